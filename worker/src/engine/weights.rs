//! Base weights: read from safetensors through a memory map, or drawn from the seed.
//!
//! In: a model folder and the names and shapes that the configuration calls for. Out: float32 values, or frozen
//! tensors in the job's base type. Vectors (norms, biases) are always float32.

use candle_core::{Device, Tensor};
use common::files::FileError;
use common::files::model::ModelFolder;
use common::files::tensors::{Dtype, TensorFile};
use common::job::BaseDtype;
use common::rng::CounterRng;
use half::bf16;

use super::EngineError;
use super::config::ModelConfig;

/// Draw stream of the counter-based generator.
const STREAM_WEIGHTS: u64 = 0x7765_6967_6874;

/// Where base weights come from.
pub enum WeightSource {
    Files {
        folder: String,
        files: Vec<TensorFile>,
    },
    /// Normal with this standard deviation; norms are one and biases zero.
    Random { seed: u64, standard_deviation: f64 },
}

impl WeightSource {
    pub fn open(folder: &ModelFolder) -> Result<Self, EngineError> {
        let files = folder
            .weight_files()
            .iter()
            .map(|path| TensorFile::open(path))
            .collect::<Result<_, _>>()?;
        Ok(Self::Files {
            folder: folder.dir().display().to_string(),
            files,
        })
    }

    /// Fills `out` with the values of a tensor in float32.
    pub fn read_f32(
        &self,
        name: &str,
        shape: &[usize],
        out: &mut [f32],
    ) -> Result<(), EngineError> {
        match self {
            Self::Files { folder, files } => {
                find(folder, files, name)?.read_f32(name, shape, out)?;
            }
            Self::Random {
                seed,
                standard_deviation,
            } => draw(name, shape, *seed, *standard_deviation, out),
        }
        Ok(())
    }

    /// A tensor in its storage type: vectors in float32, matrices in `dtype`.
    pub fn tensor(
        &self,
        name: &str,
        shape: &[usize],
        dtype: BaseDtype,
    ) -> Result<Tensor, EngineError> {
        if dtype == BaseDtype::Bfloat16 && shape.len() > 1 {
            let values = self.read_bf16(name, shape)?;
            return Ok(Tensor::from_vec(values, shape, &Device::Cpu)?);
        }
        let mut values = vec![0.0; shape.iter().product()];
        self.read_f32(name, shape, &mut values)?;
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    fn read_bf16(&self, name: &str, shape: &[usize]) -> Result<Vec<bf16>, EngineError> {
        if let Self::Files { folder, files } = self {
            let view = find(folder, files, name)?.expect(name, shape)?;
            if view.dtype == Dtype::BF16 {
                let pairs = view.bytes.chunks_exact(2);
                return Ok(pairs
                    .map(|pair| bf16::from_bits(u16::from_le_bytes([pair[0], pair[1]])))
                    .collect());
            }
        }
        let mut wide = vec![0.0; shape.iter().product()];
        self.read_f32(name, shape, &mut wide)?;
        Ok(wide.into_iter().map(bf16::from_f32).collect())
    }
}

fn find<'a>(
    folder: &str,
    files: &'a [TensorFile],
    name: &str,
) -> Result<&'a TensorFile, FileError> {
    files
        .iter()
        .find(|file| file.get(name).is_some())
        .ok_or_else(|| FileError::MissingTensor {
            path: folder.into(),
            tensor: name.to_owned(),
        })
}

fn draw(name: &str, shape: &[usize], seed: u64, standard_deviation: f64, out: &mut [f32]) {
    if shape.len() == 1 {
        out.fill(if name.ends_with(".bias") { 0.0 } else { 1.0 });
        return;
    }
    let mut rng = CounterRng::new(seed, &[STREAM_WEIGHTS, name_key(name)]);
    for value in out {
        *value = (rng.normal() * standard_deviation) as f32;
    }
}

/// A name as a word of a random stream's key.
pub fn name_key(name: &str) -> u64 {
    let digest = blake3::hash(name.as_bytes());
    let mut word = [0; 8];
    word.copy_from_slice(&digest.as_bytes()[..8]);
    u64::from_le_bytes(word)
}

/// Names and shapes of all base weights, with Hugging Face's names. A tied output layer is not listed.
pub fn base_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let mut tensors = vec![
        (
            EMBEDDING.to_owned(),
            vec![config.vocab_size, config.hidden_size],
        ),
        (FINAL_NORM.to_owned(), vec![config.hidden_size]),
    ];
    if !config.tied {
        let shape = vec![config.vocab_size, config.hidden_size];
        tensors.push((HEAD.to_owned(), shape));
    }
    for layer in 0..config.layers {
        let prefix = format!("model.layers.{layer}.");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((format!("{prefix}{norm}.weight"), vec![config.hidden_size]));
        }
        if config.head_norms {
            for norm in ["q_norm", "k_norm"] {
                let name = format!("{prefix}self_attn.{norm}.weight");
                tensors.push((name, vec![config.head_dim]));
            }
        }
        for linear in linears(config) {
            let name = format!("{prefix}{}", linear.path);
            tensors.push((format!("{name}.weight"), vec![linear.out, linear.width]));
            if linear.bias {
                tensors.push((format!("{name}.bias"), vec![linear.out]));
            }
        }
    }
    tensors
}

pub const EMBEDDING: &str = "model.embed_tokens.weight";
pub const FINAL_NORM: &str = "model.norm.weight";
pub const HEAD: &str = "lm_head.weight";

/// One linear of a decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// Within its layer.
    pub path: &'static str,
    pub out: usize,
    pub width: usize,
    pub bias: bool,
}

/// The linears of each decoder layer: queries, keys, values, attention output, gate, up, down.
pub fn linears(config: &ModelConfig) -> [LinearShape; 7] {
    let hidden = config.hidden_size;
    let queries = config.heads * config.head_dim;
    let keys = config.key_value_heads * config.head_dim;
    let linear = |path, out, width, bias| LinearShape {
        path,
        out,
        width,
        bias,
    };
    [
        linear("self_attn.q_proj", queries, hidden, config.qkv_bias),
        linear("self_attn.k_proj", keys, hidden, config.qkv_bias),
        linear("self_attn.v_proj", keys, hidden, config.qkv_bias),
        linear("self_attn.o_proj", hidden, queries, config.output_bias),
        linear(
            "mlp.gate_proj",
            config.intermediate_size,
            hidden,
            config.mlp_bias,
        ),
        linear(
            "mlp.up_proj",
            config.intermediate_size,
            hidden,
            config.mlp_bias,
        ),
        linear(
            "mlp.down_proj",
            hidden,
            config.intermediate_size,
            config.mlp_bias,
        ),
    ]
}
