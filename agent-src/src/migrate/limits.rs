//! Limits that change while the migration runs.
//!
//! Owns what a changed limit does: a bandwidth holds for the next bytes, a downtime for the next decision. A cutover that is
//! under way keeps the time-outs with which it began.

use serde_json::{Value, json};
use vmferry_common::local::CommandError;
use vmferry_common::units::Span;

use super::Migration;
use crate::settings::Setting;

impl Migration {
    /// Changes limits, all or none; returns them as they are then.
    ///
    /// # Errors
    /// A downtime that `--pause-timeout` does not allow.
    pub(super) fn set_limits(&mut self, settings: &[Setting]) -> Result<Value, CommandError> {
        for setting in settings {
            self.check_limit(*setting)?;
        }
        for setting in settings {
            match *setting {
                Setting::MaxBandwidth(limit) => self.pacer.set_limit(limit),
                Setting::MaxDowntime(time) => self.options.limits.max_downtime = time,
            }
        }
        let limits = self.limits();
        tracing::info!(%limits, "limits changed");
        Ok(limits)
    }

    fn check_limit(&self, setting: Setting) -> Result<(), CommandError> {
        match (setting, self.options.limits.pause_timeout) {
            (Setting::MaxDowntime(time), Some(pause)) if time > pause => {
                Err(CommandError::generic(format!(
                    "max-downtime {} is longer than the --pause-timeout {} that this migration was started with: \
                     every longer cutover that is allowed would be rolled back",
                    Span(time),
                    Span(pause)
                )))
            }
            (Setting::MaxDowntime(_) | Setting::MaxBandwidth(_), _) => Ok(()),
        }
    }

    /// The limits as they are, for `status` and as the answer to `set`.
    pub(super) fn limits(&self) -> Value {
        let limit = self.pacer.limit();
        let (bandwidth, downtime) = (limit.map(|rate| rate.0), self.options.limits.max_downtime);
        let shown = limit.map_or_else(|| "none".to_owned(), |rate| rate.to_string());
        json!({
            "max_bandwidth": bandwidth,
            "max_downtime_ms": downtime.as_secs_f64() * 1e3,
            "text": format!("max-bandwidth {shown}, max-downtime {}", Span(downtime)),
        })
    }
}
