//! A layer of all experts on the GPU beside plain products.

use super::*;
use crate::engine::cuda::sums::SlotGradient;
use crate::engine::cuda::testing::{assert_near, gpu};
use crate::engine::ops::routing::Routing;
use crate::engine::testing::random_values;

const EXPERTS: usize = 4;
const INPUT: usize = 24;
const OUT: usize = 40;

/// Tokens of which none goes through the third expert.
fn routes(gpu: &Gpu) -> Routes {
    let routing = Routing {
        experts: EXPERTS,
        per_token: 2,
        normalises: false,
    };
    let mut logits = random_values(50 * EXPERTS, 5);
    let of_third = logits.iter_mut().skip(2).step_by(EXPERTS);
    of_third.for_each(|logit| *logit = -100.0);
    let mut logits = gpu.upload(&logits).unwrap();
    Routes::new(gpu, routing, &mut logits.as_view_mut()).unwrap()
}

/// The weight of an output and an input of an expert.
fn weight(weights: &[f32], stored: Stored, expert: usize, out: usize, input: usize) -> f32 {
    let own = &weights[expert * INPUT * OUT..];
    match stored {
        Stored::OutByIn => own[out * INPUT + input],
        Stored::InByOut => own[input * OUT + out],
    }
}

/// Zeros in the rows of nobody, as gathered rows have them.
fn input(gpu: &Gpu, routes: &Routes, width: usize, seed: u64) -> Vec<f32> {
    let mut tokens = vec![0; routes.rows()];
    gpu.read(&routes.tokens(), &mut tokens).unwrap();
    let mut x = random_values(routes.rows() * width, seed);
    for (row, token) in x.chunks_exact_mut(width).zip(&tokens) {
        if *token == u32::MAX {
            row.fill(0.0);
        }
    }
    x
}

#[test]
fn values_and_gradients_are_those_of_each_expert() {
    let Some(gpu) = gpu() else { return };
    let routes = routes(gpu);
    let rows = routes.rows();
    assert_eq!(routes.counts()[2], 0);
    let weights = random_values(EXPERTS * INPUT * OUT, 1);
    let biases = random_values(EXPERTS * OUT, 2);
    let (x, dy) = (input(gpu, &routes, INPUT, 3), input(gpu, &routes, OUT, 4));
    let [x_on_gpu, dy_on_gpu] = [&x, &dy].map(|values| gpu.upload(values).unwrap());
    let flat = gpu.upload(&[&weights[..], &biases].concat()).unwrap();
    for (stored, parts) in [
        (Stored::OutByIn, 2),
        (Stored::OutByIn, 1),
        (Stored::InByOut, 1),
    ] {
        let scalars = INPUT * OUT / parts;
        let range = |offset: usize, scalars: usize| Some(FlatRange { offset, scalars });
        let ranges = (0..EXPERTS * parts).map(|number| range(number * scalars, scalars));
        let own = ExpertBiases {
            values: gpu.take(biases.len()).unwrap(),
            range: range(weights.len(), biases.len()),
        };
        let sizes = ExpertSizes {
            experts: EXPERTS,
            input: INPUT,
            out: OUT,
            stored,
            parts,
        };
        let mut layer = ExpertLinear::<f32>::new(gpu, sizes, ranges.collect(), Some(own)).unwrap();
        layer.refresh(gpu, &flat).unwrap();

        let mut y = gpu.take::<f32>(rows * OUT).unwrap();
        let out = &mut y.as_view_mut();
        layer
            .forward(gpu, &x_on_gpu.as_view(), out, &routes)
            .unwrap();
        let mut dx = gpu.take::<f32>(rows * INPUT).unwrap();
        let out = &mut dx.as_view_mut();
        layer
            .backward_input(gpu, &dy_on_gpu.as_view(), out, &routes)
            .unwrap();
        let mut slot = SlotGradient(gpu.upload(&vec![f32::NAN; flat.len()]).unwrap());
        let factors = (&x_on_gpu.as_view(), &dy_on_gpu.as_view());
        layer
            .backward_weights(gpu, factors, &routes, &mut slot)
            .unwrap();

        let (mut y_plain, mut dx_plain) = (vec![0.0; rows * OUT], vec![0.0; rows * INPUT]);
        let mut gradient = vec![0.0; flat.len()];
        for group in routes.groups() {
            for row in group.first..group.first + group.rows {
                for o in 0..OUT {
                    let d = dy[row * OUT + o];
                    let bias = group.expert * OUT + o;
                    y_plain[row * OUT + o] = biases[bias];
                    gradient[weights.len() + bias] += d;
                    for i in 0..INPUT {
                        let w = weight(&weights, stored, group.expert, o, i);
                        y_plain[row * OUT + o] += w * x[row * INPUT + i];
                        dx_plain[row * INPUT + i] += w * d;
                        let at = match stored {
                            Stored::OutByIn => o * INPUT + i,
                            Stored::InByOut => i * OUT + o,
                        };
                        gradient[group.expert * INPUT * OUT + at] += d * x[row * INPUT + i];
                    }
                }
            }
        }
        let what = |what: &str| format!("{what}, {stored:?}, {parts} parts");
        let read = |buffer: &DeviceBuffer<f32>, length| gpu.download(buffer, length).unwrap();
        assert_near(&what("y"), &read(&y, y_plain.len()), &y_plain, 1e-5);
        assert_near(&what("dx"), &read(&dx, dx_plain.len()), &dx_plain, 1e-5);
        let found = read(&slot.0, gradient.len());
        assert_near(&what("gradient"), &found, &gradient, 1e-5);
    }
}
