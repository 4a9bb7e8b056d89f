//! The exact exchange between workers beside a plain all-reduce in float32 (a ring, as everybody else's is): bytes and
//! time for the same number of scalars, all ranks in this process, over the loopback.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use worker::collective::{Collective, Contribution, LocalSums, Membership, PeerAddress};
use worker::engine::slot::{HeldSlots, SlotOutcome};

const HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Nobody falls silent here.
const SILENCE: Duration = Duration::from_secs(60);

/// One exchange, all ranks taken together.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    pub time: Duration,
    /// On the wire, headers included, as the system counts them for the loopback.
    pub bytes: u64,
}

/// `rounds` exchanges of the exact sum among `ranks`, after one that does not count.
pub fn exact(ranks: usize, scalars: usize, rounds: usize) -> Vec<Measured> {
    let members: Vec<Collective> = (0..ranks)
        .map(|_| Collective::bind(HOST).unwrap())
        .collect();
    let addresses: Vec<PeerAddress> = members
        .iter()
        .map(|member| PeerAddress {
            name: String::new(),
            address: format!("{HOST}:{}", member.port()),
        })
        .collect();
    for (rank, member) in members.iter().enumerate() {
        member.enter(Membership {
            run_id: [0; 32],
            generation: 1,
            rank: rank as u32,
            members: addresses.clone(),
            silence: SILENCE,
        });
    }
    let ranks = members.into_iter().enumerate().map(|(rank, member)| {
        let sums: Vec<i64> = (0..scalars)
            .map(|i| ((i * 7919 + rank) as i64) << 20)
            .collect();
        move || {
            let mesh = member.mesh(1).unwrap();
            let contribution = Contribution {
                step: 1,
                slots: 1,
                held: &(if rank == 0 {
                    [(0, SlotOutcome::default())].into()
                } else {
                    HeldSlots::new()
                }),
                sums: LocalSums::Exact(&sums),
                invalid: 0,
            };
            std::hint::black_box(mesh.all_reduce(&contribution).unwrap());
        }
    });
    measure(ranks.collect(), rounds)
}

/// The same with a ring of float32: reduce-scatter, then gather.
pub fn plain(ranks: usize, scalars: usize, rounds: usize) -> Vec<Measured> {
    let listeners: Vec<TcpListener> = (0..ranks)
        .map(|_| TcpListener::bind((HOST, 0)).unwrap())
        .collect();
    let to_next: Vec<TcpStream> = (0..ranks)
        .map(|rank| {
            let next = listeners[(rank + 1) % ranks].local_addr().unwrap();
            TcpStream::connect(next).unwrap()
        })
        .collect();
    let ranks_of_ring =
        listeners
            .iter()
            .zip(to_next)
            .enumerate()
            .map(|(rank, (listener, next))| {
                let (previous, _) = listener.accept().unwrap();
                next.set_nodelay(true).unwrap();
                let gradient: Vec<f32> = (0..scalars).map(|i| (i % 97 + rank) as f32).collect();
                let ring = Ring {
                    rank,
                    ranks,
                    previous,
                    next,
                };
                move || {
                    let mut sums = gradient.clone();
                    ring.all_reduce(&mut sums);
                    let expected = (ranks * (ranks - 1) / 2) as f32;
                    assert_eq!(sums.first(), Some(&expected), "a ring that does not sum");
                }
            });
    measure(ranks_of_ring.collect(), rounds)
}

/// Runs all ranks at once, round by round.
fn measure<Rank: FnMut() + Send>(ranks: Vec<Rank>, rounds: usize) -> Vec<Measured> {
    let barrier = Arc::new(Barrier::new(ranks.len() + 1));
    std::thread::scope(|scope| {
        for mut rank in ranks {
            let barrier = barrier.clone();
            scope.spawn(move || {
                for _ in 0..=rounds {
                    barrier.wait();
                    rank();
                    barrier.wait();
                }
            });
        }
        let round = |_| {
            let (began, bytes) = (Instant::now(), loopback_bytes());
            barrier.wait();
            barrier.wait();
            Measured {
                time: began.elapsed(),
                bytes: loopback_bytes() - bytes,
            }
        };
        let measured: Vec<Measured> = (0..=rounds).map(round).collect();
        measured[1..].to_vec()
    })
}

struct Ring {
    rank: usize,
    ranks: usize,
    previous: TcpStream,
    next: TcpStream,
}

impl Ring {
    fn all_reduce(&self, sums: &mut [f32]) {
        let mut incoming = vec![0f32; sums.len().div_ceil(self.ranks)];
        for phase in 0..2 * (self.ranks - 1) {
            let gathers = phase >= self.ranks - 1;
            let sent = (self.rank + 2 * self.ranks - phase) % self.ranks;
            let received = (sent + self.ranks - 1) % self.ranks;
            let (outgoing, taken) = (
                self.chunk(sums.len(), sent),
                self.chunk(sums.len(), received),
            );
            let incoming = &mut incoming[..taken.len()];
            let out = &sums[outgoing];
            std::thread::scope(|scope| {
                scope.spawn(|| (&self.next).write_all(bytemuck::cast_slice(out)).unwrap());
                (&self.previous)
                    .read_exact(bytemuck::cast_slice_mut(incoming))
                    .unwrap();
            });
            for (sum, &part) in sums[taken].iter_mut().zip(&*incoming) {
                *sum = if gathers { part } else { *sum + part };
            }
        }
    }

    fn chunk(&self, scalars: usize, index: usize) -> std::ops::Range<usize> {
        scalars * index / self.ranks..scalars * (index + 1) / self.ranks
    }
}

/// Sent over the loopback so far.
fn loopback_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/net/dev").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("lo:"));
    let sent = line.and_then(|line| line.split_whitespace().nth(8)?.parse().ok());
    sent.unwrap_or(0)
}
