//! Rows of experts on the GPU beside plain loops.

use half::bf16;

use super::*;
use crate::engine::cuda::gpu::DeviceBuffer;
use crate::engine::cuda::testing::{assert_near, gpu};
use crate::engine::ops::element::Element;
use crate::engine::ops::routing::Routing;
use crate::engine::testing::random_values;

const TOKENS: usize = 37;
const WIDTH: usize = 300;
const EXPERTS: usize = 5;

/// Rows of which an expert has some that are nobody's, and their tokens, experts and weights.
struct ExpertRows {
    routes: Routes,
    tokens: Vec<u32>,
    experts: Vec<u32>,
    weights: Vec<f32>,
}

fn rows(gpu: &Gpu) -> ExpertRows {
    let routing = Routing {
        experts: EXPERTS,
        per_token: 2,
        normalises: true,
    };
    let mut logits = gpu.upload(&random_values(TOKENS * EXPERTS, 9)).unwrap();
    let routes = Routes::new(gpu, routing, &mut logits.as_view_mut()).unwrap();
    let count = routes.rows();
    let read = |view: CudaView<u32>| {
        let mut values = vec![0; count];
        gpu.read(&view, &mut values).unwrap();
        values
    };
    let mut weights = vec![0.0; count];
    gpu.read(&routes.weights(), &mut weights).unwrap();
    ExpertRows {
        tokens: read(routes.tokens()),
        experts: read(routes.experts()),
        weights,
        routes,
    }
}

fn read<E: GpuElement + Element>(gpu: &Gpu, buffer: &DeviceBuffer<E>) -> Vec<f32> {
    let values = gpu.download(buffer, buffer.len()).unwrap();
    values.into_iter().map(Element::wide).collect()
}

#[test]
fn rows_come_out_and_go_back_to_their_tokens() {
    let Some(gpu) = gpu() else { return };
    let of = rows(gpu);
    let count = of.tokens.len();
    assert!(of.tokens.contains(&u32::MAX), "rows of nobody");
    let x = random_values(TOKENS * WIDTH, 1);
    let x_on_gpu = gpu.upload(&x).unwrap();
    let expected: Vec<f32> = of
        .tokens
        .iter()
        .flat_map(|token| match *token {
            u32::MAX => vec![0.0; WIDTH],
            token => x[token as usize * WIDTH..][..WIDTH].to_vec(),
        })
        .collect();
    let mut gathered = gpu.take::<f32>(count * WIDTH).unwrap();
    let out = &mut gathered.as_view_mut();
    gather(gpu, &x_on_gpu.as_view(), &of.routes, out).unwrap();
    assert_eq!(read(gpu, &gathered), expected);
    let mut rounded = gpu.take::<bf16>(count * WIDTH).unwrap();
    let out = &mut rounded.as_view_mut();
    gather_rounded(gpu, &x_on_gpu.as_view(), &of.routes, out).unwrap();
    let round = |x: &f32| bf16::from_f32(*x).to_f32();
    let expected: Vec<f32> = expected.iter().map(round).collect();
    assert_eq!(read(gpu, &rounded), expected);

    // Of rows that differ from those of their tokens, with what must not be read in those of nobody.
    let mut values = random_values(count * WIDTH, 2);
    let (mut sums, mut weighted) = (vec![0.0; x.len()], x.clone());
    for (row, token) in of.tokens.iter().enumerate() {
        let own = &mut values[row * WIDTH..(row + 1) * WIDTH];
        if *token == u32::MAX {
            own.fill(f32::NAN);
            continue;
        }
        for (column, value) in own.iter().enumerate() {
            sums[*token as usize * WIDTH + column] += value;
            weighted[*token as usize * WIDTH + column] += of.weights[row] * value;
        }
    }
    let values = gpu.upload(&values).unwrap();
    let mut y = gpu.take::<f32>(x.len()).unwrap();
    sum(gpu, &values.as_view(), &of.routes, &mut y.as_view_mut()).unwrap();
    assert_near("sums", &read(gpu, &y), &sums, 1e-6);
    let both = (&x_on_gpu.as_view(), &values.as_view());
    super::add_weighted(gpu, both, &of.routes, &mut y.as_view_mut()).unwrap();
    assert_near("weighted sums", &read(gpu, &y), &weighted, 1e-6);
}

#[test]
fn rows_are_scaled_and_have_the_biases_of_their_experts() {
    let Some(gpu) = gpu() else { return };
    let of = rows(gpu);
    let count = of.tokens.len();
    let (x, biases) = (
        random_values(count * WIDTH, 1),
        random_values(EXPERTS * WIDTH, 2),
    );
    let bias = |row: usize| &biases[of.experts[row] as usize * WIDTH..][..WIDTH];
    let biases_on_gpu = gpu.upload(&biases).unwrap();
    let mut rows = gpu.upload(&x).unwrap();
    let weights = gpu.upload(&of.weights).unwrap();
    scale(gpu, &mut rows.as_view_mut(), &weights.as_view()).unwrap();
    let scaled: Vec<f32> = (0..x.len()).map(|i| x[i] * of.weights[i / WIDTH]).collect();
    assert_near("scaled", &read(gpu, &rows), &scaled, 1e-6);
    let own = of.routes.experts();
    let mut products = gpu.upload(&vec![1.0f32; count]).unwrap();
    let from = (&biases_on_gpu.as_view(), &own);
    let out = &mut products.as_view_mut();
    add_bias_products(gpu, &rows.as_view(), from, out).unwrap();
    let expected: Vec<f32> = scaled
        .chunks_exact(WIDTH)
        .enumerate()
        .map(|(row, x)| 1.0 + x.iter().zip(bias(row)).map(|(a, b)| a * b).sum::<f32>())
        .collect();
    assert_near("products", &read(gpu, &products), &expected, 1e-5);
    let out = &mut rows.as_view_mut();
    add_biases(gpu, out, &biases_on_gpu.as_view(), &own).unwrap();
    let expected: Vec<f32> = (0..x.len())
        .map(|i| scaled[i] + bias(i / WIDTH)[i % WIDTH])
        .collect();
    assert_near("biased", &read(gpu, &rows), &expected, 1e-6);
}

#[test]
fn tokens_are_weighted_through_a_sigmoid_and_back() {
    let Some(gpu) = gpu() else { return };
    let (x, dy) = (
        random_values(TOKENS * WIDTH, 1),
        random_values(TOKENS * WIDTH, 2),
    );
    let gates = random_values(TOKENS, 3);
    let [x_on_gpu, dy_on_gpu] = [&x, &dy].map(|values| gpu.upload(values).unwrap());
    let mut weights = gpu.upload(&gates).unwrap();
    sigmoid(gpu, &mut weights.as_view_mut()).unwrap();
    let expected: Vec<f32> = gates.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
    assert_near("sigmoid", &read(gpu, &weights), &expected, 1e-6);

    let mut y = gpu.upload(&dy).unwrap();
    let (rows, view) = (x_on_gpu.as_view(), weights.as_view());
    add_weighted_tokens(gpu, &mut y.as_view_mut(), &rows, &view).unwrap();
    let weighted: Vec<f32> = (0..x.len()).map(|i| expected[i / WIDTH] * x[i]).collect();
    let sums: Vec<f32> = weighted.iter().zip(&dy).map(|(a, b)| a + b).collect();
    assert_near("sums", &read(gpu, &y), &sums, 1e-6);

    let shape = Rows::strided(TOKENS, WIDTH, WIDTH + 8);
    let mut wide = gpu.zeroed::<f32>(TOKENS * shape.stride).unwrap();
    weigh(gpu, (&rows, &view), (&mut wide.as_view_mut(), shape)).unwrap();
    let found = read(gpu, &wide);
    let found = found.chunks_exact(shape.stride);
    let found: Vec<f32> = found.flat_map(|row| row[..WIDTH].to_vec()).collect();
    assert_near("weighed", &found, &weighted, 1e-6);

    let mut d_gate = gpu.zeroed::<f32>(TOKENS * 9).unwrap();
    let (both, out) = (
        (&dy_on_gpu.as_view(), &rows),
        (&mut d_gate.as_view_mut(), 9),
    );
    gate_gradient(gpu, both, &view, out).unwrap();
    let products: Vec<f32> = (0..TOKENS)
        .map(|token| {
            let own = token * WIDTH..(token + 1) * WIDTH;
            let dot: f32 = own.map(|i| x[i] * dy[i]).sum();
            dot * expected[token] * (1.0 - expected[token])
        })
        .collect();
    let found: Vec<f32> = read(gpu, &d_gate).into_iter().step_by(9).collect();
    assert_near("gates", &found, &products, 1e-5);
}
