//! Projections beside plain references.

use super::*;
use crate::engine::ops::dora::Magnitudes;
use crate::engine::testing::{
    TestWeights, assert_close, check_op, flat, random_tensor, random_values,
};
use candle_core::{Device, Result, Tensor};
use half::bf16;

fn reference(x: &Tensor, weights: &TestWeights, layer: &str, lora: bool) -> Result<Tensor> {
    let variable = |name: &str| weights.variable(&format!("{layer}.{name}"));
    let y = x
        .matmul(&variable("w").t()?)?
        .broadcast_add(&variable("bias"))?;
    match lora {
        false => Ok(y),
        true => y + (x.matmul(&variable("a").t()?)?.matmul(&variable("b").t()?)? * 0.5)?,
    }
}

fn weights(depth: usize) -> TestWeights {
    TestWeights::new(&[
        ("p.w", &[70, depth]),
        ("p.bias", &[70]),
        ("p.a", &[3, depth]),
        ("p.b", &[70, 3]),
        ("q.w", &[20, depth]),
        ("q.bias", &[20]),
        ("q.a", &[4, depth]),
        ("q.b", &[20, 4]),
    ])
}

fn lora(weights: &TestWeights, layer: &str, dropout: f64) -> Lora {
    Lora {
        a: weights.trainable(&format!("{layer}.a")),
        b: weights.trainable(&format!("{layer}.b")),
        scale: 0.5,
        trained: usize::MAX,
        dropout,
        module: 1,
        magnitudes: None,
        bias: None,
    }
}

/// Forward and backward, as a decoder layer does it.
fn run<E: Element>(
    projection: &Projection,
    x: &[f32],
    dy: &[f32],
    tokens: usize,
    mask: Option<MaskKey>,
) -> (Vec<f32>, Vec<f32>) {
    let pool = Pool::default();
    let context = Context {
        tokens,
        mask,
        pool: &pool,
    };
    let narrow = |values: &[f32]| values.iter().map(|x| E::round_from(*x)).collect::<Vec<E>>();
    let (narrow_x, narrow_dy) = (narrow(x), narrow(dy));
    let mut y = vec![E::zeroed(); tokens * projection.out()];
    let mut dx = vec![f32::NAN; x.len()];
    let u = projection.forward(&narrow_x, &mut y, context);
    let du = projection.backward_input(&narrow_dy, &mut dx, context);
    if projection.learns() {
        projection.backward_weights(&narrow_x, &u, &narrow_dy, &du, context);
    }
    (y.iter().map(|y| y.wide()).collect(), dx)
}

#[test]
fn trainable_layers_side_by_side_equal_the_reference() {
    let weights = weights(50);
    let linear = |layer: &str| Linear {
        weight: weights.trainable(&format!("{layer}.w")),
        bias: Some(weights.trainable(&format!("{layer}.bias"))),
        lora: None,
    };
    let projection = Projection(vec![linear("p"), linear("q")]);
    check_op(
        &random_tensor(90, 50, 1),
        &weights,
        &["p.a", "p.b", "q.a", "q.b"],
        &|x, dy| run::<f32>(&projection, x, dy, 90, None),
        &|x| {
            let parts = ["p", "q"].map(|layer| reference(x, &weights, layer, false).unwrap());
            Tensor::cat(&parts, 1)
        },
    );
}

fn adapted(weights: &TestWeights, dropout: f64) -> Projection {
    let linear = |layer: &str| Linear {
        weight: weights.frozen(&format!("{layer}.w")),
        bias: Some(weights.frozen(&format!("{layer}.bias"))),
        lora: Some(lora(weights, layer, dropout)),
    };
    Projection(vec![linear("p"), linear("q")])
}

#[test]
fn adapted_layers_equal_the_reference_and_their_base_gets_no_gradient() {
    let weights = weights(50);
    let projection = adapted(&weights, 0.0);
    check_op(
        &random_tensor(91, 50, 1),
        &weights,
        &["p.w", "p.bias", "q.w", "q.bias"],
        &|x, dy| run::<f32>(&projection, x, dy, 91, None),
        &|x| {
            let parts = ["p", "q"].map(|layer| reference(x, &weights, layer, true).unwrap());
            Tensor::cat(&parts, 1)
        },
    );
}

#[test]
fn a_bfloat16_base_gives_nearly_the_same() {
    let weights = weights(50);
    let linear = |layer: &str| Linear {
        weight: weights.frozen_bf16(&format!("{layer}.w")),
        bias: Some(weights.frozen(&format!("{layer}.bias"))),
        lora: Some(lora(&weights, layer, 0.0)),
    };
    let narrow = Projection(vec![linear("p"), linear("q")]);
    let wide = adapted(&weights, 0.0);
    let (x, dy) = (random_values(33 * 50, 1), random_values(33 * 90, 2));
    let gradients = |run: &dyn Fn() -> (Vec<f32>, Vec<f32>)| {
        weights.reset_gradients();
        let (y, dx) = run();
        [
            y,
            dx,
            weights.gradients(&["p.w", "p.bias", "q.w", "q.bias"]),
        ]
    };
    let narrow = gradients(&|| run::<bf16>(&narrow, &x, &dy, 33, None));
    let wide = gradients(&|| run::<f32>(&wide, &x, &dy, 33, None));
    for (narrow, wide) in narrow.iter().zip(&wide) {
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
        let off = norm(&mut narrow.iter().zip(wide).map(|(a, b)| a - b));
        assert!(off.sqrt() < 0.01 * norm(&mut wide.iter().copied()).sqrt());
    }
}

#[test]
fn a_residual_passes_its_value() {
    let weights = weights(70);
    let projection = Projection(vec![Linear {
        weight: weights.frozen("p.w"),
        bias: Some(weights.frozen("p.bias")),
        lora: Some(lora(&weights, "p", 0.0)),
    }]);
    check_op(
        &random_tensor(33, 70, 1),
        &weights,
        &["p.w", "p.bias", "q.w", "q.bias", "q.a", "q.b"],
        &|x, dy| {
            let (_, mut dx) = run::<f32>(&projection, x, dy, 33, None);
            crate::engine::ops::add_in_place(&mut dx, dy);
            let pool = Pool::default();
            let context = Context {
                tokens: 33,
                mask: None,
                pool: &pool,
            };
            let mut y = vec![f32::NAN; dy.len()];
            projection.forward_onto(x, x, &mut y, context);
            (y, dx)
        },
        &|x| x + reference(x, &weights, "p", true)?,
    );
}

#[test]
fn dropout_is_drawn_from_its_key_and_keeps_the_mean() {
    let weights = weights(50);
    let key = |slot| MaskKey {
        seed: 1,
        step: 2,
        slot,
        part: 0,
    };
    let (x, dy) = (random_values(90 * 50, 1), vec![0.0; 90 * 90]);
    let run = |dropout, mask| run::<f32>(&adapted(&weights, dropout), &x, &dy, 90, mask).0;
    let dropped = run(0.5, Some(key(0)));
    assert_eq!(run(0.5, Some(key(0))), dropped);
    assert_ne!(run(0.5, Some(key(1))), dropped);
    assert_eq!(run(0.5, None), run(0.0, Some(key(0))));
    let mean_over_masks: Vec<f32> = (0..400).map(|slot| run(0.5, Some(key(slot)))[7]).collect();
    let mean = mean_over_masks.iter().sum::<f32>() / 400.0;
    assert!((mean - run(0.0, None)[7]).abs() < 1.5, "{mean}");
}

#[test]
fn dropout_s_gradient_goes_through_its_mask() {
    // x -> y is linear for one mask, so dx is exact by differences.
    let weights = weights(50);
    let projection = adapted(&weights, 0.4);
    let mask = Some(MaskKey {
        seed: 3,
        step: 1,
        slot: 0,
        part: 0,
    });
    let (x, direction) = (random_values(70 * 50, 1), random_values(70 * 50, 2));
    let moved: Vec<f32> = x.iter().zip(&direction).map(|(x, d)| x + d).collect();
    let run = |x: &[f32]| run::<f32>(&projection, x, &[1.0; 70 * 90], 70, mask);
    let ((y, dx), (moved, _)) = (run(&x), run(&moved));
    let sum = |values: &mut dyn Iterator<Item = f32>| values.map(f64::from).sum::<f64>();
    let expected = sum(&mut moved.iter().zip(&y).map(|(a, b)| a - b));
    let found = sum(&mut dx.iter().zip(&direction).map(|(a, b)| a * b));
    assert!((expected - found).abs() < 1e-2, "{expected} {found}");
}

/// The gradient of A is that of the dropped input: zero where a whole column was dropped.
#[test]
fn dropout_s_weight_gradient_sees_the_dropped_input() {
    let weights = weights(50);
    let projection = adapted(&weights, 0.5);
    let key = |slot| {
        Some(MaskKey {
            seed: 3,
            step: 1,
            slot,
            part: 0,
        })
    };
    let (x, dy) = (random_values(50, 1), random_values(90, 2));
    let gradient = |mask| {
        weights.reset_gradients();
        run::<f32>(&projection, &x, &dy, 1, mask);
        weights.gradients(&["p.w", "p.bias", "q.w", "q.bias"])
    };
    // In layout order A of p comes first: three rows of 50 columns, of which about half are dropped.
    let dropped = |gradient: &[f32]| gradient[..150].iter().filter(|g| **g == 0.0).count();
    let count = dropped(&gradient(key(0)));
    assert!((30..120).contains(&count) && count % 3 == 0, "{count}");
    assert_ne!(gradient(key(0)), gradient(key(1)));
    assert_eq!(dropped(&gradient(None)), 0);
}

/// A layer with magnitudes beside one without an adapter.
fn magnitude_weights(depth: usize) -> TestWeights {
    TestWeights::new(&[
        ("p.w", &[70, depth]),
        ("p.bias", &[70]),
        ("p.a", &[3, depth]),
        ("p.b", &[70, 3]),
        ("p.m", &[70]),
        ("q.w", &[20, depth]),
        ("q.bias", &[20]),
    ])
}

const FROZEN: [&str; 4] = ["p.w", "p.bias", "q.w", "q.bias"];

fn with_magnitudes(
    weights: &TestWeights,
    dropout: f64,
    frozen: impl Fn(&str) -> Weight,
) -> Projection {
    let p = Linear {
        weight: frozen("p.w"),
        bias: Some(weights.frozen("p.bias")),
        lora: Some(Lora {
            magnitudes: Some(Magnitudes::new(weights.trainable("p.m"))),
            ..lora(weights, "p", dropout)
        }),
    };
    let q = Linear {
        weight: frozen("q.w"),
        bias: Some(weights.frozen("q.bias")),
        lora: None,
    };
    Projection(vec![p, q])
}

/// `g · (x (W + s B A)ᵀ) + bias`, with norms that get no gradient.
fn magnitude_reference(x: &Tensor, weights: &TestWeights) -> Result<Tensor> {
    let variable = |name: &str| weights.variable(&format!("p.{name}"));
    let adapted = (variable("w") + (variable("b").matmul(&variable("a"))? * 0.5)?)?;
    let norms = adapted.sqr()?.sum(1)?.sqrt()?.detach();
    let gains = (variable("m") / norms)?;
    x.matmul(&adapted.t()?)?
        .broadcast_mul(&gains)?
        .broadcast_add(&variable("bias"))
}

/// As gate and up of an expert have one.
#[test]
fn an_adapter_may_be_of_several_layers_side_by_side() {
    let weights = TestWeights::new(&[
        ("p.w", &[70, 50]),
        ("q.w", &[20, 50]),
        ("p.a", &[3, 50]),
        ("p.b", &[90, 3]),
    ]);
    let linear = |name: &str, lora| Linear {
        weight: weights.frozen(name),
        bias: None,
        lora,
    };
    let projection = Projection(vec![
        linear("p.w", Some(lora(&weights, "p", 0.0))),
        linear("q.w", None),
    ]);
    check_op(
        &random_tensor(91, 50, 1),
        &weights,
        &["p.w", "q.w"],
        &|x, dy| run::<f32>(&projection, x, dy, 91, None),
        &|x| {
            let w = Tensor::cat(&[&weights.variable("p.w"), &weights.variable("q.w")], 0)?;
            let update = (weights.variable("p.b").matmul(&weights.variable("p.a"))? * 0.5)?;
            x.matmul(&(w + update)?.t()?)
        },
    );
}

#[test]
fn layers_with_magnitudes_equal_the_reference() {
    let weights = magnitude_weights(50);
    let projection = with_magnitudes(&weights, 0.0, |name| weights.frozen(name));
    check_op(
        &random_tensor(91, 50, 1),
        &weights,
        &FROZEN,
        &|x, dy| run::<f32>(&projection, x, dy, 91, None),
        &|x| {
            let parts = [
                magnitude_reference(x, &weights)?,
                reference(x, &weights, "q", false)?,
            ];
            Tensor::cat(&parts, 1)
        },
    );
}

#[test]
fn a_residual_passes_magnitudes_and_the_low_rank_gradient_is_the_same_alone() {
    let weights = magnitude_weights(70);
    let mut projection = with_magnitudes(&weights, 0.0, |name| weights.frozen(name));
    projection.0.truncate(1);
    let (x, pool) = (random_tensor(33, 70, 1), Pool::default());
    let context = Context {
        tokens: 33,
        mask: None,
        pool: &pool,
    };
    let values = flat(&x);
    let mut y = vec![f32::NAN; 33 * 70];
    projection.forward_onto(&values, &values, &mut y, context);
    let expected = (&x + magnitude_reference(&x, &weights).unwrap()).unwrap();
    let expected = flat(&expected);
    assert_close("onto", &y, &expected);
    let (dy, mut dx) = (random_values(33 * 70, 2), vec![0.0; 33 * 70]);
    let both = projection
        .backward_input(&dy[..], &mut dx, context)
        .unwrap();
    let alone = projection.backward_low_rank(&dy[..], context).unwrap();
    assert_eq!(both[..], alone[..]);
}

#[test]
fn magnitudes_on_a_bfloat16_base_give_nearly_the_same() {
    let weights = magnitude_weights(50);
    let wide = with_magnitudes(&weights, 0.0, |name| weights.frozen(name));
    let narrow = with_magnitudes(&weights, 0.0, |name| weights.frozen_bf16(name));
    let (x, dy) = (random_values(33 * 50, 1), random_values(33 * 90, 2));
    let all = |run: &dyn Fn() -> (Vec<f32>, Vec<f32>)| {
        weights.reset_gradients();
        let (y, dx) = run();
        [y, dx, weights.gradients(&FROZEN)]
    };
    let wide = all(&|| run::<f32>(&wide, &x, &dy, 33, None));
    let narrow = all(&|| run::<bf16>(&narrow, &x, &dy, 33, None));
    for (narrow, wide) in narrow.iter().zip(&wide) {
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
        let off = norm(&mut narrow.iter().zip(wide).map(|(a, b)| a - b));
        assert!(off.sqrt() < 0.01 * norm(&mut wide.iter().copied()).sqrt());
    }
}

/// What a mask of [`lora`]'s module leaves of an input of 50 columns: what two unit matrices make of it.
fn what_is_left(x: &[f32], mask: Option<MaskKey>) -> Vec<f32> {
    let weights = TestWeights::new(&[("e.a", &[50, 50]), ("e.b", &[50, 50]), ("e.w", &[50, 50])]);
    let unit: Vec<f32> = (0..50 * 50)
        .map(|index| f32::from(u8::from(index % 51 == 0)))
        .collect();
    for name in ["e.a", "e.b"] {
        weights.trainable(name).set(&unit);
    }
    weights.trainable("e.w").set(&[0.0; 50 * 50]);
    let identity = Lora {
        scale: 1.0,
        ..lora(&weights, "e", 0.4)
    };
    let projection = Projection(vec![Linear {
        weight: weights.trainable("e.w"),
        bias: None,
        lora: Some(identity),
    }]);
    run::<f32>(&projection, x, &vec![0.0; x.len()], 70, mask).0
}

/// With a mask, x -> y and m -> y are linear: gradients are exact by differences. The part without magnitudes is LoRA's.
#[test]
fn dropped_inputs_of_magnitudes_have_the_gradients_of_their_differences() {
    let weights = magnitude_weights(50);
    let projection = with_magnitudes(&weights, 0.4, |name| weights.frozen(name));
    let mask = Some(MaskKey {
        seed: 3,
        step: 1,
        slot: 0,
        part: 0,
    });
    let (x, direction) = (random_values(70 * 50, 1), random_values(70 * 50, 2));
    let dy = random_values(70 * 90, 4);
    let moved: Vec<f32> = x.iter().zip(&direction).map(|(x, d)| x + d).collect();
    let sum = |values: &mut dyn Iterator<Item = f32>| values.map(f64::from).sum::<f64>();
    let change = |from: &[f32], to: &[f32]| {
        sum(&mut to
            .iter()
            .zip(from)
            .zip(&dy)
            .map(|((b, a), dy)| (b - a) * dy))
    };
    weights.reset_gradients();
    let (y, dx) = run::<f32>(&projection, &x, &dy, 70, mask);
    let gradients = weights.gradients(&FROZEN);
    let (after, _) = run::<f32>(&projection, &moved, &dy, 70, mask);
    let found = sum(&mut dx.iter().zip(&direction).map(|(a, b)| a * b));
    let expected = change(&y, &after);
    assert!(
        (expected - found).abs() < 1e-3 * expected.abs().max(1.0),
        "{expected} {found}"
    );

    let magnitudes = projection.0[0].lora.as_ref().unwrap().magnitudes.clone();
    let magnitudes = magnitudes.unwrap().weight;
    let (old, shift) = (magnitudes.read_f32().to_vec(), random_values(70, 5));
    let new: Vec<f32> = old.iter().zip(&shift).map(|(m, d)| m + d).collect();
    magnitudes.set(&new);
    let (after, _) = run::<f32>(&projection, &x, &dy, 70, mask);
    // In layout order: a, b, bias, m.
    let first = 3 * 50 + 70 * 3 + 70;
    let of_m = &gradients[first..first + 70];
    let found = sum(&mut of_m.iter().zip(&shift).map(|(a, b)| a * b));
    let expected = change(&y, &after);
    assert!(
        (expected - found).abs() < 1e-3 * expected.abs().max(1.0),
        "{expected} {found}"
    );
    assert_ne!(y, run::<f32>(&projection, &x, &dy, 70, None).0);

    // As PEFT has it: the base reads the input whole, and all that the gains change of it reads what is left.
    let dropped = what_is_left(&x, mask);
    let variable = |name: &str| weights.variable(&format!("p.{name}"));
    let of = |values: &[f32]| Tensor::from_slice(values, (70, 50), &Device::Cpu).unwrap();
    let (whole, left) = (of(&x), of(&dropped));
    let expected = || -> Result<Tensor> {
        let change = (variable("b").matmul(&variable("a"))? * 0.5)?;
        let norms = (variable("w") + &change)?.sqr()?.sum(1)?.sqrt()?;
        let gains = (Tensor::from_slice(&new, 70, &Device::Cpu)? / norms)?;
        let base = whole
            .matmul(&variable("w").t()?)?
            .broadcast_add(&variable("bias"))?;
        let update = left.matmul(&change.t()?)?;
        let again = (left.matmul(&variable("w").t()?)? + &update)?;
        (base + update)? + again.broadcast_mul(&(gains - 1.0)?)?
    };
    let first = Tensor::from_slice(&after, (70, 90), &Device::Cpu).unwrap();
    let first = flat(&first.narrow(1, 0, 70).unwrap().contiguous().unwrap());
    assert_close("formula", &first, &flat(&expected().unwrap()));

    // With gains of one nothing but LoRA is left.
    let w = weights.variable("p.w");
    let change = weights.variable("p.b").matmul(&weights.variable("p.a"));
    let norms = (w + (change.unwrap() * 0.5).unwrap()).unwrap();
    let norms = norms.sqr().unwrap().sum(1).unwrap().sqrt().unwrap();
    magnitudes.set(&flat(&norms));
    let (with, _) = run::<f32>(&projection, &x, &dy, 70, mask);
    let mut plain = projection.clone();
    plain.0[0].lora.as_mut().unwrap().magnitudes = None;
    let (without, _) = run::<f32>(&plain, &x, &dy, 70, mask);
    assert_close("gains of one", &with, &without);
}

#[test]
fn biases_of_linears_and_of_their_adapters_are_trained() {
    let weights = TestWeights::new(&[
        ("p.w", &[70, 50]),
        ("p.bias", &[70]),
        ("p.a", &[3, 50]),
        ("p.b", &[70, 3]),
        ("p.bb", &[70]),
        ("q.w", &[20, 50]),
        ("q.bias", &[20]),
    ]);
    let p = Linear {
        weight: weights.frozen("p.w"),
        bias: Some(weights.trainable("p.bias")),
        lora: Some(Lora {
            bias: Some(weights.trainable("p.bb")),
            ..lora(&weights, "p", 0.0)
        }),
    };
    let q = Linear {
        weight: weights.frozen("q.w"),
        bias: Some(weights.trainable("q.bias")),
        lora: None,
    };
    let projection = Projection(vec![p, q]);
    check_op(
        &random_tensor(91, 50, 1),
        &weights,
        &["p.w", "q.w"],
        &|x, dy| run::<f32>(&projection, x, dy, 91, None),
        &|x| {
            let added = (weights.variable("p.bb") * 0.5)?;
            let p = reference(x, &weights, "p", true)?.broadcast_add(&added)?;
            Tensor::cat(&[p, reference(x, &weights, "q", false)?], 1)
        },
    );
}
