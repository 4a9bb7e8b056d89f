//! Base weights: read from safetensors through a memory map, drawn from the seed, or at hand.
//!
//! In: a model folder and the names and shapes that the configuration calls for. Out: float32 values, or frozen
//! tensors in the job's base type, or in 4 bits. Vectors (norms, biases) are always float32.

use std::collections::HashMap;

use common::files::model::{ModelFolder, WeightFiles};
use common::files::tensors::{Dtype, NotBfloat16};
use common::job::{BaseDtype, Quantization, TrainedRows};
use common::model::{
    DECAY, DECAY_BIAS, EMBEDDING, FUSED_BIAS, HEAD, HEAD_NORM, ModelConfig, ROUTER_SCALES,
    is_norm_or_bias,
};
use common::nf4::{Nf4, NotQuantised};
use common::rng::CounterRng;
use half::bf16;
use rayon::prelude::*;

use super::mean_row::{MeanRow, fill_with_mean};
use crate::engine::EngineError;
use crate::engine::buffer::Pool;
use crate::engine::ops::element::{Element, round_slice, widen};
use crate::engine::params::Weight;

/// Scalars drawn in one task.
const DRAW_TILE: usize = 1 << 16;

/// Rows of a matrix that are read at once where not all are wanted.
const ROWS_AT_ONCE: usize = 1 << 12;

/// Stream of the counter-based generator from which random weights are drawn.
const STREAM_WEIGHTS: u64 = 0x7765_6967_6874;

/// Where base weights come from.
pub enum WeightSource {
    Files {
        files: WeightFiles,
        /// Tokens that the files have rows for. Where the model has more, the others are the mean of these.
        vocabulary: usize,
        /// Whether the embedding is the output layer, too.
        tied: bool,
    },
    /// Drawn from a normal distribution with this standard deviation; biases are zero.
    Random {
        seed: u64,
        standard_deviation: f64,
        /// What norms are drawn as: the value at which they change nothing.
        norm: f32,
    },
    /// All values of every tensor, by name.
    Memory(HashMap<String, Vec<f32>>),
}

impl WeightSource {
    /// Opens a model folder. `expected` are all tensors of the model ([`base_tensors`](common::model::base_tensors)), which are compared with the files'.
    pub fn open(
        folder: &ModelFolder,
        expected: &[(String, Vec<usize>)],
    ) -> Result<Self, EngineError> {
        Ok(Self::of(WeightFiles::open(folder, expected)?, expected))
    }

    /// Files that hold these tensors.
    pub fn of(files: WeightFiles, expected: &[(String, Vec<usize>)]) -> Self {
        let embedding = expected.iter().find(|(name, _)| name == EMBEDDING);
        Self::Files {
            files,
            vocabulary: embedding.map_or(usize::MAX, |(_, shape)| shape[0]),
            tied: !expected.iter().any(|(name, _)| name == HEAD),
        }
    }

    /// Fills `out` with the values of a tensor in float32.
    pub fn read_f32(
        &self,
        name: &str,
        shape: &[usize],
        out: &mut [f32],
    ) -> Result<(), EngineError> {
        let name = self.stored_name(name);
        match self {
            Self::Files { files, .. } => match self.stored(name, shape) {
                None => files.read_f32(name, shape, out)?,
                Some(stored) => {
                    let (known, new) = out.split_at_mut(stored.iter().product());
                    files.read_f32(name, &stored, known)?;
                    fill_with_mean(known, new, shape[1]);
                }
            },
            Self::Random { .. } => self.draw(name, shape, 0, out),
            Self::Memory(values) => {
                let values = values.get(name).filter(|values| values.len() == out.len());
                out.copy_from_slice(values.expect("all tensors of the model, in their shapes"));
            }
        }
        Ok(())
    }

    /// Fills `out` with rows of the embedding or the output layer, in float32.
    pub fn read_rows(
        &self,
        config: &ModelConfig,
        name: &str,
        rows: &TrainedRows,
        out: &mut [f32],
    ) -> Result<(), EngineError> {
        let shape = [config.vocab_size, config.hidden_size];
        let TrainedRows::These(ids) = rows else {
            return self.read_f32(name, &shape, out);
        };
        let width = config.hidden_size;
        let Self::Files {
            files, vocabulary, ..
        } = self
        else {
            let mut all = vec![0.0; shape[0] * width];
            self.read_f32(name, &shape, &mut all)?;
            for (id, row) in ids.iter().zip(out.chunks_exact_mut(width)) {
                row.copy_from_slice(&all[*id as usize * width..][..width]);
            }
            return Ok(());
        };
        let name = self.stored_name(name);
        let stored = self.stored(name, &shape).unwrap_or(shape);
        let mut mean: Option<MeanRow> = None;
        for (id, row) in ids.iter().zip(out.chunks_exact_mut(width)) {
            match *id as usize {
                known if known < *vocabulary => {
                    files.read_part(name, &stored, known * width, row)?;
                }
                _ => match &mean {
                    Some(mean) => mean.write(row),
                    None => mean.insert(mean_row(files, name, &stored)?).write(row),
                },
            }
        }
        Ok(())
    }

    /// The name that files have a tensor under: a tied output layer that is to be one of its own begins as the embedding.
    fn stored_name<'a>(&self, name: &'a str) -> &'a str {
        match self {
            Self::Files { tied: true, .. } if name == HEAD => EMBEDDING,
            _ => name,
        }
    }

    /// The shape that files have a matrix in, where the model has more tokens than they.
    fn stored(&self, name: &str, shape: &[usize]) -> Option<[usize; 2]> {
        let Self::Files { vocabulary, .. } = self else {
            return None;
        };
        let is_of_tokens = [EMBEDDING, HEAD].contains(&name);
        (is_of_tokens && shape[0] > *vocabulary).then(|| [*vocabulary, shape[1]])
    }

    /// Reads or draws a frozen tensor in its storage type: vectors in float32, matrices in `dtype`.
    pub fn tensor(
        &self,
        name: &str,
        shape: &[usize],
        dtype: BaseDtype,
    ) -> Result<Weight, EngineError> {
        let scalars = shape.iter().product();
        // A pool of its own: it maps memory in large pages, and is given up with the weight.
        let pool = Pool::default();
        if dtype == BaseDtype::Bfloat16 && shape.len() > 1 {
            let mut values = pool.take(scalars);
            self.read_bf16(name, shape, &mut values)?;
            return Ok(Weight::frozen_bf16(values, shape));
        }
        let mut values = pool.take(scalars);
        self.read_f32(name, shape, &mut values)?;
        Ok(Weight::frozen_f32(values, shape))
    }

    /// Reads or draws a frozen vector, rounded to bfloat16 but in float32.
    pub fn rounded_vector(&self, name: &str, shape: &[usize]) -> Result<Weight, EngineError> {
        let mut narrow = vec![bf16::ZERO; shape.iter().product()];
        self.read_bf16(name, shape, &mut narrow)?;
        let mut values = Pool::default().take(narrow.len());
        widen(&narrow, &mut values);
        Ok(Weight::frozen_f32(values, shape))
    }

    /// A frozen matrix in 4 bits, where the files hold it so, or where they hold numbers and these are to be quantised: as they
    /// are in `dtype`. None where it stays as it is.
    pub fn four_bits(
        &self,
        name: &str,
        shape: &[usize],
        dtype: BaseDtype,
        quantization: Option<Quantization>,
    ) -> Result<Option<Nf4>, EngineError> {
        let name = self.stored_name(name);
        if let Self::Files { files, .. } = self
            && files.are_four_bits()
        {
            // What the files leave as it is, whoever quantised the rest had a reason for.
            return Ok(files.four_bits(name, shape)?);
        }
        let Some(how) = quantization else {
            return Ok(None);
        };
        let mut values = vec![0.0; shape.iter().product()];
        match dtype {
            BaseDtype::Float32 => self.read_f32(name, shape, &mut values)?,
            BaseDtype::Bfloat16 => {
                let mut narrow = vec![bf16::ZERO; values.len()];
                self.read_bf16(name, shape, &mut narrow)?;
                widen(&narrow, &mut values);
            }
        }
        let matrix = Nf4::quantise(&values, how.nested_scales);
        matrix
            .map(Some)
            .map_err(|reason| self.not_quantised(name, reason))
    }

    /// The error of a matrix that has no 4 bits.
    pub fn not_quantised(&self, name: &str, reason: NotQuantised) -> EngineError {
        match self {
            Self::Files { files, .. } => files.malformed(name, &reason.to_string()).into(),
            Self::Random { .. } | Self::Memory(_) => EngineError::NotQuantised {
                name: name.to_owned(),
                reason,
            },
        }
    }

    /// A frozen matrix as it is kept: its [`four_bits`](Self::four_bits) where it has some, else in `dtype`.
    pub fn matrix(
        &self,
        name: &str,
        shape: &[usize],
        dtype: BaseDtype,
        quantization: Option<Quantization>,
    ) -> Result<Weight, EngineError> {
        match self.four_bits(name, shape, dtype, quantization)? {
            Some(matrix) => Ok(Weight::frozen_nf4(matrix, shape)),
            None => self.tensor(name, shape, dtype),
        }
    }

    /// Whether [`matrix`](Self::matrix) has this one in 4 bits.
    #[cfg(feature = "cuda")]
    pub fn has_four_bits(&self, name: &str, quantization: Option<Quantization>) -> bool {
        match self {
            Self::Files { files, .. } if files.are_four_bits() => {
                files.is_quantised(self.stored_name(name))
            }
            _ => quantization.is_some(),
        }
    }

    /// Fills `out` with the values of a tensor in bfloat16, rounded to the nearest where they are wider.
    pub fn read_bf16(
        &self,
        name: &str,
        shape: &[usize],
        out: &mut [bf16],
    ) -> Result<(), EngineError> {
        let name = self.stored_name(name);
        match self {
            Self::Files { files, .. } => {
                if let Some(stored) = self.stored(name, shape) {
                    let (known, new) = out.split_at_mut(stored.iter().product());
                    self.read_bf16(name, &stored, known)?;
                    fill_with_mean(known, new, shape[1]);
                    return Ok(());
                }
                if !files.is_widened(name) {
                    let view = files.expect(name, shape)?;
                    if view.dtype == Dtype::BF16 {
                        for (out, pair) in out.iter_mut().zip(view.bytes.chunks_exact(2)) {
                            *out = bf16::from_bits(u16::from_le_bytes([pair[0], pair[1]]));
                        }
                        return Ok(());
                    }
                }
                let mut wide = vec![0.0; out.len()];
                files.read_f32(name, shape, &mut wide)?;
                round_slice(&wide, 1.0, out);
                check_rounded(files, name, &wide, out)?;
            }
            Self::Random { .. } => self.draw(name, shape, 0, out),
            Self::Memory(_) => {
                let mut wide = vec![0.0; out.len()];
                self.read_f32(name, shape, &mut wide)?;
                round_slice(&wide, 1.0, out);
            }
        }
        Ok(())
    }
}

/// The mean of all rows of a matrix, of which only a part is in memory at a time.
fn mean_row(files: &WeightFiles, name: &str, shape: &[usize; 2]) -> Result<MeanRow, EngineError> {
    let [rows, width] = *shape;
    let mut mean = MeanRow::new(width);
    let mut part = vec![0.0f32; ROWS_AT_ONCE.min(rows) * width];
    for first in (0..rows).step_by(ROWS_AT_ONCE) {
        let part = &mut part[..ROWS_AT_ONCE.min(rows - first) * width];
        files.read_part(name, shape, first * width, part)?;
        mean.add(part);
    }
    Ok(mean)
}

/// Refuses weights that were finite and that bfloat16 made infinite.
pub(super) fn check_rounded(
    files: &WeightFiles,
    name: &str,
    wide: &[f32],
    narrow: &[bf16],
) -> Result<(), EngineError> {
    let mut pairs = wide.iter().zip(narrow);
    let beyond = pairs.find(|(wide, narrow)| wide.is_finite() && narrow.is_infinite());
    let Some((wide, _)) = beyond else {
        return Ok(());
    };
    Err(files
        .malformed(name, &NotBfloat16(*wide).to_string())
        .into())
}

impl WeightSource {
    /// Draws the scalars of a tensor from `first` on, where values are drawn.
    pub(super) fn draw<E: Element>(
        &self,
        name: &str,
        shape: &[usize],
        first: usize,
        out: &mut [E],
    ) {
        let Self::Random {
            seed,
            standard_deviation,
            norm,
        } = self
        else {
            return;
        };
        let is_bias = name.ends_with(".bias") || name.ends_with(FUSED_BIAS);
        match is_norm_or_bias(name, shape.len()) {
            true if is_bias => out.fill(E::zeroed()),
            // These multiply by their weight in every family, and Transformers starts the other with the same value.
            true if name.ends_with(HEAD_NORM) || name.ends_with(DECAY_BIAS) => {
                out.fill(E::round_from(1.0));
            }
            true => out.fill(E::round_from(*norm)),
            false if ROUTER_SCALES.iter().any(|scale| name.ends_with(scale)) => {
                out.fill(E::round_from(1.0));
            }
            false if name.ends_with(DECAY) => draw_decay(name, *seed, first, out),
            false => draw_normal(name, (*seed, *standard_deviation), first, out),
        }
    }
}

fn draw_normal<E: Element>(name: &str, (seed, deviation): (u64, f64), first: usize, out: &mut [E]) {
    let key = [STREAM_WEIGHTS, name_key(name)];
    out.par_chunks_mut(DRAW_TILE)
        .enumerate()
        .for_each(|(tile, out)| {
            let mut rng = CounterRng::new(seed, &key);
            rng.skip((first + tile * DRAW_TILE) as u64 * CounterRng::WORDS_PER_NORMAL);
            for value in out {
                *value = E::round_from((rng.normal() * deviation) as f32);
            }
        });
}

/// Logarithms of how fast heads forget, which is drawn uniformly from 0.01 to 16, as Transformers does.
fn draw_decay<E: Element>(name: &str, seed: u64, first: usize, out: &mut [E]) {
    const STEPS: u64 = 1 << 24;
    let mut rng = CounterRng::new(seed, &[STREAM_WEIGHTS, name_key(name)]);
    let all: Vec<f64> = (0..first + out.len())
        .map(|_| rng.below(STEPS) as f64 / STEPS as f64)
        .collect();
    for (value, drawn) in out.iter_mut().zip(&all[first..]) {
        *value = E::round_from(libm::log(0.01 + (16.0 - 0.01) * drawn) as f32);
    }
}

/// Turns a tensor's name into a word of a random stream's key.
pub fn name_key(name: &str) -> u64 {
    let digest = blake3::hash(name.as_bytes());
    let mut word = [0; 8];
    word.copy_from_slice(&digest.as_bytes()[..8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use common::model::{ModelConfig, base_tensors};

    use super::*;
    use crate::ComputeDevice;
    use crate::engine::{Trainer, TrainerOptions, testing};
    use common::files::model::{ModelTensor, Scalars, write_model};
    use common::job::{InitWeights, Method, TargetModules};
    use serde_json::json;

    const SHAPE: [usize; 2] = [3, 4];

    fn open(max_shard_bytes: u64, dtype: Dtype) -> (tempfile::TempDir, WeightSource) {
        let dir = tempfile::tempdir().unwrap();
        let values = testing::random_values(12, 1);
        let tensor = |name| ModelTensor {
            name,
            shape: &SHAPE,
            scalars: Scalars::Here(&values),
        };
        let config = testing::config("LlamaForCausalLM");
        let tensors = [tensor("a"), tensor("b")];
        write_model(dir.path(), &config, &tensors, dtype, max_shard_bytes).unwrap();
        let folder = ModelFolder::open(dir.path(), InitWeights::Pretrained).unwrap();
        let expected = ["a", "b"].map(|name| (name.to_owned(), SHAPE.to_vec()));
        let source = WeightSource::open(&folder, &expected).unwrap();
        (dir, source)
    }

    fn read(source: &WeightSource, name: &str, dtype: BaseDtype) -> Vec<f32> {
        let weight = source.tensor(name, &SHAPE, dtype).unwrap();
        let mut values = vec![0.0; 12];
        for (row, values) in values.chunks_exact_mut(4).enumerate() {
            weight.read().slice().copy_row(row, 4, values);
        }
        values
    }

    #[test]
    fn one_file_and_shards_give_the_same_weights() {
        let (_single_dir, single) = open(1 << 20, Dtype::F32);
        let (_sharded_dir, sharded) = open(50, Dtype::F32);
        let expected = testing::random_values(12, 1);
        for source in [single, sharded] {
            assert_eq!(read(&source, "a", BaseDtype::Float32), expected);
            assert_eq!(read(&source, "b", BaseDtype::Float32), expected);
        }
    }

    #[test]
    fn weights_are_rounded_to_the_job_s_type_whatever_the_file_has() {
        let (_wide_dir, wide) = open(1 << 20, Dtype::F32);
        let (_narrow_dir, narrow) = open(1 << 20, Dtype::BF16);
        let rounded = read(&wide, "a", BaseDtype::Bfloat16);
        assert_eq!(read(&narrow, "a", BaseDtype::Bfloat16), rounded);
        assert_eq!(read(&narrow, "a", BaseDtype::Float32), rounded);
        assert_ne!(read(&wide, "a", BaseDtype::Float32), rounded);
    }

    #[test]
    fn numbers_beyond_bfloat16_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let mut values = testing::random_values(12, 1);
        values[7] = -f32::MAX;
        let tensor = ModelTensor {
            name: "a",
            shape: &SHAPE,
            scalars: Scalars::Here(&values),
        };
        let config = testing::config("LlamaForCausalLM");
        write_model(dir.path(), &config, &[tensor], Dtype::F32, 1 << 20).unwrap();
        let folder = ModelFolder::open(dir.path(), InitWeights::Pretrained).unwrap();
        let expected = [("a".to_owned(), SHAPE.to_vec())];
        let source = WeightSource::open(&folder, &expected).unwrap();
        assert_eq!(read(&source, "a", BaseDtype::Float32), values);
        let error = source.tensor("a", &SHAPE, BaseDtype::Bfloat16).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("model.safetensors") && error.contains("tensor a holds -3.4028235e38"),
            "{error}"
        );
    }

    #[test]
    fn missing_tensors_and_other_shapes_are_named() {
        let (_dir, source) = open(1 << 20, Dtype::F32);
        let message = |name: &str, shape: &[usize]| {
            let error = source.tensor(name, shape, BaseDtype::Float32).unwrap_err();
            error.to_string()
        };
        assert!(message("c", &SHAPE).contains("no tensor c"));
        let shape = message("a", &[4, 3]);
        assert!(
            shape.contains("[3, 4]") && shape.contains("[4, 3]"),
            "{shape}"
        );
    }

    #[test]
    fn sizes_that_the_files_do_not_have_are_refused_before_memory_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = testing::config("LlamaForCausalLM");
        testing::write_model(dir.path(), &config, 7);
        for size in ["hidden_size", "intermediate_size"] {
            config[size] = json!(1 << 20);
        }
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        for method in [Method::Full, testing::lora(TargetModules::AllLinear, 0.0)] {
            let loaded = Trainer::load(TrainerOptions {
                job: testing::job(method).into(),
                model_dir: dir.path().to_owned(),
                adapter_dir: None,
                threads: 1,
                device: ComputeDevice::Cpu,
            });
            let message = loaded.err().unwrap().to_string();
            assert!(message.contains("[61, 1048576]"), "{message}");
        }
    }

    #[test]
    fn random_weights_depend_on_seed_and_name_alone() {
        let draw = |seed, name: &str| {
            let source = WeightSource::Random {
                seed,
                standard_deviation: 0.5,
                norm: 1.0,
            };
            let mut values = vec![0.0; 4000];
            source.read_f32(name, &[40, 100], &mut values).unwrap();
            values
        };
        assert_eq!(draw(1, "a"), draw(1, "a"));
        let key = [STREAM_WEIGHTS, name_key("a")];
        let mut rng = CounterRng::new(1, &key);
        let one_by_one: Vec<f32> = (0..4000).map(|_| (rng.normal() * 0.5) as f32).collect();
        assert_eq!(draw(1, "a"), one_by_one);
        assert_ne!(draw(1, "a"), draw(2, "a"));
        assert_ne!(draw(1, "a"), draw(1, "b"));
        let squares: f32 = draw(1, "a").iter().map(|x| x * x).sum();
        assert!((squares / 4000.0 - 0.25).abs() < 0.02);
        let mut norm = [0.0; 3];
        let source = WeightSource::Random {
            seed: 1,
            standard_deviation: 0.5,
            norm: 1.0,
        };
        source.read_f32("norm.weight", &[3], &mut norm).unwrap();
        assert_eq!(norm, [1.0; 3]);
    }

    #[test]
    fn a_configuration_names_every_tensor_once() {
        let mut json = testing::config("Qwen2ForCausalLM");
        json["tie_word_embeddings"] = json!(false);
        let config = ModelConfig::parse(&json, std::path::Path::new("config.json")).unwrap();
        let tensors = base_tensors(&config);
        let mut names: Vec<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        // Embedding, head, final norm; per layer two norms, seven linears and three biases.
        assert_eq!((names.len(), tensors.len()), (3 + 2 * 12, 3 + 2 * 12));
        assert!(names.contains(&"model.layers.1.self_attn.k_proj.bias"));
    }
}
