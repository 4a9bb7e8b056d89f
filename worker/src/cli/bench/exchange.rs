//! `worker bench-exchange`: how fast workers on this machine sum their gradients exactly, over the loopback.
//!
//! In: a number of ranks and of scalars. Out: the seconds of an exchange, from the first rank's start to the last one's
//! end. The ranks are threads of this process, each with its own sums, listener and connections.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use clap::Args;
use common::exact::{FixedPoint, dequantize};
use common::rng::CounterRng;
use serde::Serialize;
use thiserror::Error;
use worker::collective::tcp::Mesh;
use worker::collective::{
    AllReduced, Collective, CollectiveError, Contribution, LocalSums, Membership, PeerAddress,
};
use worker::engine::packed::PackedSums;
use worker::engine::slot::{HeldSlots, SlotOutcome};

const HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const SILENCE: Duration = Duration::from_secs(30);
/// Number of gradients that repeat, rotated for each rank.
const PATTERN: usize = 1 << 20;

#[derive(Args)]
pub struct ExchangeArgs {
    /// Members of the exchange
    #[arg(long, value_name = "R", default_value_t = 2, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(2..=64))]
    ranks: u32,
    /// Trainable scalars
    #[arg(long, value_name = "N", default_value_t = 1_000_000, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=1 << 30))]
    scalars: u32,
    /// Exchanges that are measured, after one that is not
    #[arg(long, value_name = "N", default_value_t = 7, allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..))]
    steps: u16,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
}

/// Why a benchmark of the exchange failed.
#[derive(Debug, Error)]
pub enum ExchangeError {
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    #[error("rank {rank} has another sum at scalar {scalar}: {found} where {expected} was due")]
    Wrong {
        rank: usize,
        scalar: usize,
        found: f32,
        expected: f32,
    },
    #[error("the thread of a rank broke down")]
    Rank,
}

#[derive(Serialize)]
struct Report {
    ranks: u32,
    scalars: u32,
    seconds_median: f64,
    seconds_best: f64,
    /// Bytes of the float32 result a second, in units of 10⁹.
    gigabytes_per_second: f64,
}

/// Measures exchanges between ranks in this process and prints the result.
pub fn run(args: ExchangeArgs) -> Result<(), ExchangeError> {
    let (ranks, scalars) = (args.ranks as usize, args.scalars as usize);
    let pattern = gradients();
    let sums: Vec<PackedSums> = (0..ranks)
        .map(|rank| share(&pattern, rank, scalars))
        .collect();
    let members = connect(ranks)?;
    let mut seconds = Vec::new();
    // The same memory again, as in training.
    let mut means = vec![Vec::new(); ranks];
    for step in 0..=args.steps {
        let (elapsed, reduced) = exchange(&members, &sums, means, u64::from(step))?;
        if step > 0 {
            seconds.push(elapsed);
        }
        check(&reduced, &sums)?;
        means = reduced
            .into_iter()
            .map(|reduced| reduced.mean.values)
            .collect();
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    print(
        &Report {
            ranks: args.ranks,
            scalars: args.scalars,
            seconds_median: median,
            seconds_best: seconds[0],
            gigabytes_per_second: 4e-9 * scalars as f64 / median,
        },
        args.json,
    );
    Ok(())
}

/// Draws mean gradients as a fine-tuning has them: about 1e-4, up to 1e-2, and tensors differ.
fn gradients() -> Vec<f32> {
    const TENSOR: usize = 4096;
    let mut rng = CounterRng::new(0, &[]);
    let mut gradients = Vec::with_capacity(PATTERN);
    while gradients.len() < PATTERN {
        let scale = 10f64.powf(-2.5 - 2.0 * rng.uniform());
        gradients.extend((0..TENSOR).map(|_| (scale * rng.normal()) as f32));
    }
    gradients
}

/// The sums that one rank brings: another part of the pattern than the others at each scalar.
fn share(pattern: &[f32], rank: usize, scalars: usize) -> PackedSums {
    let rule = FixedPoint::new(1, 1);
    let mut period = pattern.to_vec();
    period.rotate_left(rank * 12_345);
    let mut sums = PackedSums::zeros(scalars);
    for offset in (0..scalars).step_by(PATTERN) {
        sums.add(&rule, offset, &period[..PATTERN.min(scalars - offset)]);
    }
    sums
}

struct Member {
    /// Keeps the listener open.
    _collective: Collective,
    mesh: Arc<Mesh>,
}

fn connect(ranks: usize) -> Result<Vec<Member>, CollectiveError> {
    let collectives = (0..ranks)
        .map(|_| Collective::bind(HOST))
        .collect::<Result<Vec<_>, _>>()?;
    let addresses: Vec<PeerAddress> = collectives
        .iter()
        .enumerate()
        .map(|(rank, collective)| PeerAddress {
            name: format!("rank {rank}"),
            address: format!("{HOST}:{}", collective.port()),
        })
        .collect();
    for (rank, collective) in collectives.iter().enumerate() {
        collective.enter(Membership {
            run_id: [0; 32],
            generation: 1,
            rank: rank as u32,
            members: addresses.clone(),
            silence: SILENCE,
        });
    }
    collectives
        .into_iter()
        .map(|collective| {
            Ok(Member {
                mesh: collective.mesh(1)?,
                _collective: collective,
            })
        })
        .collect()
}

/// Runs one exchange and returns its seconds.
fn exchange(
    members: &[Member],
    sums: &[PackedSums],
    means: Vec<Vec<f32>>,
    step: u64,
) -> Result<(f64, Vec<AllReduced>), ExchangeError> {
    let together = Barrier::new(members.len());
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = members
            .iter()
            .zip(sums)
            .zip(means)
            .enumerate()
            .map(|(rank, ((member, sums), mean))| {
                let together = &together;
                scope.spawn(move || {
                    let held = HeldSlots::from([(rank as u32, SlotOutcome::default())]);
                    together.wait();
                    let started = Instant::now();
                    let contribution = Contribution {
                        step,
                        slots: members.len() as u32,
                        held: &held,
                        sums: LocalSums::Packed(sums),
                        invalid: 0,
                    };
                    let reduced = member.mesh.all_reduce_into(&contribution, mean);
                    reduced.map(|reduced| (started.elapsed().as_secs_f64(), reduced))
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    let mut slowest = 0.0f64;
    let mut reduced = Vec::new();
    for result in results {
        let (seconds, sum) = result.map_err(|_| ExchangeError::Rank)??;
        slowest = slowest.max(seconds);
        reduced.push(sum);
    }
    Ok((slowest, reduced))
}

/// Checks some scalars of the result: a wrong sum must not count as a fast one.
fn check(reduced: &[AllReduced], sums: &[PackedSums]) -> Result<(), ExchangeError> {
    for (rank, sum) in reduced.iter().enumerate() {
        for scalar in (0..sum.mean.values.len()).step_by(997) {
            let mut total = 0i64;
            for share in sums {
                let mut part = [0];
                share.read(scalar, &mut part);
                total = total.wrapping_add(part[0]);
            }
            let (found, expected) = (sum.mean.values[scalar], dequantize(total));
            if found.to_bits() != expected.to_bits() {
                return Err(ExchangeError::Wrong {
                    rank,
                    scalar,
                    found,
                    expected,
                });
            }
        }
    }
    Ok(())
}

fn print(report: &Report, json: bool) {
    if json {
        return super::print_json(report);
    }
    super::say(format_args!(
        "{} ranks, {} scalars: {:.2} ms median, {:.2} ms best; {:.2} GB/s of gradients",
        report.ranks,
        report.scalars,
        1e3 * report.seconds_median,
        1e3 * report.seconds_best,
        report.gigabytes_per_second
    ));
}
