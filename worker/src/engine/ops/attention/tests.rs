//! Attention equals a plain reference, forward and backward.

use super::*;
use crate::engine::params::Weight;
use crate::engine::testing::{TestWeights, check_op, flat, in_pool, random_tensor, random_values};
use candle_core::{D, Device, Result, Tensor};
use half::bf16;

/// What attention may have beside heads.
#[derive(Clone, Copy, Default)]
struct More {
    window: Option<usize>,
    cap: Option<f32>,
}

fn reference(qkv: &Tensor, layout: HeadLayout, lengths: &[usize]) -> Result<Tensor> {
    reference_with(qkv, layout, lengths, More::default(), None)
}

fn reference_with(
    qkv: &Tensor,
    layout: HeadLayout,
    lengths: &[usize],
    more: More,
    sinks: Option<&Tensor>,
) -> Result<Tensor> {
    let HeadLayout {
        heads,
        key_value_heads,
        head_dim,
    } = layout;
    let tokens = qkv.dim(0)?;
    let segment: Vec<usize> = lengths
        .iter()
        .enumerate()
        .flat_map(|(segment, length)| vec![segment; *length])
        .collect();
    let mask: Vec<f32> = (0..tokens)
        .flat_map(|i| {
            let segment = &segment;
            (0..tokens).map(move |j| {
                let is_near = more.window.is_none_or(|window| j + window > i);
                match segment[i] == segment[j] && j <= i && is_near {
                    true => 0.0,
                    false => -1e9,
                }
            })
        })
        .collect();
    let mask = Tensor::from_vec(mask, (tokens, tokens), &Device::Cpu)?;
    let part = |head: usize| qkv.narrow(1, head * head_dim, head_dim);
    let mut outs = Vec::new();
    for head in 0..heads {
        let shared = head / (heads / key_value_heads);
        let (q, k) = (part(head)?, part(heads + shared)?);
        let v = part(heads + key_value_heads + shared)?;
        let scores = (q.matmul(&k.t()?)? / (head_dim as f64).sqrt())?;
        let scores = match more.cap.map(f64::from) {
            None => scores,
            Some(cap) => ((scores / cap)?.tanh()? * cap)?,
        };
        let scores = (scores + &mask)?;
        let seen = scores.dim(1)?;
        let scores = match sinks {
            None => scores,
            Some(sinks) => {
                let sink = sinks.narrow(0, head, 1)?.broadcast_as((tokens, 1))?;
                Tensor::cat(&[scores, sink], 1)?
            }
        };
        let max = scores.max_keepdim(D::Minus1)?.detach();
        let e = scores.broadcast_sub(&max)?.exp()?;
        let p = e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?;
        let p = p.narrow(1, 0, seen)?.contiguous()?;
        outs.push(p.matmul(&v.contiguous()?)?);
    }
    Tensor::cat(&outs, 1)
}

fn run_as<E: Element>(
    x: &[E],
    dy: &[f32],
    layout: HeadLayout,
    segments: &Segments,
) -> (Vec<E>, Vec<f32>) {
    run_with(x, dy, layout, segments, None, None)
}

fn run_with<E: Element>(
    x: &[E],
    dy: &[f32],
    layout: HeadLayout,
    segments: &Segments,
    cap: Option<f32>,
    sinks: Option<&Weight>,
) -> (Vec<E>, Vec<f32>) {
    let values = sinks.map(Weight::read_f32);
    let attention = Attention {
        layout,
        segments,
        scale: 1.0 / (layout.head_dim as f32).sqrt(),
        cap,
        sinks: values.as_deref(),
    };
    let mut y = vec![E::round_from(f32::NAN); segments.tokens() * attention.out_width()];
    let mut log_sums = vec![f32::NAN; layout.heads * segments.tokens()];
    let mut dx = vec![f32::NAN; x.len()];
    attention.forward(x, &mut y, &mut log_sums);
    let saved = Saved {
        qkv: x,
        out: &y,
        d_out: dy,
        log_sums: &log_sums,
    };
    attention.backward(&saved, &mut dx);
    if let Some(sinks) = sinks {
        sinks.add_gradient(|_, d_sinks, accumulate| {
            attention.backward_sinks(&saved, d_sinks, accumulate);
        });
    }
    (y, dx)
}

fn run(x: &[f32], dy: &[f32], layout: HeadLayout, segments: &Segments) -> (Vec<f32>, Vec<f32>) {
    run_as::<f32>(x, dy, layout, segments)
}

#[test]
fn values_and_gradients_equal_the_reference() {
    for lengths in [vec![1], vec![300], vec![70, 1, 1, 130, 64, 3], vec![5; 40]] {
        for (heads, key_value_heads, head_dim) in [(4, 2, 8), (3, 3, 16), (6, 1, 4)] {
            let layout = HeadLayout {
                heads,
                key_value_heads,
                head_dim,
            };
            let segments = Segments::new(&lengths);
            let x = random_tensor(segments.tokens(), layout.width(), 1);
            check_op(
                &x,
                &TestWeights::new(&[]),
                &[],
                &|x, dy| run(x, dy, layout, &segments),
                &|x| reference(x, layout, &lengths),
            );
        }
    }
}

#[test]
fn windows_and_caps_equal_the_reference() {
    let layout = HeadLayout {
        heads: 4,
        key_value_heads: 2,
        head_dim: 8,
    };
    for lengths in [vec![300], vec![70, 1, 130, 64, 3], vec![5; 40]] {
        for (window, cap) in [
            (Some(1), None),
            (Some(7), Some(0.5)),
            (Some(90), None),
            (None, Some(2.0)),
        ] {
            let whole = Segments::new(&lengths);
            let segments = window.map_or_else(|| Segments::new(&lengths), |w| whole.windowed(w));
            let x = random_tensor(segments.tokens(), layout.width(), 1);
            check_op(
                &x,
                &TestWeights::new(&[]),
                &[],
                &|x, dy| run_with::<f32>(x, dy, layout, &segments, cap, None),
                &|x| reference_with(x, layout, &lengths, More { window, cap }, None),
            );
        }
    }
}

#[test]
fn sinks_and_their_gradients_equal_the_reference() {
    let layout = HeadLayout {
        heads: 4,
        key_value_heads: 2,
        head_dim: 8,
    };
    let weights = TestWeights::new(&[("sinks", &[4])]);
    let sinks = weights.trainable("sinks");
    for lengths in [vec![1], vec![300], vec![70, 1, 130, 64, 3], vec![5; 40]] {
        for window in [None, Some(7)] {
            let whole = Segments::new(&lengths);
            let segments = window.map_or_else(|| Segments::new(&lengths), |w| whole.windowed(w));
            let more = More { window, cap: None };
            check_op(
                &random_tensor(segments.tokens(), layout.width(), 1),
                &weights,
                &[],
                &|x, dy| run_with::<f32>(x, dy, layout, &segments, None, Some(&sinks)),
                &|x| reference_with(x, layout, &lengths, more, Some(&weights.variable("sinks"))),
            );
        }
    }
}

#[test]
fn bfloat16_gives_nearly_the_same_and_the_same_bits_for_any_number_of_threads() {
    let layout = HeadLayout {
        heads: 4,
        key_value_heads: 2,
        head_dim: 16,
    };
    // Odd lengths end within a pair of factors.
    for lengths in [vec![1], vec![301], vec![70, 1, 1, 131, 64, 3]] {
        let segments = Segments::new(&lengths);
        let tokens = segments.tokens();
        let x = random_values(tokens * layout.width(), 1);
        let x: Vec<bf16> = x.into_iter().map(bf16::from_f32).collect();
        let wide: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
        let dy = random_values(tokens * layout.heads * layout.head_dim, 2);
        let narrow = |threads| in_pool(threads, || run_as(&x, &dy, layout, &segments));
        let (y, dx) = narrow(1);
        assert_eq!(narrow(3), (y.clone(), dx.clone()));
        let y: Vec<f32> = y.iter().map(|y| y.to_f32()).collect();
        let (expected_y, expected_dx) = run(&wide, &dy, layout, &segments);
        for (found, expected) in [(y, expected_y), (dx, expected_dx)] {
            let norm = |values: &mut dyn Iterator<Item = f32>| {
                values.map(|x| f64::from(x * x)).sum::<f64>().sqrt()
            };
            let off = norm(&mut found.iter().zip(&expected).map(|(a, b)| a - b));
            let all = norm(&mut expected.iter().copied());
            assert!(off < 0.01 * all, "{lengths:?}: {off} of {all}");
        }
    }
}

#[test]
fn large_scores_stay_finite() {
    let layout = HeadLayout {
        heads: 1,
        key_value_heads: 1,
        head_dim: 4,
    };
    let x = (random_tensor(30, 12, 3) * 1e3).unwrap();
    let segments = Segments::new(&[30]);
    let (y, dx) = run(&flat(&x), &[1.0; 30 * 4], layout, &segments);
    assert!(y.iter().chain(&dx).all(|value| value.is_finite()));
}
