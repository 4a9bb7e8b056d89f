use common::files::Moment;
use common::files::layout::Layout;
use common::files::moments::MomentPart;
use common::job::{JobSpec, Method, Optimizer as Kind};
use serde_json::Value;

use super::*;
use crate::engine::optim::{Optimizer, Update};
use crate::engine::testing::{job, random_values};

const GOLDEN: &str = include_str!("../golden/eight_bits.json");

/// The numbers of `make_8bit.py`: of five sizes, and every ninth is 0.
fn made_up(count: usize, seed: u32) -> Vec<f32> {
    let number = |index: u32| {
        let mut x = index.wrapping_mul(0x9E37_79B1);
        x = x
            .wrapping_add(seed.wrapping_mul(0x85EB_CA77))
            .wrapping_add(1);
        for (shift, factor) in [(15, 0x2C1B_3C6D), (12, 0x297A_2D39), (15, 1)] {
            x = (x ^ (x >> shift)).wrapping_mul(factor);
        }
        match x % 9 {
            0 => 0.0,
            _ => ((f64::from(x) / 4_294_967_296.0 - 0.5) / 10f64.powi(index as i32 % 5)) as f32,
        }
    };
    (0..count as u32).map(number).collect()
}

fn numbers(value: &Value) -> Vec<f32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn optimizer(kind: Kind, beta1: f64, beta2: f64) -> Optimizer {
    Optimizer::from_job(&JobSpec {
        optimizer: kind,
        adam_beta1: beta1,
        adam_beta2: beta2,
        weight_decay: 0.1,
        ..job(Method::Full)
    })
}

/// Weights and moments after some steps on made-up gradients.
fn trained(
    layout: &Layout,
    optimizer: &Optimizer,
    rate: f64,
    steps: u32,
) -> (Vec<f32>, Vec<Moment>) {
    let mut weights: Vec<f32> = Vec::new();
    for tensor in &layout.tensors {
        weights.extend(made_up(tensor.scalars(), 100));
    }
    let mut moments = vec![Moment::zeros(layout); layout.moments.count];
    for step in 0..steps {
        let mut gradient: Vec<f32> = Vec::new();
        for tensor in &layout.tensors {
            gradient.extend(made_up(tensor.scalars(), step));
        }
        let update = Update {
            number: u64::from(step) + 1,
            learning_rate: rate * (1.0 - f64::from(step) / f64::from(steps)),
            gradient_scale: 1.0,
        };
        let moments = moments.iter_mut();
        let mut parts: Vec<_> = moments.map(|moment| moment.parts_mut(layout)).collect();
        for tensor in &layout.tensors {
            let range = tensor.offset..tensor.offset + tensor.scalars();
            let parts = parts.iter_mut().filter_map(Iterator::next).collect();
            let mean = (MeanSource::Values(&gradient), tensor.offset);
            let rule = optimizer.of_tensor(tensor);
            rule.apply_f32(&update, &mut weights[range], parts, mean);
        }
    }
    (weights, moments)
}

#[test]
fn maps_are_bitsandbytes_s() {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    assert_eq!(numbers(&golden["signed"]), dynamic_map::signed());
    assert_eq!(numbers(&golden["unsigned"]), dynamic_map::unsigned());
}

#[test]
fn the_code_of_a_number_is_that_of_the_nearest_value() {
    for (codebook, least) in [(Codebook::signed(), -1.0), (Codebook::unsigned(), 0.0)] {
        let nearest = |x: f32| {
            let off =
                |code: &u8| (f64::from(codebook.map[usize::from(*code)]) - f64::from(x)).abs();
            // Of two the lower.
            (0..=u8::MAX)
                .min_by(|a, b| off(a).total_cmp(&off(b)))
                .unwrap()
        };
        let mut numbers: Vec<f32> = codebook.map.to_vec();
        for scale in 0..9 {
            let numbers_of_scale = random_values(3000, scale);
            numbers.extend(
                numbers_of_scale
                    .iter()
                    .map(|x| x / 10f32.powi(scale as i32)),
            );
        }
        for limit in &codebook.limits[1..255] {
            numbers.extend([limit.next_down(), limit.next_up()]);
        }
        for x in numbers.into_iter().filter(|x| (least..=1.0).contains(x)) {
            let expected = match least == 0.0 && x > 0.0 {
                true => nearest(x).max(1),
                false => nearest(x),
            };
            assert_eq!(codebook.code(x), expected, "{x}");
        }
    }
}

#[test]
fn a_block_without_a_gradient_stays_zero_and_one_that_is_not_finite_has_a_code() {
    let codebook = Codebook::unsigned();
    let (mut codes, mut open) = ([7u8; 256], [0.0f32; 256]);
    assert_eq!(codebook.close(&open, &mut codes), 0.0);
    assert_eq!(codes, [0; 256]);
    open[3] = f32::INFINITY;
    open[5] = f32::NAN;
    open[6] = f32::from_bits(f32::NAN.to_bits() | 1 << 31);
    open[7] = 1e30;
    assert_eq!(codebook.close(&open, &mut codes), f32::MAX);
    assert_eq!(codes[..8], [0, 0, 0, 255, 0, 255, 255, 1]);
}

#[test]
fn ten_steps_leave_the_codes_and_weights_that_bitsandbytes_does() {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let shapes: Vec<(String, Vec<usize>)> =
        serde_json::from_value(golden["shapes"].clone()).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let kind: Kind = serde_json::from_value(case["optimizer"].clone()).unwrap();
        let [beta1, beta2] = ["beta1", "beta2"].map(|beta| case[beta].as_f64().unwrap());
        let layout = Layout::new(shapes.clone()).with_moments(kind.moments());
        let rate = golden["rate"].as_f64().unwrap();
        let (weights, moments) = trained(&layout, &optimizer(kind, beta1, beta2), rate, 10);
        for (tensor, weights) in layout.tensors.iter().zip(layout.split(&weights)) {
            let expected = numbers(&case["tensors"][&tensor.name]["weights"]);
            for (found, expected) in weights.iter().step_by(7).zip(&expected) {
                let off = (found - expected).abs();
                assert!(off < 1e-6, "{kind} {}: {found} for {expected}", tensor.name);
            }
        }
        for (moment, key) in moments.iter().zip(["state1", "state2"]) {
            for (tensor, part) in layout.tensors.iter().zip(moment.parts(&layout)) {
                let expected = &case["tensors"][&tensor.name][key];
                let MomentPart::EightBits { codes, absmax } = part else {
                    assert!(expected.is_null(), "{} has 8 bits there", tensor.name);
                    continue;
                };
                let hex = expected["codes"].as_str().unwrap();
                let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
                let expected_codes: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
                assert_eq!(codes.len(), expected_codes.len());
                // A sum that rounds otherwise may lie on the other side of a limit.
                let pairs = codes.iter().zip(&expected_codes);
                assert!(
                    pairs.clone().all(|(a, b)| a.abs_diff(*b) <= 1),
                    "{kind} {key}"
                );
                let other = pairs.filter(|(a, b)| a != b).count();
                assert!(
                    other * 500 <= codes.len(),
                    "{kind} {key}: {other} of {}",
                    codes.len()
                );
                for (found, expected) in absmax.iter().zip(&numbers(&expected["absmax"])) {
                    assert!(
                        (found / expected - 1.0).abs() < 1e-6,
                        "{found} for {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let layout = Layout::new([("a.weight".into(), vec![3 * UPDATE_CHUNK + 300])]);
    for kind in [Kind::Adamw8bit, Kind::Lion8bit] {
        let layout = layout.clone().with_moments(kind.moments());
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let pool = pool.build().unwrap();
            pool.install(|| trained(&layout, &optimizer(kind, 0.9, 0.99), 0.01, 3))
        };
        let expected = run(1);
        assert!(run(2) == expected && run(5) == expected, "{kind}");
    }
}

#[test]
fn a_second_moment_that_is_small_beside_its_block_s_largest_stays_above_zero() {
    let layout = Layout::new([("a.weight".into(), vec![4096])]);
    let layout = layout.with_moments(Kind::Adamw8bit.moments());
    let rule = optimizer(Kind::Adamw8bit, 0.9, 0.999).of_tensor(&layout.tensors[0]);
    let (mut weights, mut moments) = (vec![0.0; 4096], vec![Moment::zeros(&layout); 2]);
    // The second gradient of a scalar is gone, and the first was small beside others of its block.
    let gradients = [
        [vec![1e-5; 1], vec![1.0; 4095]].concat(),
        [vec![0.0; 1], vec![1.0; 4095]].concat(),
    ];
    for (number, gradient) in (1..).zip(&gradients) {
        let update = Update {
            number,
            learning_rate: 0.1,
            gradient_scale: 1.0,
        };
        let parts = moments
            .iter_mut()
            .filter_map(|moment| moment.parts_mut(&layout).next());
        let parts = parts.collect();
        rule.apply_f32(
            &update,
            &mut weights,
            parts,
            (MeanSource::Values(gradient), 0),
        );
    }
    assert!(
        weights[0].abs() < 0.3,
        "a step as large as those of others: {}",
        weights[0]
    );
}
