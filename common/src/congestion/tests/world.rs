//! Flows over one bottleneck, in simulated time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use super::super::Congestion;
use super::flow::{Datagram, Peer, pair};
use super::link::{Link, LinkPlan};

/// What a payload of the application may be of the link's rate: quinn's packets carry 1,472 bytes less some 30 of QUIC's own.
pub(super) fn ceiling(rate: u64) -> u64 {
    rate * 1436 / 1500
}

/// Flows, and the link that they share.
pub(super) struct World {
    pub(super) link: Link,
    pub(super) flows: Vec<[Peer; 2]>,
    now: Instant,
    arrivals: BinaryHeap<Reverse<(Instant, u64, Arrival)>>,
    sequence: u64,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Arrival {
    flow: usize,
    side: usize,
    datagram: Datagram,
}

impl World {
    pub(super) fn new(plan: LinkPlan) -> Self {
        let start = Instant::now();
        Self {
            link: Link::new(plan, start),
            flows: Vec::new(),
            now: start,
            arrivals: BinaryHeap::new(),
            sequence: 0,
        }
    }

    /// A flow that begins now, with so many bytes to send.
    pub(super) fn add(&mut self, congestion: Congestion, bytes: u64) -> usize {
        let flow = self.flows.len();
        let seed = u8::try_from(flow).unwrap() + 1;
        let mut peers = pair(congestion, self.link.plan.mtu, seed, self.now);
        peers[0].backlog = bytes;
        self.flows.push(peers);
        self.drive(flow, 0);
        flow
    }

    /// Gives a flow more to send.
    pub(super) fn give(&mut self, flow: usize, bytes: u64) {
        self.flows[flow][0].backlog += bytes;
        self.drive(flow, 0);
    }

    /// Lets time pass.
    pub(super) fn run(&mut self, time: Duration) {
        let until = self.now + time;
        self.run_while(until, |_| true);
        self.now = until;
    }

    /// Lets time pass until `flow` has received so many bytes in all, or `limit` is over; returns the time it took.
    pub(super) fn run_to(
        &mut self,
        flow: usize,
        received: u64,
        limit: Duration,
    ) -> Option<Duration> {
        let began = self.now;
        self.run_while(began + limit, |world| world.received(flow) < received);
        (self.received(flow) >= received).then(|| self.now - began)
    }

    fn run_while(&mut self, until: Instant, go_on: impl Fn(&Self) -> bool) {
        while go_on(self) {
            let wakes = self.flows.iter_mut().enumerate().flat_map(|(flow, peers)| {
                let [a, b] = peers;
                [(a.wakes_at(), flow, 0), (b.wakes_at(), flow, 1)]
            });
            let wake = wakes
                .filter_map(|(at, flow, side)| Some((at?, flow, side)))
                .min();
            let arrival = self.arrivals.peek().map(|Reverse((at, _, _))| *at);
            let next = [wake.map(|wake| wake.0), arrival]
                .into_iter()
                .flatten()
                .min();
            let Some(next) = next.filter(|next| *next <= until) else {
                return;
            };
            self.now = self.now.max(next);
            if arrival.is_some_and(|at| at <= next) {
                let Some(Reverse((_, _, arrival))) = self.arrivals.pop() else {
                    return;
                };
                self.flows[arrival.flow][arrival.side].handle(self.now, &arrival.datagram);
                self.drive(arrival.flow, arrival.side);
            } else if let Some((_, flow, side)) = wake {
                self.drive(flow, side);
            }
        }
    }

    fn drive(&mut self, flow: usize, side: usize) {
        let Self {
            link,
            flows,
            now,
            arrivals,
            sequence,
            ..
        } = self;
        flows[flow][side].drive(*now, |datagram| {
            let at = match side {
                0 => link.offer(*now, datagram.len() as u64),
                _ => Some(link.answer(*now)),
            };
            if let Some(at) = at {
                *sequence += 1;
                let arrival = Arrival {
                    flow,
                    side: 1 - side,
                    datagram,
                };
                arrivals.push(Reverse((at, *sequence, arrival)));
            }
        });
    }

    pub(super) fn received(&self, flow: usize) -> u64 {
        self.flows[flow][1].received
    }

    /// Packets that a flow's sender has sent.
    pub(super) fn sent(&self, flow: usize) -> u64 {
        self.flows[flow][0].packets_sent()
    }

    pub(super) fn set_rate(&mut self, mbit: u64) {
        self.link.set_rate(self.now, mbit * 125_000);
    }

    /// Bytes a second that each flow received in this time.
    pub(super) fn rates(&mut self, time: Duration) -> Vec<u64> {
        let before: Vec<u64> = (0..self.flows.len())
            .map(|flow| self.received(flow))
            .collect();
        self.run(time);
        let millis = u64::try_from(time.as_millis()).unwrap();
        let after = (0..self.flows.len()).map(|flow| self.received(flow));
        after
            .zip(before)
            .map(|(after, before)| (after - before) * 1000 / millis)
            .collect()
    }
}
