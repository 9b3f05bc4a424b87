//! Sizes, rates and durations as people write and read them.
//!
//! Owns parsing for the command line and how figures are shown. Sizes take `MiB`, `GiB` (and decimal `MB`,
//! `GB`); rates take bits (`1Gbit/s`, `1Gbit`) or bytes (`100MiB/s`); durations `300ms`, `1h 30m`. A bare
//! number is refused wherever two units would make sense.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

/// A number of bytes.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct Size(pub u64);

/// Bytes per second.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct Rate(pub u64);

/// A duration, written and shown with its unit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Span(pub Duration);

/// Text that is not a size, rate or duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {what}: write it as in {example}")]
pub struct UnitError {
    text: String,
    what: &'static str,
    example: &'static str,
}

fn refuse<T>(text: &str, what: &'static str, example: &'static str) -> Result<T, UnitError> {
    Err(UnitError {
        text: text.chars().take(80).collect(),
        what,
        example,
    })
}

impl FromStr for Size {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim().parse::<ByteSize>() {
            Ok(size) if text.trim().bytes().any(|b| b.is_ascii_alphabetic()) => Ok(Self(size.0)),
            _ => refuse(text, "a size", "512MiB or 2GiB"),
        }
    }
}

impl FromStr for Rate {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let trimmed = text.trim();
        let lower = trimmed.to_ascii_lowercase();
        let parsed = match lower.strip_suffix("/s") {
            Some(amount) => bits(amount).or_else(|| bytes_of(amount)),
            None => match lower.strip_suffix("bps") {
                Some(amount) => bits(&format!("{amount}bit")),
                None => bits(&lower),
            },
        };
        match parsed {
            Some(rate) if rate > 0 => Ok(Self(rate)),
            _ => refuse(text, "a rate above zero", "1Gbit/s, 1Gbit or 100MiB/s"),
        }
    }
}

fn bytes_of(amount: &str) -> Option<u64> {
    amount.parse::<Size>().ok().map(|size| size.0)
}

/// `10gbit` as bytes per second; prefixes of bits are decimal, as everywhere in networking.
fn bits(amount: &str) -> Option<u64> {
    let amount = amount
        .strip_suffix("bits")
        .or_else(|| amount.strip_suffix("bit"))?;
    let digits = amount.trim_end_matches(|c: char| !c.is_ascii_digit());
    let scale: f64 = match amount.get(digits.len()..)?.trim() {
        "" => 1.0,
        "k" => 1e3,
        "m" => 1e6,
        "g" => 1e9,
        "t" => 1e12,
        _ => return None,
    };
    let number: f64 = digits.trim().parse().ok()?;
    whole(number * scale / 8.0)
}

/// A non-negative number that fits, as an integer.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the range is checked: 0 to 2^63, where the fraction is meant to go"
)]
fn whole(number: f64) -> Option<u64> {
    (number.is_finite() && (0.0..9.2e18).contains(&number)).then_some(number as u64)
}

impl FromStr for Span {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match humantime::parse_duration(text.trim()) {
            Ok(span) => Ok(Self(span)),
            Err(_) => refuse(text, "a duration", "300ms, 10s or 1h 30m"),
        }
    }
}

/// clap value parser of sizes.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    text.parse().map(|Size(bytes)| bytes)
}

/// clap value parser of rates.
pub fn parse_rate(text: &str) -> Result<Rate, UnitError> {
    text.parse()
}

/// clap value parser of durations.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    text.parse().map(|Span(span)| span)
}

/// `1.5 GiB`.
#[must_use]
pub fn show_bytes(bytes: u64) -> String {
    Size(bytes).to_string()
}

/// `12.3 ms`.
#[must_use]
pub fn show_duration(duration: Duration) -> String {
    Span(duration).to_string()
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
        let text = if self.0 < 1024 {
            format!("{} B", self.0)
        } else {
            scaled(self.0, 1024.0, &UNITS)
        };
        f.pad(&text)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"];
        f.pad(&scaled(self.0.saturating_mul(8), 1000.0, &UNITS))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs_f64();
        let text = if seconds == 0.0 {
            "0 ms".to_owned()
        } else if seconds < 0.001 {
            format!("{:.0} µs", seconds * 1e6)
        } else if seconds < 1.0 {
            format!("{} ms", digits(seconds * 1e3))
        } else if seconds < 60.0 {
            format!("{} s", digits(seconds))
        } else if seconds < 3600.0 {
            let whole = self.0.as_secs();
            format!("{} min {:02} s", whole / 60, whole % 60)
        } else {
            let whole = self.0.as_secs();
            format!("{} h {:02} min", whole / 3600, whole % 3600 / 60)
        };
        f.pad(&text)
    }
}

#[allow(
    clippy::cast_precision_loss,
    reason = "three digits are shown; a u64 keeps fifteen"
)]
fn scaled(amount: u64, base: f64, units: &[&str]) -> String {
    let mut value = amount as f64;
    let mut left = units.iter();
    let mut unit = left.next();
    // 999.5 would be shown as 1000: go on to the next unit there.
    while value >= base - base / 2000.0 {
        match left.next() {
            Some(next) => {
                value /= base;
                unit = Some(next);
            }
            None => break,
        }
    }
    format!("{} {}", digits(value), unit.copied().unwrap_or_default())
}

/// Three significant digits without needless zeros.
fn digits(value: f64) -> String {
    let text = if value < 9.995 {
        format!("{value:.2}")
    } else if value < 99.95 {
        format!("{value:.1}")
    } else {
        return format!("{value:.0}");
    };
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

impl Rate {
    /// The rate of `bytes` in `time`; zero where no time passed.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "a rate is an estimate")]
    pub fn of(bytes: u64, time: Duration) -> Self {
        if time.is_zero() {
            return Self(0);
        }
        Self(whole(bytes as f64 / time.as_secs_f64()).unwrap_or(u64::MAX))
    }

    /// How long `bytes` take at this rate; `Duration::MAX` at rate zero.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "a prediction is an estimate")]
    pub fn time_for(self, bytes: u64) -> Duration {
        if self.0 == 0 {
            return if bytes == 0 {
                Duration::ZERO
            } else {
                Duration::MAX
            };
        }
        Duration::try_from_secs_f64(bytes as f64 / self.0 as f64).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::{Rate, Size, Span};
    use std::time::Duration;

    #[test]
    fn rates_take_bits_and_bytes() {
        for (text, bytes) in [
            ("1Gbit/s", 125_000_000),
            ("1Gbit", 125_000_000),
            ("1gbit/s", 125_000_000),
            ("2.5 Gbit/s", 312_500_000),
            ("800kbit", 100_000),
            ("100Mbps", 12_500_000),
            ("100MiB/s", 104_857_600),
            ("100MB/s", 100_000_000),
            ("8bit/s", 1),
        ] {
            assert_eq!(text.parse(), Ok(Rate(bytes)), "{text}");
        }
        for bad in [
            "", "1", "1G", "fast", "0bit", "0Gbit/s", "-1Gbit", "1Gbit/h", "100/s", "1e3bit x",
            "nanbit", "infbit", "bit", "MiB/s",
        ] {
            assert!(bad.parse::<Rate>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn sizes_and_durations_need_their_unit() {
        assert_eq!("2GiB".parse(), Ok(Size(2 << 30)));
        assert_eq!("512 MiB".parse(), Ok(Size(512 << 20)));
        assert_eq!("1MB".parse(), Ok(Size(1_000_000)));
        assert!("100".parse::<Size>().is_err());
        assert_eq!("300ms".parse(), Ok(Span(Duration::from_millis(300))));
        assert_eq!("1h 30m".parse(), Ok(Span(Duration::from_secs(5400))));
        assert!("300".parse::<Span>().is_err());
        let text = "300".parse::<Span>().unwrap_err().to_string();
        assert_eq!(
            text,
            r#""300" is not a duration: write it as in 300ms, 10s or 1h 30m"#
        );
    }

    #[test]
    fn figures_are_shown_short_and_with_their_unit() {
        assert_eq!(Size(0).to_string(), "0 B");
        assert_eq!(Size(1023).to_string(), "1023 B");
        assert_eq!(Size(1536).to_string(), "1.5 KiB");
        assert_eq!(Size((1 << 30) - 1).to_string(), "1 GiB");
        assert_eq!(Size(u64::MAX).to_string(), "16384 PiB");
        assert_eq!(Rate(125_000_000).to_string(), "1 Gbit/s");
        assert_eq!(Rate(12_345_678).to_string(), "98.8 Mbit/s");
        assert_eq!(Rate(0).to_string(), "0 bit/s");
        assert_eq!(Span(Duration::from_micros(450)).to_string(), "450 µs");
        assert_eq!(Span(Duration::from_micros(12_340)).to_string(), "12.3 ms");
        assert_eq!(Span(Duration::from_millis(2_500)).to_string(), "2.5 s");
        assert_eq!(Span(Duration::from_secs(125)).to_string(), "2 min 05 s");
        assert_eq!(Span(Duration::from_secs(3_700)).to_string(), "1 h 01 min");
        assert_eq!(format!("{:>10}|", Size(2048)), "     2 KiB|");
    }

    #[test]
    fn rate_and_time_fit_together() {
        let rate = Rate::of(1_000_000, Duration::from_millis(500));
        assert_eq!(rate, Rate(2_000_000));
        assert_eq!(rate.time_for(4_000_000), Duration::from_secs(2));
        assert_eq!(Rate(0).time_for(1), Duration::MAX);
        assert_eq!(Rate(0).time_for(0), Duration::ZERO);
        assert_eq!(Rate::of(5, Duration::ZERO), Rate(0));
    }
}
