//! Typed message to schema type. Total: what the peer would refuse is found when the result is read again.

use super::schema::{self, outcome, to_destination, to_source};
use crate::error::WireError;
use crate::ids::{Attempt, FrameSeq};
use crate::message::{
    AttemptKey, Compared, Digests, Final, Hello, LaneProgress, Offer, Outcome, PopulatedWindows,
    Prepared, Ready, ResumePoint, ToDestination, ToSource, Verdict, VerifyWindows, Welcome,
    WindowDigest, WindowRange,
};
use crate::spec::{DeviceSpec, GuestSpec, RegionKind, RegionSpec, RunState};
use crate::version::Features;

pub(super) fn to_destination(message: &ToDestination) -> schema::ToDestination {
    use to_destination::Message;
    let message = match message {
        ToDestination::Hello(it) => Message::Hello(hello(it)),
        ToDestination::Offer(it) => Message::Offer(offer(it)),
        ToDestination::Converged => Message::Converged(schema::Converged {}),
        ToDestination::Compare(it) => Message::Compare(window_range(*it)),
        ToDestination::OpenAttempt { attempt } => {
            Message::OpenAttempt(schema::OpenAttempt { attempt: attempt.0 })
        }
        ToDestination::Final(it) => Message::Final(last(it)),
        ToDestination::DeviceState {
            attempt,
            len,
            digest,
        } => Message::DeviceState(schema::DeviceState {
            attempt: attempt.0,
            len: *len,
            digest: digest.to_le_bytes().to_vec(),
        }),
        ToDestination::Commit(key) => Message::Commit(attempt_key(key)),
        ToDestination::Query(key) => Message::Query(attempt_key(key)),
        ToDestination::Abort { attempt, reason } => Message::Abort(schema::Abort {
            attempt: attempt.0,
            reason: Some(error(reason)),
        }),
        ToDestination::Cancel { reason } => Message::Cancel(error(reason)),
        ToDestination::Goodbye => Message::Goodbye(schema::Goodbye {}),
        ToDestination::Error(it) => Message::Error(error(it)),
    };
    schema::ToDestination {
        message: Some(message),
    }
}

pub(super) fn to_source(message: &ToSource) -> schema::ToSource {
    use to_source::Message;
    let message = match message {
        ToSource::Welcome(it) => Message::Welcome(welcome(it)),
        ToSource::Ready(it) => Message::Ready(ready(it)),
        ToSource::Progress(lanes) => Message::Progress(schema::Progress {
            lanes: lane_progress(lanes),
        }),
        ToSource::Compared(it) => Message::Compared(compared(it)),
        ToSource::AttemptOpened { attempt } => {
            Message::AttemptOpened(schema::AttemptOpened { attempt: attempt.0 })
        }
        ToSource::Digests(it) => Message::Digests(digests(it)),
        ToSource::Complete { attempt } => {
            Message::Complete(schema::Complete { attempt: attempt.0 })
        }
        ToSource::Prepared(it) => Message::Prepared(prepared(it)),
        ToSource::Outcome(it) => Message::Outcome(outcome(it)),
        ToSource::Cancelled => Message::Cancelled(schema::Cancelled {}),
        ToSource::Error(it) => Message::Error(error(it)),
    };
    schema::ToSource {
        message: Some(message),
    }
}

fn error(error: &WireError) -> schema::Error {
    // The detail is cut and cleaned again: its field is public, and an error must always be sendable.
    let error = WireError::new(error.code, error.detail.clone());
    schema::Error {
        code: error.code.number(),
        detail: error.detail,
    }
}

fn attempt_key(key: &AttemptKey) -> schema::AttemptKey {
    schema::AttemptKey {
        migration: key.migration.as_bytes().to_vec(),
        attempt: key.attempt.0,
        register: key.register.as_bytes().to_vec(),
    }
}

fn features(features: &Features) -> Vec<String> {
    features.0.iter().cloned().collect()
}

fn hello(hello: &Hello) -> schema::Hello {
    schema::Hello {
        version_min: hello.versions.min.0,
        version_max: hello.versions.max.0,
        features: features(&hello.features),
        guest: hello.guest.to_string(),
        migration: hello.migration.as_bytes().to_vec(),
        generation: hello.generation.0,
        session: hello.session.0,
        lanes: u32::from(hello.lanes),
        connections: u32::from(hello.connections),
        connection: u32::from(hello.connection),
    }
}

fn welcome(welcome: &Welcome) -> schema::Welcome {
    schema::Welcome {
        version: welcome.version.0,
        features: features(&welcome.features),
        register: welcome.register.as_bytes().to_vec(),
        session: welcome.session.0,
        agent: welcome.agent.clone(),
    }
}

fn offer(offer: &Offer) -> schema::Offer {
    schema::Offer {
        spec: Some(guest_spec(&offer.spec)),
        populated: offer.populated.iter().map(populated_windows).collect(),
    }
}

fn populated_windows(populated: &PopulatedWindows) -> schema::PopulatedWindows {
    schema::PopulatedWindows {
        region: u32::from(populated.region.0),
        first: populated.windows.start,
        count: populated.windows.end - populated.windows.start,
    }
}

fn guest_spec(spec: &GuestSpec) -> schema::GuestSpec {
    schema::GuestSpec {
        name: spec.name.to_string(),
        uuid: spec.uuid.map(Vec::from),
        driver: spec.driver.clone(),
        hypervisor_version: spec.hypervisor_version.clone(),
        machine: spec.machine.clone(),
        cpu_model: spec.cpu_model.clone(),
        vcpus: spec.vcpus,
        run_state: run_state(spec.run_state).into(),
        regions: spec.regions.iter().map(region_spec).collect(),
        shared_disks: spec.shared_disks.clone(),
        devices: spec.devices.iter().map(device_spec).collect(),
    }
}

const fn run_state(state: RunState) -> schema::RunState {
    match state {
        RunState::Running => schema::RunState::Running,
        RunState::Paused => schema::RunState::Paused,
    }
}

fn region_spec(region: &RegionSpec) -> schema::RegionSpec {
    let kind = match region.kind {
        RegionKind::Memory => schema::RegionKind::Memory,
        RegionKind::Disk => schema::RegionKind::Disk,
    };
    schema::RegionSpec {
        name: region.name.clone(),
        kind: kind.into(),
        len: region.len.0,
    }
}

fn device_spec(device: &DeviceSpec) -> schema::DeviceSpec {
    schema::DeviceSpec {
        path: device.path.clone(),
        kind: device.kind.clone(),
    }
}

fn ready(ready: &Ready) -> schema::Ready {
    schema::Ready {
        incarnations: ready
            .incarnations
            .iter()
            .map(|incarnation| incarnation.as_bytes().to_vec())
            .collect(),
        resume: ready.resume.as_ref().map(resume_point),
    }
}

fn resume_point(point: &ResumePoint) -> schema::ResumePoint {
    schema::ResumePoint {
        session: point.session.0,
        lanes: lane_progress(&point.lanes),
    }
}

fn lane_progress(lanes: &[LaneProgress]) -> Vec<schema::LaneProgress> {
    lanes
        .iter()
        .map(|lane| schema::LaneProgress {
            lane: u32::from(lane.lane.0),
            applied: lane.applied.0,
            flushed: lane.flushed.0,
        })
        .collect()
}

fn last(last: &Final) -> schema::Final {
    let Final {
        attempt: Attempt(attempt),
        lanes,
        verify,
        run_state: state,
    } = last;
    schema::Final {
        attempt: *attempt,
        lanes: lanes.iter().map(|FrameSeq(seq)| *seq).collect(),
        verify: verify.iter().map(verify_windows).collect(),
        run_state: run_state(*state).into(),
    }
}

fn verify_windows(windows: &VerifyWindows) -> schema::VerifyWindows {
    schema::VerifyWindows {
        region: u32::from(windows.region.0),
        first: windows.first.0,
        stride: windows.stride,
    }
}

fn digests(digests: &Digests) -> schema::Digests {
    schema::Digests {
        attempt: digests.attempt.0,
        windows: digests.windows.iter().map(window_digest).collect(),
        last: digests.last,
    }
}

fn window_range(range: WindowRange) -> schema::WindowRange {
    schema::WindowRange {
        region: u32::from(range.region.0),
        first: range.first.0,
        count: range.count,
    }
}

fn compared(compared: &Compared) -> schema::Compared {
    schema::Compared {
        windows: compared.windows.iter().map(window_digest).collect(),
    }
}

fn window_digest(digest: &WindowDigest) -> schema::WindowDigest {
    schema::WindowDigest {
        region: u32::from(digest.region.0),
        window: digest.window.0,
        digest: digest.digest.to_vec(),
    }
}

fn prepared(prepared: &Prepared) -> schema::Prepared {
    schema::Prepared {
        key: Some(attempt_key(&prepared.key)),
        timing: Some(schema::PrepareTiming {
            apply_us: prepared.timing.apply_us,
            verify_us: prepared.timing.verify_us,
            flush_us: prepared.timing.flush_us,
            load_us: prepared.timing.load_us,
        }),
    }
}

fn outcome(it: &Outcome) -> schema::Outcome {
    let verdict = match &it.verdict {
        Verdict::Committed {
            record_us,
            start_us,
        } => outcome::Verdict::Committed(schema::Committed {
            record_us: *record_us,
            start_us: *start_us,
        }),
        Verdict::Aborted(reason) => outcome::Verdict::Aborted(error(reason)),
        Verdict::Unknown => outcome::Verdict::Unknown(schema::Unknown {}),
    };
    schema::Outcome {
        key: Some(attempt_key(&it.key)),
        verdict: Some(verdict),
    }
}
