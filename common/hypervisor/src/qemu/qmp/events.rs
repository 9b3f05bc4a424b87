//! Events of QEMU, and the count of those that tell whether anybody touched the guest.

use serde_json::Value;

/// Events that a slow receiver may fall behind before it loses some.
pub(super) const BACKLOG: usize = 256;

/// Something that QEMU said by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, such as `SHUTDOWN`.
    pub name: String,
    /// Its data; `Null` where it has none.
    pub data: Value,
}

/// How often each event that matters for ownership was seen on a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventTally {
    /// The CPUs were stopped.
    pub stop: u64,
    /// The CPUs were resumed.
    pub resume: u64,
    /// The machine was reset.
    pub reset: u64,
    /// The guest was shut down.
    pub shutdown: u64,
    /// Reason of the last shutdown.
    pub shutdown_reason: Option<String>,
}

impl EventTally {
    pub(super) fn count(&mut self, event: &Event) {
        match event.name.as_str() {
            "STOP" => self.stop += 1,
            "RESUME" => self.resume += 1,
            "RESET" => self.reset += 1,
            "SHUTDOWN" => {
                self.shutdown += 1;
                self.shutdown_reason = Some(
                    event.data["reason"]
                        .as_str()
                        .unwrap_or("no reason given")
                        .to_owned(),
                );
            }
            _ => {}
        }
    }

    /// What happened between `earlier` and now that only somebody else can have done to a paused guest.
    #[must_use]
    pub fn touched_since(&self, earlier: &Self) -> Option<String> {
        if self.shutdown > earlier.shutdown {
            let reason = self.shutdown_reason.as_deref().unwrap_or("no reason given");
            Some(format!("it was shut down ({reason})"))
        } else if self.reset > earlier.reset {
            Some("it was reset".to_owned())
        } else if self.resume > earlier.resume {
            Some("it was resumed".to_owned())
        } else {
            None
        }
    }
}
