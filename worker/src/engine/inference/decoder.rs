//! Models for inference on weights into which an adapter was merged: candle-transformers' decoders where they have all that
//! the model does, else the decoder that is trained.
//!
//! In: a model folder and perhaps a PEFT adapter, neither trusted. Out: the logits that follow a text. Everything is
//! float32 on the CPU; nothing here has gradients.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::{llama, qwen2, qwen3};
use common::files::layout::Layout;
use common::files::model::{Architecture, ModelFolder};
use common::job::{BaseDtype, InitWeights};
use common::model::{ModelConfig, RopeScaling};

use super::error::InferenceError;
use super::merged_weights::{Adapter, FourBits, merged_weights};
use crate::engine::model::Parts;
use crate::engine::model::causal_lm::{CausalLm, Text};
use crate::engine::model::weights::WeightSource;
use crate::engine::params::{Collect, Parameters};

/// Positions that rotary tables are made for, where the model does not say fewer.
const MAX_POSITIONS: usize = 32_768;
/// Tokens of a prompt that go through the model at once, which bounds the attention matrix.
const PROMPT_CHUNK: usize = 512;

/// A decoder with its key-value cache.
pub struct InferenceModel {
    decoder: Decoder,
    vocabulary: usize,
    positions: usize,
    seen: usize,
}

enum Decoder {
    Llama {
        model: llama::Llama,
        config: Box<llama::Config>,
        cache: llama::Cache,
    },
    Qwen2(qwen2::ModelForCausalLM),
    Qwen3(qwen3::ModelForCausalLM),
    /// The decoder that is trained.
    Own {
        model: Box<CausalLm>,
        text: Text,
    },
}

impl InferenceModel {
    /// Loads a model, quantises it where that is asked for, and merges the adapter into its weights if there is one.
    pub fn load(
        model_dir: &Path,
        adapter_dir: Option<&Path>,
        four_bits: Option<FourBits>,
    ) -> Result<Self, InferenceError> {
        Self::load_with(model_dir, adapter_dir, four_bits, 0)
    }

    /// [`load`](Self::load) with rows for at least so many tokens.
    pub fn load_with(
        model_dir: &Path,
        adapter_dir: Option<&Path>,
        four_bits: Option<FourBits>,
        vocabulary: usize,
    ) -> Result<Self, InferenceError> {
        let folder = ModelFolder::open(model_dir, InitWeights::Pretrained)?;
        let mut adapter = adapter_dir.map(Adapter::open).transpose()?;
        let config = ModelConfig::of(&folder)?;
        let config = match &mut adapter {
            Some(adapter) => adapter.on(config)?,
            None => config,
        };
        let config = ModelConfig {
            vocab_size: config.vocab_size.max(vocabulary),
            ..config
        };
        config.check_vocabulary()?;
        let positions = folder.config_json()["max_position_embeddings"]
            .as_u64()
            .map_or(MAX_POSITIONS, |positions| {
                positions.clamp(1, MAX_POSITIONS as u64) as usize
            });
        let weights = merged_weights(&folder, &config, adapter.as_ref(), four_bits)?;
        // candle counts something else against this limit too, so it is never small.
        let table = positions.max(4096);
        let vars = |weights| VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
        let is_known = candle_knows(&config, positions);
        let decoder = match folder.architecture() {
            Architecture::Llama if is_known => {
                let vars = vars(weights);
                let config = Box::new(llama_config(&config, table));
                Decoder::Llama {
                    model: llama::Llama::load(vars, &config)?,
                    cache: llama::Cache::new(true, DType::F32, &config, &Device::Cpu)?,
                    config,
                }
            }
            Architecture::Qwen2 if is_known => Decoder::Qwen2(qwen2::ModelForCausalLM::new(
                &qwen2_config(&config, table),
                vars(weights),
            )?),
            Architecture::Qwen3 if is_known => Decoder::Qwen3(qwen3::ModelForCausalLM::new(
                &qwen3_config(&config, table),
                vars(weights),
            )?),
            _ => Decoder::Own {
                model: Box::new(own_model(&config, weights)?),
                text: Text::default(),
            },
        };
        Ok(Self {
            decoder,
            vocabulary: config.vocab_size,
            positions,
            seen: 0,
        })
    }

    /// Most tokens that one text may have.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Forgets the text so far, to begin another.
    pub fn reset(&mut self) -> Result<(), InferenceError> {
        match &mut self.decoder {
            Decoder::Llama { cache, config, .. } => {
                *cache = llama::Cache::new(true, DType::F32, config, &Device::Cpu)?;
            }
            Decoder::Qwen2(model) => model.clear_kv_cache(),
            Decoder::Qwen3(model) => model.clear_kv_cache(),
            Decoder::Own { text, .. } => *text = Text::default(),
        }
        self.seen = 0;
        Ok(())
    }

    /// Appends tokens (at least one) to the text, and returns the logits of what comes next.
    pub fn append(&mut self, tokens: &[u32]) -> Result<Vec<f32>, InferenceError> {
        assert!(!tokens.is_empty(), "nothing to append");
        let vocabulary = self.vocabulary;
        if let Some(&token) = tokens.iter().find(|token| **token as usize >= vocabulary) {
            return Err(InferenceError::TokenOutOfRange { token, vocabulary });
        }
        if let Decoder::Own { model, text } = &mut self.decoder {
            return finite(model.append(text, tokens)?);
        }
        let mut logits: Vec<f32> = Vec::new();
        for chunk in tokens.chunks(PROMPT_CHUNK) {
            let input = Tensor::new(chunk, &Device::Cpu)?.unsqueeze(0)?;
            let output = match &mut self.decoder {
                Decoder::Llama { model, cache, .. } => model.forward(&input, self.seen, cache)?,
                Decoder::Qwen2(model) => model.forward(&input, self.seen)?,
                Decoder::Qwen3(model) => model.forward(&input, self.seen)?,
                Decoder::Own { .. } => unreachable!("answered above"),
            };
            self.seen += chunk.len();
            logits = output.flatten_all()?.to_vec1()?;
        }
        finite(logits)
    }
}

fn finite(logits: Vec<f32>) -> Result<Vec<f32>, InferenceError> {
    match logits.iter().all(|logit| logit.is_finite()) {
        true => Ok(logits),
        false => Err(InferenceError::NotFinite),
    }
}

/// The decoder that is trained, on these weights.
fn own_model(
    config: &ModelConfig,
    weights: HashMap<String, Tensor>,
) -> Result<CausalLm, InferenceError> {
    let values = weights.into_iter().map(|(name, tensor)| {
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        Ok((name, values))
    });
    let values = values.collect::<Result<_, candle_core::Error>>()?;
    let parts = Parts {
        config,
        source: &WeightSource::Memory(values),
        parameters: &Parameters::new(Layout::new([]), Vec::new(), Collect::Slot),
        lora: None,
        new_adapter: None,
        dtype: BaseDtype::Float32,
        quantization: None,
    };
    Ok(parts.model(PROMPT_CHUNK)?)
}

/// Whether candle-transformers' decoder of the family has all that this model does, for texts of so many tokens.
fn candle_knows(config: &ModelConfig, positions: usize) -> bool {
    let sees_all = config
        .smallest_window()
        .is_none_or(|window| window >= positions);
    let usual_heads = config.head_dim * config.heads == config.hidden_size;
    let unscaled = config.rope.scaling == RopeScaling::None;
    sees_all
        && !config.mlp_bias
        && match config.architecture {
            Architecture::Llama => {
                let llama3 = matches!(config.rope.scaling, RopeScaling::Llama3 { .. });
                usual_heads && (unscaled || llama3) && !config.qkv_bias && !config.output_bias
            }
            Architecture::Qwen2 => usual_heads && unscaled,
            Architecture::Qwen3 => unscaled,
            _ => false,
        }
}

fn llama_config(config: &ModelConfig, positions: usize) -> llama::Config {
    let rope_scaling = match config.rope.scaling {
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_positions,
        } => Some(llama::Llama3RopeConfig {
            factor: factor as f32,
            low_freq_factor: low_freq_factor as f32,
            high_freq_factor: high_freq_factor as f32,
            original_max_position_embeddings: original_positions as usize,
            rope_type: llama::Llama3RopeType::Llama3,
        }),
        RopeScaling::None
        | RopeScaling::Linear { .. }
        | RopeScaling::Proportional { .. }
        | RopeScaling::Yarn { .. }
        | RopeScaling::Long { .. } => None,
    };
    llama::Config {
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        vocab_size: config.vocab_size,
        num_hidden_layers: config.layers,
        num_attention_heads: config.heads,
        num_key_value_heads: config.key_value_heads,
        use_flash_attn: false,
        rms_norm_eps: config.rms_norm_epsilon,
        rope_theta: config.rope.theta as f32,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling,
        max_position_embeddings: positions,
        tie_word_embeddings: config.tied,
    }
}

fn qwen2_config(config: &ModelConfig, positions: usize) -> qwen2::Config {
    qwen2::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.layers,
        num_attention_heads: config.heads,
        num_key_value_heads: config.key_value_heads,
        max_position_embeddings: positions,
        // Applied whatever `use_sliding_window` says; `candle_knows` has seen to it that none is needed.
        sliding_window: positions,
        max_window_layers: config.layers,
        tie_word_embeddings: config.tied,
        rope_theta: config.rope.theta,
        rms_norm_eps: config.rms_norm_epsilon,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    }
}

fn qwen3_config(config: &ModelConfig, positions: usize) -> qwen3::Config {
    qwen3::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.layers,
        num_attention_heads: config.heads,
        head_dim: config.head_dim,
        attention_bias: config.qkv_bias,
        num_key_value_heads: config.key_value_heads,
        max_position_embeddings: positions,
        sliding_window: None,
        max_window_layers: config.layers,
        tie_word_embeddings: config.tied,
        rope_theta: config.rope.theta,
        rms_norm_eps: config.rms_norm_epsilon,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use common::job::Method;
    use serde_json::{Value, json};

    use super::*;
    use crate::engine::testing::{config, job, load, write_model};

    /// The logits behind a text, and those of the trainer.
    fn check(architecture: &str, is_known: bool, change: &dyn Fn(&mut Value)) {
        let mut json = config(architecture);
        change(&mut json);
        let dir = tempfile::tempdir().unwrap();
        write_model(dir.path(), &json, 7);
        let text: Vec<u32> = (0..30).map(|i| i * i % 61).collect();
        let mut model = InferenceModel::load(dir.path(), None, None).unwrap();
        assert_eq!(
            matches!(model.decoder, Decoder::Own { .. }),
            !is_known,
            "{json}"
        );
        model.append(&text[..20]).unwrap();
        let found = model.append(&text[20..]).unwrap();
        let all = load(dir.path(), job(Method::Full), 1)
            .logits(&text)
            .unwrap();
        let expected = &all[all.len() - found.len()..];
        let largest = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-4 * largest, "{json}");
        }
        model.reset().unwrap();
        let again = [
            model.append(&text[..1]).unwrap(),
            model.append(&text[1..]).unwrap(),
        ]
        .concat();
        let off = again[found.len()..]
            .iter()
            .zip(expected)
            .map(|(a, b)| (a - b).abs());
        assert!(off.fold(0.0, f32::max) < 1e-4 * largest, "{json}");
    }

    #[test]
    fn what_candle_s_decoders_lack_is_generated_from_all_the_same() {
        check("LlamaForCausalLM", true, &|_| {});
        check("Qwen3ForCausalLM", true, &|_| {});
        check("LlamaForCausalLM", false, &|json| {
            json["attention_bias"] = true.into()
        });
        check("LlamaForCausalLM", false, &|json| {
            json["rope_scaling"] = json!({"rope_type": "linear", "factor": 4.0});
        });
        check("Qwen2ForCausalLM", false, &|json| {
            json["sliding_window"] = 7.into();
            json["use_sliding_window"] = true.into();
        });
        check("Gemma3ForCausalLM", false, &|_| {});
        check("Glm4ForCausalLM", false, &|_| {});
        check("Qwen3_5ForCausalLM", false, &|_| {});
        check("Qwen3NextForCausalLM", false, &|_| {});
        // The text becomes long as it goes on.
        check("Phi3ForCausalLM", false, &|json| {
            json["original_max_position_embeddings"] = 24.into();
            json["max_position_embeddings"] = 96.into();
            json["rope_scaling"] = json!({
                "type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0],
                "long_factor": [2.0, 4.0, 8.0, 16.0]
            });
        });
    }
}
