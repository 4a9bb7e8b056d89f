//! What a user should know before training: what of the job, the model and the data is done otherwise than may be thought, or not
//! at all. Nothing here refuses anything.

use common::job::{
    AdapterShape, BaseDtype, LoraSpec, Method, RateGroups, TOKEN_MODULES, TargetModules,
    TrainedBiases, is_embedding,
};
use common::model::{
    Experts, absent_parameters, absent_targets, adapted_modules, linear_names, linears,
    trained_matrices,
};
use common::text::count;

use super::Prepared;

impl Prepared {
    /// What a user should know before training, a line each.
    pub fn notices(&self) -> Vec<String> {
        let counts = &self.data.counts;
        let mut notices = self.job.reading.notices.clone();
        notices.extend(self.model_notices.iter().cloned());
        if self.job.pure_bf16 {
            notices.push("pure_bf16: done on processors; a worker on a GPU refuses the job".into());
        }
        notices.extend(self.data.notices.iter().cloned());
        if self.data.is_found && !self.has_own_data() {
            let path = self.data.file.path().display();
            notices.push(format!("the data was prepared before, in {path}"));
        }
        notices.extend(counts.notes.iter().cloned());
        if counts.divided_rows > 0 {
            notices.push(format!(
                "{} became several examples each, {} in all: the chat template shows an answer otherwise once the conversation goes on",
                count(counts.divided_rows, "row"),
                counts.examples
            ));
        }
        notices.extend(counts.filter_notice(self.job.mixture.min_sample_len));
        notices.extend(counts.cut_notice(self.job.sequence_len));
        if counts.added_eos > 0 {
            notices.push(format!(
                "the chat template ends no turn with a special token: EOS was added to {}",
                count(counts.added_eos, "example")
            ));
        }
        if counts.dated_template {
            let day = match self.data.is_found {
                true => "the date of the day on which it was prepared",
                false => "today's date",
            };
            notices.push(format!("the chat template prints {day} into the data"));
        }
        if let Some(positions) = self.model_config.max_positions
            && positions < self.job.sequence_len
        {
            notices.push(format!(
                "sequence_len {} is beyond the {positions} positions of the model",
                self.job.sequence_len
            ));
        }
        notices.extend(self.groups_notice());
        notices.extend(self.frozen_embedding_notice());
        notices.extend(self.embedding_alone_notice());
        notices.extend(self.targets_notice());
        notices.extend(self.biases_notice());
        notices.extend(self.patterns_notices());
        notices.extend(self.token_adapters_notices());
        notices.extend(self.experts_notices());
        notices.extend(self.parameters_notices());
        notices
    }

    /// What of `lr_groups` names no matrix that is trained.
    fn groups_notice(&self) -> Option<String> {
        let matrices = trained_matrices(&self.model_config, &self.job).ok()?;
        let without = self.job.lr_groups.without_effect(&matrices);
        let told = || {
            let parts: Vec<String> = without.iter().map(|part| format!("{part:?}")).collect();
            let parts = parts.join(", ");
            format!("lr_groups: no matrix that is trained has a name with {parts}")
        };
        (!without.is_empty()).then(told)
    }

    /// A rate of the embedding where full training leaves that, and the output layer, as they are.
    fn frozen_embedding_notice(&self) -> Option<String> {
        let RateGroups::Named {
            embedding: Some(_), ..
        } = self.job.lr_groups
        else {
            return None;
        };
        let matrices = trained_matrices(&self.model_config, &self.job).ok()?;
        let is_left_out =
            !self.job.unfrozen.is_all() && !matrices.iter().any(|it| is_embedding(it));
        is_left_out.then(|| {
            "embedding_lr: changes nothing, because unfrozen_parameters leaves out embedding and output layer"
                .to_owned()
        })
    }

    /// What an adapter on the embedding, where there is no other, makes no use of.
    fn embedding_alone_notice(&self) -> Option<String> {
        let Method::Lora(lora) = &self.job.method else {
            return None;
        };
        let modules = adapted_modules(&self.model_config, lora).ok()?;
        let [embedding, _] = TOKEN_MODULES;
        if modules.iter().any(|module| module.path != embedding) {
            return None;
        }
        let fields = [
            (lora.dropout > 0.0, "lora_dropout"),
            (!lora.init.is_default(), "init_lora_weights"),
        ];
        let idle = fields.into_iter().filter(|(is_given, _)| *is_given);
        let idle: Vec<&str> = idle.map(|(_, field)| field).collect();
        let told = || {
            format!(
                "{}: of no effect on an adapter of the embedding, and there is no other",
                idle.join(", ")
            )
        };
        (!idle.is_empty()).then(told)
    }

    /// What of `lora_target_modules` names no linear.
    fn targets_notice(&self) -> Option<String> {
        let Method::Lora(lora) = &self.job.method else {
            return None;
        };
        let absent = absent_targets(&self.model_config, &lora.target_modules);
        let told = || {
            format!(
                "lora_target_modules: no linear of this model is called {} (it has {})",
                absent.join(", "),
                linear_names(&self.model_config)
            )
        };
        (!absent.is_empty()).then(told)
    }

    /// Biases that are to be trained where there are none.
    fn biases_notice(&self) -> Option<String> {
        let Method::Lora(lora) = &self.job.method else {
            return None;
        };
        let config = &self.model_config;
        let (has_some, why) = match lora.biases {
            TrainedBiases::None => return None,
            TrainedBiases::LoraOnly => {
                let adapted = adapted_modules(config, lora).unwrap_or_default();
                let has_some = adapted.iter().any(|module| module.shape.bias);
                (has_some, "no linear with an adapter has one")
            }
            TrainedBiases::All => {
                let of_layer = |layer| linears(config, layer).iter().any(|linear| linear.bias);
                let has_some = (0..config.layers).any(of_layer);
                (has_some, "no linear of this model has one")
            }
        };
        (!has_some).then(|| format!("bias: changes nothing, because {why}"))
    }

    /// What becomes of adapters on the embedding or the output layer where these are one matrix, or layers are named by number.
    fn token_adapters_notices(&self) -> Vec<String> {
        let Method::Lora(lora) = &self.job.method else {
            return Vec::new();
        };
        let named = lora.target_modules.name_tokens();
        let mut notices = Vec::new();
        if lora.shape.layers.is_some() && named.contains(&true) {
            let told = "layers_to_transform: embed_tokens and lm_head are in no layer and get no adapter, as in PEFT";
            notices.push(told.to_owned());
        }
        if self.model_config.tied {
            let told = match lora.adapts_tokens() {
                [false, false] => return notices,
                [true, true] => {
                    "the embedding and the output layer, one matrix here, get an adapter each"
                }
                [true, false] => {
                    "the output layer, which is the embedding here, stays as it is: name lm_head for an adapter of its own"
                }
                [false, true] => {
                    "the embedding, which is the output layer here, stays as it is: name embed_tokens for an adapter of its own"
                }
            };
            notices.push(format!(
                "lora_target_modules: {told}, as in PEFT; a merged model has two matrices"
            ));
        }
        notices
    }

    /// What of a mixture of experts has no adapter, and what of it is not in 4 bits.
    fn experts_notices(&self) -> Vec<String> {
        let config = &self.model_config;
        let mut notices = Vec::new();
        let experts = config.experts.as_ref();
        if let Method::Lora(lora) = &self.job.method
            && lora.target_modules == TargetModules::AllLinear
            && let Some(experts) = experts
            && (experts.names.are_parameters || experts.fused.is_some())
        {
            let though = match experts.names.are_parameters {
                true => ", though PEFT 0.21 would give them one",
                false => "",
            };
            let (what, get) = match lora.shape.parameters.is_empty() {
                true => (
                    "router and experts are no linears and get no adapter",
                    "; lora_target_parameters gives experts some",
                ),
                false => (
                    "router and experts are no linears and get the adapters alone that lora_target_parameters names",
                    "",
                ),
            };
            notices.push(format!(
                "lora_target_modules: all-linear is {} here: {what}{though}{get}",
                linear_names(config)
            ));
        }
        notices.extend(self.router_notice());
        let asked = self.job.quantization.filter(|_| !config.is_four_bits);
        match (experts, asked) {
            (Some(_), Some(how)) if !how.experts => {
                let dtype = match self.job.base_dtype {
                    BaseDtype::Float32 => "float32",
                    BaseDtype::Bfloat16 => "bfloat16",
                };
                notices.push(format!(
                    "load_in_4bit: the experts are no linears and stay in {dtype}; quantize_moe_experts: true keeps them in 4 bits too"
                ));
            }
            (None, Some(how)) if how.experts => {
                notices.push("quantize_moe_experts: changes nothing without experts".to_owned());
            }
            _ => {}
        }
        notices
    }

    /// Whether the router has a loss, where there is one or the job says something of it.
    fn router_notice(&self) -> Option<String> {
        let experts = self.model_config.experts.as_ref();
        if let Some(coefficient) = experts.and_then(Experts::router_loss) {
            return Some(format!(
                "a loss of the router is added to that of the tokens, times {coefficient}: it spreads tokens over the experts"
            ));
        }
        let asked = self.job.router_loss;
        let is_asked = asked.is_added == Some(true);
        let has_coefficient = asked.coefficient.is_some_and(|number| number > 0.0);
        let why = match experts {
            _ if !is_asked && !has_coefficient => return None,
            None => "the model has no experts",
            Some(_) if is_asked => "its coefficient (router_aux_loss_coef) is 0",
            Some(_) => "output_router_logits is not on",
        };
        Some(format!(
            "no loss of the router is added, because {why}: what the job says of one changes nothing"
        ))
    }

    /// What of the parameters that are named is none of the model's experts', and what leaves none of them out.
    fn parameters_notices(&self) -> Vec<String> {
        let Method::Lora(lora) = &self.job.method else {
            return Vec::new();
        };
        let shape = &lora.shape;
        if shape.parameters.is_empty() {
            return Vec::new();
        }
        let mut notices = Vec::new();
        let absent = absent_parameters(&self.model_config, &shape.parameters);
        let names = absent.join(", ");
        if self.model_config.experts.is_none() {
            let told = "lora_target_parameters: the model has no experts";
            return vec![format!("{told}, so that {names} changes nothing")];
        }
        if !absent.is_empty() {
            notices.push(format!(
                "lora_target_parameters: no parameter of this model's experts is called {names} (they are experts.gate_up_proj, \
                 experts.down_proj and the weight of the router)"
            ));
        }
        if absent.len() == shape.parameters.len() {
            return notices;
        }
        notices.push(
            "lora_target_parameters: done on processors; a worker on a GPU refuses the job"
                .to_owned(),
        );
        let fields = [
            (shape.layers.is_some(), "layers_to_transform"),
            (shape.excluded.is_some(), "exclude_modules"),
        ];
        let idle = fields.into_iter().filter(|(is_given, _)| *is_given);
        notices.extend(idle.map(|(_, field)| {
            format!(
                "{field}: leaves out none of the parameters of experts, as in PEFT; name these by layer \
                 (layers.3.mlp.experts.down_proj) to have some of them"
            )
        }));
        notices
    }

    /// What of the adapter's patterns and exclusions fits no linear, and patterns that mean something else once PEFT has sorted them.
    fn patterns_notices(&self) -> Vec<String> {
        let Method::Lora(lora) = &self.job.method else {
            return Vec::new();
        };
        let paths = |lora: &LoraSpec| -> Vec<String> {
            let modules = adapted_modules(&self.model_config, lora).unwrap_or_default();
            modules.into_iter().map(|module| module.path).collect()
        };
        let adapted = paths(lora);
        let all = paths(&LoraSpec {
            shape: Box::new(AdapterShape {
                parameters: lora.shape.parameters.clone(),
                ..AdapterShape::default()
            }),
            ..lora.clone()
        });
        let absent = lora.shape.absent(&all).into_iter();
        let mut notices: Vec<String> = absent
            .map(|(field, name)| {
                format!("{field}: {name} fits none of the linears with an adapter")
            })
            .collect();
        notices.extend(lora.shape.ambiguous(&adapted).map(|field| {
            format!(
                "{field}: several patterns fit one linear, and the first counts; where PEFT saves the adapter again, it sorts them, and \
                 another one is first"
            )
        }));
        notices
    }
}
