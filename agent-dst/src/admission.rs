//! Who is let in: what a `Hello` is checked against before any migration hears of it.
//!
//! Owns the checks that need no migration: version, guest file, sender. What depends on the journal (sessions, generations,
//! identities that own a migration) is `vmferry_proto::handover::admit`'s. Nothing of the guest is touched for a
//! `Hello` that fails here.

use vmferry_common::causes::chain;
use vmferry_common::identity::PeerName;
use vmferry_hypervisor::config::TargetConfig;
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::ids::RegisterId;
use vmferry_proto::message::{Hello, Welcome};
use vmferry_proto::session::agree;

use crate::config::{GuestFiles, Lookup};

/// The guest file for `hello`, if its sender may send this guest.
///
/// # Errors
/// The refusal to send.
pub(crate) fn check(
    hello: &Hello,
    peer: &PeerName,
    guests: &GuestFiles,
) -> Result<TargetConfig, WireError> {
    agree(hello)?;
    if hello.lanes == 0 || hello.connections == 0 || hello.connection >= hello.connections {
        return Err(WireError::new(
            ErrorCode::ProtocolViolation,
            "a session has at least one lane and one connection",
        ));
    }
    let config = look_up(hello, guests)?;
    if config.from.iter().any(|listed| peer.is(listed)) {
        return Ok(config);
    }
    let listed = if config.from.is_empty() {
        "nobody".to_owned()
    } else {
        config.from.join(", ")
    };
    Err(WireError::new(
        ErrorCode::NotAuthorized,
        format!(
            "{peer} may not send guest {}: the guest file's `from` allows {listed}; add {peer:?} there",
            hello.guest,
            peer = peer.as_str()
        ),
    ))
}

fn look_up(hello: &Hello, guests: &GuestFiles) -> Result<TargetConfig, WireError> {
    let unknown = |detail: String| WireError::new(ErrorCode::UnknownGuest, detail);
    match guests.find(&hello.guest) {
        Ok(Lookup::Found(config)) => Ok(*config),
        Ok(Lookup::Unknown { unusable }) => {
            // The paths of this host are for its own log.
            for error in &unusable {
                tracing::warn!("{}", chain(error));
            }
            let hint = if unusable.is_empty() {
                "write one"
            } else {
                "some cannot be read, see the destination's log"
            };
            Err(unknown(format!(
                "the destination has no guest file for {}: {hint}",
                hello.guest
            )))
        }
        Err(error) => {
            tracing::warn!("{}", chain(&error));
            Err(unknown(format!(
                "the destination's guest files for {} cannot be used: see its log",
                hello.guest
            )))
        }
    }
}

/// The answer to a `Hello` that was let in.
///
/// # Errors
/// The refusal, where there is no version in common.
pub(crate) fn welcome(
    hello: &Hello,
    register: RegisterId,
    agent: &str,
) -> Result<Welcome, WireError> {
    let agreed = agree(hello)?;
    Ok(Welcome {
        version: agreed.version,
        features: agreed.features,
        register,
        session: hello.session,
        agent: agent.to_owned(),
    })
}
