//! The mixture of experts of a `config.json`: how many experts there are, which layers have them, and what their weights are
//! called in files. What is not done of one is refused here.
//!
//! Source of names and defaults: Transformers 5.24, `configuration_*.py` and `modeling_*.py` of each family; names in files:
//! what `save_pretrained` writes (`conversion_mapping.py`).

use serde_json::Value;

use super::error::ModelError;
use super::fields::Fields;
use crate::job::RouterLoss;
use crate::memory;

/// What an architecture with experts has that its `config.json` does not say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct ExpertKind {
    /// Keys of the number of experts: the one that is written, and another name for it.
    pub count: [&'static str; 2],
    /// Key of the number of experts that a token goes through.
    pub per_token: &'static str,
    /// Key of an expert's intermediate size.
    pub width: &'static str,
    /// Key of the shared expert's intermediate size, where there is one.
    pub shared: Option<&'static str>,
    /// When the weights of a token's experts are divided by their sum.
    pub normalised: Normalised,
    /// Whether a layer has all of its experts in fused tensors, with biases.
    pub fused: bool,
    /// Coefficient of the router's loss, where `config.json` has none.
    pub router_loss: f64,
    /// Whether `mlp_only_layers` and `decoder_sparse_step` leave layers dense.
    pub may_be_dense: bool,
    /// Whether they stand beside a dense half, where `enable_moe_block` says that there are some.
    pub beside_dense: bool,
    pub names: ExpertNames,
}

/// When the weights of a token's experts are divided by their sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Normalised {
    Always,
    /// As `norm_topk_prob` says, and so where that is not there.
    Asked {
        by_default: bool,
    },
}

/// What the weights of experts are called within a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertNames {
    /// What router and experts are parts of.
    pub block: &'static str,
    pub router: &'static str,
    /// Of an expert's gate, as up and down are; or of both where they are fused.
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
    /// Whether PEFT 0.21 takes these names, and `all-linear`, for the parameters in which Transformers 5 keeps the experts of a
    /// layer, and its router.
    pub are_parameters: bool,
}

impl ExpertKind {
    pub const QWEN: Self = Self {
        count: ["num_experts", "num_local_experts"],
        per_token: "num_experts_per_tok",
        width: "moe_intermediate_size",
        shared: None,
        normalised: Normalised::Asked { by_default: false },
        fused: false,
        router_loss: 0.001,
        may_be_dense: true,
        beside_dense: false,
        names: ExpertNames {
            block: "mlp",
            router: "gate",
            gate: "gate_proj",
            up: "up_proj",
            down: "down_proj",
            are_parameters: true,
        },
    };
    pub const QWEN_SHARED: Self = Self {
        shared: Some("shared_expert_intermediate_size"),
        names: ExpertNames {
            are_parameters: false,
            ..Self::QWEN.names
        },
        ..Self::QWEN
    };
    /// Every layer has experts.
    pub const QWEN_3_5: Self = Self {
        normalised: Normalised::Always,
        may_be_dense: false,
        ..Self::QWEN_SHARED
    };
    pub const QWEN_NEXT: Self = Self {
        normalised: Normalised::Asked { by_default: true },
        names: Self::QWEN.names,
        ..Self::QWEN_SHARED
    };
    pub const OLMOE: Self = Self {
        width: "intermediate_size",
        router_loss: 0.01,
        may_be_dense: false,
        ..Self::QWEN
    };
    pub const MIXTRAL: Self = Self {
        count: ["num_local_experts", "num_experts"],
        normalised: Normalised::Always,
        router_loss: 0.001,
        names: ExpertNames {
            block: "block_sparse_moe",
            router: "gate",
            gate: "w1",
            up: "w3",
            down: "w2",
            are_parameters: true,
        },
        ..Self::OLMOE
    };
    /// Router and experts are parts of the layer itself.
    pub const GEMMA4: Self = Self {
        per_token: "top_k_experts",
        normalised: Normalised::Always,
        may_be_dense: false,
        beside_dense: true,
        names: ExpertNames {
            block: "router",
            router: "proj",
            are_parameters: false,
            ..Self::QWEN.names
        },
        ..Self::QWEN
    };
    /// Its router chooses by logits, and takes the softmax of the chosen ones: that of all, divided by the sum of the chosen.
    pub const GPT_OSS: Self = Self {
        count: ["num_local_experts", "num_experts"],
        normalised: Normalised::Always,
        fused: true,
        router_loss: 0.9,
        names: ExpertNames {
            block: "mlp",
            router: "router",
            gate: "gate_up_proj",
            up: "gate_up_proj",
            down: "down_proj",
            are_parameters: false,
        },
        ..Self::OLMOE
    };
}

/// A mixture of experts as the engine builds it.
#[derive(Clone, Debug, PartialEq)]
pub struct Experts {
    pub sizes: memory::Experts,
    /// The weights of a token's experts are divided by their sum.
    pub normalises: bool,
    pub names: ExpertNames,
    /// Whether the router's loss is added to that of the tokens.
    pub adds_router_loss: bool,
    /// What the router's loss is multiplied by.
    pub router_loss_coefficient: f64,
    /// What differs where a layer has all of its experts in fused tensors.
    pub fused: Option<FusedExperts>,
}

/// Within a layer whose experts stand beside a dense half (Gemma 4), what its router multiplies by: what it reads, and the weight of
/// each expert.
pub const ROUTER_SCALES: [&str; 2] = ["router.scale", "router.per_expert_scale"];
/// The norms of such a layer, by their names in it: of what the dense half gives, of what the experts read, and of what they give.
pub const BESIDE_NORMS: [&str; 3] = [
    "post_feedforward_layernorm_1",
    "pre_feedforward_layernorm_2",
    "post_feedforward_layernorm_2",
];
/// The two tensors of such a layer that have all of its experts, `[experts][out][in]`: gates before ups, and down.
pub const STACKED_EXPERTS: [&str; 2] = ["experts.gate_up_proj", "experts.down_proj"];

/// Experts that a layer has in fused tensors (GPT-OSS): gate and up, whose columns alternate, and down, each `[experts][in][out]`
/// beside its biases `[experts][out]`. What is between them is `(up + 1) · gate · sigmoid(alpha · gate)`, where neither is above
/// the limit, nor up below its negative.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FusedExperts {
    pub alpha: f64,
    pub limit: f64,
}

impl Experts {
    /// Coefficient of the router's loss, where it is added.
    pub fn router_loss(&self) -> Option<f64> {
        let coefficient = self.router_loss_coefficient;
        let is_added = self.adds_router_loss && self.sizes.layers.contains(&true);
        (is_added && coefficient > 0.0).then_some(coefficient)
    }

    /// The same experts with the router's loss that a job asks for.
    pub(super) fn with_router_loss(self, asked: RouterLoss) -> Self {
        Self {
            adds_router_loss: asked.is_added.unwrap_or(self.adds_router_loss),
            router_loss_coefficient: asked.coefficient.unwrap_or(self.router_loss_coefficient),
            ..self
        }
    }

    /// Path of the router within its layer.
    pub fn router(&self) -> String {
        format!("{}.{}", self.names.block, self.names.router)
    }

    /// Names of the two fused tensors of a layer within it: gate and up, and down.
    pub fn fused_tensors(&self) -> [String; 2] {
        let ExpertNames {
            block, gate, down, ..
        } = self.names;
        [gate, down].map(|name| format!("{block}.experts.{name}"))
    }

    /// Paths of the three matrices of an expert within its layer: gate, up, down.
    pub fn matrices(&self, expert: usize) -> [String; 3] {
        let ExpertNames {
            block,
            gate,
            up,
            down,
            ..
        } = self.names;
        [gate, up, down].map(|name| format!("{block}.experts.{expert}.{name}"))
    }
}

/// Whether a tensor of that name is of an expert that not every token goes through.
pub fn is_of_expert(name: &str) -> bool {
    name.contains(".experts.")
}

/// Whether a tensor of that name is a router.
pub fn is_router(name: &str) -> bool {
    let ends = [
        ".mlp.gate.weight",
        ".block_sparse_moe.gate.weight",
        ".mlp.router.weight",
    ];
    ends.iter().any(|end| name.ends_with(end))
}

impl Fields<'_> {
    /// Reads the experts of an architecture that has some.
    pub fn experts(&self, kind: ExpertKind, layers: usize) -> Result<Experts, ModelError> {
        self.refuse_of_routers()?;
        let count = self.expert_count(kind.count)?;
        let per_token = self.size(kind.per_token)?;
        if per_token > count {
            let key = kind.per_token;
            return Err(self.bad(&format!(
                "{key} {per_token} is more than the {count} experts that there are"
            )));
        }
        let coefficient = self
            .number("router_aux_loss_coef")
            .unwrap_or(kind.router_loss);
        let shared = kind.shared.map(|key| self.size(key)).transpose()?;
        let has_experts = match kind.may_be_dense {
            true => self.layers_with_experts(layers)?,
            false => vec![true; layers],
        };
        Ok(Experts {
            sizes: memory::Experts {
                count,
                per_token,
                width: self.size(kind.width)?,
                shared,
                layers: has_experts,
                biased: kind.fused,
                beside_dense: kind.beside_dense,
            },
            normalises: match kind.normalised {
                Normalised::Always => true,
                Normalised::Asked { by_default } => {
                    let asked = self.json["norm_topk_prob"].as_bool();
                    asked.unwrap_or(by_default)
                }
            },
            names: kind.names,
            adds_router_loss: self.flag("output_router_logits"),
            router_loss_coefficient: coefficient,
            fused: kind.fused.then(|| FusedExperts {
                alpha: self.number("swiglu_alpha").unwrap_or(1.702),
                limit: self.number("swiglu_limit").unwrap_or(7.0),
            }),
        })
    }

    fn refuse_of_routers(&self) -> Result<(), ModelError> {
        for key in ["router_jitter_noise", "clip_qkv"] {
            if let Some(number) = self.number(key).filter(|number| *number != 0.0) {
                return Err(self.unsupported(format!("{key} {number}")));
            }
        }
        Ok(())
    }

    fn expert_count(&self, keys: [&str; 2]) -> Result<usize, ModelError> {
        let [first, second] = keys;
        match (self.optional_size(first)?, self.optional_size(second)?) {
            (Some(one), Some(other)) if one != other => Err(self.bad(&format!(
                "{first} is {one} and {second} is {other}, where both are the number of experts"
            ))),
            (one, other) => one
                .or(other)
                .ok_or_else(|| self.bad(&format!("{first} is missing"))),
        }
    }

    /// For each layer, whether it has experts: every so many have some, but for those that are listed.
    fn layers_with_experts(&self, layers: usize) -> Result<Vec<bool>, ModelError> {
        let every = self.optional_size("decoder_sparse_step")?.unwrap_or(1);
        let listed = &self.json["mlp_only_layers"];
        let dense: Vec<usize> = match listed {
            Value::Null => Vec::new(),
            Value::Array(numbers) => {
                let numbers = numbers.iter().map(|number| {
                    let number = number.as_u64().and_then(|n| usize::try_from(n).ok());
                    number.filter(|number| *number < layers)
                });
                numbers.collect::<Option<_>>().ok_or_else(|| {
                    self.bad(&format!(
                        "mlp_only_layers has an entry that is none of the layers 0 to {}",
                        layers.saturating_sub(1)
                    ))
                })?
            }
            _ => return Err(self.bad("mlp_only_layers is not a list of layers")),
        };
        Ok((0..layers)
            .map(|layer| (layer + 1).is_multiple_of(every) && !dense.contains(&layer))
            .collect())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::model::ModelConfig;

    fn parse(class: &str, change: impl FnOnce(&mut Value)) -> Result<ModelConfig, ModelError> {
        let mut json = json!({
            "architectures": [class], "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8,
            "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40
        });
        change(&mut json);
        ModelConfig::parse(&json, Path::new("config.json"))
    }

    fn experts(class: &str, change: impl FnOnce(&mut Value)) -> Experts {
        parse(class, change).unwrap().experts.unwrap()
    }

    #[test]
    fn families_differ_in_sizes_and_names() {
        let qwen3 = experts("Qwen3MoeForCausalLM", |json| {
            json["norm_topk_prob"] = true.into();
        });
        assert!(qwen3.normalises);
        assert_eq!((qwen3.sizes.width, qwen3.sizes.shared), (24, None));
        let qwen2 = experts("Qwen2MoeForCausalLM", |_| {});
        assert!(!qwen2.normalises);
        assert_eq!((qwen2.sizes.width, qwen2.sizes.shared), (24, Some(40)));
        let olmoe = experts("OlmoeForCausalLM", |_| {});
        assert_eq!((olmoe.sizes.width, olmoe.normalises), (96, false));
        for class in ["Qwen3_5MoeForCausalLM", "Qwen3NextForCausalLM"] {
            let shared = experts(class, |_| {});
            assert!(shared.normalises, "{class}");
            assert_eq!((shared.sizes.width, shared.sizes.shared), (24, Some(40)));
            let asked = experts(class, |json| json["norm_topk_prob"] = false.into());
            assert_eq!(asked.normalises, class == "Qwen3_5MoeForCausalLM");
        }
        let mixtral = experts("MixtralForCausalLM", |_| {});
        assert_eq!((mixtral.sizes.width, mixtral.normalises), (96, true));
        assert_eq!(mixtral.router(), "block_sparse_moe.gate");
        assert_eq!(
            mixtral.matrices(3)[1],
            "block_sparse_moe.experts.3.w3",
            "up"
        );
    }

    #[test]
    fn fused_experts_have_biases_and_their_own_names() {
        let plain = experts("GptOssForCausalLM", |_| {});
        assert_eq!(plain.router(), "mlp.router");
        let names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"];
        assert_eq!(plain.fused_tensors(), names);
        assert_eq!((plain.sizes.width, plain.normalises), (96, true));
        let usual = FusedExperts {
            alpha: 1.702,
            limit: 7.0,
        };
        assert_eq!(plain.fused, Some(usual));
        let other = experts("GptOssForCausalLM", |json| {
            json["swiglu_alpha"] = 1.5.into();
            json["swiglu_limit"] = 3.into();
        });
        let given = FusedExperts {
            alpha: 1.5,
            limit: 3.0,
        };
        assert_eq!(other.fused, Some(given));
    }

    #[test]
    fn layers_may_be_dense_by_number_and_by_step() {
        let layers =
            |change: &dyn Fn(&mut Value)| experts("Qwen3MoeForCausalLM", change).sizes.layers;
        assert_eq!(layers(&|_| {}), [true; 4]);
        let stepped = layers(&|json| {
            json["decoder_sparse_step"] = 2.into();
            json["mlp_only_layers"] = json!([3]);
        });
        assert_eq!(stepped, [false, true, false, false]);
        let layers = |class: &str| {
            let listed = experts(class, |json| json["mlp_only_layers"] = json!([0, 2]));
            listed.sizes.layers
        };
        assert_eq!(layers("Qwen3NextForCausalLM"), [false, true, false, true]);
        // It reads no such list.
        assert_eq!(layers("Qwen3_5MoeForCausalLM"), [true; 4]);
        for (wrong, word) in [(json!([4]), "0 to 3"), (json!(1), "not a list")] {
            let message = parse("Qwen2MoeForCausalLM", |json| {
                json["mlp_only_layers"] = wrong
            });
            let message = message.unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    }

    #[test]
    fn the_router_s_loss_is_as_the_model_and_the_job_say() {
        let of = |class: &str, asked: RouterLoss| {
            let model = |is_added: bool| {
                experts(class, |json| json["output_router_logits"] = is_added.into())
            };
            [false, true].map(|is_added| model(is_added).with_router_loss(asked).router_loss())
        };
        let nothing = RouterLoss::default();
        assert_eq!(of("MixtralForCausalLM", nothing), [None, Some(0.001)]);
        assert_eq!(of("OlmoeForCausalLM", nothing), [None, Some(0.01)]);
        assert_eq!(of("GptOssForCausalLM", nothing), [None, Some(0.9)]);
        let asked = |is_added, coefficient| {
            of(
                "Qwen3MoeForCausalLM",
                RouterLoss {
                    is_added,
                    coefficient,
                },
            )
        };
        assert_eq!(asked(Some(true), None), [Some(0.001); 2]);
        assert_eq!(asked(Some(false), Some(0.5)), [None; 2]);
        assert_eq!(asked(None, Some(0.5)), [None, Some(0.5)]);
        assert_eq!(asked(Some(true), Some(0.0)), [None; 2]);
        let own = experts("OlmoeForCausalLM", |json| {
            json["output_router_logits"] = true.into();
            json["router_aux_loss_coef"] = 0.25.into();
        });
        assert_eq!(own.router_loss(), Some(0.25));
    }

    #[test]
    fn what_is_not_done_is_refused_by_name() {
        for (key, value) in [
            ("router_aux_loss_coef", json!(-0.1)),
            ("router_jitter_noise", json!(0.1)),
            ("clip_qkv", json!(8.0)),
            ("num_experts_per_tok", json!(9)),
            ("num_local_experts", json!(4)),
            ("num_experts", Value::Null),
        ] {
            let message = parse("OlmoeForCausalLM", |json| json[key] = value.clone());
            let message = message.unwrap_err().to_string();
            assert!(message.contains(key), "{message}");
        }
    }

    #[test]
    fn parameters_that_take_part_in_a_token_are_counted_apart() {
        let shape = parse("Qwen3MoeForCausalLM", |_| {}).unwrap().shape();
        // Six of eight experts are left out, in four layers.
        let idle = 4 * 6 * 3 * 24 * 64;
        assert_eq!(shape.parameters() - shape.active_parameters(), idle);
        let shape = parse("GptOssForCausalLM", |_| {}).unwrap().shape();
        let idle = 4 * 6 * (3 * 96 * 64 + 2 * 96 + 64);
        assert_eq!(shape.parameters() - shape.active_parameters(), idle);
    }
}
