//! A layer of experts equals a plain reference, forward and backward.

use std::path::Path;
use std::sync::Arc;

use candle_core::{D, Result, Tensor};
use common::model::{Activation, ModelConfig};

use super::*;
use crate::engine::batch::Batch;
use crate::engine::buffer::Pool;
use crate::engine::model::layers::expert::ExpertLinear;
use crate::engine::model::layers::{BatchRopes, RopeTables};
use crate::engine::ops::clamped_swiglu::ClampedSwiglu;
use crate::engine::ops::projection::Linear;
use crate::engine::ops::segments::SegmentViews;
use crate::engine::ops::transposed_linear::TransposedLinear;
use crate::engine::testing::{TestWeights, check_op, config, largest_few, random_tensor};

const HIDDEN: usize = 20;
const EXPERTS: usize = 5;
/// One that no token goes through would have no gradient in the reference.
const TOKENS: usize = 150;

fn weights() -> TestWeights {
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("router".to_owned(), vec![EXPERTS, HIDDEN]),
        ("shared_gate".to_owned(), vec![1, HIDDEN]),
    ];
    for (name, width) in (0..EXPERTS)
        .map(|expert| (expert.to_string(), 12))
        .chain([("shared".to_owned(), 14)])
    {
        shapes.push((format!("{name}.gate"), vec![width, HIDDEN]));
        shapes.push((format!("{name}.up"), vec![width, HIDDEN]));
        shapes.push((format!("{name}.down"), vec![HIDDEN, width]));
    }
    let shapes: Vec<(&str, &[usize])> = shapes
        .iter()
        .map(|(name, shape)| (name.as_str(), &shape[..]))
        .collect();
    TestWeights::new(&shapes)
}

fn layer(weights: &TestWeights) -> Experts {
    let projection = |names: &[String]| {
        let linear = |name: &String| Linear {
            weight: weights.trainable(name),
            bias: None,
            lora: None,
        };
        Projection(names.iter().map(linear).collect())
    };
    let parts = |name: &str| {
        let gate_up = ["gate", "up"].map(|part| format!("{name}.{part}"));
        let down = format!("{name}.down");
        (projection(&gate_up), projection(&[down]))
    };
    let (gate_up, down) = parts("shared");
    Experts {
        norm: None,
        router: projection(&["router".to_owned()]),
        own_routing: None,
        routing: Routing {
            experts: EXPERTS,
            per_token: 2,
            normalises: true,
        },
        experts: (0..EXPERTS)
            .map(|expert| {
                let (gate_up, down) = parts(&expert.to_string());
                Expert {
                    gate_up: ExpertLinear::Apart(gate_up),
                    down: ExpertLinear::Apart(down),
                }
            })
            .collect(),
        shared: Some(SharedExpert {
            gate_up,
            down,
            gate: projection(&["shared_gate".to_owned()]),
            activation: Activation::Silu,
        }),
        gating: Gating::Halves(Activation::Silu),
    }
}

fn reference(x: &Tensor, weights: &TestWeights) -> Result<Tensor> {
    let product = |x: &Tensor, name: &str| x.matmul(&weights.variable(name).t()?);
    let expert = |name: &str| {
        let gate = product(x, &format!("{name}.gate"))?.silu()?;
        let h = (gate * product(x, &format!("{name}.up"))?)?;
        product(&h, &format!("{name}.down"))
    };
    let exp = product(x, "router")?.exp()?;
    let chosen = (&exp * largest_few(&exp, 2)?)?;
    let shares = chosen.broadcast_div(&chosen.sum_keepdim(D::Minus1)?)?;
    // sigmoid(g) = 1 / (1 + e^-g)
    let gate = (product(x, "shared_gate")?.neg()?.exp()? + 1.0)?.recip()?;
    let mut y = (x + expert("shared")?.broadcast_mul(&gate)?)?;
    for index in 0..EXPERTS {
        let share = shares.narrow(1, index, 1)?;
        y = (y + expert(&index.to_string())?.broadcast_mul(&share)?)?;
    }
    Ok(y)
}

/// Compares a layer, in value and in every gradient.
fn check(layer: &Experts, weights: &TestWeights, reference: &dyn Fn(&Tensor) -> Result<Tensor>) {
    let config = ModelConfig::parse(&config("LlamaForCausalLM"), Path::new("config.json"));
    let config = config.unwrap();
    let run = |x: &[f32], dy: &[f32]| {
        let batch = Batch::from_tokens(&[0; TOKENS], 1).unwrap();
        let segments = SegmentViews::new(batch.segments.clone(), &[], TOKENS);
        let tables = Arc::new(RopeTables::new(&config, TOKENS));
        let pass = Pass {
            batch: &batch,
            segments: &segments,
            ropes: &BatchRopes::new(tables, &batch.positions),
            mask: None,
            pool: &Pool::default(),
            own_inputs: None,
            router_loss: None,
            abandon: None,
        };
        let activations = layer.forward_saving::<f32>(x, pass);
        let y = layer.forward_output(x, &activations, pass).to_vec();
        let mut dx = dy.to_vec();
        layer.backward(x, activations, &mut dx, pass);
        (y, dx)
    };
    let x = (random_tensor(TOKENS, HIDDEN, 1) * 0.3).unwrap();
    check_op(&x, weights, &[], &run, reference);
}

#[test]
fn values_and_all_gradients_equal_the_reference() {
    let weights = weights();
    check(&layer(&weights), &weights, &|x| reference(x, &weights));
}

const WIDTH: usize = 12;
const CLAMPED: ClampedSwiglu = ClampedSwiglu {
    alpha: 1.7,
    limit: 0.8,
};

/// Weights and biases of fused experts, each of which is a tensor of its own here.
fn fused_weights() -> TestWeights {
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("router".to_owned(), vec![EXPERTS, HIDDEN]),
        ("router_bias".to_owned(), vec![EXPERTS]),
    ];
    for expert in 0..EXPERTS {
        shapes.push((format!("{expert}.gate_up"), vec![HIDDEN, 2 * WIDTH]));
        shapes.push((format!("{expert}.gate_up_bias"), vec![2 * WIDTH]));
        shapes.push((format!("{expert}.down"), vec![WIDTH, HIDDEN]));
        shapes.push((format!("{expert}.down_bias"), vec![HIDDEN]));
    }
    let shapes: Vec<(&str, &[usize])> = shapes
        .iter()
        .map(|(name, shape)| (name.as_str(), &shape[..]))
        .collect();
    TestWeights::new(&shapes)
}

fn fused_reference(x: &Tensor, weights: &TestWeights) -> Result<Tensor> {
    let product = |x: &Tensor, name: &str| {
        let y = x.matmul(&weights.variable(name))?;
        y.broadcast_add(&weights.variable(&format!("{name}_bias")))
    };
    let (alpha, limit) = (f64::from(CLAMPED.alpha), f64::from(CLAMPED.limit));
    let below = |x: &Tensor| (limit - x)?.relu()?.affine(-1.0, limit);
    let above = |x: &Tensor| (x + limit)?.relu()? - limit;
    let expert = |index: usize| {
        let pairs = product(x, &format!("{index}.gate_up"))?.reshape((TOKENS, WIDTH, 2))?;
        let column = |index: usize| pairs.narrow(2, index, 1)?.squeeze(2);
        let (g, u) = (below(&column(0)?)?, above(&below(&column(1)?)?)?);
        let s = ((&g * -alpha)?.exp()? + 1.0)?.recip()?;
        let h = ((u + 1.0)? * (g * s)?)?;
        product(&h, &format!("{index}.down"))
    };
    let logits = x.matmul(&weights.variable("router").t()?)?;
    let exp = logits
        .broadcast_add(&weights.variable("router_bias"))?
        .exp()?;
    let chosen = (&exp * largest_few(&exp, 2)?)?;
    let shares = chosen.broadcast_div(&chosen.sum_keepdim(D::Minus1)?)?;
    let mut y = x.clone();
    for index in 0..EXPERTS {
        y = (y + expert(index)?.broadcast_mul(&shares.narrow(1, index, 1)?)?)?;
    }
    Ok(y)
}

#[test]
fn fused_experts_with_biases_equal_the_reference() {
    let weights = fused_weights();
    let linear = |name: String| {
        ExpertLinear::Fused(Box::new(TransposedLinear {
            weight: weights.trainable(&name),
            bias: weights.trainable(&format!("{name}_bias")),
            lora: None,
        }))
    };
    let layer = Experts {
        norm: None,
        router: Projection(vec![Linear {
            weight: weights.trainable("router"),
            bias: Some(weights.trainable("router_bias")),
            lora: None,
        }]),
        own_routing: None,
        routing: Routing {
            experts: EXPERTS,
            per_token: 2,
            normalises: true,
        },
        experts: (0..EXPERTS)
            .map(|expert| Expert {
                gate_up: linear(format!("{expert}.gate_up")),
                down: linear(format!("{expert}.down")),
            })
            .collect(),
        shared: None,
        gating: Gating::Alternating(CLAMPED),
    };
    check(&layer, &weights, &|x| fused_reference(x, &weights));
}
