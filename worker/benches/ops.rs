//! The engine's operations one by one, at the sizes of one layer of a 0.6B model and 512 tokens, on all cores.
//!
//! `cargo bench -p worker --bench ops -- --quick` takes about a minute; a name picks some: `-- --quick attention`. Rates are in
//! operations or scalars a second (`elem/s`).
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use common::data::pack::best_fit_decreasing;
use common::files::moments::{BLOCK_SCALARS, BlocksMut};
use common::job::Reduction;
use common::model::Activation;
use common::rng::CounterRng;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use worker::engine::accumulator::Accumulator;
use worker::engine::buffer::{Buffer, Pool};
use worker::engine::mean_gradient::MeanSource;
use worker::engine::ops::attention::{Attention, Saved};
use worker::engine::ops::causal_conv::CausalConv;
use worker::engine::ops::clamped_swiglu::ClampedSwiglu;
use worker::engine::ops::cross_entropy::{self, LogitRule, LossHead};
use worker::engine::ops::delta_gates::Gates;
use worker::engine::ops::delta_rule::{DeltaHeads, DeltaRule, Inputs};
use worker::engine::ops::element::Element;
use worker::engine::ops::lora_linear::Lora;
use worker::engine::ops::matrix::{Along, MatrixMut, Target, View};
use worker::engine::ops::output_layer::OutputLayer;
use worker::engine::ops::product::{multiply, multiply_turned};
use worker::engine::ops::projection::{Context, Linear, Projection};
use worker::engine::ops::rms_norm::RmsNorm;
use worker::engine::ops::rope::{HeadLayout, Rope, RopeTable, Values};
use worker::engine::ops::routing::Routing;
use worker::engine::ops::segments::Segments;
use worker::engine::ops::swiglu;
use worker::engine::ops::token_matrix::TokenMatrix;
use worker::engine::optim::{AdamW, Update};
use worker::engine::params::Weight;

const TOKENS: usize = 512;
const HIDDEN: usize = 1024;
const INTERMEDIATE: usize = 3072;
const RANK: usize = 16;
/// A part of the real one: the loss goes in chunks anyway.
const VOCABULARY: usize = 16_384;
const HEADS: HeadLayout = HeadLayout {
    heads: 16,
    key_value_heads: 8,
    head_dim: 128,
};
/// Of an adapter of rank 16 on all layers of the model.
const SCALARS: usize = 10_000_000;

/// What differs between the two types of base weights.
trait Base: Element {
    const NAME: &'static str;
    fn frozen(values: Buffer<Self>, shape: &[usize]) -> Weight;
}

impl Base for f32 {
    const NAME: &'static str = "f32";
    fn frozen(values: Buffer<f32>, shape: &[usize]) -> Weight {
        Weight::frozen_f32(values, shape)
    }
}

impl Base for bf16 {
    const NAME: &'static str = "bf16";
    fn frozen(values: Buffer<bf16>, shape: &[usize]) -> Weight {
        Weight::frozen_bf16(values, shape)
    }
}

fn random<E: Element>(len: usize, seed: u64) -> Vec<E> {
    let mut rng = CounterRng::new(seed, &[]);
    let pattern: Vec<E> = (0..len.min(1 << 16))
        .map(|_| E::round_from(0.02 * rng.normal() as f32))
        .collect();
    pattern.iter().copied().cycle().take(len).collect()
}

fn weight<E: Base>(shape: &[usize], seed: u64, pool: &Pool) -> Weight {
    let values = random::<E>(shape.iter().product(), seed);
    let mut buffer = pool.take::<E>(values.len());
    buffer.copy_from_slice(&values);
    E::frozen(buffer, shape)
}

fn products<E: Base>(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group(format!("product/{}", E::NAME));
    group.throughput(Throughput::Elements(
        2 * (TOKENS * HIDDEN * INTERMEDIATE) as u64,
    ));
    let (x, w) = (
        random::<E>(TOKENS * HIDDEN, 1),
        random::<E>(INTERMEDIATE * HIDDEN, 2),
    );
    let dy = random::<E>(TOKENS * INTERMEDIATE, 3);
    let (x, dy) = (
        View::new(&x, TOKENS, HIDDEN),
        View::new(&dy, TOKENS, INTERMEDIATE),
    );
    let w = View::new(&w, INTERMEDIATE, HIDDEN);
    let mut y = vec![E::zeroed(); TOKENS * INTERMEDIATE];
    group.bench_function("forward", |bencher| {
        bencher.iter(|| {
            multiply(
                Target::new(&mut y, TOKENS, INTERMEDIATE),
                x,
                w,
                Along::Columns,
            )
        });
    });
    let mut dx = vec![0f32; TOKENS * HIDDEN];
    group.bench_function("input gradient", |bencher| {
        bencher.iter(|| multiply(Target::new(&mut dx, TOKENS, HIDDEN), dy, w, Along::Rows));
    });
    group.finish();
}

/// Only what is float32 is trained as a whole.
fn weight_gradient(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("product/f32");
    group.throughput(Throughput::Elements(
        2 * (TOKENS * HIDDEN * INTERMEDIATE) as u64,
    ));
    let x = random::<f32>(TOKENS * HIDDEN, 1);
    let dy = random::<f32>(TOKENS * INTERMEDIATE, 3);
    let mut dw = vec![0f32; INTERMEDIATE * HIDDEN];
    group.bench_function("weight gradient", |bencher| {
        bencher.iter(|| {
            let target = MatrixMut::new(&mut dw, INTERMEDIATE, HIDDEN);
            let (dy, x) = (
                View::new(&dy, TOKENS, INTERMEDIATE),
                View::new(&x, TOKENS, HIDDEN),
            );
            multiply_turned(target, false, dy, x);
        });
    });
    group.finish();
}

/// The layers of the MLP that share an input, with adapters.
fn lora_linear<E: Base>(criterion: &mut Criterion) {
    let pool = Pool::default();
    let layer = |seed| Linear {
        weight: weight::<E>(&[INTERMEDIATE, HIDDEN], seed, &pool),
        bias: None,
        lora: Some(Lora {
            a: weight::<f32>(&[RANK, HIDDEN], seed + 1, &pool),
            b: weight::<f32>(&[INTERMEDIATE, RANK], seed + 2, &pool),
            scale: 2.0,
            trained: RANK,
            dropout: 0.0,
            module: seed,
            bias: None,
            magnitudes: None,
        }),
    };
    let projection = Projection(vec![layer(1), layer(4)]);
    let context = Context {
        tokens: TOKENS,
        mask: None,
        pool: &pool,
    };
    let (x, dy) = (
        random::<E>(TOKENS * HIDDEN, 7),
        random::<E>(TOKENS * 2 * INTERMEDIATE, 8),
    );
    let mut group = criterion.benchmark_group(format!("lora linear/{}", E::NAME));
    group.throughput(Throughput::Elements(
        4 * (TOKENS * HIDDEN * INTERMEDIATE) as u64,
    ));
    let mut y = vec![E::zeroed(); TOKENS * 2 * INTERMEDIATE];
    group.bench_function("forward", |bencher| {
        bencher.iter(|| projection.forward(&x, &mut y, context));
    });
    let mut dx = vec![0f32; TOKENS * HIDDEN];
    group.bench_function("input gradient", |bencher| {
        bencher.iter(|| projection.backward_input(&dy, &mut dx, context));
    });
    group.finish();
}

fn rows<E: Base>(criterion: &mut Criterion) {
    let pool = Pool::default();
    let mut group = criterion.benchmark_group(format!("rms norm/{}", E::NAME));
    group.throughput(Throughput::Elements((TOKENS * HIDDEN) as u64));
    let norm = RmsNorm {
        weight: weight::<f32>(&[HIDDEN], 1, &pool),
        epsilon: 1e-6,
        offset: false,
    };
    let (x, dy) = (
        random::<f32>(TOKENS * HIDDEN, 2),
        random::<f32>(TOKENS * HIDDEN, 3),
    );
    let (mut y, mut dx) = (vec![E::zeroed(); x.len()], vec![0f32; x.len()]);
    group.bench_function("forward", |bencher| {
        bencher.iter(|| norm.forward(&x, &mut y))
    });
    group.bench_function("backward", |bencher| {
        bencher.iter(|| norm.backward(&x, &dy, &mut dx))
    });
    group.finish();

    let mut group = criterion.benchmark_group(format!("swiglu/{}", E::NAME));
    group.throughput(Throughput::Elements((TOKENS * INTERMEDIATE) as u64));
    let gate_up = random::<E>(TOKENS * 2 * INTERMEDIATE, 4);
    let dh = random::<f32>(TOKENS * INTERMEDIATE, 5);
    let mut h = vec![E::zeroed(); TOKENS * INTERMEDIATE];
    let mut d_gate_up = vec![E::zeroed(); gate_up.len()];
    group.bench_function("forward", |bencher| {
        bencher.iter(|| swiglu::forward(&gate_up, &mut h, INTERMEDIATE, Activation::Silu));
    });
    group.bench_function("backward", |bencher| {
        bencher.iter(|| {
            swiglu::backward(
                &gate_up,
                &dh,
                (&mut d_gate_up[..], &mut h[..]),
                INTERMEDIATE,
                Activation::Silu,
            )
        });
    });
    let clamped = ClampedSwiglu {
        alpha: 1.702,
        limit: 7.0,
    };
    group.bench_function("clamped forward", |bencher| {
        bencher.iter(|| clamped.forward(&gate_up, &mut h, INTERMEDIATE));
    });
    group.bench_function("clamped backward", |bencher| {
        bencher.iter(|| {
            let outs = (&mut d_gate_up[..], &mut h[..]);
            clamped.backward(&gate_up, &dh, outs, INTERMEDIATE)
        });
    });
    group.finish();
}

fn rope_and_attention<E: Base>(criterion: &mut Criterion) {
    let (width, out_width) = (HEADS.width(), HEADS.heads * HEADS.head_dim);
    let frequencies: Vec<f32> = (0..HEADS.head_dim / 2)
        .map(|pair| 1e6f32.powf(-2.0 * pair as f32 / HEADS.head_dim as f32))
        .collect();
    let positions: Vec<u32> = (0..TOKENS as u32).collect();
    let rope = Rope {
        layout: HEADS,
        norms: None,
        values: Values::PLAIN,
        rows: &positions,
        table: Some(&RopeTable::new(&frequencies, TOKENS, 1.0)),
    };
    let qkv = random::<E>(TOKENS * width, 1);
    let (mut y, dy) = (vec![E::zeroed(); qkv.len()], random::<f32>(qkv.len(), 2));
    let mut group = criterion.benchmark_group(format!("rope/{}", E::NAME));
    group.throughput(Throughput::Elements(qkv.len() as u64));
    group.bench_function("forward", |bencher| {
        bencher.iter(|| rope.forward(&qkv, &mut y))
    });
    group.bench_function("backward", |bencher| {
        bencher.iter(|| rope.backward(&qkv, &dy, &mut y))
    });
    group.finish();

    let mut group = criterion.benchmark_group(format!("attention/{}", E::NAME));
    // One long segment, and a packed block of short ones.
    for (name, lengths) in [("1 x 512", vec![512]), ("8 x 64", vec![64; 8])] {
        let segments = Segments::new(&lengths);
        let attention = Attention {
            layout: HEADS,
            segments: &segments,
            scale: 1.0 / (HEADS.head_dim as f32).sqrt(),
            cap: None,
            sinks: None,
        };
        let mut out = vec![E::zeroed(); TOKENS * out_width];
        let mut log_sums = vec![0f32; TOKENS * HEADS.heads];
        group.bench_function(format!("forward {name}"), |bencher| {
            bencher.iter(|| attention.forward(&qkv, &mut out, &mut log_sums));
        });
        let d_out = random::<f32>(out.len(), 3);
        let mut d_qkv = vec![0f32; qkv.len()];
        let saved = Saved {
            qkv: &qkv,
            out: &out,
            d_out: &d_out,
            log_sums: &log_sums,
        };
        group.bench_function(format!("backward {name}"), |bencher| {
            bencher.iter(|| attention.backward(&saved, &mut d_qkv));
        });
    }
    group.finish();
}

fn loss<E: Base>(criterion: &mut Criterion) {
    let pool = Pool::default();
    let norm = RmsNorm {
        weight: weight::<f32>(&[HIDDEN], 1, &pool),
        epsilon: 1e-6,
        offset: false,
    };
    let head = TokenMatrix::from(weight::<E>(&[VOCABULARY, HIDDEN], 2, &pool));
    let head = OutputLayer::from(head);
    let head = LossHead {
        norm: &norm,
        head: &head,
        mask: None,
        pool: &pool,
        loss: Default::default(),
        logits: LogitRule::NONE,
    };
    let x = random::<f32>(TOKENS * HIDDEN, 3);
    let targets: Vec<cross_entropy::Target> = (0..TOKENS)
        .map(|row| cross_entropy::Target {
            row,
            id: (row * 31 % VOCABULARY) as u32,
        })
        .collect();
    let mut dx = vec![0f32; x.len()];
    let mut group = criterion.benchmark_group(format!("linear and cross-entropy/{}", E::NAME));
    group.sample_size(10);
    group.throughput(Throughput::Elements(
        4 * (TOKENS * HIDDEN * VOCABULARY) as u64,
    ));
    group.bench_function("forward and backward", |bencher| {
        bencher.iter(|| head.loss::<E>(&x, &targets, Some(&mut dx)));
    });
    group.finish();
}

fn update(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("update");
    group.sample_size(10);
    group.throughput(Throughput::Elements(SCALARS as u64));
    let gradient = random::<f32>(SCALARS, 1);
    let mut accumulator = Accumulator::new(Reduction::Exact, SCALARS);
    let mut step = 0;
    group.bench_function("add to the exact sum", |bencher| {
        bencher.iter(|| {
            step += 1;
            accumulator.begin(step, 1000, 1);
            accumulator.add(0, [&gradient[..]])
        });
    });
    let adam = AdamW {
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.0,
        early_epsilon: false,
    };
    let update = Update {
        number: 1,
        learning_rate: 1e-4,
        gradient_scale: 1.0,
    };
    let (mut weights, mut first) = (vec![0f32; SCALARS], vec![0f32; SCALARS]);
    let mut second = vec![0f32; SCALARS];
    for (name, mean) in [
        ("AdamW", MeanSource::Values(&gradient)),
        ("AdamW from the sums", MeanSource::Sums(&accumulator)),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                adam.update(&update, &mut weights, &mut first, &mut second, (mean, 0));
            });
        });
    }
    let (mut first, mut second) = (vec![0u8; SCALARS], vec![0u8; SCALARS]);
    let mut absmax = [(); 2].map(|()| vec![0f32; SCALARS.div_ceil(BLOCK_SCALARS)]);
    let [first_absmax, second_absmax] = &mut absmax;
    let mut exp_avg = BlocksMut {
        codes: &mut first,
        absmax: first_absmax,
    };
    let mut exp_avg_sq = BlocksMut {
        codes: &mut second,
        absmax: second_absmax,
    };
    group.bench_function("AdamW, moments of 8 bits", |bencher| {
        bencher.iter(|| {
            let mean = (MeanSource::Values(&gradient), 0);
            let moments = [&mut exp_avg, &mut exp_avg_sq];
            adam.update_8bit(&update, &mut weights, moments, mean);
        });
    });
    group.finish();
}

/// As Qwen3-30B-A3B has them.
fn routing(criterion: &mut Criterion) {
    let routing = Routing {
        experts: 128,
        per_token: 8,
        normalises: true,
    };
    let logits = random::<f32>(TOKENS * routing.experts, 1);
    let mut group = criterion.benchmark_group("routing");
    group.throughput(Throughput::Elements(logits.len() as u64));
    group.bench_function("forward", |bencher| {
        bencher.iter(|| {
            let mut probabilities = logits.clone();
            routing.softmax(&mut probabilities);
            routing.routes(&probabilities).rows()
        });
    });
    let mut probabilities = logits.clone();
    routing.softmax(&mut probabilities);
    let routes = routing.routes(&probabilities);
    let d_weights = random::<f32>(routes.rows(), 2);
    let mut d_logits = vec![0f32; logits.len()];
    group.bench_function("backward", |bencher| {
        bencher
            .iter(|| routing.backward(&probabilities, (&routes, &d_weights), None, &mut d_logits));
    });
    group.finish();
}

/// As Qwen3.5-0.8B has it.
fn linear_attention(criterion: &mut Criterion) {
    let heads = DeltaHeads {
        key_heads: 16,
        value_heads: 16,
        key_dim: 128,
        value_dim: 128,
    };
    let qkv = random::<f32>(TOKENS * heads.width(), 1);
    let written = vec![0.5f32; TOKENS * heads.value_heads];
    let kept = vec![-0.1f32; written.len()];
    let inputs = Inputs {
        qkv: &qkv,
        written: &written,
        kept: &kept,
    };
    let mut group = criterion.benchmark_group("delta rule");
    for (name, length) in [("1 x 512", 512), ("8 x 64", 64)] {
        let segments: Vec<_> = (0..TOKENS / length)
            .map(|index| index * length..(index + 1) * length)
            .collect();
        let rule = DeltaRule {
            heads,
            segments: &segments,
        };
        let mut out = vec![0f32; TOKENS * heads.values()];
        group.bench_function(format!("forward {name}"), |bencher| {
            bencher.iter(|| rule.forward(inputs, &mut out));
        });
        let d_out = random::<f32>(out.len(), 2);
        let (mut d_qkv, mut gates) = (vec![0f32; qkv.len()], [written.clone(), kept.clone()]);
        group.bench_function(format!("backward {name}"), |bencher| {
            bencher.iter(|| {
                let [written, kept] = &mut gates;
                rule.backward(inputs, &d_out, &mut d_qkv, Gates { written, kept });
            });
        });
    }
    group.finish();
    let positions: Vec<u32> = (0..TOKENS as u32).collect();
    let pool = Pool::default();
    let conv = CausalConv {
        weight: weight::<f32>(&[heads.width(), 1, 4], 3, &pool),
    };
    let view = View::new(&qkv[..], TOKENS, heads.width());
    let (mut y, mut dx) = (vec![0f32; qkv.len()], vec![0f32; qkv.len()]);
    let mut group = criterion.benchmark_group("causal convolution");
    group.throughput(Throughput::Elements(qkv.len() as u64));
    group.bench_function("forward", |bencher| {
        bencher.iter(|| conv.forward(view, &positions, &mut y));
    });
    group.bench_function("backward", |bencher| {
        bencher.iter(|| conv.backward(view, &positions, &mut y, (&mut dx, heads.width())));
    });
    group.finish();
}

fn packing(criterion: &mut Criterion) {
    const EXAMPLES: usize = 100_000;
    let mut rng = CounterRng::new(1, &[]);
    let lengths: Vec<u32> = (0..EXAMPLES)
        .map(|_| ((200.0 * (0.7 * rng.normal()).exp()) as u32).clamp(1, 2048))
        .collect();
    let mut group = criterion.benchmark_group("packing");
    group.sample_size(10);
    group.throughput(Throughput::Elements(EXAMPLES as u64));
    group.bench_function("best fit decreasing", |bencher| {
        bencher.iter(|| best_fit_decreasing(&lengths, 2048));
    });
    group.finish();
}

criterion_group! {
    name = ops;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = products::<f32>, weight_gradient, products::<bf16>, lora_linear::<f32>, lora_linear::<bf16>,
        rows::<f32>, rows::<bf16>, rope_and_attention::<f32>, rope_and_attention::<bf16>,
        loss::<f32>, loss::<bf16>, update, routing, linear_attention, packing
}

criterion_main!(ops);
