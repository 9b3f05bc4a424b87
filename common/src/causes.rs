//! An error and what caused it, as a person and the peer are told.
//!
//! Errors name only what their own layer knows and keep the rest as their source; this puts the sentence together, once, where
//! it is printed or sent.

use std::error::Error;

/// The error with all its causes, in one line; a cause that only repeats what was said is left out.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::chain;

    #[derive(Debug, thiserror::Error)]
    enum Layered {
        #[error("region d0 cannot be written")]
        Outer(#[source] Box<Self>),
        #[error("disk: {0}")]
        Repeats(#[source] std::io::Error),
    }

    #[test]
    fn causes_are_told_once_each() {
        let io = std::io::Error::other("no space left on device");
        let error = Layered::Outer(Box::new(Layered::Repeats(io)));
        assert_eq!(
            chain(&error),
            "region d0 cannot be written: disk: no space left on device"
        );
    }
}
