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

use std::env;
use std::fmt;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tun_rs::{DeviceBuilder, SyncDevice};

pub use netns::Namespace;
pub use relay::Carried;
pub use schedule::{CREDIT, Fate, Schedule, Shape};

use relay::{Relay, Switch};

/// Largest packet, from the IP header on: Ethernet's.
pub const MTU: u16 = 1500;
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
    forth: Relay,
    back: Relay,
    switch: Arc<Switch>,
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
            assert!(
                env::var("CI").as_deref() != Ok("true"),
                "in CI no test may be skipped: {missing}"
            );
            eprintln!("SKIPPED: {missing}");
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
        let (alpha, near) = end(Ipv4Addr::new(10, 77, 0, 1))?;
        let (beta, far) = end(Ipv4Addr::new(10, 77, 0, 2))?;
        let switch = Arc::<Switch>::default();
        let relay = |way, seed| {
            let schedule = Schedule::new(spec.shape(), seed);
            Relay::start(way, schedule, Arc::clone(&switch)).context("a relay's thread")
        };
        Ok(Self {
            spec,
            forth: relay((Arc::clone(&near), Arc::clone(&far)), spec.seed)?,
            back: relay((far, near), !spec.seed)?,
            alpha,
            beta,
            switch,
        })
    }

    /// What went from alpha to beta so far.
    #[must_use]
    pub fn forth(&self) -> Carried {
        self.forth.counters().read()
    }

    /// What went from beta to alpha so far.
    #[must_use]
    pub fn back(&self) -> Carried {
        self.back.counters().read()
    }

    /// Nothing arrives any more, not even what is on its way.
    pub fn cut(&self) {
        self.switch.cut.store(true, Ordering::Release);
    }

    /// The link is whole again.
    pub fn restore(&self) {
        self.switch.cut.store(false, Ordering::Release);
    }
}

fn end(address: Ipv4Addr) -> Result<(End, Arc<SyncDevice>)> {
    let namespace = Namespace::new()?;
    let device = namespace.run(|| {
        let device = DeviceBuilder::new()
            .name("link")
            .ipv4(address, 24_u8, None)
            .mtu(MTU)
            .offload(true)
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
