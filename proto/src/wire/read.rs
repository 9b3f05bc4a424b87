//! Schema type to typed message: every cap, every unknown value, every missing member is refused here.

use super::lists::{self, Field};
use super::schema::{self, outcome, to_destination, to_source};
use super::sealed::Door;
use super::{WireDecodeError, write};
use crate::error::{ErrorCode, WireError};
use crate::geometry::{RegionLen, WindowIndex};
use crate::ids::{
    Attempt, FrameSeq, Generation, GuestName, Incarnation, Lane, MigrationId, RegionId, RegisterId,
    SessionNumber,
};
use crate::limits;
use crate::message::{
    AttemptKey, Compared, Digests, Final, Hello, LaneProgress, Offer, Outcome, PopulatedWindows,
    PrepareTiming, Prepared, Ready, ResumePoint, ToDestination, ToSource, Verdict, VerifyWindows,
    Welcome, WindowDigest, WindowRange,
};
use crate::spec::{DeviceSpec, GuestSpec, RegionKind, RegionSpec, RunState};
use crate::version::{Features, ProtocolVersion, VersionRange};

type Read<T> = Result<T, WireDecodeError>;

impl Door for ToDestination {
    type Schema = schema::ToDestination;
    const LISTS: &'static [Field] = lists::TO_DESTINATION;

    fn to_schema(&self) -> Self::Schema {
        write::to_destination(self)
    }

    fn from_schema(schema: Self::Schema) -> Read<Self> {
        use to_destination::Message;
        Ok(match present("message", schema.message)? {
            Message::Hello(it) => Self::Hello(hello(it)?),
            Message::Offer(it) => Self::Offer(offer(it)?),
            Message::Converged(schema::Converged {}) => Self::Converged,
            Message::Compare(it) => Self::Compare(window_range(&it)?),
            Message::OpenAttempt(it) => Self::OpenAttempt {
                attempt: attempt("open_attempt.attempt", it.attempt)?,
            },
            Message::Final(it) => Self::Final(last(it)?),
            Message::DeviceState(it) => Self::DeviceState {
                attempt: attempt("device_state.attempt", it.attempt)?,
                len: range("device_state.len", it.len, 1, limits::MAX_DEVICE_STATE)?,
                digest: u128::from_le_bytes(sixteen("device_state.digest", &it.digest)?),
            },
            Message::Commit(key) => Self::Commit(attempt_key(&key)?),
            Message::Query(key) => Self::Query(attempt_key(&key)?),
            Message::Abort(it) => Self::Abort {
                attempt: attempt("abort.attempt", it.attempt)?,
                reason: error(present("abort.reason", it.reason)?)?,
            },
            Message::Cancel(reason) => Self::Cancel {
                reason: error(reason)?,
            },
            Message::Goodbye(schema::Goodbye {}) => Self::Goodbye,
            Message::Error(it) => Self::Error(error(it)?),
        })
    }
}

impl Door for ToSource {
    type Schema = schema::ToSource;
    const LISTS: &'static [Field] = lists::TO_SOURCE;

    fn to_schema(&self) -> Self::Schema {
        write::to_source(self)
    }

    fn from_schema(schema: Self::Schema) -> Read<Self> {
        use to_source::Message;
        Ok(match present("message", schema.message)? {
            Message::Welcome(it) => Self::Welcome(welcome(it)?),
            Message::Ready(it) => Self::Ready(ready(&it)?),
            Message::Progress(it) => Self::Progress(lane_progress("progress.lanes", &it.lanes)?),
            Message::Compared(it) => Self::Compared(compared(&it)?),
            Message::AttemptOpened(it) => Self::AttemptOpened {
                attempt: attempt("attempt_opened.attempt", it.attempt)?,
            },
            Message::Digests(it) => Self::Digests(digests(&it)?),
            Message::Complete(it) => Self::Complete {
                attempt: attempt("complete.attempt", it.attempt)?,
            },
            Message::Prepared(it) => Self::Prepared(prepared(&it)?),
            Message::Outcome(it) => Self::Outcome(outcome(it)?),
            Message::Cancelled(schema::Cancelled {}) => Self::Cancelled,
            Message::Error(it) => Self::Error(error(it)?),
        })
    }
}

// What fields are made of.

fn present<T>(field: &'static str, value: Option<T>) -> Read<T> {
    value.ok_or(WireDecodeError::Missing { field })
}

fn range(field: &'static str, value: u64, min: u64, max: u64) -> Read<u64> {
    if (min..=max).contains(&value) {
        Ok(value)
    } else {
        Err(WireDecodeError::OutOfRange {
            field,
            value,
            min,
            max,
        })
    }
}

/// A number from `min` to `max`, in a type that holds them.
fn small<T: TryFrom<u32>>(field: &'static str, value: u32, min: u32, max: u32) -> Read<T> {
    T::try_from(value)
        .ok()
        .filter(|_| (min..=max).contains(&value))
        .ok_or(WireDecodeError::OutOfRange {
            field,
            value: u64::from(value),
            min: u64::from(min),
            max: u64::from(max),
        })
}

fn length(field: &'static str, len: usize, min: usize, max: usize) -> Read<()> {
    if (min..=max).contains(&len) {
        Ok(())
    } else {
        Err(WireDecodeError::Length {
            field,
            len,
            min,
            max,
        })
    }
}

fn sixteen(field: &'static str, bytes: &[u8]) -> Read<[u8; 16]> {
    bytes.try_into().map_err(|_| WireDecodeError::Length {
        field,
        len: bytes.len(),
        min: 16,
        max: 16,
    })
}

/// A text of at most `max` bytes without control characters: it ends up in logs and on terminals.
fn text(field: &'static str, value: String, min: usize, max: usize) -> Read<String> {
    length(field, value.len(), min, max)?;
    if value.chars().any(char::is_control) {
        return Err(WireDecodeError::Text { field });
    }
    Ok(value)
}

fn name(field: &'static str, value: String) -> Read<String> {
    text(field, value, 1, limits::MAX_NAME)
}

fn guest_name(field: &'static str, value: &str) -> Read<GuestName> {
    value.parse().map_err(|_| WireDecodeError::Text { field })
}

fn attempt(field: &'static str, value: u32) -> Read<Attempt> {
    small(field, value, 1, u32::MAX).map(Attempt)
}

fn session(field: &'static str, value: u64) -> Read<SessionNumber> {
    range(field, value, 1, u64::MAX).map(SessionNumber)
}

fn region_id(field: &'static str, value: u32) -> Read<RegionId> {
    range(field, u64::from(value), 0, limits::MAX_REGIONS as u64 - 1)?;
    small(field, value, 0, u32::from(u16::MAX)).map(RegionId)
}

/// Whether `keys` rise from each to the next.
fn ascending<K: PartialOrd>(field: &'static str, keys: impl Iterator<Item = K>) -> Read<()> {
    if keys.is_sorted_by(|a, b| a < b) {
        Ok(())
    } else {
        Err(WireDecodeError::Order { field })
    }
}

fn error(error: schema::Error) -> Read<WireError> {
    length("error.detail", error.detail.len(), 0, limits::MAX_DETAIL)?;
    let code = ErrorCode::from_number(error.code).ok_or(WireDecodeError::UnknownValue {
        field: "error.code",
        value: i64::from(error.code),
    })?;
    Ok(WireError::new(code, error.detail))
}

// The messages.

fn attempt_key(key: &schema::AttemptKey) -> Read<AttemptKey> {
    Ok(AttemptKey {
        migration: MigrationId::from_bytes(sixteen("attempt_key.migration", &key.migration)?),
        attempt: attempt("attempt_key.attempt", key.attempt)?,
        register: RegisterId::from_bytes(sixteen("attempt_key.register", &key.register)?),
    })
}

fn features(names: Vec<String>) -> Read<Features> {
    length("features", names.len(), 0, limits::MAX_FEATURES)?;
    ascending("features", names.iter())?;
    names
        .into_iter()
        .map(|name| text("features", name, 1, limits::MAX_FEATURE_NAME))
        .collect::<Read<_>>()
        .map(Features)
}

fn hello(hello: schema::Hello) -> Read<Hello> {
    let connections = small(
        "hello.connections",
        hello.connections,
        1,
        u32::from(limits::MAX_CONNECTIONS),
    )?;
    Ok(Hello {
        versions: VersionRange {
            min: ProtocolVersion(small(
                "hello.version_min",
                hello.version_min,
                1,
                hello.version_max,
            )?),
            max: ProtocolVersion(hello.version_max),
        },
        features: features(hello.features)?,
        guest: guest_name("hello.guest", &hello.guest)?,
        migration: MigrationId::from_bytes(sixteen("hello.migration", &hello.migration)?),
        generation: Generation(range("hello.generation", hello.generation, 1, u64::MAX)?),
        session: session("hello.session", hello.session)?,
        lanes: small("hello.lanes", hello.lanes, 1, u32::from(limits::MAX_LANES))?,
        connections,
        connection: small(
            "hello.connection",
            hello.connection,
            0,
            hello.connections - 1,
        )?,
    })
}

fn welcome(welcome: schema::Welcome) -> Read<Welcome> {
    Ok(Welcome {
        version: ProtocolVersion(small("welcome.version", welcome.version, 1, u32::MAX)?),
        features: features(welcome.features)?,
        register: RegisterId::from_bytes(sixteen("welcome.register", &welcome.register)?),
        session: session("welcome.session", welcome.session)?,
        agent: text("welcome.agent", welcome.agent, 0, limits::MAX_AGENT_NAME)?,
    })
}

fn offer(offer: schema::Offer) -> Read<Offer> {
    let spec = guest_spec(present("offer.spec", offer.spec)?)?;
    length(
        "offer.populated",
        offer.populated.len(),
        0,
        limits::MAX_POPULATED,
    )?;
    let populated = offer
        .populated
        .iter()
        .map(|windows| populated_windows(&spec, windows))
        .collect::<Read<_>>()?;
    Ok(Offer { spec, populated })
}

/// Windows of a memory region of `spec`.
fn populated_windows(
    spec: &GuestSpec,
    windows: &schema::PopulatedWindows,
) -> Read<PopulatedWindows> {
    let region = region_id("offer.populated.region", windows.region)?;
    let len = match spec.region(region) {
        Some(it) if it.kind == RegionKind::Memory => it.len,
        Some(_) | None => {
            return Err(WireDecodeError::UnknownValue {
                field: "offer.populated.region",
                value: i64::from(windows.region),
            });
        }
    };
    let all = len.windows();
    let first: u32 = small("offer.populated.first", windows.first, 0, all - 1)?;
    let count: u32 = small("offer.populated.count", windows.count, 1, all - first)?;
    Ok(PopulatedWindows {
        region,
        windows: first..first + count,
    })
}

fn guest_spec(spec: schema::GuestSpec) -> Read<GuestSpec> {
    length(
        "spec.shared_disks",
        spec.shared_disks.len(),
        0,
        limits::MAX_SHARED_DISKS,
    )?;
    length("spec.devices", spec.devices.len(), 0, limits::MAX_DEVICES)?;
    Ok(GuestSpec {
        name: guest_name("spec.name", &spec.name)?,
        uuid: spec
            .uuid
            .map(|uuid| sixteen("spec.uuid", &uuid))
            .transpose()?,
        driver: name("spec.driver", spec.driver)?,
        hypervisor_version: text(
            "spec.hypervisor_version",
            spec.hypervisor_version,
            0,
            limits::MAX_NAME,
        )?,
        machine: text("spec.machine", spec.machine, 0, limits::MAX_NAME)?,
        cpu_model: text("spec.cpu_model", spec.cpu_model, 0, limits::MAX_NAME)?,
        vcpus: small("spec.vcpus", spec.vcpus, 1, limits::MAX_VCPUS)?,
        run_state: run_state("spec.run_state", spec.run_state)?,
        regions: regions(spec.regions)?,
        shared_disks: spec
            .shared_disks
            .into_iter()
            .map(|disk| name("spec.shared_disks", disk))
            .collect::<Read<_>>()?,
        devices: spec
            .devices
            .into_iter()
            .map(device_spec)
            .collect::<Read<_>>()?,
    })
}

fn run_state(field: &'static str, value: i32) -> Read<RunState> {
    match schema::RunState::try_from(value) {
        Ok(schema::RunState::Running) => Ok(RunState::Running),
        Ok(schema::RunState::Paused) => Ok(RunState::Paused),
        Ok(schema::RunState::Unspecified) | Err(_) => Err(WireDecodeError::UnknownValue {
            field,
            value: i64::from(value),
        }),
    }
}

fn regions(regions: Vec<schema::RegionSpec>) -> Read<Vec<RegionSpec>> {
    length("spec.regions", regions.len(), 1, limits::MAX_REGIONS)?;
    let regions: Vec<RegionSpec> = (0u16..)
        .map(RegionId)
        .zip(regions)
        .map(|(id, region)| region_spec(id, region))
        .collect::<Read<_>>()?;
    let mut names: Vec<_> = regions
        .iter()
        .map(|region| (region.kind == RegionKind::Disk, region.name.as_str()))
        .collect();
    names.sort_unstable();
    ascending("spec.regions.name", names.into_iter())?;
    Ok(regions)
}

fn region_spec(id: RegionId, region: schema::RegionSpec) -> Read<RegionSpec> {
    let kind = match schema::RegionKind::try_from(region.kind) {
        Ok(schema::RegionKind::Memory) => RegionKind::Memory,
        Ok(schema::RegionKind::Disk) => RegionKind::Disk,
        Ok(schema::RegionKind::Unspecified) | Err(_) => {
            return Err(WireDecodeError::UnknownValue {
                field: "spec.regions.kind",
                value: i64::from(region.kind),
            });
        }
    };
    Ok(RegionSpec {
        id,
        name: name("spec.regions.name", region.name)?,
        kind,
        len: RegionLen(range(
            "spec.regions.len",
            region.len,
            1,
            limits::MAX_REGION_LEN,
        )?),
    })
}

fn device_spec(device: schema::DeviceSpec) -> Read<DeviceSpec> {
    Ok(DeviceSpec {
        path: name("spec.devices.path", device.path)?,
        kind: name("spec.devices.kind", device.kind)?,
    })
}

fn ready(ready: &schema::Ready) -> Read<Ready> {
    length(
        "ready.incarnations",
        ready.incarnations.len(),
        1,
        limits::MAX_REGIONS,
    )?;
    Ok(Ready {
        incarnations: ready
            .incarnations
            .iter()
            .map(|bytes| sixteen("ready.incarnations", bytes).map(Incarnation::from_bytes))
            .collect::<Read<_>>()?,
        resume: ready.resume.as_ref().map(resume_point).transpose()?,
    })
}

fn resume_point(point: &schema::ResumePoint) -> Read<ResumePoint> {
    Ok(ResumePoint {
        session: session("resume.session", point.session)?,
        lanes: lane_progress("resume.lanes", &point.lanes)?,
    })
}

fn lane_progress(field: &'static str, lanes: &[schema::LaneProgress]) -> Read<Vec<LaneProgress>> {
    length(field, lanes.len(), 0, usize::from(limits::MAX_LANES))?;
    ascending(field, lanes.iter().map(|lane| lane.lane))?;
    lanes
        .iter()
        .map(|lane| {
            Ok(LaneProgress {
                lane: Lane(small(
                    field,
                    lane.lane,
                    0,
                    u32::from(limits::MAX_LANES) - 1,
                )?),
                applied: FrameSeq(lane.applied),
                flushed: FrameSeq(range(field, lane.flushed, 0, lane.applied)?),
            })
        })
        .collect()
}

fn last(last: schema::Final) -> Read<Final> {
    length(
        "final.lanes",
        last.lanes.len(),
        1,
        usize::from(limits::MAX_LANES),
    )?;
    length("final.verify", last.verify.len(), 0, limits::MAX_REGIONS)?;
    ascending(
        "final.verify",
        last.verify.iter().map(|windows| windows.region),
    )?;
    Ok(Final {
        attempt: attempt("final.attempt", last.attempt)?,
        lanes: last.lanes.into_iter().map(FrameSeq).collect(),
        verify: last
            .verify
            .iter()
            .map(verify_windows)
            .collect::<Read<_>>()?,
        run_state: run_state("final.run_state", last.run_state)?,
    })
}

fn verify_windows(windows: &schema::VerifyWindows) -> Read<VerifyWindows> {
    Ok(VerifyWindows {
        region: region_id("final.verify.region", windows.region)?,
        first: WindowIndex(windows.first),
        stride: small("final.verify.stride", windows.stride, 1, u32::MAX)?,
    })
}

fn digests(digests: &schema::Digests) -> Read<Digests> {
    length(
        "digests.windows",
        digests.windows.len(),
        0,
        limits::MAX_DIGESTS,
    )?;
    Ok(Digests {
        attempt: attempt("digests.attempt", digests.attempt)?,
        windows: digests
            .windows
            .iter()
            .map(window_digest)
            .collect::<Read<_>>()?,
        last: digests.last,
    })
}

fn window_range(range: &schema::WindowRange) -> Read<WindowRange> {
    Ok(WindowRange {
        region: region_id("compare.region", range.region)?,
        first: WindowIndex(range.first),
        count: small("compare.count", range.count, 1, limits::MAX_COMPARE_WINDOWS)?,
    })
}

fn compared(compared: &schema::Compared) -> Read<Compared> {
    length(
        "compared.windows",
        compared.windows.len(),
        0,
        limits::MAX_COMPARE_WINDOWS as usize,
    )?;
    let keys = compared.windows.iter();
    ascending("compared.windows", keys.map(|it| (it.region, it.window)))?;
    Ok(Compared {
        windows: compared
            .windows
            .iter()
            .map(window_digest)
            .collect::<Read<_>>()?,
    })
}

fn window_digest(digest: &schema::WindowDigest) -> Read<WindowDigest> {
    Ok(WindowDigest {
        region: region_id("digests.windows.region", digest.region)?,
        window: WindowIndex(digest.window),
        digest: sixteen("digests.windows.digest", &digest.digest)?,
    })
}

fn prepared(prepared: &schema::Prepared) -> Read<Prepared> {
    let key = present("prepared.key", prepared.key.as_ref())?;
    let timing = present("prepared.timing", prepared.timing.as_ref())?;
    Ok(Prepared {
        key: attempt_key(key)?,
        timing: PrepareTiming {
            apply_us: timing.apply_us,
            verify_us: timing.verify_us,
            flush_us: timing.flush_us,
            load_us: timing.load_us,
        },
    })
}

fn outcome(it: schema::Outcome) -> Read<Outcome> {
    let key = present("outcome.key", it.key.as_ref())?;
    let verdict = match present("outcome.verdict", it.verdict)? {
        outcome::Verdict::Committed(it) => Verdict::Committed {
            record_us: it.record_us,
            start_us: it.start_us,
        },
        outcome::Verdict::Aborted(reason) => Verdict::Aborted(error(reason)?),
        outcome::Verdict::Unknown(schema::Unknown {}) => Verdict::Unknown,
    };
    Ok(Outcome {
        key: attempt_key(key)?,
        verdict,
    })
}
