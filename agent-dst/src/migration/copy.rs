//! The copy that takes the guest's content: taken in hand when it is made or found, and noted for a later agent.
//!
//! Owns the join of copy, coverage and notes. Invariant: what the notes say was received is in the copy whose incarnations
//! they name; a copy that begins with nothing is forgotten in them before its new incarnation is named.

use std::sync::Arc;

use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::handover::{DestinationEvent, ProcessRecord};
use vmferry_proto::ids::Incarnation;
use vmferry_proto::spec::GuestSpec;

use super::jobs::{Guest, Kept};
use super::{Copied, Migration};
use crate::coverage::Coverage;
use crate::durable::{CopyFiles, Folder};
use crate::host::RunFolder;
use crate::sink::Sink;

impl Migration {
    /// The folder of this guest's logs, sockets and notes.
    pub(super) fn folder(&self) -> Folder {
        let RunFolder { storage, path } = &self.host.run;
        Folder {
            storage: storage.clone(),
            path: path.join("guests").join(self.config.name.as_str()),
        }
    }

    pub(super) async fn on_copy_made(
        &mut self,
        guest: Guest,
        made: Result<Option<Box<Kept>>, WireError>,
    ) {
        let made = match made {
            Ok(kept) => self.keep_copy(guest, kept),
            Err(error) => {
                if let Some(copy) = &mut self.copy {
                    // What is left of it is discarded in a moment.
                    copy.guest = guest;
                }
                Err(error)
            }
        };
        match made {
            Ok(process) => self.feed(DestinationEvent::CopyMade { process }).await,
            Err(reason) => self.feed(DestinationEvent::MakeCopyFailed { reason }).await,
        }
    }

    /// Takes a fresh or renewed copy in hand; returns its process.
    fn keep_copy(
        &mut self,
        guest: Guest,
        kept: Option<Box<Kept>>,
    ) -> Result<ProcessRecord, WireError> {
        let internal = |what: &str| WireError::new(ErrorCode::Internal, what);
        let guest = guest.ok_or_else(|| internal("no copy was made"))?;
        let spec = self
            .spec
            .clone()
            .ok_or_else(|| internal("nothing was offered"))?;
        let incarnations = guest.incarnations();
        if incarnations.len() != spec.regions.len() {
            return Err(internal(
                "the driver has another number of regions than the guest",
            ));
        }
        let coverage = match &self.copy {
            Some(before) => before.coverage.clone(),
            None => Arc::new(self.coverage(&spec, &incarnations, kept)),
        };
        coverage.renew(&incarnations);
        let process = guest.process().into();
        self.note_copy(&process, &incarnations);
        let sink = Sink::new(spec, &*guest, coverage.clone());
        let sink =
            sink.map_err(|error| crate::error::guest_to_wire(&error, "the copy is not usable"))?;
        self.copy = Some(Copied {
            sink: Arc::new(sink),
            coverage,
            board: None,
            incarnations,
            life: guest.life(),
            life_told: false,
            guest: Some(guest),
        });
        Ok(process)
    }

    /// What was received of a copy that is new to this agent: what one before it noted, else nothing.
    fn coverage(
        &mut self,
        spec: &GuestSpec,
        incarnations: &[Incarnation],
        kept: Option<Box<Kept>>,
    ) -> Coverage {
        let migration = self.handover.record().migration;
        let begun = match kept {
            Some(kept) => {
                let Kept { files, resume } = *kept;
                self.resume = self.resume.take().or(resume);
                Ok(files)
            }
            None => CopyFiles::begin(&self.folder(), migration, spec),
        };
        match begun {
            Ok(files) => {
                let known = match files.record.incarnations.as_slice() {
                    [] => incarnations,
                    known => known,
                };
                let coverage = Coverage::kept(spec, known, files.applied.clone());
                self.files = Some(files);
                coverage
            }
            Err(error) => {
                self.copy_not_noted(&error);
                Coverage::new(spec, incarnations)
            }
        }
    }

    /// Writes down which copy the notes are of, behind their own change: what a new copy has not got is not noted any more.
    fn note_copy(&mut self, process: &ProcessRecord, incarnations: &[Incarnation]) {
        let folder = self.folder();
        let Some(files) = &mut self.files else {
            return;
        };
        let written = files.put_in_force(&folder, process, incarnations);
        self.noted = written.is_ok();
        if let Err(error) = written {
            self.copy_not_noted(&error);
        }
    }

    fn copy_not_noted(&self, error: &std::io::Error) {
        tracing::warn!(guest = %self.config.name, %error, "should this agent be killed, the copy begins again");
    }

    /// Sees to it that the copy is noted before an attempt is opened: by the notes a later agent finds the loaded guest that it has to
    /// start (`[HAND-7]`).
    ///
    /// # Errors
    /// They cannot be written, now as before.
    pub(super) fn note_for_start(&mut self) -> Result<(), WireError> {
        if self.noted {
            return Ok(());
        }
        let record = self.handover.record();
        let (migration, process) = (record.migration, record.process.clone());
        let (Some(process), Some(copy), Some(spec)) = (process, &self.copy, &self.spec) else {
            return Ok(());
        };
        let incarnations = copy.incarnations.clone();
        if self.files.is_none() {
            let begun = CopyFiles::begin(&self.folder(), migration, spec);
            self.files = Some(begun.map_err(|error| no_notes(&error.to_string()))?);
        }
        self.note_copy(&process, &incarnations);
        self.noted
            .then_some(())
            .ok_or_else(|| no_notes("see the log there"))
    }
}

fn no_notes(why: &str) -> WireError {
    let detail = format!(
        "the destination cannot write down how a later agent would start the guest: {why}; make room there and migrate again"
    );
    WireError::new(ErrorCode::Journal, detail)
}
