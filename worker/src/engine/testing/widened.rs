//! Copies of model folders that hold what 4 bits leave of the weights.

use std::path::Path;

use common::files::model::{ModelFolder, ModelTensor, Scalars, WeightFiles, write_model};
use common::files::tensors::Dtype;
use common::job::{BaseDtype, InitWeights, Quantization};
use common::model::{
    CONVOLUTION, EMBEDDING, HEAD, INPUT_EMBEDDING, ModelConfig, base_tensors, is_norm_or_bias,
    is_of_expert, is_router,
};
use common::nf4::Nf4;

use crate::engine::ops::element::Element;

/// A copy of a model folder whose linears (with `how`'s switches embeddings and experts too) hold what 4 bits leave of them, as they
/// are in `dtype`.
pub fn widened_copy(from: &Path, how: Quantization, dtype: BaseDtype) -> tempfile::TempDir {
    changed_copy(from, |name, shape, scalars| {
        let is_of_tokens = [EMBEDDING, HEAD, INPUT_EMBEDDING].contains(&name);
        let stays = (is_of_tokens && !how.embeddings)
            || (is_of_expert(name) && !how.experts)
            || is_router(name)
            || name.ends_with(CONVOLUTION);
        if let [.., rows, columns] = shape[..]
            && !stays
            && !is_norm_or_bias(name, shape.len())
        {
            if dtype == BaseDtype::Bfloat16 {
                let rounded = |scalar: f32| half::bf16::round_from(scalar).wide();
                scalars
                    .iter_mut()
                    .for_each(|scalar| *scalar = rounded(*scalar));
            }
            // Each expert of a fused tensor is a matrix of its own.
            for matrix in scalars.chunks_mut(rows * columns) {
                let quantised = Nf4::quantise(matrix, how.nested_scales).unwrap();
                quantised.dequantise(0, matrix);
            }
        }
    })
}

/// A copy of a model folder in float32, as if nothing in it had ever been quantised; `change` gets each tensor's name, shape and scalars.
pub fn changed_copy(from: &Path, change: impl Fn(&str, &[usize], &mut [f32])) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    let folder = ModelFolder::open(from, InitWeights::Pretrained).unwrap();
    let config = ModelConfig::of(&folder).unwrap();
    let expected = base_tensors(&config);
    let files = WeightFiles::open(&folder, &expected).unwrap();
    let mut tensors = Vec::new();
    for (name, shape) in &expected {
        let mut scalars = vec![0.0; shape.iter().product()];
        files.read_f32(name, shape, &mut scalars).unwrap();
        change(name, shape, &mut scalars);
        tensors.push((name.clone(), shape.clone(), scalars));
    }
    let listed: Vec<ModelTensor> = tensors
        .iter()
        .map(|(name, shape, scalars)| ModelTensor {
            name,
            shape,
            scalars: Scalars::Here(scalars),
        })
        .collect();
    let mut json = folder.config_json().clone();
    if let Some(json) = json.as_object_mut() {
        json.remove("quantization_config");
    }
    write_model(to.path(), &json, &listed, Dtype::F32, 1 << 30).unwrap();
    to
}
