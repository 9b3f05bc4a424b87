//! Limits that may be changed while a migration runs: `vmferry-src set NAME KEY=VALUE…`.
//!
//! Owns the keys, what their values may be, and the one door from text to them, which the command line and the control
//! socket share: what is refused is refused by both in the same words. What a changed limit does is the migration's.

use std::str::FromStr;
use std::time::Duration;

use serde_json::{Map, Value};
use vmferry_common::units::{Rate, UnitError, parse_duration, parse_rate};

use crate::cli::LONGEST_DOWNTIME;

/// Keys, as on the command line of `migrate` without the dashes.
const MAX_BANDWIDTH: &str = "max-bandwidth";
const MAX_DOWNTIME: &str = "max-downtime";
/// Value of `max-bandwidth` that takes the limit away.
const UNLIMITED: &str = "none";

/// One changed limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    /// Most that is sent; `None` is without bound.
    MaxBandwidth(Option<Rate>),
    /// Longest time that the guest may stand still.
    MaxDowntime(Duration),
}

/// A setting that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// No `=`.
    #[error("{0:?} is not KEY=VALUE: write it as in max-bandwidth=500Mbit or max-downtime=100ms")]
    NoValue(String),
    /// There is no such key.
    #[error("{0:?} cannot be changed while a migration runs: max-bandwidth and max-downtime can")]
    UnknownKey(String),
    /// The value is no rate or duration.
    #[error("{key}: {source}")]
    Value {
        /// Which.
        key: &'static str,
        /// Why.
        source: UnitError,
    },
    /// The downtime is zero or beyond reason.
    #[error("max-downtime must be more than 0 and at most 1h")]
    Downtime,
    /// Over the control socket: values are text, as on the command line.
    #[error("{0}: the value must be text with a unit, such as \"500Mbit\" or \"100ms\"")]
    NotText(&'static str),
    /// Nothing is to be changed.
    #[error("nothing to set: give max-bandwidth, max-downtime or both")]
    Nothing,
}

impl FromStr for Setting {
    type Err = SettingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some((key, value)) = text.split_once('=') else {
            return Err(SettingError::NoValue(shown(text)));
        };
        Self::of(key, value)
    }
}

impl Setting {
    fn of(key: &str, value: &str) -> Result<Self, SettingError> {
        match key {
            MAX_BANDWIDTH if value == UNLIMITED => Ok(Self::MaxBandwidth(None)),
            MAX_BANDWIDTH => {
                let rate = parse_rate(value).map_err(|source| SettingError::Value {
                    key: MAX_BANDWIDTH,
                    source,
                })?;
                Ok(Self::MaxBandwidth(Some(rate)))
            }
            MAX_DOWNTIME => downtime(value),
            other => Err(SettingError::UnknownKey(shown(other))),
        }
    }

    /// Reads the arguments of the control socket's `set`: an object of keys and values.
    ///
    /// # Errors
    /// The first that cannot be used; then none is.
    pub fn from_arguments(arguments: &Value) -> Result<Vec<Self>, SettingError> {
        let none = Map::new();
        let fields = arguments.as_object().unwrap_or(&none);
        if fields.is_empty() {
            return Err(SettingError::Nothing);
        }
        let read = |(key, value): (&String, &Value)| match value.as_str() {
            Some(text) => Self::of(key, text),
            None if key == MAX_BANDWIDTH => Err(SettingError::NotText(MAX_BANDWIDTH)),
            None if key == MAX_DOWNTIME => Err(SettingError::NotText(MAX_DOWNTIME)),
            None => Err(SettingError::UnknownKey(shown(key))),
        };
        fields.iter().map(read).collect()
    }

    /// As [`from_arguments`](Self::from_arguments) reads it, exactly.
    fn argument(self) -> (&'static str, String) {
        match self {
            Self::MaxBandwidth(None) => (MAX_BANDWIDTH, UNLIMITED.to_owned()),
            Self::MaxBandwidth(Some(rate)) => (MAX_BANDWIDTH, format!("{}B/s", rate.0)),
            Self::MaxDowntime(time) => (MAX_DOWNTIME, format!("{}us", time.as_micros())),
        }
    }

    /// The arguments of the control socket's `set` for these; of two with one key the later counts.
    #[must_use]
    pub fn to_arguments(settings: &[Self]) -> Value {
        let fields = settings.iter().map(|setting| {
            let (key, value) = setting.argument();
            (key.to_owned(), Value::String(value))
        });
        Value::Object(fields.collect())
    }
}

fn downtime(value: &str) -> Result<Setting, SettingError> {
    let time = parse_duration(value).map_err(|source| SettingError::Value {
        key: MAX_DOWNTIME,
        source,
    })?;
    if time.is_zero() || time > LONGEST_DOWNTIME {
        return Err(SettingError::Downtime);
    }
    Ok(Setting::MaxDowntime(time))
}

fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;
    use vmferry_common::units::Rate;

    use super::Setting;

    #[test]
    fn what_is_typed_arrives_the_same_over_the_control_socket() {
        let typed = ["max-bandwidth=500Mbit", "max-downtime=1500us"];
        let settings: Vec<Setting> = typed.iter().map(|text| text.parse().unwrap()).collect();
        let expected = [
            Setting::MaxBandwidth(Some(Rate(62_500_000))),
            Setting::MaxDowntime(Duration::from_micros(1500)),
        ];
        assert_eq!(settings, expected);
        let arrived = Setting::from_arguments(&Setting::to_arguments(&settings)).unwrap();
        assert_eq!(arrived, expected);
        let none: Setting = "max-bandwidth=none".parse().unwrap();
        let arrived = Setting::from_arguments(&Setting::to_arguments(&[none]));
        assert_eq!(arrived.unwrap(), [Setting::MaxBandwidth(None)]);
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_the_next_step() {
        for (text, part) in [
            ("max-bandwidth", "write it as in max-bandwidth=500Mbit"),
            ("max-bandwidth=500", "1Gbit"),
            ("max-bandwidth=0Mbit", "1Gbit"),
            ("max-downtime=0ms", "more than 0"),
            ("max-downtime=2h", "at most 1h"),
            ("max-downtime=fast", "max-downtime"),
            ("timeout=1h", "max-bandwidth and max-downtime can"),
        ] {
            let error = text.parse::<Setting>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        for arguments in [
            json!({}),
            json!(null),
            json!({"max-downtime": 100}),
            json!({"lanes": 3}),
        ] {
            assert!(Setting::from_arguments(&arguments).is_err(), "{arguments}");
        }
    }
}
