//! A link that a test can cut: a relay of UDP datagrams between the agents.
//!
//! Owns one thread and the sockets. Each direction is cut and restored by itself; what is sent meanwhile is lost, as on a pulled
//! cable. What comes from the destination can be held back for a time. It counts what it carries, which is what really
//! went over the wire. It can also take another port towards the destination, as an address translator does that has forgotten the flow: the
//! destination sees the source's address change. It does not reorder.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Datagrams that a socket may hold while the relay is elsewhere: it must not lose what the link would not.
const SOCKET_BUFFER: usize = 8 << 20;
/// Larger than any datagram of QUIC.
const DATAGRAM: usize = 65_536;
/// Datagrams taken from one socket before the others get their turn.
const BURST: usize = 64;

/// A relay that runs until it is dropped.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    link: Arc<Link>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

#[derive(Debug, Default)]
struct Link {
    /// Lost on the way to the destination.
    cut_there: AtomicBool,
    /// Lost on the way back.
    cut_back: AtomicBool,
    /// For how long what comes back is held, in milliseconds.
    delay_back: AtomicU64,
    bytes_there: AtomicU64,
    /// How often the destination was to see another address of the source.
    moves: AtomicU64,
    stop: AtomicBool,
}

impl Proxy {
    /// Relays from a free port to `target` on 127.0.0.1.
    ///
    /// # Errors
    /// The kernel has no socket or thread.
    pub fn to(target: u16) -> anyhow::Result<Self> {
        let front = socket()?;
        let port = front.local_addr()?.port();
        let link = Arc::new(Link::default());
        let relay = Relay {
            front,
            target: SocketAddr::from(([127, 0, 0, 1], target)),
            backs: Vec::new(),
            known: HashMap::new(),
            held: VecDeque::new(),
            moved: 0,
            link: link.clone(),
        };
        let thread = std::thread::Builder::new()
            .name("proxy".to_owned())
            .spawn(move || relay.run())?;
        Ok(Self {
            port,
            link,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Loses everything, both ways.
    pub fn cut(&self) {
        self.cut_there();
        self.cut_back();
    }

    /// Loses what goes to the destination.
    pub fn cut_there(&self) {
        self.link.cut_there.store(true, Ordering::Relaxed);
    }

    /// Loses what comes from the destination.
    pub fn cut_back(&self) {
        self.link.cut_back.store(true, Ordering::Relaxed);
    }

    /// Holds what comes from the destination for `time`. What is held when that direction is cut is lost, too.
    pub fn delay_back(&self, time: Duration) {
        let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.link.delay_back.store(millis, Ordering::Relaxed);
    }

    /// From now on the destination sees the source at another port; what is on its way to the old one is lost.
    pub fn move_source(&self) {
        self.link.moves.fetch_add(1, Ordering::Relaxed);
    }

    /// Carries again, to the destination.
    pub fn restore_there(&self) {
        self.link.cut_there.store(false, Ordering::Relaxed);
    }

    /// Carries again, both ways.
    pub fn restore(&self) {
        self.restore_there();
        self.delay_back(Duration::ZERO);
        self.link.cut_back.store(false, Ordering::Relaxed);
    }

    /// Bytes of datagrams carried to the destination so far.
    #[must_use]
    pub fn bytes_there(&self) -> u64 {
        self.link.bytes_there.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.link.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // What it failed of has shown in the test already.
            drop(thread.join());
        }
    }
}

struct Relay {
    front: UdpSocket,
    target: SocketAddr,
    /// One socket per source, so that the destination tells them apart.
    backs: Vec<(SocketAddr, UdpSocket)>,
    known: HashMap<SocketAddr, usize>,
    /// On their way back: when they are due, to whom, what.
    held: VecDeque<(Instant, SocketAddr, Vec<u8>)>,
    /// Moves of the source that are done.
    moved: u64,
    link: Arc<Link>,
}

impl Relay {
    fn run(mut self) -> io::Result<()> {
        let mut buffer = vec![0; DATAGRAM];
        while !self.link.stop.load(Ordering::Relaxed) {
            self.move_source()?;
            self.wait()?;
            self.forward(&mut buffer)?;
            self.bring_back(&mut buffer);
            self.deliver();
        }
        Ok(())
    }

    fn move_source(&mut self) -> io::Result<()> {
        let wanted = self.link.moves.load(Ordering::Relaxed);
        if self.moved != wanted {
            self.moved = wanted;
            for (_, back) in &mut self.backs {
                let other = socket()?;
                other.connect(self.target)?;
                *back = other;
            }
        }
        Ok(())
    }

    fn deliver(&mut self) {
        while let Some((due, _, _)) = self.held.front()
            && *due <= Instant::now()
        {
            let Some((_, source, datagram)) = self.held.pop_front() else {
                return;
            };
            if !self.link.cut_back.load(Ordering::Relaxed) {
                drop(self.front.send_to(&datagram, source));
            }
        }
    }

    /// Until there is something, or for a moment: the end is not announced.
    fn wait(&self) -> io::Result<()> {
        let sockets = std::iter::once(&self.front).chain(self.backs.iter().map(|(_, back)| back));
        let mut polled: Vec<PollFd<'_>> = sockets
            .map(|socket| PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN))
            .collect();
        let moment = if self.held.is_empty() { 50 } else { 2 };
        let moment = Timespec::try_from(Duration::from_millis(moment)).map_err(io::Error::other)?;
        match poll(&mut polled, Some(&moment)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn forward(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        for _ in 0..BURST {
            // Nothing there, or the answer to an earlier datagram that nobody took.
            let Ok((len, from)) = self.front.recv_from(buffer) else {
                break;
            };
            if self.link.cut_there.load(Ordering::Relaxed) {
                continue;
            }
            let back = self.back(from)?;
            self.link
                .bytes_there
                .fetch_add(len as u64, Ordering::Relaxed);
            // A full or closed socket loses datagrams; QUIC sends them again.
            drop(self.backs[back].1.send(&buffer[..len]));
        }
        Ok(())
    }

    fn bring_back(&mut self, buffer: &mut [u8]) {
        let delay = Duration::from_millis(self.link.delay_back.load(Ordering::Relaxed));
        for (source, back) in &self.backs {
            for _ in 0..BURST {
                let Ok(len) = back.recv(buffer) else { break };
                let due = Instant::now() + delay;
                self.held.push_back((due, *source, buffer[..len].to_vec()));
            }
        }
    }

    fn back(&mut self, from: SocketAddr) -> io::Result<usize> {
        if let Some(index) = self.known.get(&from) {
            return Ok(*index);
        }
        let back = socket()?;
        back.connect(self.target)?;
        self.backs.push((from, back));
        self.known.insert(from, self.backs.len() - 1);
        Ok(self.backs.len() - 1)
    }
}

fn socket() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(("127.0.0.1", 0))?;
    socket.set_nonblocking(true)?;
    let options = socket2::SockRef::from(&socket);
    // As far as the host allows; more is not to be had.
    drop(options.set_recv_buffer_size(SOCKET_BUFFER));
    drop(options.set_send_buffer_size(SOCKET_BUFFER));
    Ok(socket)
}
