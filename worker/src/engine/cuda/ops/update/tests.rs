//! Sums and updates on the GPU have the bits of the processor's.

use common::files::layout::Layout;
use common::files::{Moment, WeightsPartMut};
use common::job::{MomentDtype, Moments, Optimizer as Kind};

use super::*;
use crate::engine::cuda::moments::{GpuMoment, upload_codebooks};
use crate::engine::cuda::testing::gpu;
use crate::engine::mean_gradient::MeanSource;
use crate::engine::optim::{AdamW, Lion, Sgd, gradient_norm};
use crate::engine::testing::random_values;

#[test]
fn sums_and_means_are_those_of_the_processor_to_the_bit() {
    let Some(gpu) = gpu() else { return };
    let rule = FixedPoint::new(37, 8);
    let mut gradient = random_values(1000, 1);
    gradient.extend([f32::NAN, f32::INFINITY, 1e30, -1e30, 0.0, 1e-20]);
    let mut expected = vec![0i64; gradient.len()];
    let mut sums = gpu.zeroed::<i64>(gradient.len()).unwrap();
    let mut invalid = gpu.zeroed::<u64>(1).unwrap();
    let mut count = 0;
    for scale in [1.0f32, -0.3, 1e-6] {
        let gradient: Vec<f32> = gradient.iter().map(|g| g * scale).collect();
        count += rule.accumulate(&mut expected, &gradient);
        let gradient = gpu.upload(&gradient).unwrap();
        let mut view = sums.as_view_mut();
        exact_accumulate(gpu, &rule, &mut view, &gradient.as_view(), &mut invalid).unwrap();
    }
    assert_eq!(gpu.download(&sums, expected.len()).unwrap(), expected);
    assert_eq!(gpu.download(&invalid, 1).unwrap(), [count]);
    let mut means = gpu.take::<f32>(expected.len()).unwrap();
    exact_means(gpu, &sums.as_view(), &mut means.as_view_mut()).unwrap();
    let means = gpu.download(&means, expected.len()).unwrap();
    let expected: Vec<f32> = expected
        .into_iter()
        .map(common::exact::dequantize)
        .collect();
    assert_eq!(means, expected);
}

/// Rules with the moments that each keeps.
fn rules() -> Vec<(Rule, Moments)> {
    let adamw = AdamW {
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
        early_epsilon: false,
    };
    let lion = Lion {
        beta1: 0.9,
        beta2: 0.99,
        weight_decay: 0.1,
    };
    let sgd = |momentum, nesterov| Sgd {
        momentum,
        dampening: 0.0,
        nesterov,
        weight_decay: 0.1,
    };
    vec![
        (Rule::AdamW(adamw), Kind::Adamw.moments()),
        (Rule::AdamW(adamw), Kind::Adamw8bit.moments()),
        (Rule::Lion(lion), Kind::Lion.moments()),
        (Rule::Lion(lion), Kind::Lion8bit.moments()),
        (Rule::Sgd(sgd(0.0, false)), float32(0)),
        (Rule::Sgd(sgd(0.9, false)), float32(1)),
        (Rule::Sgd(sgd(0.9, true)), float32(1)),
    ]
}

fn float32(count: usize) -> Moments {
    let dtype = MomentDtype::Float32;
    Moments { count, dtype }
}

#[test]
fn updates_are_those_of_the_processor_to_the_bit() {
    let Some(gpu) = gpu() else { return };
    for (rule, moments) in rules() {
        check_updates(
            gpu,
            TensorUpdate {
                rule,
                rate: 1.5,
                seed: 0,
            },
            moments,
        );
    }
}

fn check_updates(gpu: &Gpu, rule: TensorUpdate, moments: Moments) {
    let scalars = 70_000;
    let on_gpu = |values: &[f32]| gpu.upload(values).unwrap();
    let mut w = random_values(scalars, 1);
    // The last block is cut short.
    let layout = Layout::new([("a".into(), vec![scalars])]).with_moments(moments);
    let mut kept = vec![Moment::zeros(&layout); moments.count];
    let mut w_gpu = on_gpu(&w);
    let kept_gpu = kept.iter().map(|_| GpuMoment::zeros(gpu, &layout).unwrap());
    let mut kept_gpu: Vec<_> = kept_gpu.collect();
    let codebooks = upload_codebooks(gpu).unwrap();
    for number in 1..4 {
        let gradient = random_values(scalars, 10 + number);
        let update = Update {
            number,
            learning_rate: 0.01,
            gradient_scale: 0.7,
        };
        let parts = kept.iter_mut();
        let parts = parts.filter_map(|moment| moment.parts_mut(&layout).next());
        let mean = MeanSource::Values(&gradient);
        rule.apply(
            &update,
            WeightsPartMut::Float32(&mut w),
            parts.collect(),
            (mean, 0),
        );
        let uploaded = on_gpu(&gradient);
        let found = squares(gpu, &uploaded.as_view())
            .unwrap()
            .iter()
            .sum::<f64>()
            .sqrt();
        assert!((found / gradient_norm(MeanSource::Values(&gradient)) - 1.0).abs() < 1e-12);
        let place = layout.moment_places()[0];
        // As the engine goes through a tensor: part by part.
        for range in [0..20 * 256, 20 * 256..scalars] {
            let moments = kept_gpu.iter_mut();
            let moments = moments.map(|moment| moment.part(place, range.clone()));
            let moments = (moments.collect(), &codebooks);
            let weights = &mut w_gpu.slice_mut(range.clone());
            let gradient = &uploaded.slice(range);
            update_tensor(gpu, (&rule, &update), weights, moments, gradient).unwrap();
        }
    }
    assert_eq!(gpu.download(&w_gpu, scalars).unwrap(), w, "{rule:?}");
    for (found, expected) in kept_gpu.iter().zip(&kept) {
        let found = found.download(gpu, &layout).unwrap();
        assert_eq!(found, *expected, "{rule:?}");
    }
}
