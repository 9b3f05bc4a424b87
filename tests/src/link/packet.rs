//! Packets as a TUN device with offloads hands them over: up to 64 kB with one header, to be cut up by the network card.
//!
//! Owns looking into such a super-packet (its segments and their sizes on the wire) and cutting a run of segments out of
//! it, which is again a packet that the kernel takes. Nothing is checksummed but the IP header: the payload's sum
//! is left to the receiver's kernel as "partial", which on a path that corrupts nothing it need not look at. IPv4 only.

use std::ops::Range;

/// Bytes of the header that the kernel puts in front: flags, type, header length, segment size, start and offset of the sum.
pub(super) const VNET: usize = 10;
/// Largest packet with that header.
pub(super) const MAX_FRAME: usize = VNET + 65_535;

const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCP4: u8 = 1;
const GSO_UDP: u8 = 5;
const GSO_ECN: u8 = 0x80;

const TCP: u8 = 6;
const UDP: u8 = 17;
const UDP_HEADER: usize = 8;
const TCP_HEADER: usize = 20;
const TCP_SEQUENCE: usize = 4;
const TCP_DATA_OFFSET: usize = 12;
const TCP_FLAGS: usize = 13;
const TCP_FIN_PSH: u8 = 0x09;
const TCP_CWR: u8 = 0x80;

/// A packet that was read, and how it falls into segments.
#[derive(Debug)]
pub(super) struct Packet<'a> {
    frame: &'a [u8],
    /// Length of the IP header.
    ip_header: usize,
    /// IP and transport header together, which every segment has.
    headers: usize,
    /// Payload of each segment but the last.
    segment: usize,
}

impl<'a> Packet<'a> {
    /// Looks at what was read; `None` where it is not IPv4, or no packet that a kernel would hand over.
    #[must_use]
    pub(super) fn parse(frame: &'a [u8]) -> Option<Self> {
        let ip = frame.get(VNET..)?;
        let first = *ip.first()?;
        let ip_header = usize::from(first & 0x0f) * 4;
        if first >> 4 != 4 || ip_header < 20 || ip.len() < ip_header {
            return None;
        }
        let whole = Self {
            frame,
            ip_header,
            headers: ip_header,
            segment: ip.len() - ip_header,
        };
        let size = usize::from(u16::from_ne_bytes([frame[4], frame[5]]));
        let transport = match (frame[1] & !GSO_ECN, ip[9]) {
            (GSO_NONE, _) => return Some(whole),
            (GSO_TCP4, TCP) => usize::from(ip.get(ip_header + TCP_DATA_OFFSET)? >> 4) * 4,
            (GSO_UDP, UDP) => UDP_HEADER,
            _ => return None,
        };
        let headers = ip_header + transport;
        let least = if ip[9] == TCP { TCP_HEADER } else { UDP_HEADER };
        (size > 0 && transport >= least && ip.len() > headers).then_some(Self {
            headers,
            segment: size,
            ..whole
        })
    }

    /// How many packets it is on the wire.
    #[must_use]
    pub(super) fn segments(&self) -> usize {
        self.payload().len().div_ceil(self.segment.max(1)).max(1)
    }

    /// Bytes of segment number `index` on the wire, from the IP header on.
    #[must_use]
    pub(super) fn wire_bytes(&self, index: usize) -> usize {
        self.headers + self.payload_range(&(index..index + 1)).len()
    }

    /// A packet of these segments only, to be handed to the kernel.
    #[must_use]
    pub(super) fn take(&self, run: &Range<usize>) -> Vec<u8> {
        if run.start == 0 && run.end == self.segments() {
            return self.frame.to_vec();
        }
        let payload = &self.payload()[self.payload_range(run)];
        let mut out = Vec::with_capacity(VNET + self.headers + payload.len());
        out.extend_from_slice(&self.frame[..VNET + self.headers]);
        out.extend_from_slice(payload);
        if run.len() == 1 {
            // Flags stay; type, header length and segment size go.
            out[1..6].fill(0);
        }
        self.mend_ip(&mut out, run);
        self.mend_transport(&mut out, run);
        self.mend_checksum(&mut out);
        out
    }

    fn payload(&self) -> &'a [u8] {
        &self.frame[VNET + self.headers..]
    }

    fn payload_range(&self, run: &Range<usize>) -> Range<usize> {
        let len = self.payload().len();
        (run.start * self.segment).min(len)..(run.end * self.segment).min(len)
    }

    fn mend_ip(&self, out: &mut [u8], run: &Range<usize>) {
        let length = truncated(out.len() - VNET);
        let ip = &mut out[VNET..VNET + self.ip_header];
        let number = u16::from_be_bytes([ip[4], ip[5]]).wrapping_add(truncated(run.start));
        ip[2..4].copy_from_slice(&length.to_be_bytes());
        ip[4..6].copy_from_slice(&number.to_be_bytes());
        ip[10..12].fill(0);
        let sum = !fold(sum(ip));
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
    }

    fn mend_transport(&self, out: &mut [u8], run: &Range<usize>) {
        let last = run.end == self.segments();
        let protocol = out[VNET + 9];
        let transport = &mut out[VNET + self.ip_header..];
        if protocol == UDP {
            let length = truncated(transport.len());
            transport[4..6].copy_from_slice(&length.to_be_bytes());
            return;
        }
        let place: &mut [u8] = &mut transport[TCP_SEQUENCE..TCP_SEQUENCE + 4];
        let sequence = place
            .iter()
            .fold(0, |all, byte| all << 8 | u32::from(*byte));
        let ahead = u32::try_from(run.start * self.segment).unwrap_or(0);
        place.copy_from_slice(&sequence.wrapping_add(ahead).to_be_bytes());
        if !last {
            transport[TCP_FLAGS] &= !TCP_FIN_PSH;
        }
        if run.start > 0 {
            transport[TCP_FLAGS] &= !TCP_CWR;
        }
    }

    /// The sum of the pseudo header, to which whoever looks adds the rest.
    fn mend_checksum(&self, out: &mut [u8]) {
        if out[0] & NEEDS_CHECKSUM == 0 {
            return;
        }
        let start = usize::from(u16::from_ne_bytes([out[6], out[7]]));
        let offset = usize::from(u16::from_ne_bytes([out[8], out[9]]));
        let length = out.len() - VNET - self.ip_header;
        let ip = &out[VNET..];
        let pseudo = sum(&ip[12..20]) + u32::from(ip[9]) + u32::from(truncated(length));
        let field = VNET + start + offset;
        if let Some(place) = out.get_mut(field..field + 2) {
            place.copy_from_slice(&fold(pseudo).to_be_bytes());
        }
    }
}

/// Lengths and numbers of packets are below 64 Ki, or meant to wrap.
#[allow(clippy::cast_possible_truncation, reason = "see above")]
const fn truncated(number: usize) -> u16 {
    number as u16
}

fn sum(bytes: &[u8]) -> u32 {
    let pairs = bytes.chunks(2);
    pairs
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |byte| u32::from(*byte)))
        .sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A super-packet of `payload` bytes of the numbers 0, 1, 2, …
    fn super_packet(protocol: u8, segment: u16, payload: usize) -> Vec<u8> {
        let transport = if protocol == TCP { 20 } else { UDP_HEADER };
        let kind = if protocol == TCP { GSO_TCP4 } else { GSO_UDP };
        let mut frame = vec![NEEDS_CHECKSUM, kind];
        let sum_at: u16 = if protocol == TCP { 16 } else { 6 };
        for field in [0, segment, 20, sum_at] {
            frame.extend_from_slice(&field.to_ne_bytes());
        }
        let total = u16::try_from(20 + transport + payload).unwrap();
        frame.extend_from_slice(&[0x45, 0]);
        frame.extend_from_slice(&total.to_be_bytes());
        frame.extend_from_slice(&[0x12, 0xff, 0x40, 0, 64, protocol, 0, 0]);
        frame.extend_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        let mut header = vec![0; transport];
        header[..4].copy_from_slice(&[0x13, 0x88, 0x1d, 0x17]);
        if protocol == TCP {
            header[4..8].copy_from_slice(&0xffff_ff00_u32.to_be_bytes());
            header[TCP_DATA_OFFSET] = 0x50;
            header[TCP_FLAGS] = 0x10 | TCP_FIN_PSH | TCP_CWR;
        }
        frame.extend_from_slice(&header);
        frame.extend((0..=u8::MAX).cycle().take(payload));
        frame
    }

    fn be16(bytes: &[u8], at: usize) -> u16 {
        u16::from_be_bytes([bytes[at], bytes[at + 1]])
    }

    #[test]
    fn a_super_packet_is_as_many_packets_as_the_card_would_make_of_it() {
        let frame = super_packet(TCP, 1448, 1448 * 3 + 100);
        let packet = Packet::parse(&frame).unwrap();
        assert_eq!(packet.segments(), 4);
        let sizes: Vec<usize> = (0..4).map(|index| packet.wire_bytes(index)).collect();
        assert_eq!(sizes, [1488, 1488, 1488, 140]);
        assert_eq!(packet.take(&(0..4)), frame);
    }

    #[test]
    fn segments_of_tcp_carry_their_own_place_and_flags() {
        let frame = super_packet(TCP, 1000, 3500);
        let packet = Packet::parse(&frame).unwrap();
        let middle = packet.take(&(1..3));
        assert_eq!(middle.len(), VNET + 40 + 2000);
        assert_eq!(middle[1], GSO_TCP4);
        let ip = &middle[VNET..];
        assert_eq!(be16(ip, 2), 2040);
        assert_eq!(be16(ip, 4), 0x1300);
        assert_eq!(fold(sum(&ip[..20])), 0xffff);
        assert_eq!(
            &ip[24..28],
            &(0xffff_ff00_u32.wrapping_add(1000)).to_be_bytes()
        );
        assert_eq!(ip[20 + TCP_FLAGS], 0x10);
        assert_eq!(ip[40..], frame[VNET + 40 + 1000..VNET + 40 + 3000]);
        let last = packet.take(&(3..4));
        assert_eq!(last[1], GSO_NONE);
        assert_eq!(last[VNET + 20 + TCP_FLAGS], 0x10 | TCP_FIN_PSH);
        assert_eq!(last.len(), VNET + 40 + 500);
    }

    #[test]
    fn segments_of_udp_have_their_own_length_and_partial_sum() {
        let frame = super_packet(UDP, 1472, 1472 * 2 + 7);
        let packet = Packet::parse(&frame).unwrap();
        let last = packet.take(&(2..3));
        let ip = &last[VNET..];
        assert_eq!(ip.len(), 20 + 8 + 7);
        assert_eq!(be16(ip, 24), 15);
        let pseudo = sum(&ip[12..20]) + u32::from(UDP) + 15;
        assert_eq!(be16(ip, 26), fold(pseudo));
    }

    #[test]
    fn what_is_cut_is_a_packet_again() {
        let frame = super_packet(UDP, 1200, 12_000);
        let packet = Packet::parse(&frame).unwrap();
        let some = packet.take(&(2..6));
        let again = Packet::parse(&some).unwrap();
        assert_eq!(again.segments(), 4);
        assert_eq!(again.wire_bytes(0), 1228);
        assert_eq!(again.take(&(0..1)), packet.take(&(2..3)));
    }

    #[test]
    fn ordinary_packets_are_one_segment_and_others_none() {
        let mut frame = super_packet(UDP, 0, 100);
        frame[1] = GSO_NONE;
        let packet = Packet::parse(&frame).unwrap();
        assert_eq!(packet.segments(), 1);
        assert_eq!(packet.wire_bytes(0), 128);
        frame[VNET] = 0x60;
        assert!(Packet::parse(&frame).is_none());
        assert!(Packet::parse(&frame[..VNET]).is_none());
        assert!(Packet::parse(&[]).is_none());
    }

    proptest::proptest! {
        /// No length and no bytes make it panic.
        #[test]
        fn anything_can_be_looked_at(mut frame in proptest::collection::vec(0u8.., 0..200), kind in 0u8..6) {
            if frame.len() > VNET + 9 {
                frame[1] = kind;
                frame[VNET] = 0x45;
                frame[VNET + 9] = if kind == GSO_UDP { UDP } else { TCP };
            }
            if let Some(packet) = Packet::parse(&frame) {
                let segments = packet.segments();
                let bytes: usize = (0..segments).map(|index| packet.take(&(index..index + 1)).len()).sum();
                proptest::prop_assert!(bytes >= frame.len());
            }
        }
    }
}
