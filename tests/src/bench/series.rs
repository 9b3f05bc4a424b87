//! Series of measurements: median and spread, and the line that says whether a target is met.
//!
//! Owns numbers and their printing only. Units are the caller's: a series says what they are in its name.

use std::fmt;

/// Measurements of one thing.
#[derive(Debug, Clone)]
pub struct Series {
    name: String,
    unit: &'static str,
    values: Vec<f64>,
}

/// What a number is to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// At least this.
    AtLeast(f64),
    /// At most this.
    AtMost(f64),
}

impl Target {
    /// Whether `value` meets it.
    #[must_use]
    pub fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(least) => value >= least,
            Self::AtMost(most) => value <= most,
        }
    }

    /// How far `value` is from the target, as a share of the target.
    #[must_use]
    pub fn shortfall(self, value: f64) -> f64 {
        match self {
            Self::AtLeast(least) => (least - value) / least,
            Self::AtMost(most) => (value - most) / most,
        }
    }

    /// Prints `what` with its value, the target and whether it is met.
    pub fn judge(self, what: &str, value: f64, unit: &str) {
        let verdict = if self.is_met(value) {
            "met".to_owned()
        } else if value.is_nan() {
            "MISSED, nothing was measured".to_owned()
        } else {
            format!("MISSED by {:.0} %", self.shortfall(value) * 100.0)
        };
        println!("  {what}: {value:.2} {unit} (target {self} {unit}): {verdict}");
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(least) => write!(f, "≥ {least:.2}"),
            Self::AtMost(most) => write!(f, "≤ {most:.2}"),
        }
    }
}

impl Series {
    /// Nothing measured yet.
    #[must_use]
    pub fn new(name: &str, unit: &'static str) -> Self {
        Self {
            name: name.to_owned(),
            unit,
            values: Vec::new(),
        }
    }

    /// Adds a measurement.
    pub fn push(&mut self, value: f64) {
        self.values.push(value);
    }

    /// The middle one; the mean of the two middle ones of an even number; NaN of none.
    #[must_use]
    pub fn median(&self) -> f64 {
        let sorted = self.sorted();
        let half = sorted.len() / 2;
        match sorted.len() {
            0 => f64::NAN,
            len if len % 2 == 1 => sorted[half],
            _ => f64::midpoint(sorted[half - 1], sorted[half]),
        }
    }

    /// The largest; NaN of none.
    #[must_use]
    pub fn max(&self) -> f64 {
        self.sorted().last().copied().unwrap_or(f64::NAN)
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }
}

/// A row of a table: name, median, least and most.
impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sorted = self.sorted();
        let (Some(least), Some(most)) = (sorted.first(), sorted.last()) else {
            return write!(f, "  {:<34} nothing measured", self.name);
        };
        let Self { name, unit, .. } = self;
        let median = self.median();
        let count = sorted.len();
        write!(
            f,
            "  {name:<34} {median:>9.2} {unit:<6} ({least:.2} to {most:.2}, {count} runs)"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(values: &[f64]) -> Series {
        let mut series = Series::new("x", "s");
        values.iter().for_each(|value| series.push(*value));
        series
    }

    #[test]
    fn the_median_is_the_middle() {
        assert!((series(&[3.0, 1.0, 2.0]).median() - 2.0).abs() < 1e-9);
        assert!((series(&[4.0, 1.0, 2.0, 3.0]).median() - 2.5).abs() < 1e-9);
        assert!(series(&[]).median().is_nan());
    }

    #[test]
    fn a_target_of_nothing_measured_is_not_met() {
        assert!(!Target::AtLeast(0.6).is_met(f64::NAN));
        assert!(!Target::AtMost(10.0).is_met(f64::NAN));
        assert!(Target::AtMost(10.0).is_met(9.9));
    }

    #[test]
    fn a_miss_is_told_as_a_share_of_the_target() {
        assert!((Target::AtMost(2.0).shortfall(3.0) - 0.5).abs() < 1e-9);
        assert!((Target::AtLeast(0.8).shortfall(0.6) - 0.25).abs() < 1e-9);
    }
}
