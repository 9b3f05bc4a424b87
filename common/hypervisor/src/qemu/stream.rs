//! The migration stream that carries the device state into the destination's QEMU.
//!
//! `xen-save-devices-state` writes header and device sections. A destination wants a configuration section in front and a
//! description behind, and it would run by itself if the section `globalstate` said that the guest ran. This file
//! makes the one out of the other. Invariant: what leaves here says `paused`, or there is an error.
//!
//! ```text
//! "QEVM" be32 3 | 0x07 be32 len machine | 0x04 … globalstate … | other sections | 0x00 | 0x06 be32 2 "{}"
//! ```

/// `QEVM` and version 3.
const HEADER: [u8; 8] = [b'Q', b'E', b'V', b'M', 0, 0, 0, 3];
/// A configuration section: length and machine type.
const CONFIGURATION: u8 = 0x07;
/// A description section: length and JSON.
const DESCRIPTION: u8 = 0x06;
/// The first byte of a section that comes at once.
const SECTION_FULL: u8 = 0x04;
/// The end of all sections.
const END: u8 = 0x00;
/// Name of the section of the run state, with the length in front.
const GLOBAL_STATE: &[u8] = b"\x0bglobalstate";
/// Size in bytes of the text of the run state.
const RUN_STATE_LEN: usize = 100;
/// What it is made to say.
const PAUSED: &[u8] = b"paused";
/// The length of that text with its end, as the field says it.
const PAUSED_LEN: [u8; 4] = [0, 0, 0, 7];

/// A saved device state that is not as QEMU writes it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the saved device state is not as QEMU writes it: {0}")]
pub(super) struct StreamError(String);

/// Checks what the source saved, before it is sent.
///
/// # Errors
/// Where it is not whole or would not be accepted by [`incoming`].
pub(super) fn check_saved(saved: &[u8]) -> Result<(), StreamError> {
    checked_run_state(saved).map(drop)
}

/// Where the run state's field is in a state that is whole.
fn checked_run_state(saved: &[u8]) -> Result<usize, StreamError> {
    if !saved.starts_with(&HEADER) {
        return Err(broken("it does not begin with QEVM version 3"));
    }
    if saved.last() != Some(&END) {
        return Err(broken("it does not end with the end of all sections"));
    }
    run_state_at(saved)
}

/// The stream for `migrate-incoming`: loads `saved` into a `machine` and leaves it paused.
///
/// # Errors
/// As [`check_saved`].
pub(super) fn incoming(saved: &[u8], machine: &str) -> Result<Vec<u8>, StreamError> {
    let at = checked_run_state(saved)?;
    let mut out = Vec::with_capacity(saved.len() + machine.len() + 64);
    out.extend(HEADER);
    out.push(CONFIGURATION);
    out.extend(length(machine.len())?);
    out.extend(machine.as_bytes());
    let inserted = out.len() - HEADER.len();
    out.extend(&saved[HEADER.len()..]);
    write_paused(&mut out, at + inserted);
    out.push(DESCRIPTION);
    out.extend(length(2)?);
    out.extend(b"{}");
    Ok(out)
}

/// The state's length with its end, then the text, filled up with zeroes.
fn write_paused(out: &mut [u8], at: usize) {
    let field = &mut out[at..at + 4 + RUN_STATE_LEN];
    field.fill(0);
    field[..4].copy_from_slice(&PAUSED_LEN);
    field[4..4 + PAUSED.len()].copy_from_slice(PAUSED);
}

fn length(len: usize) -> Result<[u8; 4], StreamError> {
    u32::try_from(len)
        .map(u32::to_be_bytes)
        .map_err(|_| broken("a name of more than 4 GiB"))
}

/// Where the run state's field (be32 length and 100 bytes) begins: in exactly one place all of
/// section byte, name, instance 0, version 1 and a text of that length fit together.
fn run_state_at(saved: &[u8]) -> Result<usize, StreamError> {
    let mut found = None;
    for at in memchr::memmem::find_iter(saved, GLOBAL_STATE) {
        if !is_section(saved, at) {
            continue;
        }
        let field = at + GLOBAL_STATE.len() + 8;
        if !is_run_state(&saved[field..]) {
            continue;
        }
        if found.replace(field).is_some() {
            return Err(broken("it has the section globalstate twice"));
        }
    }
    found.ok_or_else(|| broken("it has no section globalstate"))
}

/// Whether the name at `name` stands in a full section (0x04, be32 id) with instance 0 and version 1.
fn is_section(saved: &[u8], name: usize) -> bool {
    let begins = name >= 5 && saved[name - 5] == SECTION_FULL;
    let numbers = name + GLOBAL_STATE.len();
    let wanted = [0, 0, 0, 0, 0, 0, 0, 1];
    begins && saved.get(numbers..numbers + 8) == Some(&wanted[..])
}

/// Whether a length, a text of that length with its end, and room for 100 bytes stand here.
fn is_run_state(field: &[u8]) -> bool {
    let Some((len, text)) = field.split_first_chunk::<4>() else {
        return false;
    };
    let len = u32::from_be_bytes(*len) as usize;
    let Some(text) = text.get(..RUN_STATE_LEN) else {
        return false;
    };
    let Some(end) = text.iter().position(|byte| *byte == 0) else {
        return false;
    };
    let is_word = text[..end]
        .iter()
        .all(|byte| byte.is_ascii_lowercase() || *byte == b'-');
    end > 0 && is_word && len == end + 1
}

fn broken(what: &str) -> StreamError {
    StreamError(what.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{HEADER, RUN_STATE_LEN, check_saved, incoming};

    fn global_state(state: &str) -> Vec<u8> {
        let mut out = vec![0x04, 0, 0, 0, 2];
        out.extend(b"\x0bglobalstate");
        out.extend([0, 0, 0, 0, 0, 0, 0, 1]);
        out.extend((u32::try_from(state.len()).unwrap() + 1).to_be_bytes());
        let mut text = state.as_bytes().to_vec();
        text.resize(RUN_STATE_LEN, 0);
        out.extend(text);
        out.extend([0x7e, 0, 0, 0, 2]);
        out
    }

    fn saved(sections: &[Vec<u8>]) -> Vec<u8> {
        let mut out = HEADER.to_vec();
        sections.iter().for_each(|section| out.extend(section));
        out.push(0);
        out
    }

    #[test]
    fn the_stream_is_as_a_destination_wants_it_and_says_paused() {
        let other = b"\x04\0\0\0\x03\x05timer\0\0\0\0\0\0\0\x02abc".to_vec();
        let stream = incoming(
            &saved(&[other.clone(), global_state("running")]),
            "pc-q35-10.0",
        )
        .unwrap();
        let mut wanted = b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-10.0".to_vec();
        wanted.extend(other);
        wanted.extend(global_state("paused"));
        wanted.extend(b"\0\x06\0\0\0\x02{}");
        assert_eq!(stream, wanted);
    }

    #[test]
    fn a_state_without_or_with_two_run_states_is_refused() {
        assert!(check_saved(&saved(&[])).is_err());
        let twice = saved(&[global_state("running"), global_state("paused")]);
        assert!(
            check_saved(&twice)
                .unwrap_err()
                .to_string()
                .contains("twice")
        );
    }

    #[test]
    fn the_name_alone_inside_other_data_is_not_taken_for_the_section() {
        let decoy = b"\x04\0\0\0\x03\x05timer\0\0\0\0\0\0\0\x02 \x0bglobalstate ".to_vec();
        check_saved(&saved(&[decoy, global_state("running")])).unwrap();
    }

    #[test]
    fn a_cut_or_foreign_state_is_refused() {
        let whole = saved(&[global_state("running")]);
        for end in 0..whole.len() - 1 {
            let cut = &whole[..end];
            if cut.last() == Some(&0) && end > 8 + 24 + 4 + RUN_STATE_LEN {
                continue;
            }
            assert!(check_saved(cut).is_err(), "{end} bytes were accepted");
        }
        assert!(check_saved(b"QEVM\0\0\0\x02\0").is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), at in 0usize..400) {
            let mut whole = HEADER.to_vec();
            whole.extend(&bytes);
            let mut mixed = whole.clone();
            let section = global_state("running");
            let at = at.min(mixed.len());
            mixed.splice(at..at, section);
            for candidate in [&bytes, &whole, &mixed] {
                if let Ok(stream) = incoming(candidate, "m") {
                    prop_assert!(stream.windows(7).any(|part| part == b"paused\0"));
                }
            }
        }
    }
}
