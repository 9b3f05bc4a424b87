//! How errors of this host are told to the peer and to the log.
//!
//! Owns the mapping from local errors to wire codes. Local enums never go on the wire; what does is a code and one
//! sentence that also makes sense at the other end.

use vmferry_common::causes::chain;
use vmferry_hypervisor::{GuestError, GuestLife};
use vmferry_proto::error::{ErrorCode, WireError};

/// A driver's error as the peer is told; `doing` says what was being done.
pub(crate) fn guest_to_wire(error: &GuestError, doing: &str) -> WireError {
    WireError::new(guest_code(error), format!("{doing}: {}", chain(error)))
}

/// The end of the hypervisor that holds the copy, as the peer is told; `None` while it lives.
pub(crate) fn life_to_wire(life: &GuestLife) -> Option<WireError> {
    let detail = match life {
        GuestLife::Alive => return None,
        GuestLife::ShutDown(how) => {
            format!("the hypervisor that held the copy was shut down: {how}")
        }
        GuestLife::Gone(how) => format!("the hypervisor that held the copy is gone: {how}"),
    };
    Some(WireError::new(ErrorCode::Hypervisor, detail))
}

/// The code of a driver's error, seen from the destination.
const fn guest_code(error: &GuestError) -> ErrorCode {
    match error {
        GuestError::Touched(_) => ErrorCode::GuestChanged,
        GuestError::Incompatible(_) => ErrorCode::Incompatible,
        GuestError::NoSpace(_) => ErrorCode::NoSpace,
        GuestError::Gone(_)
        | GuestError::ShutDown(_)
        | GuestError::Rebooted
        | GuestError::Refused { .. }
        | GuestError::TimedOut { .. }
        | GuestError::Io { .. }
        | GuestError::Tracking(_)
        | GuestError::Config(_) => ErrorCode::Hypervisor,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_once_each() {
        let io = std::io::Error::other("no space left on device");
        let error = GuestError::Io {
            what: "writing d0".into(),
            source: io,
        };
        let wire = guest_to_wire(&error, "region d0 cannot be written");
        assert_eq!(
            wire.detail,
            "region d0 cannot be written: writing d0: no space left on device"
        );
        assert_eq!(wire.code, ErrorCode::Hypervisor);
    }

    #[test]
    fn a_living_hypervisor_is_no_error() {
        assert_eq!(life_to_wire(&GuestLife::Alive), None);
        assert!(life_to_wire(&GuestLife::Gone("signal 9".into())).is_some());
    }
}
