//! What a new adapter's tensors start with: a function of the job's seed and each tensor's name alone.

use common::files::adapter::{Factor, parse_tensor_name};
use common::files::layout::{Layout, TensorLayout};
use common::job::AdapterInit;
use common::rng::CounterRng;
use rayon::prelude::*;

use crate::engine::model::weights::name_key;
use crate::engine::{EngineError, memory};

/// Stream of the counter-based generator from which adapters' starting values are drawn.
const STREAM_ADAPTER: u64 = 0x6c6f_7261;
/// What PEFT divides the products with an orthogonal matrix by (`orthogonal_init`).
const ORTHOGONAL_DIVISOR: f64 = 10.0;

/// Starting values of all adapters, in layout order, drawn as PEFT draws them; what is no factor starts with zeros. Magnitudes,
/// biases of the base and rows of tokens follow weights that are not read yet. `experts` says how many experts the factors of a module
/// are of, one where it is no parameter of experts.
///
/// # Errors
/// Where the machine has not the memory.
pub fn initial_values(
    layout: &Layout,
    seed: u64,
    init: AdapterInit,
    experts: &(dyn Fn(&str) -> usize + Sync),
) -> Result<Vec<f32>, EngineError> {
    let scalars = layout.scalars;
    let mut flat = memory::try_zeros(scalars).map_err(|_| EngineError::Memory { scalars })?;
    let mut rest = &mut flat[..];
    let mut parts = Vec::new();
    for tensor in &layout.tensors {
        let values = rest.split_off_mut(..tensor.scalars());
        parts.push((tensor, values.expect("the layout's own length")));
    }
    parts.into_par_iter().for_each(|(tensor, values)| {
        if let Some((module, factor)) = parse_tensor_name(&tensor.name) {
            start(
                tensor,
                (module, factor, experts(module)),
                values,
                seed,
                init,
            );
        }
    });
    Ok(flat)
}

/// The generator of what is drawn for a tensor or a module of this name.
pub fn start_stream(seed: u64, name: &str) -> CounterRng {
    CounterRng::new(seed, &[STREAM_ADAPTER, name_key(name)])
}

/// Draws the values of a tensor, which are zeros before.
fn start(
    tensor: &TensorLayout,
    (module, factor, experts): (&str, Factor, usize),
    values: &mut [f32],
    seed: u64,
    init: AdapterInit,
) {
    let mut rng = start_stream(seed, &tensor.name);
    match (init, factor) {
        // Kaiming with a = sqrt 5.
        (AdapterInit::Kaiming, Factor::A) => {
            let bound = 1.0 / (tensor.shape[1] as f64).sqrt();
            for value in values {
                *value = ((2.0 * rng.uniform() - 1.0) * bound) as f32;
            }
        }
        (AdapterInit::Gaussian, Factor::A) => {
            let deviation = experts as f64 / tensor.shape[0] as f64;
            for value in values {
                *value = (rng.normal() * deviation) as f32;
            }
        }
        (AdapterInit::Orthogonal, Factor::A) => {
            let (rank, inputs) = (tensor.shape[0], tensor.shape[1]);
            let rows = every_other(orthogonal_rows(rank, module, seed), 0);
            for input in 0..inputs {
                let mixed = mixture(&rows, rank, &mut rng);
                for (row, value) in mixed.iter().enumerate() {
                    values[row * inputs + input] = *value as f32;
                }
            }
        }
        (AdapterInit::Orthogonal, Factor::B) => {
            let rank = tensor.shape[1];
            let rows = every_other(orthogonal_rows(rank, module, seed), 1);
            for row in values.chunks_exact_mut(rank) {
                let mixed = mixture(&rows, rank, &mut rng);
                for (value, mixed) in row.iter_mut().zip(mixed) {
                    *value = mixed as f32;
                }
            }
        }
        // As PEFT has it, however the others start.
        (_, Factor::EmbeddingB) => {
            for value in values {
                *value = rng.normal() as f32;
            }
        }
        // What begins with a part of the weight follows it, and magnitudes do.
        (_, Factor::B | Factor::EmbeddingA | Factor::Magnitude) => {}
        (_, Factor::BiasOfB | Factor::Bias | Factor::BiasAlone) => {}
        (AdapterInit::Pissa { .. } | AdapterInit::Olora, Factor::A) => {}
    }
}

fn every_other(rows: Vec<Vec<f64>>, first: usize) -> Vec<Vec<f64>> {
    rows.into_iter().skip(first).step_by(2).collect()
}

/// A random mixture of the rows, divided as PEFT divides it.
fn mixture(rows: &[Vec<f64>], width: usize, rng: &mut CounterRng) -> Vec<f64> {
    let mut mixed = vec![0.0; width];
    for row in rows {
        let weight = rng.normal() / ORTHOGONAL_DIVISOR;
        for (mixed, x) in mixed.iter_mut().zip(row) {
            *mixed += weight * x;
        }
    }
    mixed
}

/// The rows of a random orthogonal matrix, the same for both factors of a module: Gram-Schmidt, each row twice.
fn orthogonal_rows(rank: usize, module: &str, seed: u64) -> Vec<Vec<f64>> {
    let mut rng = start_stream(seed, module);
    let mut rows: Vec<Vec<f64>> = Vec::with_capacity(rank);
    for _ in 0..rank {
        let mut row: Vec<f64> = (0..rank).map(|_| rng.normal()).collect();
        for _ in 0..2 {
            for other in &rows {
                let along = dot(&row, other);
                for (x, other) in row.iter_mut().zip(other) {
                    *x -= along * other;
                }
            }
        }
        let norm = dot(&row, &row).sqrt();
        row.iter_mut().for_each(|x| *x /= norm);
        rows.push(row);
    }
    rows
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::testing::in_pool;

    const RANK: usize = 8;
    const INPUTS: usize = 600;
    const OUTPUTS: usize = 40;

    fn values(init: AdapterInit, experts: usize) -> [Vec<f32>; 2] {
        let name = |factor: &str| format!("base_model.model.q_proj.lora_{factor}.weight");
        let layout = Layout::new([
            (name("A"), vec![RANK, INPUTS]),
            (name("B"), vec![OUTPUTS, RANK]),
        ]);
        let drawn = |threads| {
            in_pool(threads, || {
                initial_values(&layout, 7, init, &|_: &str| experts).unwrap()
            })
        };
        let flat = drawn(1);
        assert_eq!(flat, drawn(3));
        let (a, b) = flat.split_at(RANK * INPUTS);
        [a.to_vec(), b.to_vec()]
    }

    fn deviation(values: &[f32]) -> f64 {
        let squares: f64 = values.iter().map(|x| f64::from(*x).powi(2)).sum();
        (squares / values.len() as f64).sqrt()
    }

    #[test]
    fn b_starts_with_zeros_and_a_with_what_is_asked_for() {
        let [uniform, zeros] = values(AdapterInit::Kaiming, 1);
        let bound = 1.0 / (INPUTS as f32).sqrt();
        assert!(uniform.iter().all(|x| x.abs() <= bound));
        assert!((deviation(&uniform) * 3f64.sqrt() / f64::from(bound) - 1.0).abs() < 0.05);
        assert!(zeros.iter().all(|x| *x == 0.0));
        for experts in [1, 4] {
            let [normal, zeros] = values(AdapterInit::Gaussian, experts);
            let rank = (RANK / experts) as f64;
            assert!((deviation(&normal) * rank - 1.0).abs() < 0.05);
            assert!(zeros.iter().all(|x| *x == 0.0));
        }
    }

    #[test]
    fn orthogonal_factors_are_full_of_numbers_and_their_product_is_zero() {
        let [a, b] = values(AdapterInit::Orthogonal, 1);
        // Each is a mixture of half as many rows of length one.
        let expected = (0.5f64).sqrt() / ORTHOGONAL_DIVISOR;
        for values in [&a, &b] {
            assert!((deviation(values) / expected - 1.0).abs() < 0.15);
        }
        for b in b.chunks_exact(RANK) {
            for input in 0..INPUTS {
                let product = |row: usize| b[row] * a[row * INPUTS + input];
                let sum: f32 = (0..RANK).map(product).sum();
                assert!(sum.abs() < 1e-7, "{sum}");
            }
        }
    }
}
