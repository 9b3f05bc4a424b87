//! An emulated link between two network namespaces: rate, delay, seeded loss, a bounded queue, cut and restore.
//!
//! Owns the two namespaces, a TUN device in each, and two threads that carry packets between them as a pure
//! [`Schedule`] says; the kernel needs neither netem nor any other module than `tun`. The MTU is that of Ethernet, and bytes
//! count from the IP header on, in both directions apart. The kernel hands over up to 64 kB at a time (segmentation
//! offload), so that 1 Gbit/s takes a fraction of a core; loss, queue and counters see each packet that a network card would
//! have made of them.
//!
//! Nothing is left behind, however the process ends: namespaces have no names and devices belong to open files, so the kernel
//! removes both. Needs root; [`Link::get`] says so.
//!
//! ```text
//!  namespace alpha, 10.77.0.1                              namespace beta, 10.77.0.2
//!    sockets - TUN ----> queue, rate, loss, delay ----> TUN - sockets
//!              TUN <---- delay, loss, rate, queue <---- TUN
//! ```

pub mod calibrate;
mod netns;
mod packet;
mod relay;
mod schedule;

use std::fmt;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tun_rs::{DeviceBuilder, SyncDevice};

pub use netns::Namespace;
pub(crate) use netns::on_thread;
pub use relay::Carried;
pub use schedule::{CREDIT, Fate, Schedule, Shape};

use crate::skip::skipped;
use relay::{Relay, Switch};

/// Largest packet, from the IP header on: Ethernet's.
pub const MTU: u16 = 1500;
/// The same of a cable: jumbo frames.
const JUMBO: &str = "9000";
/// Name of the device at either end.
const DEVICE: &str = "link";
const NEAR: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const FAR: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// Batches that may wait for the relay to wake up; what does not fit would be lost beside the schedule.
const DEVICE_QUEUE: u32 = 10_000;
/// Header of a frame, which the kernel counts and we do not.
const ETHERNET: u64 = 14;
/// The queue holds at least so many bytes: 80 packets.
const LEAST_QUEUE: u64 = 120_000;
/// And at least what the line sends in so long, on short paths too.
const LEAST_QUEUE_TIME: Duration = Duration::from_millis(10);

/// What a link is like; the same in both directions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinkSpec {
    /// Bits per second.
    pub rate: u64,
    /// Round trip of a small packet on an idle link.
    pub rtt: Duration,
    /// Share of packets that are lost at random, in each direction.
    pub loss: f64,
    /// Bytes that may wait in front of it.
    pub queue: u64,
    /// Of the losses.
    pub seed: u64,
}

impl LinkSpec {
    /// That of a cable.
    const UNLIMITED: Self = Self {
        rate: u64::MAX,
        rtt: Duration::ZERO,
        loss: 0.0,
        queue: u64::MAX,
        seed: 0,
    };

    /// A link without loss, its queue one round trip long.
    #[must_use]
    pub fn new(rate: u64, rtt: Duration) -> Self {
        let time = rtt.max(LEAST_QUEUE_TIME).as_micros();
        let queue = u128::from(rate) / 8 * time / 1_000_000;
        Self {
            rate,
            rtt,
            loss: 0.0,
            queue: u64::try_from(queue).unwrap_or(u64::MAX).max(LEAST_QUEUE),
            seed: 1,
        }
    }

    /// The same, losing `share` of its packets.
    #[must_use]
    pub const fn lossy(mut self, share: f64) -> Self {
        self.loss = share;
        self
    }

    fn shape(&self) -> Shape {
        Shape {
            rate: self.rate,
            delay: self.rtt / 2,
            loss: self.loss,
            queue: self.queue,
        }
    }
}

impl fmt::Display for LinkSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::UNLIMITED {
            return f.write_str("no limit");
        }
        let mbit = self.rate as f64 / 1e6;
        let rtt = self.rtt.as_secs_f64() * 1e3;
        write!(f, "{mbit} Mbit/s, {rtt} ms")?;
        if self.loss > 0.0 {
            write!(f, ", {} % loss", self.loss * 100.0)?;
        }
        Ok(())
    }
}

/// One end of a link.
#[derive(Debug, Clone)]
pub struct End {
    /// Where sockets and processes of this end live.
    pub namespace: Arc<Namespace>,
    /// Its address.
    pub address: Ipv4Addr,
}

/// A link between two namespaces.
#[derive(Debug)]
pub struct Link {
    /// What it is like.
    pub spec: LinkSpec,
    /// One end.
    pub alpha: End,
    /// The other.
    pub beta: End,
    carrier: Carrier,
}

#[derive(Debug)]
enum Carrier {
    Relays {
        forth: Relay,
        back: Relay,
        switch: Arc<Switch>,
    },
    /// A pair of devices of the kernel's.
    Cable,
}

impl Link {
    /// Makes a link, or says why this machine or user cannot: the test is then skipped.
    ///
    /// # Panics
    /// Where `CI=true`: there no test may be skipped.
    ///
    /// # Errors
    /// It can, and fails.
    pub fn get(spec: LinkSpec) -> Result<Option<Self>> {
        if let Err(missing) = Self::possible() {
            skipped(missing);
            return Ok(None);
        }
        Self::new(spec).map(Some)
    }

    /// Whether links can be made here, or what is missing.
    ///
    /// # Errors
    /// What is missing.
    pub fn possible() -> Result<(), String> {
        if !rustix::process::geteuid().is_root() {
            return Err("an emulated link needs root".to_owned());
        }
        match std::fs::File::open("/dev/net/tun") {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("/dev/net/tun: {error}: modprobe tun")),
        }
    }

    /// Makes a link.
    ///
    /// # Errors
    /// Not root, or no TUN devices.
    pub fn new(spec: LinkSpec) -> Result<Self> {
        let (alpha, near) = end(NEAR)?;
        let (beta, far) = end(FAR)?;
        let switch = Arc::<Switch>::default();
        let relay = |way, seed| {
            let schedule = Schedule::new(spec.shape(), seed);
            Relay::start(way, schedule, Arc::clone(&switch)).context("a relay's thread")
        };
        Ok(Self {
            spec,
            carrier: Carrier::Relays {
                forth: relay((Arc::clone(&near), Arc::clone(&far)), spec.seed)?,
                back: relay((far, near), !spec.seed)?,
                switch,
            },
            alpha,
            beta,
        })
    }

    /// A cable without limit, delay or loss, as fast as the kernel copies; it cannot be cut. Its packets are as large as those of
    /// networks that are that fast (jumbo frames). Batches are never taken apart on it, so their headers count once.
    ///
    /// # Errors
    /// Not root, or no virtual Ethernet.
    pub fn cable() -> Result<Self> {
        let end = |address| {
            Ok::<_, anyhow::Error>(End {
                namespace: Arc::new(Namespace::new()?),
                address,
            })
        };
        let (alpha, beta) = (end(NEAR)?, end(FAR)?);
        netns::join(DEVICE, &alpha.namespace, &beta.namespace)?;
        for end in [&alpha, &beta] {
            let address = format!("{}/24", end.address);
            end.namespace.run(|| {
                netns::ip(&["address", "add", &address, "dev", DEVICE])?;
                netns::ip(&["link", "set", "dev", DEVICE, "mtu", JUMBO, "up"])
            })?;
        }
        Ok(Self {
            spec: LinkSpec::UNLIMITED,
            alpha,
            beta,
            carrier: Carrier::Cable,
        })
    }

    /// What went from alpha to beta so far.
    #[must_use]
    pub fn forth(&self) -> Carried {
        match &self.carrier {
            Carrier::Relays { forth, .. } => forth.counters().read(),
            Carrier::Cable => received(&self.beta),
        }
    }

    /// What went from beta to alpha so far.
    #[must_use]
    pub fn back(&self) -> Carried {
        match &self.carrier {
            Carrier::Relays { back, .. } => back.counters().read(),
            Carrier::Cable => received(&self.alpha),
        }
    }

    /// Nothing arrives any more, not even what is on its way.
    pub fn cut(&self) {
        self.set_cut(true);
    }

    /// The link is whole again.
    pub fn restore(&self) {
        self.set_cut(false);
    }

    fn set_cut(&self, cut: bool) {
        match &self.carrier {
            Carrier::Relays { switch, .. } => switch.cut.store(cut, Ordering::Release),
            Carrier::Cable => {}
        }
    }
}

/// What the kernel counted at the device of `end`; nothing where it does not say.
fn received(end: &End) -> Carried {
    let counted = end.namespace.run(|| {
        let text = std::fs::read_to_string("/proc/thread-self/net/dev")?;
        counters(&text).context("no such device")
    });
    counted.unwrap_or_default()
}

/// Bytes and packets received, from the kernel's table of devices.
fn counters(table: &str) -> Option<Carried> {
    let mut lines = table.lines().map(str::trim_start);
    let line = lines.find_map(|line| line.strip_prefix(DEVICE)?.strip_prefix(':'))?;
    let mut fields = line.split_whitespace().map(str::parse::<u64>);
    let (bytes, packets) = (fields.next()?.ok()?, fields.next()?.ok()?);
    Some(Carried {
        bytes: bytes.saturating_sub(packets * ETHERNET),
        packets,
        ..Carried::default()
    })
}

fn end(address: Ipv4Addr) -> Result<(End, Arc<SyncDevice>)> {
    let namespace = Namespace::new()?;
    let device = namespace.run(|| {
        let device = DeviceBuilder::new()
            .name(DEVICE)
            .ipv4(address, 24_u8, None)
            .mtu(MTU)
            .offload(true)
            .tx_queue_len(DEVICE_QUEUE)
            .build_sync()
            .context("a TUN device")?;
        ensure!(
            device.udp_gso(),
            "TUN devices of this kernel take no batches of UDP: Linux 6.2 or newer is needed"
        );
        device.set_nonblocking(true)?;
        Ok(device)
    })?;
    let end = End {
        namespace: Arc::new(namespace),
        address,
    };
    Ok((end, Arc::new(device)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_queue_is_a_round_trip_long_and_never_tiny() {
        let queue = |mbit: u64, millis| {
            LinkSpec::new(mbit * 1_000_000, Duration::from_millis(millis)).queue
        };
        assert_eq!(queue(1000, 80), 10_000_000);
        assert_eq!(queue(1000, 0), 1_250_000);
        assert_eq!(queue(1, 1), LEAST_QUEUE);
    }

    #[test]
    fn the_kernels_table_is_read_and_frames_count_without_their_header() {
        let table = "Inter-| Receive | Transmit\n face |bytes packets\n\
            \x20   lo: 9 9 0 0 0 0 0 0 9 9 0 0 0 0 0 0\n  link: 1140 10 0 0 0 0 0 0 7 1 0 0 0 0 0 0\n";
        let carried = counters(table).unwrap();
        assert_eq!((carried.bytes, carried.packets), (1000, 10));
        assert!(counters("nothing").is_none());
    }
}
