//! How gradients change weights: the optimizer, and learning rates of some weights beside that of all others.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Optimizer, with what only it knows. Betas, epsilon and weight decay are fields of the job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    /// Adam with decoupled weight decay (Loshchilov & Hutter, 2019).
    #[default]
    Adamw,
    /// AdamW with moments of 8 bits (Dettmers et al., 2022).
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
    /// Stochastic gradient descent, as `torch.optim.SGD` does it: the weight decay is added to the gradient.
    Sgd {
        /// Share of the last step's direction that is kept, in [0, 1).
        momentum: f64,
        /// Share of the gradient that does not enter the direction, in [0, 1].
        dampening: f64,
        nesterov: bool,
    },
    /// The sign of an interpolated moment (Chen et al., 2023).
    Lion,
    /// Lion with a moment of 8 bits.
    #[serde(rename = "lion_8bit")]
    Lion8bit,
    /// Orthogonalised momentum for matrices (Jordan et al., 2024), AdamW for embedding and output layer.
    Muon {
        /// Whether norms and biases are trained, by AdamW: so in LLaMA-Factory. In Axolotl they stay as they are.
        trains_vectors: bool,
    },
}

/// What an optimizer keeps of each trained scalar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moments {
    pub count: usize,
    pub dtype: MomentDtype,
}

/// What a moment is kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MomentDtype {
    Float32,
    /// 8 bits, in blocks that share a scale; float32 in small tensors and embeddings.
    EightBits,
}

impl Optimizer {
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The moments that are kept of each trained scalar.
    pub fn moments(&self) -> Moments {
        let count = match self {
            Self::Adamw | Self::Adamw8bit | Self::Muon { .. } => 2,
            Self::Lion | Self::Lion8bit => 1,
            Self::Sgd { momentum, .. } => usize::from(*momentum > 0.0),
        };
        let dtype = match self {
            Self::Adamw8bit | Self::Lion8bit => MomentDtype::EightBits,
            _ => MomentDtype::Float32,
        };
        Moments { count, dtype }
    }

    /// What is wrong with a number of it; goes after the optimizer's name.
    pub fn check(&self) -> Result<(), String> {
        let Self::Sgd {
            momentum,
            dampening,
            nesterov,
        } = *self
        else {
            return Ok(());
        };
        if !(0.0..1.0).contains(&momentum) {
            return Err(format!("has a momentum of {momentum}, not from 0, below 1"));
        }
        if !(0.0..=1.0).contains(&dampening) {
            return Err(format!("has a dampening of {dampening}, not from 0 to 1"));
        }
        if nesterov && (momentum == 0.0 || dampening > 0.0) {
            return Err("has nesterov, which needs a momentum and no dampening".to_owned());
        }
        Ok(())
    }
}

/// The optimizer for people.
impl fmt::Display for Optimizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Adamw => f.write_str("AdamW"),
            Self::Adamw8bit => f.write_str("AdamW, moments of 8 bits"),
            Self::Lion => f.write_str("Lion"),
            Self::Lion8bit => f.write_str("Lion, a moment of 8 bits"),
            Self::Muon { .. } => f.write_str("Muon"),
            Self::Sgd {
                momentum, nesterov, ..
            } => match (*momentum > 0.0, nesterov) {
                (false, _) => f.write_str("SGD"),
                (true, false) => write!(f, "SGD, momentum {momentum}"),
                (true, true) => write!(f, "SGD, Nesterov momentum {momentum}"),
            },
        }
    }
}

/// Learning rates of some weights beside that of all others. The curve of the job multiplies each.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RateGroups {
    /// One rate for all.
    #[default]
    None,
    /// LoRA+ (Hayou et al., 2024): the factor B of an adapter learns at `ratio` times the rate of A.
    LoraPlus {
        ratio: f64,
        /// Rate of the adapter on the embedding, where there is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        embedding: Option<f64>,
    },
    /// Axolotl's groups; embedding and output layer do not decay then.
    Named {
        /// Rate of embedding and output layer. Default: that of all others.
        embedding: Option<f64>,
        groups: Vec<RateGroup>,
    },
}

/// Matrices with a rate of their own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RateGroup {
    pub name: String,
    /// Parts of tensors' names. The first group that has one of a tensor's name is the tensor's.
    pub modules: Vec<String>,
    pub lr: f64,
}

/// What a tensor's group says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorRate {
    /// Factor on the learning rate of a step.
    pub factor: f64,
    /// Whether the tensor decays, where matrices do.
    pub decays: bool,
}

/// Parts of the names of embedding and output layer.
const EMBEDDINGS: [&str; 2] = ["embed_tokens", "lm_head"];

/// Whether a tensor is of the embedding or the output layer.
pub fn is_embedding(name: &str) -> bool {
    EMBEDDINGS.iter().any(|part| name.contains(part))
}

/// A part of the names of the factors of an adapter on the embedding, as PEFT saves them.
const OF_EMBEDDING: &str = "lora_embedding_";

/// The end of a name of DoRA's magnitudes, as PEFT saves them.
pub const MAGNITUDE: &str = "lora_magnitude_vector";

/// Whether a tensor of that name holds DoRA's magnitudes. A vector, but to Transformers neither a norm nor a bias.
pub fn is_magnitude(name: &str) -> bool {
    name.ends_with(MAGNITUDE)
}

impl RateGroups {
    pub fn is_none(&self) -> bool {
        *self == Self::None
    }

    /// The group of a tensor by its name, where `peak` is the learning rate of all others. `is_vector`: a norm or a bias.
    pub fn of(&self, name: &str, is_vector: bool, peak: f64) -> TensorRate {
        let rate = |rate: f64, decays| TensorRate {
            factor: rate / peak,
            decays,
        };
        match self {
            Self::None => rate(peak, true),
            // A vector is of the group of B (PEFT, `optimizers/loraplus.py`).
            Self::LoraPlus { embedding, .. } if name.contains(OF_EMBEDDING) => {
                rate(embedding.unwrap_or(peak), true)
            }
            Self::LoraPlus { ratio, .. } if is_vector || name.contains("lora_B") => TensorRate {
                factor: *ratio,
                decays: true,
            },
            Self::LoraPlus { .. } => rate(peak, true),
            Self::Named { embedding, .. } if is_embedding(name) => {
                rate(embedding.unwrap_or(peak), false)
            }
            Self::Named { .. } if is_vector && !is_magnitude(name) => rate(peak, true),
            Self::Named { groups, .. } => {
                let name = name_in_peft(name);
                let group = groups
                    .iter()
                    .find(|group| group.modules.iter().any(|part| name.contains(part)));
                rate(group.map_or(peak, |group| group.lr), true)
            }
        }
    }

    /// Parts of names that groups have and no matrix of these, and so no effect.
    pub fn without_effect<'a>(&'a self, matrices: &[String]) -> Vec<&'a str> {
        let Self::Named { groups, .. } = self else {
            return Vec::new();
        };
        let matrices = matrices.iter().filter(|name| !is_embedding(name));
        let names: Vec<String> = matrices.map(|name| name_in_peft(name)).collect();
        let parts = groups.iter().flat_map(|group| &group.modules);
        parts
            .map(String::as_str)
            .filter(|part| !names.iter().any(|name| name.contains(part)))
            .collect()
    }

    /// What is wrong with a number of it; goes after the field's name.
    pub fn check(&self) -> Result<(), String> {
        let is_rate = |lr: &f64| (0.0..=1e3).contains(lr);
        match self {
            Self::None => Ok(()),
            Self::LoraPlus { ratio, .. } if !(*ratio > 0.0 && *ratio <= 1e6) => {
                Err(format!("has a ratio of {ratio}"))
            }
            Self::LoraPlus { embedding, .. } => match embedding.filter(|lr| !is_rate(lr)) {
                Some(lr) => Err(format!("has a learning rate of {lr}")),
                None => Ok(()),
            },
            Self::Named { embedding, groups } => {
                let rates = groups.iter().map(|group| &group.lr).chain(embedding);
                match rates.copied().find(|lr| !is_rate(lr)) {
                    Some(lr) => Err(format!("has a learning rate of {lr}")),
                    None => Ok(()),
                }
            }
        }
    }
}

/// An adapter's tensor as PEFT calls it in memory, where it stands under the adapter's name.
fn name_in_peft(name: &str) -> String {
    let mut name = name.to_owned();
    for factor in ["lora_A", "lora_B"] {
        name = name.replace(
            &format!(".{factor}.weight"),
            &format!(".{factor}.default.weight"),
        );
    }
    match is_magnitude(&name) {
        true => name + ".default.weight",
        false => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    const B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";

    #[test]
    fn lora_plus_multiplies_the_rate_of_b_alone() {
        let rates = RateGroups::LoraPlus {
            ratio: 16.0,
            embedding: Some(1e-6),
        };
        assert_eq!(rates.of(A, false, 1e-4).factor, 1.0);
        assert_eq!(rates.of(B, false, 1e-4).factor, 16.0);
        assert!(rates.of(B, false, 1e-4).decays);
        let magnitude = B.replace("lora_B.weight", MAGNITUDE);
        assert_eq!(rates.of(&magnitude, true, 1e-4).factor, 16.0);
        for factor in ["lora_embedding_A", "lora_embedding_B"] {
            let name = format!("base_model.model.model.embed_tokens.{factor}");
            assert!((rates.of(&name, false, 1e-4).factor - 1e-2).abs() < 1e-12);
        }
    }

    #[test]
    fn the_first_group_that_names_a_part_of_a_matrix_is_its_group() {
        let group = |name: &str, modules: &[&str], lr| RateGroup {
            name: name.to_owned(),
            modules: modules.iter().map(|part| (*part).to_owned()).collect(),
            lr,
        };
        let rates = RateGroups::Named {
            embedding: Some(4e-5),
            groups: vec![
                group("output", &["o_proj"], 2e-4),
                group("layers", &["layers.0.", "lora_A.default"], 5e-4),
            ],
        };
        let of = |name: &str, is_vector| {
            let rate = rates.of(name, is_vector, 1e-4);
            ((rate.factor * 1e4).round() as u64, rate.decays)
        };
        assert_eq!(
            of("model.layers.0.self_attn.o_proj.weight", false),
            (20_000, true)
        );
        assert_eq!(
            of("model.layers.0.mlp.up_proj.weight", false),
            (50_000, true)
        );
        assert_eq!(
            of("model.layers.1.mlp.up_proj.weight", false),
            (10_000, true)
        );
        assert_eq!(
            of("model.layers.1.mlp.up_proj.lora_A.weight", false),
            (50_000, true)
        );
        assert_eq!(
            of("model.layers.0.mlp.up_proj.lora_magnitude_vector", true),
            (50_000, true)
        );
        // Neither norms nor biases nor the embedding are in a group, whatever their names.
        assert_eq!(
            of("model.layers.0.input_layernorm.weight", true),
            (10_000, true)
        );
        assert_eq!(of("model.embed_tokens.weight", false), (4_000, false));
        assert_eq!(of("lm_head.weight", false), (4_000, false));
    }
}
