//! What a link really does, measured with means of its own: one TCP flow, single datagrams, a paced stream of them.
//!
//! Owns small senders and receivers that know nothing of the product. A figure taken on a link counts for as much as
//! its calibration says, so benchmarks print it first.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Link, MTU};
use crate::bench::Series;

/// Headers of IP and TCP with time stamps, in every packet of the flow.
const TCP_HEADERS: f64 = 52.0;
const CHUNK: usize = 256 << 10;
/// A receiver that hears nothing for so long gives up.
const SILENCE: Duration = Duration::from_secs(5);
/// Single datagrams sent to measure the round trip.
const ECHOES: usize = 20;
/// Datagrams sent to measure the loss, and the bytes of each.
const STREAM: usize = 20_000;
const DATAGRAM: usize = 200;
/// Room for all of them at the receiver, with what the kernel needs for each.
const ROOM: usize = 32 << 20;

/// How a TCP flow may warm up and for how long it counts.
#[derive(Debug, Clone, Copy)]
pub struct Flow {
    /// Not counted.
    pub warm_up: Duration,
    /// Counted.
    pub counted: Duration,
}

/// Set against measured.
#[derive(Debug, Clone)]
pub struct Calibration {
    /// Rate of a plain TCP flow in bits per second, headers added, to the rate that is set.
    pub rate: f64,
    /// Median round trip of single datagrams on the idle link.
    pub rtt: Duration,
    /// Share of datagrams of a paced stream that did not come.
    pub loss: f64,
    /// Mean time by which the relay was late.
    pub late: Duration,
}

/// Measures `link`, which nobody else uses meanwhile.
///
/// # Errors
/// Sockets.
pub fn calibrate(link: &Link, flow: Flow) -> Result<Calibration> {
    let rtt = round_trip(link)?;
    let loss = loss(link)?;
    let rate = tcp_rate(link, flow)? / link.spec.rate as f64;
    Ok(Calibration {
        rate,
        rtt,
        loss,
        late: link.forth().late,
    })
}

impl Calibration {
    /// The calibration of `link` as a line.
    #[must_use]
    pub fn line(&self, link: &Link) -> String {
        format!("  link {}: {self}", link.spec)
    }
}

impl fmt::Display for Calibration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "one TCP flow takes {:.1} % of the rate, round trip {:.2} ms, loss {:.3} %, relay late by {:.3} ms",
            self.rate * 100.0,
            self.rtt.as_secs_f64() * 1e3,
            self.loss * 100.0,
            self.late.as_secs_f64() * 1e3
        )
    }
}

/// Bits per second of one TCP flow with Cubic from alpha to beta, with the headers of its packets.
///
/// # Errors
/// Sockets.
pub fn tcp_rate(link: &Link, flow: Flow) -> Result<f64> {
    let to = SocketAddr::from((link.beta.address, 0));
    let listener = link.beta.namespace.run(|| Ok(TcpListener::bind(to)?))?;
    let to = listener.local_addr()?;
    thread::scope(|scope| {
        let receiver = scope.spawn(move || receive(&listener, flow));
        let mut stream = link.alpha.namespace.run(|| Ok(TcpStream::connect(to)?))?;
        stream.set_write_timeout(Some(SILENCE))?;
        // Whatever this system prefers.
        rustix::net::sockopt::set_tcp_congestion(&stream, "cubic")?;
        let (began, chunk) = (Instant::now(), vec![0x5a; CHUNK]);
        while began.elapsed() < flow.warm_up + flow.counted {
            // The receiver ends the flow when it has seen enough.
            if stream.write_all(&chunk).is_err() {
                break;
            }
        }
        drop(stream);
        let payload = receiver.join().map_err(|_| anyhow::anyhow!("receiver"))??;
        let per_packet = f64::from(MTU);
        Ok(payload * per_packet / (per_packet - TCP_HEADERS))
    })
}

/// Payload bits per second after the warm-up.
fn receive(listener: &TcpListener, flow: Flow) -> Result<f64> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(SILENCE))?;
    let mut buffer = vec![0; CHUNK];
    let mut read_for = |limit: Duration| {
        let (began, mut bytes) = (Instant::now(), 0);
        while began.elapsed() < limit {
            match stream.read(&mut buffer)? {
                0 => break,
                more => bytes += more,
            }
        }
        anyhow::Ok(bytes as f64 * 8.0 / began.elapsed().as_secs_f64())
    };
    read_for(flow.warm_up)?;
    read_for(flow.counted)
}

/// A socket of beta that alpha's other one reaches.
fn sockets(link: &Link) -> Result<(UdpSocket, UdpSocket)> {
    let bind = |end: &super::End| {
        // Free ports: a late datagram of an earlier measurement must not be heard.
        let address = SocketAddr::from((end.address, 0));
        let socket = end.namespace.run(|| Ok(UdpSocket::bind(address)?))?;
        socket.set_read_timeout(Some(SILENCE))?;
        anyhow::Ok(socket)
    };
    let (near, far) = (bind(&link.alpha)?, bind(&link.beta)?);
    near.connect(far.local_addr()?)?;
    far.connect(near.local_addr()?)?;
    Ok((near, far))
}

/// Median round trip of single datagrams.
///
/// # Errors
/// Sockets, or none comes back.
pub fn round_trip(link: &Link) -> Result<Duration> {
    let (near, far) = sockets(link)?;
    let wait = link.spec.rtt * 2 + Duration::from_millis(500);
    near.set_read_timeout(Some(wait))?;
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut word = [0; 1];
            // Zero ends it; so does silence.
            while far.recv(&mut word).is_ok() && word[0] != 0 {
                let _ = far.send(&word);
            }
        });
        let mut times = Series::new("round trip", "s");
        for number in 1..=ECHOES {
            let (began, word) = (Instant::now(), [u8::try_from(number)?]);
            near.send(&word)?;
            // One that is lost, or late for its turn, does not count.
            let mut back = [0; 1];
            if near.recv(&mut back).is_ok() && back == word {
                times.push(began.elapsed().as_secs_f64());
            }
        }
        for _ in 0..3 {
            near.send(&[0])?;
        }
        ensure!(times.median().is_finite(), "no datagram came back");
        Ok(Duration::from_secs_f64(times.median()))
    })
}

/// Share of a stream of datagrams, at half the rate, that does not arrive.
///
/// # Errors
/// Sockets.
pub fn loss(link: &Link) -> Result<f64> {
    let (near, far) = sockets(link)?;
    // Else a receiver that is not woken in time loses what the link has carried.
    rustix::net::sockopt::set_socket_recv_buffer_size_force(&far, ROOM)?;
    let half = (link.spec.rate / 2) as f64;
    let pace = Duration::from_secs_f64((DATAGRAM + 28) as f64 * 8.0 / half).max(LEAST_PACE);
    thread::scope(|scope| {
        let receiver = scope.spawn(move || count(&far));
        let began = Instant::now();
        for number in 0..STREAM {
            let due = pace * u32::try_from(number)?;
            thread::sleep(due.saturating_sub(began.elapsed()));
            near.send(&[1; DATAGRAM])?;
        }
        // What is on its way arrives before the last word.
        thread::sleep(link.spec.rtt + Duration::from_millis(200));
        for _ in 0..5 {
            near.send(&[0])?;
        }
        let came = receiver.join().map_err(|_| anyhow::anyhow!("receiver"))??;
        Ok(1.0 - came as f64 / STREAM as f64)
    })
}

/// A receiver on a busy machine keeps up with 25,000 datagrams per second.
const LEAST_PACE: Duration = Duration::from_micros(40);

fn count(socket: &UdpSocket) -> Result<usize> {
    let (mut came, mut datagram) = (0, [0; DATAGRAM]);
    loop {
        match socket.recv(&mut datagram) {
            Ok(DATAGRAM) => came += 1,
            Ok(_) => return Ok(came),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(came),
            Err(error) => return Err(error).context("receiving datagrams"),
        }
    }
}
