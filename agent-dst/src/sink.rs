//! Where frames end up: the regions of one prepared guest, as the lanes see them.
//!
//! Owns the handles for writing and the coverage; the guest itself belongs to the migration. Invariant: what is written
//! lies inside its region, since every frame was checked against the spec that these handles were made from.

use std::sync::Arc;

use vmferry_hypervisor::{GuestError, RegionWriter, TargetGuest};
use vmferry_proto::geometry::{RegionLen, WindowBits, WindowIndex};
use vmferry_proto::ids::RegionId;
use vmferry_proto::spec::{GuestSpec, RegionKind};

use crate::coverage::Coverage;

/// The regions of a prepared guest.
#[derive(Debug)]
pub(crate) struct Sink {
    spec: Arc<GuestSpec>,
    writers: Vec<Arc<dyn RegionWriter>>,
    coverage: Arc<Coverage>,
}

/// One region of the sink.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) name: &'a str,
    pub(crate) kind: RegionKind,
    pub(crate) len: RegionLen,
    pub(crate) writer: &'a Arc<dyn RegionWriter>,
}

impl Sink {
    /// The regions of `guest`, which was prepared for `spec`.
    ///
    /// # Errors
    /// The driver has no handle for a region that it was prepared for.
    pub(crate) fn new(
        spec: Arc<GuestSpec>,
        guest: &dyn TargetGuest,
        coverage: Arc<Coverage>,
    ) -> Result<Self, GuestError> {
        let writers = spec.regions.iter().map(|region| {
            guest.writer(region.id).ok_or_else(|| GuestError::Refused {
                command: format!("open region {} for writing", region.name),
                answer: "the driver does not have it".to_owned(),
            })
        });
        let writers = writers.collect::<Result<_, _>>()?;
        Ok(Self {
            spec,
            writers,
            coverage,
        })
    }

    /// The guest's description.
    pub(crate) fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    /// What was received so far.
    pub(crate) fn coverage(&self) -> &Coverage {
        &self.coverage
    }

    /// The region with this id.
    pub(crate) fn target(&self, region: RegionId) -> Option<Target<'_>> {
        let index = usize::from(region.0);
        let (spec, writer) = self.spec.regions.get(index).zip(self.writers.get(index))?;
        Some(Target {
            name: &spec.name,
            kind: spec.kind,
            len: spec.len,
            writer,
        })
    }

    /// Notes that `bits` of a window are written.
    pub(crate) fn note(&self, region: RegionId, window: WindowIndex, bits: &WindowBits) {
        self.coverage.note(region, window, bits);
    }

    /// Flushes every disk: what was written before this call survives the hypervisor's death.
    pub(crate) async fn flush(&self) -> Result<(), GuestError> {
        for (region, writer) in self.spec.regions.iter().zip(&self.writers) {
            if region.kind == RegionKind::Disk {
                writer.flush().await?;
            }
        }
        Ok(())
    }
}
