use super::*;
use crate::job::{Moments, Optimizer, TargetModules};

pub fn snapshot() -> Snapshot {
    let layout = Arc::new(Layout::new([
        ("model.b.weight".into(), vec![2, 3]),
        ("model.a.weight".into(), vec![4]),
    ]));
    let flat = |seed: f32| (0..10).map(|i| seed + i as f32 / 7.0).collect::<Flat>();
    Snapshot {
        step: 12,
        layout,
        weights: flat(1.0).into(),
        moments: vec![flat(-2.0).into(), flat(0.5).into()],
    }
}

/// A state with two moments of 8 bits: of one tensor in codes, of the other in float32.
fn eight_bits() -> Snapshot {
    let layout = Layout::new([
        ("model.b.weight".into(), vec![70, 60]),
        ("model.a.weight".into(), vec![4]),
    ]);
    let layout = layout.with_moments(Optimizer::Adamw8bit.moments());
    let moment = |seed: usize| {
        let mut moment = Moment::zeros(&layout);
        for buffer in moment.buffers_mut() {
            for (index, byte) in buffer.iter_mut().enumerate() {
                // Of float32 no sign, and no exponent of a number that is none.
                *byte = (index * seed % 127) as u8 & if index % 4 == 3 { 0x3f } else { 0x7f };
            }
        }
        moment
    };
    Snapshot {
        step: 7,
        weights: (0..layout.scalars).map(|i| i as f32 / 7.0).collect(),
        moments: vec![moment(3), moment(5)],
        layout: Arc::new(layout),
    }
}

/// Weights of bfloat16.
fn in_bfloat16() -> Snapshot {
    let snapshot = snapshot();
    let layout = (*snapshot.layout).clone();
    let wide = snapshot.weights.widened(0..layout.scalars);
    let narrow: Vec<bf16> = wide.into_iter().map(bf16::from_f32).collect();
    Snapshot {
        layout: Arc::new(layout.with_weights(BaseDtype::Bfloat16)),
        weights: FlatWeights::Bfloat16(narrow.into()),
        ..snapshot
    }
}

pub fn adapter() -> WeightsFormat {
    WeightsFormat::Adapter(AdapterConfig::new(
        2,
        4.0,
        TargetModules::Named(vec!["q_proj".into()]),
    ))
}

fn model(dtype: Dtype) -> WeightsFormat {
    let config = serde_json::json!({"architectures": ["LlamaForCausalLM"]});
    WeightsFormat::Model {
        config,
        dtype,
        frozen: None,
    }
}

#[test]
fn every_bit_comes_back_from_disk() {
    for format in [adapter(), model(Dtype::F32), model(Dtype::BF16)] {
        let folder = tempfile::tempdir().unwrap();
        for written in [snapshot(), eight_bits()] {
            written.write_files(folder.path(), &format).unwrap();
            let read = Snapshot::read_files(folder.path(), &written.layout).unwrap();
            assert_eq!(read, written);
            assert_eq!(read.weights_digest(), written.weights_digest());
            assert_eq!(read.optimizer_digest(), written.optimizer_digest());
        }
    }
}

#[test]
fn weights_of_bfloat16_are_kept_in_the_model_alone() {
    let folder = tempfile::tempdir().unwrap();
    let written = in_bfloat16();
    written
        .write_files(folder.path(), &model(Dtype::BF16))
        .unwrap();
    let read = Snapshot::read_files(folder.path(), &written.layout).unwrap();
    assert_eq!(read, written);
    assert_eq!(read.weights_digest(), written.weights_digest());
    let optimizer = TensorFile::open(&folder.path().join(OPTIMIZER)).unwrap();
    assert!(!optimizer.names().any(|name| name.starts_with("weights.")));
    let model = TensorFile::open(&folder.path().join("model.safetensors")).unwrap();
    let bytes = model
        .names()
        .map(|name| model.get(name).unwrap().bytes.len());
    assert_eq!(bytes.sum::<usize>(), 10 * 2);
    // Of a state that keeps its weights otherwise it is not.
    Snapshot::read_files(folder.path(), &snapshot().layout).unwrap_err();
}

#[test]
fn moments_of_8_bits_take_a_quarter_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let written = eight_bits();
    written.write_files(folder.path(), &adapter()).unwrap();
    let file = TensorFile::open(&folder.path().join(OPTIMIZER)).unwrap();
    let bytes: usize = file
        .names()
        .map(|name| file.get(name).unwrap().bytes.len())
        .sum();
    // Codes, the largest magnitude of each block, and a small tensor in float32.
    assert_eq!(bytes, 2 * (4200 + 17 * 4 + 4 * 4));
    assert_eq!(bytes + 4204 * 4, written.layout.state_bytes());
}

#[test]
fn one_changed_bit_changes_the_optimizer_s_digest() {
    let digest = eight_bits().optimizer_digest();
    for buffer in 1..7 {
        let mut other = eight_bits();
        other.buffers_mut()[buffer][3] ^= 1;
        assert_ne!(other.optimizer_digest(), digest, "{buffer}");
    }
}

#[test]
fn moments_of_another_kind_are_refused() {
    let refused = |written: &Snapshot, optimizer: Optimizer| {
        let folder = tempfile::tempdir().unwrap();
        written.write_files(folder.path(), &adapter()).unwrap();
        let layout = (*written.layout).clone().with_moments(optimizer.moments());
        let read = Snapshot::read_files(folder.path(), &Arc::new(layout));
        read.unwrap_err().to_string()
    };
    let message = refused(&eight_bits(), Optimizer::Adamw);
    assert!(message.contains("has moments of 8 bits"), "{message}");
    assert!(message.ends_with("saved by (adamw_8bit)"), "{message}");
    let message = refused(&snapshot(), Optimizer::Adamw8bit);
    assert!(message.contains("has float32 moments"), "{message}");
    assert!(message.ends_with("saved by (adamw or muon)"), "{message}");
    // With one moment it was Lion, whichever optimizer the job has.
    let of_lion = |written: Snapshot, lion: Optimizer| {
        let layout = (*written.layout).clone().with_moments(lion.moments());
        Snapshot {
            moments: written.moments.into_iter().take(1).collect(),
            layout: Arc::new(layout),
            ..written
        }
    };
    let message = refused(
        &of_lion(eight_bits(), Optimizer::Lion8bit),
        Optimizer::Adamw,
    );
    assert!(message.ends_with("saved by (lion_8bit)"), "{message}");
    let lion = of_lion(snapshot(), Optimizer::Lion);
    let message = refused(&lion, Optimizer::Lion8bit);
    assert!(message.contains("saved by (lion, or sgd"), "{message}");
}

#[test]
fn codes_and_magnitudes_of_another_type_are_refused() {
    for (name, dtype, expected) in [
        ("exp_avg.model.b.weight", Dtype::F32, "is not of 8 bits"),
        (
            "exp_avg_sq_absmax.model.b.weight",
            Dtype::F32,
            "no number from 0",
        ),
        (
            "exp_avg_sq_absmax.model.b.weight",
            Dtype::U8,
            "exp_avg_sq_absmax",
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let snapshot = eight_bits();
        snapshot.write_files(folder.path(), &adapter()).unwrap();
        let path = folder.path().join(OPTIMIZER);
        let file = TensorFile::open(&path).unwrap();
        let wrong = [f32::NAN; 4200];
        let tensors: Vec<_> = file
            .names()
            .map(|found| {
                let view = file.get(found).unwrap();
                let (dtype, bytes) = match found == name {
                    true => (
                        dtype,
                        &as_bytes(&wrong)[..view.scalars() * dtype.bitsize() / 8],
                    ),
                    false => (view.dtype, view.bytes),
                };
                (found.to_owned(), dtype, view.shape.to_vec(), bytes)
            })
            .collect();
        let digest = snapshot.layout.digest();
        let metadata = [("step", "7"), ("layout_digest", digest.as_str())];
        let other = tempfile::tempdir().unwrap();
        std::fs::copy(
            folder.path().join(ADAPTER_WEIGHTS),
            other.path().join(ADAPTER_WEIGHTS),
        )
        .unwrap();
        tensors::write(other.path(), OPTIMIZER, tensors, &metadata).unwrap();
        let refused = Snapshot::read_files(other.path(), &snapshot.layout);
        let message = refused.unwrap_err().to_string();
        assert!(
            message.contains(expected) && message.contains(name),
            "{message}"
        );
    }
}

#[test]
fn as_many_moments_as_the_layout_says_are_written_and_read() {
    for (count, format) in [(0, adapter()), (1, adapter()), (1, model(Dtype::BF16))] {
        let folder = tempfile::tempdir().unwrap();
        let mut written = snapshot();
        written.moments.truncate(count);
        let dtype = MomentDtype::Float32;
        let moments = Moments { count, dtype };
        written.layout = Arc::new((*written.layout).clone().with_moments(moments));
        written.write_files(folder.path(), &format).unwrap();
        let read = Snapshot::read_files(folder.path(), &written.layout).unwrap();
        assert_eq!(read, written);
        Snapshot::read_files(folder.path(), &snapshot().layout).unwrap_err();
    }
}

#[test]
fn another_layout_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    snapshot().write_files(folder.path(), &adapter()).unwrap();
    let other = Arc::new(Layout::new([("model.a.weight".into(), vec![4])]));
    let message = Snapshot::read_files(folder.path(), &other)
        .unwrap_err()
        .to_string();
    assert!(message.contains("other trainable tensors"), "{message}");
}

#[test]
fn a_weight_that_is_missing_is_named() {
    let folder = tempfile::tempdir().unwrap();
    snapshot().write_weights(folder.path(), &adapter()).unwrap();
    let other = Layout::new([("model.c.weight".into(), vec![4])]);
    let message = read_weights(folder.path(), &other).unwrap_err().to_string();
    assert!(message.contains("model.c.weight"), "{message}");
}
