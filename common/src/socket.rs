//! UDP sockets with large buffers, and what the route to a peer carries.
//!
//! Owns the socket options only. A buffer that is smaller than asked is no error but is told with its cure:
//! the default loses packets even on a fast, short link.

use std::fmt;
use std::io;
use std::net::{SocketAddr, UdpSocket};

use rustix::net::sockopt;
use socket2::{Domain, Protocol, Socket, Type};

/// Buffers that came out smaller than asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BufferShortage {
    wanted: usize,
    receive: usize,
    send: usize,
}

impl fmt::Display for BufferShortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "UDP buffers are {} (receive) and {} (send) bytes instead of {}, packets may be lost: \
             run `sysctl -w net.core.rmem_max={wanted} net.core.wmem_max={wanted}`, or give the agent CAP_NET_ADMIN",
            self.receive,
            self.send,
            self.wanted,
            wanted = self.wanted.max(16 << 20),
        )
    }
}

/// A UDP socket on `address` with buffers of `buffer` bytes, as far as the system gives them.
pub(crate) fn bind(
    address: SocketAddr,
    buffer: usize,
) -> io::Result<(UdpSocket, Option<BufferShortage>)> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    if address.is_ipv6() {
        // `[::]` serves both families, as administrators expect.
        socket.set_only_v6(false)?;
    }
    let shortage = enlarge(&socket, buffer)?;
    socket.bind(&address.into())?;
    socket.set_nonblocking(true)?;
    Ok((socket.into(), shortage))
}

fn enlarge(socket: &Socket, wanted: usize) -> io::Result<Option<BufferShortage>> {
    // The system counts in C integers and answers larger ones with an error.
    let asked = wanted.min(1 << 30);
    // FORCE passes the system's cap but needs CAP_NET_ADMIN; without it the plain option gives what the cap allows.
    if sockopt::set_socket_recv_buffer_size_force(socket, asked).is_err() {
        sockopt::set_socket_recv_buffer_size(socket, asked)?;
    }
    if sockopt::set_socket_send_buffer_size_force(socket, asked).is_err() {
        sockopt::set_socket_send_buffer_size(socket, asked)?;
    }
    // Linux answers with twice the size, its own bookkeeping included.
    let receive = sockopt::socket_recv_buffer_size(socket)? / 2;
    let send = sockopt::socket_send_buffer_size(socket)? / 2;
    let shortage = BufferShortage {
        wanted,
        receive,
        send,
    };
    Ok((receive < wanted || send < wanted).then_some(shortage))
}

/// Largest UDP payload on the route to `remote`, as this host knows it; `None` where it does not.
/// The path behind the first hop may carry less: packets are probed up to this size, never trusted.
pub(crate) fn path_mtu(remote: SocketAddr) -> Option<u16> {
    let domain = Domain::for_address(remote);
    let probe = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)).ok()?;
    probe.connect(&remote.into()).ok()?;
    let (mtu, headers) = if remote.is_ipv4() {
        (sockopt::ip_mtu(&probe).ok()?, 20 + 8)
    } else {
        (sockopt::ipv6_mtu(&probe).ok()?, 40 + 8)
    };
    let payload = mtu.saturating_sub(headers);
    Some(u16::try_from(payload).unwrap_or(u16::MAX).max(1200))
}

#[cfg(test)]
mod tests {
    use super::{BufferShortage, bind, path_mtu};

    #[test]
    fn a_shortage_names_its_cure() {
        let text = BufferShortage {
            wanted: 8 << 20,
            receive: 212_992,
            send: 212_992,
        }
        .to_string();
        assert!(text.contains("sysctl -w net.core.rmem_max="), "{text}");
    }

    #[test]
    fn an_impossible_buffer_is_told_and_not_an_error() {
        let (_socket, shortage) = bind("127.0.0.1:0".parse().unwrap(), usize::MAX).unwrap();
        assert!(shortage.is_some());
        let (_socket, shortage) = bind("127.0.0.1:0".parse().unwrap(), 4096).unwrap();
        assert_eq!(shortage, None);
    }

    #[test]
    fn loopback_carries_large_packets() {
        let mtu = path_mtu("127.0.0.1:4747".parse().unwrap()).unwrap();
        assert!(mtu > crate::endpoint::MAX_MTU, "{mtu}");
    }
}
