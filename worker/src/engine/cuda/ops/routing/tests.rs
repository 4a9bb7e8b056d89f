//! Routing on the GPU beside that on processors: choices, rows, weights and gradients.

use super::*;
use crate::engine::cuda::testing::{assert_near, gpu};
use crate::engine::ops::element::Element;
use crate::engine::ops::routing as plain;
use crate::engine::testing::random_values;
use half::bf16;

fn routing(experts: usize, per_token: usize, normalises: bool) -> Routing {
    Routing {
        experts,
        per_token,
        normalises,
    }
}

/// What is on the GPU, as the processor reads it.
struct Found {
    probabilities: Vec<f32>,
    routes: Routes,
    tokens: Vec<u32>,
    experts: Vec<u32>,
    weights: Vec<f32>,
    of_token: Vec<u32>,
}

fn route(gpu: &Gpu, routing: Routing, logits: &[f32]) -> Found {
    let mut probabilities = gpu.upload(logits).unwrap();
    let routes = Routes::new(gpu, routing, &mut probabilities.as_view_mut()).unwrap();
    let rows = routes.rows();
    Found {
        probabilities: gpu.download(&probabilities, logits.len()).unwrap(),
        tokens: gpu.download(&routes.tokens, rows).unwrap(),
        experts: gpu.download(&routes.experts, rows).unwrap(),
        weights: gpu.download(&routes.weights, rows).unwrap(),
        of_token: gpu
            .download(&routes.of_token, routes.of_token().len())
            .unwrap(),
        routes,
    }
}

/// Compares rows and weights with those that the processor makes of the same probabilities.
fn check_rows(routing: Routing, found: &Found) {
    let expected = routing.routes(&found.probabilities);
    assert_eq!(found.routes.counts(), expected.counts());
    for (own, group) in found.routes.groups().zip(expected.groups()) {
        assert_eq!(own.rows % EXPERT_ROWS_MULTIPLE, 0);
        let rows = own.first..own.first + own.rows;
        let there = own.first..own.first + group.tokens.len();
        assert_eq!(found.tokens[there.clone()], *group.tokens, "{own:?}");
        let weights = &found.weights[there.clone()];
        assert_near("weights", weights, group.weights, 1e-6);
        let behind = there.end..rows.end;
        assert!(found.tokens[behind.clone()].iter().all(|t| *t == u32::MAX));
        assert!(found.weights[behind].iter().all(|weight| *weight == 0.0));
        let experts = &found.experts[rows];
        assert!(experts.iter().all(|expert| *expert == own.expert as u32));
    }
    let pairs = found.of_token.chunks_exact(routing.per_token);
    for (token, rows) in pairs.enumerate() {
        assert!(rows.is_sorted(), "experts ascend, and so do their rows");
        let own = rows.iter().map(|row| found.tokens[*row as usize]);
        assert!(own.eq(vec![token as u32; routing.per_token]));
    }
}

#[test]
fn rows_and_weights_are_those_of_the_processor() {
    let Some(gpu) = gpu() else { return };
    for (tokens, experts, per_token) in [
        (1, 1, 1),
        (7, 5, 2),
        (300, 5, 5),
        (257, 33, 4),
        (40, 128, 8),
        (3, 512, 10),
    ] {
        for normalises in [false, true] {
            let routing = routing(experts, per_token, normalises);
            let logits = random_values(tokens * experts, 1);
            let found = route(gpu, routing, &logits);
            let mut expected = logits;
            routing.softmax(&mut expected);
            assert_near("probabilities", &found.probabilities, &expected, 1e-6);
            check_rows(routing, &found);
        }
    }
}

#[test]
fn of_equal_experts_the_first_are_chosen() {
    let Some(gpu) = gpu() else { return };
    let routing = routing(40, 3, true);
    let mut logits = vec![0.0f32; 3 * 40];
    // The largest twice, in two turns of a warp; and a row that is no numbers.
    (logits[40 + 39], logits[40 + 2]) = (2.0, 2.0);
    logits[80] = f32::NAN;
    let found = route(gpu, routing, &logits);
    let expected: [&[usize]; 3] = [&[0, 1, 2], &[0, 2, 39], &[0, 1, 2]];
    for (token, rows) in found.of_token.chunks_exact(3).enumerate() {
        let experts = rows.iter().map(|row| found.experts[*row as usize] as usize);
        assert!(experts.eq(expected[token].iter().copied()), "token {token}");
    }
}

#[test]
fn an_expert_may_have_all_tokens_and_others_none() {
    let Some(gpu) = gpu() else { return };
    let routing = routing(6, 1, false);
    let mut logits = vec![0.0f32; 100 * 6];
    logits.iter_mut().skip(4).step_by(6).for_each(|x| *x = 1.0);
    let found = route(gpu, routing, &logits);
    assert_eq!(found.routes.counts(), [0, 0, 0, 0, 100, 0]);
    assert_eq!(found.routes.rows(), 112);
    check_rows(routing, &found);
}

#[test]
fn gradients_are_those_of_the_processor() {
    let Some(gpu) = gpu() else { return };
    let (tokens, experts) = (70, 37);
    let of_loss = random_values(experts, 3);
    for (normalises, has_loss) in [(false, false), (true, false), (false, true), (true, true)] {
        let routing = routing(experts, 4, normalises);
        let found = route(gpu, routing, &random_values(tokens * experts, 1));
        let expected = routing.routes(&found.probabilities);
        // The same in rows without those of nobody.
        let d_rows = random_values(expected.rows(), 2);
        let mut d_weights = vec![f32::NAN; found.routes.rows()];
        for (own, group) in found.routes.groups().zip(expected.groups()) {
            let rows = &d_rows[group.rows.clone()];
            d_weights[own.first..own.first + rows.len()].copy_from_slice(rows);
        }
        let mut d_logits = vec![0.0; tokens * experts];
        let of_loss = has_loss.then_some(&of_loss[..]);
        let routes: (&plain::Routes, _) = (&expected, &d_rows[..]);
        routing.backward(&found.probabilities, routes, of_loss, &mut d_logits);
        assert_near(
            "d_logits",
            &backward::<f32>(gpu, &found, &d_weights, of_loss),
            &d_logits,
            1e-5,
        );
        let rounded = backward::<bf16>(gpu, &found, &d_weights, of_loss);
        assert_near("d_logits", &rounded, &d_logits, 1e-2);
    }
}

fn backward<E: GpuElement + Element>(
    gpu: &Gpu,
    found: &Found,
    d_weights: &[f32],
    of_loss: Option<&[f32]>,
) -> Vec<f32> {
    let probabilities = gpu.upload(&found.probabilities).unwrap();
    let d_weights = gpu.upload(d_weights).unwrap();
    let of_loss = of_loss.map(|of_loss| gpu.upload(of_loss).unwrap());
    let mut d_logits = gpu.take::<E>(found.probabilities.len()).unwrap();
    found
        .routes
        .backward(
            gpu,
            &probabilities.as_view(),
            &d_weights.as_view(),
            of_loss.as_ref().map(DeviceBuffer::as_view).as_ref(),
            &mut d_logits.as_view_mut(),
        )
        .unwrap();
    let d_logits = gpu.download(&d_logits, found.probabilities.len()).unwrap();
    d_logits.into_iter().map(Element::wide).collect()
}

#[test]
fn probabilities_are_summed_by_expert() {
    let Some(gpu) = gpu() else { return };
    let probabilities = random_values(600 * 5, 1);
    let on_gpu = gpu.upload(&probabilities).unwrap();
    let found = probability_sums(gpu, &on_gpu.as_view(), 5).unwrap();
    for (expert, found) in found.iter().enumerate() {
        let of_expert = probabilities.iter().skip(expert).step_by(5);
        let sum: f64 = of_expert.map(|p| f64::from(*p)).sum();
        assert!((found - sum).abs() < 1e-9, "{found} instead of {sum}");
    }
}
