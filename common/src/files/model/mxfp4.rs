//! Weights in MXFP4 (Open Compute Project, "Microscaling Formats" 1.0): numbers of 4 bits, 32 of which share a scale that is a
//! power of two. Transformers stores the experts of GPT-OSS so, under names that go on from the tensor's own.
//!
//! Enters: the blocks and the scales of a tensor, `[experts][out][in / 32]` each. Leaves: the numbers that they stand for, in the
//! order in which the tensor has them where it is not quantised, `[experts][in][out]`; or what does not fit. Every one is a
//! bfloat16. Nothing is quantised here.

use rayon::prelude::*;
use serde_json::Value;

use crate::files::tensors::{Dtype, TensorView};

/// Numbers that share a scale.
const BLOCK: usize = 32;
const BLOCK_BYTES: usize = BLOCK / 2;

/// What each code stands for, times the scale: a sign, two bits of exponent and one of mantissa.
const LEVELS: [f32; 16] = [
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
];

/// Ends of the names of what a tensor is stored as.
const BLOCKS: &str = "_blocks";
const SCALES: &str = "_scales";

/// Whether a `config.json` says that weights are stored in MXFP4.
pub fn is_mxfp4(config: &Value) -> bool {
    config["quantization_config"]["quant_method"].as_str() == Some("mxfp4")
}

/// Names of the blocks and of the scales of a tensor.
pub(super) fn parts_of(name: &str) -> [String; 2] {
    [BLOCKS, SCALES].map(|end| format!("{name}{end}"))
}

/// The tensor that one of that name is a part of, if it is the name of a part.
pub(super) fn tensor_of(name: &str) -> Option<&str> {
    [BLOCKS, SCALES]
        .iter()
        .find_map(|end| name.strip_suffix(end))
}

/// A tensor in MXFP4.
#[derive(Clone, Copy, Debug)]
pub struct Mxfp4<'a> {
    blocks: &'a [u8],
    scales: &'a [u8],
    inputs: usize,
    outputs: usize,
}

impl<'a> Mxfp4<'a> {
    /// A tensor of shape `[experts][in][out]`; the error says which of the two parts is wrong, 0 for the blocks, and why.
    pub(super) fn of_parts(
        parts: [TensorView<'a>; 2],
        shape: &[usize],
    ) -> Result<Self, (usize, String)> {
        let &[experts, inputs, outputs] = shape else {
            return Err((
                0,
                format!("is of a tensor of shape {shape:?}, which is no expert's"),
            ));
        };
        if !inputs.is_multiple_of(BLOCK) {
            let reason = format!("has blocks of {BLOCK} numbers, which do not divide {inputs}");
            return Err((0, reason));
        }
        let of_scales = vec![experts, outputs, inputs / BLOCK];
        let of_blocks = [&of_scales[..], &[BLOCK_BYTES]].concat();
        for (index, (part, shape)) in parts.iter().zip([of_blocks, of_scales]).enumerate() {
            let reason = match (part.dtype == Dtype::U8, part.shape == shape) {
                (false, _) => format!("is {:?} where MXFP4 has U8", part.dtype),
                (true, false) => format!(
                    "has shape {:?} where config.json makes it {shape:?}; one of the two files is of another model",
                    part.shape
                ),
                (true, true) => continue,
            };
            return Err((index, reason));
        }
        let [blocks, scales] = parts.map(|part| part.bytes);
        Ok(Self {
            blocks,
            scales,
            inputs,
            outputs,
        })
    }

    /// Writes the numbers from `first` on to `out`, which has no more than there are.
    pub fn widen(&self, first: usize, out: &mut [f32]) -> Result<(), String> {
        let within = first % self.outputs;
        let (head, rows) = out.split_at_mut((self.outputs - within).min(out.len()));
        self.widen_row(first / self.outputs, within, head)?;
        let next = first / self.outputs + 1;
        rows.par_chunks_mut(self.outputs)
            .enumerate()
            .try_for_each(|(row, out)| self.widen_row(next + row, 0, out))
    }

    /// Writes numbers of one row, from the column `first` on. Rows are counted through all experts.
    fn widen_row(&self, row: usize, first: usize, out: &mut [f32]) -> Result<(), String> {
        let (expert, input) = (row / self.inputs, row % self.inputs);
        let groups = self.inputs / BLOCK;
        let (group, at) = (input / BLOCK, input % BLOCK);
        for (column, number) in out.iter_mut().enumerate() {
            let block = (expert * self.outputs + first + column) * groups + group;
            let pair = self.blocks[block * BLOCK_BYTES + at / 2];
            let code = if at % 2 == 0 { pair & 0xf } else { pair >> 4 };
            let scale = self.scales[block];
            *number = LEVELS[usize::from(code)] * power_of_two(scale);
            if !number.is_finite() {
                return Err(format!(
                    "has a scale of {scale}, beyond what bfloat16 holds"
                ));
            }
        }
        Ok(())
    }
}

/// What a scale of 8 bits stands for, `2^(scale - 127)`; infinity for 255, which stands for no number.
fn power_of_two(scale: u8) -> f32 {
    match scale {
        // Below the least exponent of float32 there are its subnormal numbers.
        0 => f32::from_bits(1 << 22),
        _ => f32::from_bits(u32::from(scale) << 23),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::files::json::write_json;
    use crate::files::model::{ModelFolder, WeightFiles};
    use crate::files::names::CONFIG;
    use crate::files::tensors::write;
    use crate::job::InitWeights;

    const NAME: &str = "model.layers.0.mlp.experts.down_proj";
    const SHAPE: [usize; 3] = [2, 64, 3];

    type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

    /// Blocks in which a byte is its place, and scales from 120 on.
    fn stored() -> Vec<Tensor> {
        let [blocks, scales] = parts_of(NAME);
        vec![
            (
                blocks,
                Dtype::U8,
                vec![2, 3, 2, 16],
                (0..192).map(|byte| byte as u8).collect(),
            ),
            (scales, Dtype::U8, vec![2, 3, 2], (120..132).collect()),
        ]
    }

    fn open(
        tensors: &[Tensor],
        change: impl FnOnce(&mut Value),
    ) -> Result<(tempfile::TempDir, WeightFiles), String> {
        let dir = tempfile::tempdir().unwrap();
        let mut config = json!({
            "architectures": ["GptOssForCausalLM"], "num_hidden_layers": 2,
            "quantization_config": {"quant_method": "mxfp4"}
        });
        change(&mut config);
        write_json(&dir.path().join(CONFIG), &config).unwrap();
        let listed = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| (name.clone(), *dtype, shape.clone(), &bytes[..]));
        write(dir.path(), "model.safetensors", listed, &[]).unwrap();
        let folder = ModelFolder::open(dir.path(), InitWeights::Pretrained);
        let folder = folder.map_err(|error| error.to_string())?;
        let expected = [(NAME.to_owned(), SHAPE.to_vec())];
        let files = WeightFiles::open(&folder, &expected).map_err(|error| error.to_string())?;
        Ok((dir, files))
    }

    #[test]
    fn numbers_are_levels_times_powers_of_two_with_inputs_and_outputs_exchanged() {
        let (dir, files) = open(&stored(), |_| {}).unwrap();
        assert!(files.notices().is_empty(), "{:?}", files.notices());
        let folder = ModelFolder::open(dir.path(), InitWeights::Pretrained).unwrap();
        let told = folder.notices().join("\n");
        assert!(
            told.contains("MXFP4") && told.contains("bfloat16"),
            "{told}"
        );
        let mut all = vec![f32::NAN; 2 * 64 * 3];
        files.read_f32(NAME, &SHAPE, &mut all).unwrap();
        for (index, found) in all.iter().enumerate() {
            let (expert, input, output) = (index / 192, index / 3 % 64, index % 3);
            let block = (expert * 3 + output) * 2 + input / 32;
            let byte = block * 16 + input % 32 / 2;
            let code = if input % 2 == 0 { byte & 15 } else { byte / 16 };
            let expected = f64::from(LEVELS[code]) * 2f64.powi(120 + block as i32 - 127);
            assert_eq!(f64::from(*found), expected, "{index}");
        }
        for (first, count) in [(0, 1), (1, 1), (2, 7), (191, 5), (383, 1), (100, 284)] {
            let mut part = vec![f32::NAN; count];
            files.read_part(NAME, &SHAPE, first, &mut part).unwrap();
            assert_eq!(part, all[first..first + count], "{first}, {count}");
        }
    }

    #[test]
    fn every_scale_is_the_power_of_two_that_it_stands_for() {
        for scale in 0..=254u8 {
            let expected = 2f64.powi(i32::from(scale) - 127);
            assert_eq!(f64::from(power_of_two(scale)), expected, "{scale}");
        }
        assert!(power_of_two(255).is_infinite());
    }

    #[test]
    fn parts_that_are_missing_or_do_not_fit_are_named() {
        let changed = |change: &dyn Fn(&mut Vec<Tensor>)| {
            let mut tensors = stored();
            change(&mut tensors);
            open(&tensors, |_| {}).err().unwrap()
        };
        let [blocks, scales] = parts_of(NAME);
        for (index, part) in [(0, &blocks), (1, &scales)] {
            let message = changed(&|tensors| drop(tensors.remove(index)));
            assert!(message.contains(&format!("no tensor {part}")), "{message}");
            assert!(message.contains("not whole"), "{message}");
        }
        let shape = changed(&|tensors| tensors[1].2 = vec![3, 2, 2]);
        assert!(shape.contains(&scales), "{shape}");
        assert!(
            shape.contains("[3, 2, 2]") && shape.contains("[2, 3, 2]"),
            "{shape}"
        );
        let kind = changed(&|tensors| tensors[0].1 = Dtype::I8);
        assert!(kind.contains(&blocks) && kind.contains("I8"), "{kind}");
        let both = changed(&|tensors| {
            tensors.push((NAME.to_owned(), Dtype::BF16, SHAPE.to_vec(), vec![0; 768]));
        });
        assert!(both.contains(&blocks), "{both}");
    }

    #[test]
    fn a_scale_without_a_number_is_an_error_when_it_is_read() {
        let mut tensors = stored();
        tensors[1].3[4] = 255;
        let (_dir, files) = open(&tensors, |_| {}).unwrap();
        let mut all = vec![0.0; 2 * 64 * 3];
        let message = files.read_f32(NAME, &SHAPE, &mut all).unwrap_err();
        let message = message.to_string();
        assert!(
            message.contains(NAME) && message.contains("scale of 255"),
            "{message}"
        );
    }

    #[test]
    fn other_families_and_folders_that_do_not_say_so_are_refused() {
        let llama = open(&stored(), |config| {
            config["architectures"][0] = "LlamaForCausalLM".into();
        });
        let llama = llama.err().unwrap();
        assert!(llama.contains("mxfp4"), "{llama}");
        let plain = open(&stored(), |config| {
            config["quantization_config"] = Value::Null;
        });
        let plain = plain.err().unwrap();
        assert!(plain.contains("quantization_config"), "{plain}");
    }
}
