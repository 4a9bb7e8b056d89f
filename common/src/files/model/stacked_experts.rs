//! Experts of a layer that are stored in two tensors, as Transformers 5 has them in memory, and as some folders hold them: gate and up,
//! `[experts][2 * width][hidden]`, all of a gate before its up; and down, `[experts][hidden][width]`. An expert's matrix is a part of
//! one of them, whose scalars lie together.
//!
//! Enters: the name of a matrix. Leaves: which tensor it may be a part of, and that part.

use crate::files::tensors::TensorView;

/// Matrices of an expert, by their names: the tensor that has those of all, and the matrix's place among the equal parts that this
/// has of an expert.
const MATRICES: [(&str, &str, usize, usize); 3] = [
    ("gate_proj", "gate_up_proj", 0, 2),
    ("up_proj", "gate_up_proj", 1, 2),
    ("down_proj", "down_proj", 0, 1),
];

/// A matrix as a part of a tensor of all experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ExpertPart {
    /// Which of the tensor's parts it is.
    index: usize,
    /// Number of parts that the tensor has of each expert.
    per_expert: usize,
}

impl ExpertPart {
    /// What the matrix of that name is a part of, and which, where it is an expert's.
    pub fn of(name: &str) -> Option<(String, Self)> {
        let (block, rest) = name.split_once(".experts.")?;
        let (expert, matrix) = rest.strip_suffix(".weight")?.split_once('.')?;
        let expert: usize = expert.parse().ok()?;
        let (_, whole, place, per_expert) = MATRICES.iter().find(|(name, ..)| *name == matrix)?;
        let part = Self {
            index: expert * per_expert + place,
            per_expert: *per_expert,
        };
        Some((format!("{block}.experts.{whole}"), part))
    }

    /// The shape of the whole tensor, of so many such matrices.
    pub fn whole_shape(&self, matrices: usize, shape: &[usize]) -> Vec<usize> {
        let [rows, columns] = shape else {
            return shape.to_vec();
        };
        vec![matrices / self.per_expert, self.per_expert * rows, *columns]
    }

    /// The part, of this shape, of a tensor that has the [`whole_shape`](Self::whole_shape).
    pub fn view<'a>(&self, whole: TensorView<'a>, shape: &'a [usize]) -> TensorView<'a> {
        let bytes = shape.iter().product::<usize>() * whole.dtype.bitsize() / 8;
        TensorView {
            shape,
            bytes: &whole.bytes[self.index * bytes..][..bytes],
            ..whole
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::files::json::write_json;
    use crate::files::model::{ModelFolder, WeightFiles};
    use crate::files::names::CONFIG;
    use crate::files::tensors::{Dtype, write};
    use crate::job::InitWeights;

    /// Two experts of two columns, three wide.
    const BLOCK: &str = "model.layers.0.mlp.experts";

    fn expected() -> Vec<(String, Vec<usize>)> {
        let of_expert = |expert: usize| {
            [
                ("gate_proj", [3, 2]),
                ("up_proj", [3, 2]),
                ("down_proj", [2, 3]),
            ]
            .map(|(name, shape)| (format!("{BLOCK}.{expert}.{name}.weight"), shape.to_vec()))
        };
        (0..2).flat_map(of_expert).collect()
    }

    type Tensor = (String, Dtype, Vec<usize>);

    fn stored() -> Vec<Tensor> {
        let named =
            |name: &str, shape: [usize; 3]| (format!("{BLOCK}.{name}"), Dtype::F32, shape.to_vec());
        vec![
            named("gate_up_proj", [2, 6, 2]),
            named("down_proj", [2, 2, 3]),
        ]
    }

    /// Each tensor's scalars count from zero.
    fn put(dir: &Path, tensors: &[Tensor]) {
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, dtype, shape)| {
                let scalars = 0..shape.iter().product::<usize>();
                let size = dtype.bitsize() / 8;
                let bytes = scalars.flat_map(|scalar| (scalar as f32).to_le_bytes());
                bytes.take(shape.iter().product::<usize>() * size).collect()
            })
            .collect();
        let listed = tensors.iter().zip(&bytes);
        let listed = listed
            .map(|((name, dtype, shape), bytes)| (name.clone(), *dtype, shape.clone(), &bytes[..]));
        write(dir, "model.safetensors", listed, &[]).unwrap();
    }

    fn open(tensors: &[Tensor]) -> Result<(tempfile::TempDir, WeightFiles), String> {
        let dir = tempfile::tempdir().unwrap();
        let config = json!({"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 1});
        write_json(&dir.path().join(CONFIG), &config).unwrap();
        put(dir.path(), tensors);
        let model = ModelFolder::open(dir.path(), InitWeights::Pretrained).unwrap();
        // Tied, so that the embedding is all that is wanted beside experts.
        let files = WeightFiles::open(&model, &expected()).map_err(|error| error.to_string())?;
        Ok((dir, files))
    }

    #[test]
    fn each_expert_s_matrices_are_read_from_the_tensors_of_all() {
        let (_dir, files) = open(&stored()).unwrap();
        assert!(files.notices().is_empty());
        let read = |name: &str, shape: [usize; 2]| {
            let mut values = vec![0.0; 6];
            let name = format!("{BLOCK}.{name}.weight");
            files.read_f32(&name, &shape, &mut values).unwrap();
            values
        };
        let from = |first: u8| -> Vec<f32> { (first..first + 6).map(f32::from).collect() };
        for (name, shape, first) in [
            ("0.gate_proj", [3, 2], 0),
            ("0.up_proj", [3, 2], 6),
            ("1.gate_proj", [3, 2], 12),
            ("1.up_proj", [3, 2], 18),
            ("0.down_proj", [2, 3], 0),
            ("1.down_proj", [2, 3], 6),
        ] {
            assert_eq!(read(name, shape), from(first), "{name}");
        }
    }

    #[test]
    fn tensors_of_other_sizes_and_types_are_named() {
        let refused = |change: &dyn Fn(&mut Vec<Tensor>), words: &[&str]| {
            let mut tensors = stored();
            change(&mut tensors);
            let message = open(&tensors).err().unwrap();
            for word in words {
                assert!(message.contains(word), "{word:?} not in {message:?}");
            }
        };
        let whole = format!("{BLOCK}.gate_up_proj");
        // As Transformers 5 has those of another family, in and out the other way round.
        let turned = |tensors: &mut Vec<Tensor>| tensors[0].2 = vec![2, 2, 6];
        refused(&turned, &[&whole, "[2, 2, 6]", "[2, 6, 2]"]);
        let more = |tensors: &mut Vec<Tensor>| tensors[1].2 = vec![3, 2, 3];
        refused(&more, &["down_proj", "[3, 2, 3]", "[2, 2, 3]"]);
        let narrow = |tensors: &mut Vec<Tensor>| tensors[0].1 = Dtype::I8;
        refused(&narrow, &[&whole, "I8"]);
        let none = |tensors: &mut Vec<Tensor>| drop(tensors.remove(1));
        refused(&none, &["no tensor", "0.down_proj.weight"]);
        let twice = |tensors: &mut Vec<Tensor>| {
            let name = format!("{BLOCK}.0.gate_proj.weight");
            tensors.push((name, Dtype::F32, vec![3, 2]));
        };
        refused(&twice, &["no tensor", "0.up_proj.weight"]);
        let all_twice = |tensors: &mut Vec<Tensor>| {
            let apart = expected().into_iter();
            tensors.extend(apart.map(|(name, shape)| (name, Dtype::F32, shape)));
        };
        refused(&all_twice, &["no place", &whole]);
    }

    #[test]
    fn other_tensors_are_no_parts() {
        for name in [
            "model.layers.0.mlp.experts.gate_up_proj",
            "model.layers.0.mlp.experts.0.gate_proj.bias",
            "model.layers.0.mlp.experts.x.gate_proj.weight",
            "model.layers.0.mlp.experts.0.gate_up_proj.weight",
            "model.layers.0.mlp.gate_proj.weight",
            "model.layers.0.block_sparse_moe.experts.0.w1.weight",
        ] {
            assert_eq!(ExpertPart::of(name), None, "{name}");
        }
    }
}
