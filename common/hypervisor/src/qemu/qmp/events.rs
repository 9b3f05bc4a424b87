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
    pub resets: Resets,
    /// The guest was shut down.
    pub shutdown: u64,
    /// Reason of the last shutdown.
    pub shutdown_reason: Option<String>,
    /// Resets before the CPUs were last stopped.
    resets_at_stop: Resets,
}

/// How often the machine was reset.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resets {
    /// By the guest: it rebooted.
    pub by_guest: u64,
    /// By somebody else.
    pub by_others: u64,
}

/// What happened to a guest that was to stay paused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Touch {
    /// It was shut down, for this reason.
    ShutDown(String),
    /// Somebody else reset it.
    Reset,
    /// Somebody else resumed it.
    Resumed,
    /// It had asked for a reset just before its CPUs were stopped, and was reset then.
    Rebooted,
}

impl EventTally {
    pub(super) fn count(&mut self, event: &Event) {
        match event.name.as_str() {
            "STOP" => {
                self.stop += 1;
                self.resets_at_stop = self.resets;
            }
            "RESUME" => self.resume += 1,
            "RESET" if event.data["guest"] == true => self.resets.by_guest += 1,
            "RESET" => self.resets.by_others += 1,
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

    /// `earlier`, with the resets up to where the CPUs were stopped since: a reset of a running guest is like any write of it.
    #[must_use]
    pub fn at_stop_since(&self, earlier: &Self) -> Self {
        let mut at_stop = earlier.clone();
        if self.stop > earlier.stop {
            at_stop.resets = self.resets_at_stop;
        }
        at_stop
    }

    /// What happened between `earlier` and now that nobody does who leaves a paused guest alone.
    #[must_use]
    pub fn touched_since(&self, earlier: &Self) -> Option<Touch> {
        if self.shutdown > earlier.shutdown {
            let reason = self.shutdown_reason.clone().unwrap_or_default();
            Some(Touch::ShutDown(reason))
        } else if self.resume > earlier.resume {
            Some(Touch::Resumed)
        } else if self.resets.by_others > earlier.resets.by_others {
            Some(Touch::Reset)
        } else if self.resets.by_guest > earlier.resets.by_guest {
            Some(Touch::Rebooted)
        } else {
            None
        }
    }
}
