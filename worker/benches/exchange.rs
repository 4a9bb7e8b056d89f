//! The exact sum over the loopback with two and four ranks, each a thread with its own sums and connections.
//!
//! `cargo bench -p worker --bench exchange -- --quick`. Rates are in scalars a second. `worker bench-exchange` measures the same
//! with any number of ranks and scalars.
#![allow(clippy::unwrap_used)]

#[path = "../tests/mesh/mod.rs"]
mod mesh;

use std::sync::Arc;
use std::time::Duration;

use common::exact::FixedPoint;
use common::rng::CounterRng;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mesh::{collectives, enter};
use worker::collective::tcp::Mesh;
use worker::collective::{Contribution, LocalSums};
use worker::engine::packed::PackedSums;
use worker::engine::slot::{HeldSlots, SlotOutcome};

const SIZES: [usize; 3] = [250_000, 1_000_000, 10_000_000];

fn sums(scalars: usize, rank: u64) -> PackedSums {
    let mut rng = CounterRng::new(rank, &[]);
    let pattern: Vec<f32> = (0..1 << 16).map(|_| 1e-4 * rng.normal() as f32).collect();
    let gradient: Vec<f32> = pattern.iter().copied().cycle().take(scalars).collect();
    let mut sums = PackedSums::zeros(scalars);
    assert_eq!(sums.add(&FixedPoint::new(1, 1), 0, &gradient), 0);
    sums
}

/// All ranks at once; their means, whose memory the next exchange uses.
fn exchange(meshes: &[Arc<Mesh>], sums: &[PackedSums], means: Vec<Vec<f32>>) -> Vec<Vec<f32>> {
    std::thread::scope(|scope| {
        let ranks: Vec<_> = meshes
            .iter()
            .zip(sums)
            .zip(means)
            .enumerate()
            .map(|(rank, ((mesh, sums), mean))| {
                scope.spawn(move || {
                    let contribution = Contribution {
                        step: 1,
                        slots: meshes.len() as u32,
                        held: &HeldSlots::from([(rank as u32, SlotOutcome::default())]),
                        sums: LocalSums::Packed(sums),
                        invalid: 0,
                    };
                    mesh.all_reduce_into(&contribution, mean)
                        .unwrap()
                        .mean
                        .values
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn loopback(criterion: &mut Criterion) {
    for ranks in [2, 4] {
        let members = collectives(ranks);
        enter(&members, 1);
        let meshes: Vec<Arc<Mesh>> = members.iter().map(|m| m.mesh(1).unwrap()).collect();
        let mut group = criterion.benchmark_group(format!("exchange/{ranks} ranks"));
        group.sample_size(10);
        for scalars in SIZES {
            let sums: Vec<PackedSums> = (0..ranks as u64).map(|rank| sums(scalars, rank)).collect();
            let mut means = exchange(&meshes, &sums, vec![Vec::new(); ranks]);
            group.throughput(Throughput::Elements(scalars as u64));
            group.bench_function(BenchmarkId::from_parameter(scalars), |bencher| {
                bencher.iter(|| means = exchange(&meshes, &sums, std::mem::take(&mut means)));
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = exchanges;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = loopback
}
criterion_main!(exchanges);
