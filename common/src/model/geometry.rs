//! What follows from a model's configuration: its tensors and its linears.

use super::config::ModelConfig;
use super::experts::{BESIDE_NORMS, Experts, ROUTER_SCALES, STACKED_EXPERTS};
use super::family::HeadNormKind;
use super::linear_attention::{CONVOLUTION, DECAY, DECAY_BIAS, HEAD_NORM};
use crate::files::adapter::{trained_rows_name, trained_whole_name};
use crate::job::{JobSpec, Quantization, TrainedRows, TrainedTokens};
use crate::memory::{KeyValues, LINEARS, LinearAttention, PROJECTIONS, Shape};

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
    tensors.extend(input_tensors(config));
    for layer in 0..config.layers {
        let prefix = format!("model.layers.{layer}.");
        for norm in config.norms.names() {
            tensors.push((format!("{prefix}{norm}.weight"), vec![config.hidden_size]));
        }
        if config.layer_inputs.is_some() {
            tensors.push((
                format!("{prefix}{INPUT_MIX_NORM}"),
                vec![config.hidden_size],
            ));
        }
        if config.layer_scalars {
            tensors.push((format!("{prefix}{LAYER_SCALAR}"), vec![1]));
        }
        match config.linear_attention_of(layer) {
            Some(sizes) => tensors.extend(linear_attention_tensors(sizes, &prefix)),
            None => tensors.extend(attention_vectors(config, layer, &prefix)),
        }
        for linear in linears(config, layer) {
            let name = format!("{prefix}{}", linear.path);
            tensors.push((format!("{name}.weight"), vec![linear.out, linear.width]));
            if linear.bias {
                tensors.push((format!("{name}.bias"), vec![linear.out]));
            }
        }
        if let Some(experts) = config.experts_of(layer) {
            tensors.extend(expert_tensors(config.hidden_size, experts, &prefix));
        }
    }
    tensors
}

/// Names and shapes of what a layer's attention has beside its linears.
fn attention_vectors(
    config: &ModelConfig,
    layer: usize,
    prefix: &str,
) -> Vec<(String, Vec<usize>)> {
    let norms = ["q_norm", "k_norm"].iter();
    let norms = norms.zip(config.head_norm_widths(layer));
    let norms = norms.filter(|(_, width)| *width > 0);
    let norms =
        norms.map(|(norm, width)| (format!("{prefix}self_attn.{norm}.weight"), vec![width]));
    let sinks = config
        .sinks
        .then(|| (format!("{prefix}{SINKS}"), vec![config.heads]));
    norms.chain(sinks).collect()
}

/// Names and shapes of what all layers have their own inputs from.
fn input_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let Some(inputs) = config.layer_inputs else {
        return Vec::new();
    };
    let columns = config.layers * inputs.width;
    let tensors = [
        (INPUT_EMBEDDING, vec![inputs.vocabulary, columns]),
        (INPUT_PROJECTION, vec![columns, config.hidden_size]),
        (INPUT_NORM, vec![inputs.width]),
    ];
    tensors.map(|(name, shape)| (name.to_owned(), shape)).into()
}

/// Names and shapes of what a layer's linear attention has beside its linears.
fn linear_attention_tensors(
    sizes: &LinearAttention,
    prefix: &str,
) -> impl Iterator<Item = (String, Vec<usize>)> {
    let tensors = [
        (CONVOLUTION, vec![sizes.convolved(), 1, sizes.kernel]),
        (HEAD_NORM, vec![sizes.value_dim]),
        (DECAY, vec![sizes.value_heads]),
        (DECAY_BIAS, vec![sizes.value_heads]),
    ];
    let prefix = prefix.to_owned();
    tensors
        .into_iter()
        .map(move |(name, shape)| (format!("{prefix}{name}"), shape))
}

/// Names and shapes of the weights of a layer's router and experts.
fn expert_tensors(hidden: usize, experts: &Experts, prefix: &str) -> Vec<(String, Vec<usize>)> {
    let (count, width) = (experts.sizes.count, experts.sizes.width);
    let named =
        |path: String, shape: [usize; 2]| (format!("{prefix}{path}.weight"), shape.to_vec());
    if experts.sizes.beside_dense {
        return beside_tensors(hidden, experts, prefix);
    }
    let mut tensors = vec![named(experts.router(), [count, hidden])];
    if experts.fused.is_some() {
        tensors.push((format!("{prefix}{}.bias", experts.router()), vec![count]));
        let [gate_up, down] = experts.fused_tensors();
        for (name, input, out) in [(gate_up, hidden, 2 * width), (down, width, hidden)] {
            let name = format!("{prefix}{name}");
            tensors.push((format!("{name}{FUSED_BIAS}"), vec![count, out]));
            tensors.push((name, vec![count, input, out]));
        }
        return tensors;
    }
    for expert in 0..count {
        let [gate, up, down] = experts.matrices(expert);
        tensors.push(named(gate, [width, hidden]));
        tensors.push(named(up, [width, hidden]));
        tensors.push(named(down, [hidden, width]));
    }
    tensors
}

/// Names and shapes of what a layer has of experts beside a dense half; their router is one of its linears.
fn beside_tensors(hidden: usize, experts: &Experts, prefix: &str) -> Vec<(String, Vec<usize>)> {
    let (count, width) = (experts.sizes.count, experts.sizes.width);
    let [scale, per_expert] = ROUTER_SCALES;
    let [gate_up, down] = STACKED_EXPERTS;
    let tensors = [
        (scale, vec![hidden]),
        (per_expert, vec![count]),
        (gate_up, vec![count, 2 * width, hidden]),
        (down, vec![count, hidden, width]),
    ];
    let tensors = tensors.map(|(name, shape)| (format!("{prefix}{name}"), shape));
    let norms = BESIDE_NORMS.map(|norm| (format!("{prefix}{norm}.weight"), vec![hidden]));
    tensors.into_iter().chain(norms).collect()
}

/// What the name of the biases of a fused tensor goes on with.
pub const FUSED_BIAS: &str = "_bias";
/// The logits within a layer that stand for no token.
pub const SINKS: &str = "self_attn.sinks";

/// Whether a tensor of that name is a number that no method trains.
pub fn is_never_trained(name: &str) -> bool {
    name.ends_with(LAYER_SCALAR)
}

/// Whether a tensor is a norm or a bias, as Transformers' trainer tells them, by their names: what decays is none.
pub fn is_norm_or_bias(name: &str, dimensions: usize) -> bool {
    match dimensions {
        0 | 1 => {
            let others = [SINKS, DECAY].into_iter().chain(ROUTER_SCALES);
            !{ others }.any(|other| name.ends_with(other))
        }
        _ => name.ends_with(FUSED_BIAS),
    }
}

pub const EMBEDDING: &str = "model.embed_tokens.weight";
pub const FINAL_NORM: &str = "model.norm.weight";
pub const HEAD: &str = "lm_head.weight";
/// The embedding of all layers' own inputs, a row of each token.
pub const INPUT_EMBEDDING: &str = "model.embed_tokens_per_layer.weight";
/// What a token's embedding is projected with, for these.
pub const INPUT_PROJECTION: &str = "model.per_layer_model_projection.weight";
/// The norm of what is projected, of each layer's columns.
pub const INPUT_NORM: &str = "model.per_layer_projection_norm.weight";
/// Within a layer, the norm of what its own input adds to the residual.
pub const INPUT_MIX_NORM: &str = "post_per_layer_input_norm.weight";
/// Within a layer, the number that what it gives is multiplied by.
pub const LAYER_SCALAR: &str = "layer_scalar";

/// Names and shapes of what an adapter has of the embedding and the output layer.
pub fn token_tensors(config: &ModelConfig, trained: &TrainedTokens) -> Vec<(String, Vec<usize>)> {
    let both = [(EMBEDDING, &trained.embedding), (HEAD, &trained.head)];
    let trained = both.into_iter().filter(|(_, rows)| !rows.is_none());
    let named = trained.map(|(matrix, rows)| {
        let count = match rows {
            TrainedRows::These(ids) => ids.len(),
            TrainedRows::All => config.vocab_size,
        };
        (token_tensor(matrix, rows), vec![count, config.hidden_size])
    });
    named.collect()
}

/// The adapter's name for what it has of this matrix, the embedding or the output layer.
pub fn token_tensor(matrix: &str, rows: &TrainedRows) -> String {
    let module = matrix.strip_suffix(".weight").unwrap_or(matrix);
    match rows {
        TrainedRows::These(_) => trained_rows_name(module),
        TrainedRows::All => trained_whole_name(module),
    }
}

/// One linear of a decoder layer, or what adapters take for one outside of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// Within its layer; outside of layers the whole path.
    pub path: &'static str,
    /// Its place among the [`LINEARS`](crate::memory::LINEARS) of a layer; as many as these outside of layers.
    pub slot: usize,
    pub out: usize,
    pub width: usize,
    pub bias: bool,
}

impl LinearShape {
    /// Its last name: `q_proj`.
    pub fn name(&self) -> &'static str {
        self.path.rsplit('.').next().unwrap_or(self.path)
    }
}

/// The linears of a decoder layer, in the order of their slots. Of its experts only one that every token goes through has some.
pub fn linears(config: &ModelConfig, layer: usize) -> Vec<LinearShape> {
    let reading = match (config.linear_attention_of(layer), config.fused.qkv) {
        (Some(sizes), _) if sizes.is_grouped => {
            ["linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba", "", ""]
        }
        (Some(_), _) => [
            "linear_attn.in_proj_qkv",
            "linear_attn.in_proj_z",
            "linear_attn.in_proj_b",
            "linear_attn.in_proj_a",
        ],
        (None, true) => ["self_attn.qkv_proj", "", "", ""],
        (None, false) => [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "",
        ],
    };
    let output = match config.linear_attention_of(layer) {
        Some(_) => "linear_attn.out_proj",
        None => "self_attn.o_proj",
    };
    let [query, key, value, fourth] = reading;
    let [gate, up, down, weighted_by] = feed_forward_paths(config, layer);
    let paths = [
        query,
        key,
        value,
        fourth,
        output,
        gate,
        up,
        down,
        weighted_by,
        "per_layer_input_gate",
        "per_layer_projection",
    ];
    let shapes = config.shape().linears(layer).into_iter().enumerate();
    let linears = shapes
        .zip(paths)
        .map(|((slot, (width, out, bias)), path)| LinearShape {
            path,
            slot,
            out,
            width,
            bias,
        });
    linears.filter(|linear| linear.out > 0).collect()
}

/// Paths of the linears of a layer's feed-forward half: gate, up and down of what every token goes through, and the router of experts
/// beside that, or what a shared expert is weighted by.
fn feed_forward_paths(config: &ModelConfig, layer: usize) -> [&'static str; 4] {
    let dense = match config.fused.gate_up {
        true => ["mlp.gate_up_proj", "", "mlp.down_proj"],
        false => ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    };
    let [gate, up, down] = match config.experts_of(layer) {
        Some(experts) if experts.sizes.beside_dense => {
            let [gate, up, down] = dense;
            return [gate, up, down, "router.proj"];
        }
        Some(_) => [
            "mlp.shared_expert.gate_proj",
            "mlp.shared_expert.up_proj",
            "mlp.shared_expert.down_proj",
        ],
        None => dense,
    };
    [gate, up, down, "mlp.shared_expert_gate"]
}

/// The linear that projects all layers' own inputs, where there are some, as adapters take it.
pub fn input_projection(config: &ModelConfig) -> Option<LinearShape> {
    let inputs = config.layer_inputs?;
    Some(LinearShape {
        path: INPUT_PROJECTION.strip_suffix(".weight")?,
        slot: LINEARS,
        out: config.layers * inputs.width,
        width: config.hidden_size,
        bias: false,
    })
}

/// The linears of a decoder layer by what they read: queries, keys, values and what else is projected beside them; attention output;
/// gate and up; down; what a shared expert is weighted by; the gate of the layer's own input, and its output.
pub fn projections(config: &ModelConfig, layer: usize) -> [Vec<LinearShape>; PROJECTIONS.len()] {
    let linears = linears(config, layer);
    PROJECTIONS.map(|slots| {
        let members = linears.iter().filter(|linear| slots.contains(&linear.slot));
        members.copied().collect()
    })
}

impl ModelConfig {
    /// How linears are kept in 4 bits in this job, if all of them are: as the folder has them, else as the job asks for it.
    pub fn quantization_of(&self, job: &JobSpec) -> Option<Quantization> {
        match self.is_four_bits {
            true => self.quantization,
            false => job.quantization,
        }
    }

    /// The model in the numbers that memory and operations are counted with.
    pub fn shape(&self) -> Shape {
        Shape {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            layers: self.layers,
            heads: self.heads,
            key_value_heads: self.key_value_heads,
            head_dim: self.head_dim,
            tied: self.tied,
            qkv_bias: self.qkv_bias,
            output_bias: self.output_bias,
            mlp_bias: self.mlp_bias,
            fused: self.fused,
            // Of any layer that has both.
            head_norms: self.head_norm_widths(0),
            layer_norms: self.norms.names().count() + usize::from(self.layer_inputs.is_some()),
            adds_apart: self.norms.are_behind() || self.scales.residual != 1.0,
            norms_behind: self.norms.are_behind(),
            windows: self.windows(),
            rotary: match self.local_rope {
                None => self.rotary_dim,
                Some(_) => self.rotary_dim + self.local_rotary_dim,
            },
            sinks: match self.sinks {
                true => self.heads,
                false => 0,
            },
            experts: self.experts.as_ref().map(|experts| experts.sizes.clone()),
            output_gate: self.output_gate,
            linear_attention: self.linear_attention.clone(),
            layer_sizes: self.layer_sizes.clone(),
            layer_inputs: self.layer_inputs,
        }
    }

    /// The sizes of a layer's linear attention, if it has that in place of attention.
    pub fn linear_attention_of(&self, layer: usize) -> Option<&LinearAttention> {
        let sizes = self.linear_attention.as_ref()?;
        sizes.layers.get(layer)?.then_some(sizes)
    }

    /// The experts of a layer, if it has some.
    pub fn experts_of(&self, layer: usize) -> Option<&Experts> {
        let experts = self.experts.as_ref()?;
        experts.sizes.layers.get(layer)?.then_some(experts)
    }

    /// Number of weights of the norms of queries and of keys in a layer; 0 where there are none.
    pub fn head_norm_widths(&self, layer: usize) -> [usize; 2] {
        let own = self.sizes_of(layer);
        match self.head_norms {
            HeadNormKind::None => [0, 0],
            HeadNormKind::EachHead => match own.key_values {
                KeyValues::Of(_) => [own.head_dim, 0],
                KeyValues::Apart | KeyValues::Same => [own.head_dim; 2],
            },
            HeadNormKind::AllHeads => [self.heads, self.key_value_heads].map(|n| n * self.head_dim),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::files::layout::Layout;
    use crate::job::{JobSources, Method, load};
    use crate::memory::Work;
    use crate::model::{
        adapted_modules, adapter_ranks, module_tensors, tensors_beside, unfrozen_tensors,
    };

    const CLASSES: [&str; 16] = [
        "Qwen2ForCausalLM",
        "Gemma3ForCausalLM",
        "Olmo2ForCausalLM",
        "Phi3ForCausalLM",
        "GlmForCausalLM",
        "Glm4ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM",
        "MixtralForCausalLM",
        "OlmoeForCausalLM",
        "GptOssForCausalLM",
        "Qwen3_5ForCausalLM",
        "Qwen3_5MoeForCausalLM",
        "Qwen3NextForCausalLM",
        "Gemma4ForCausalLM",
        GEMMA4_MIXTURE,
    ];
    /// The class, and what stands for its switch.
    const GEMMA4_MIXTURE: &str = "Gemma4ForCausalLM with experts";

    fn config(class: &str) -> ModelConfig {
        config_of(class, 64)
    }

    fn config_of(class: &str, hidden_size: usize) -> ModelConfig {
        let mut json = json!({
            "architectures": [class.split(' ').next()], "vocab_size": 100, "hidden_size": hidden_size, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40, "mlp_only_layers": [1], "full_attention_interval": 2,
            // Of layers that differ, of which the last two have the keys and values of the first two.
            "global_head_dim": 16, "attention_k_eq_v": true, "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": 120
        });
        if class.starts_with("Gemma4ForCausalLM") {
            json["enable_moe_block"] = (class == GEMMA4_MIXTURE).into();
            json["top_k_experts"] = 2.into();
            let kinds = ["sliding_attention", "full_attention"];
            json["num_hidden_layers"] = 4.into();
            json["layer_types"] = json!([kinds, kinds].concat());
            json["num_kv_shared_layers"] = 2.into();
            json["use_double_wide_mlp"] = true.into();
        }
        ModelConfig::parse(&json, Path::new("config.json")).unwrap()
    }

    #[test]
    fn linears_of_one_matrix_have_one_name_and_the_widths_of_all() {
        let shapes = |class: &str| -> Vec<(&str, usize, usize)> {
            let linears = linears(&config(class), 0).into_iter();
            linears
                .map(|linear| (linear.path, linear.slot, linear.out))
                .collect()
        };
        let phi = [
            ("self_attn.qkv_proj", 0, 64),
            ("self_attn.o_proj", 4, 64),
            ("mlp.gate_up_proj", 5, 192),
            ("mlp.down_proj", 7, 64),
        ];
        assert_eq!(shapes("Phi3ForCausalLM"), phi);
        let parts = projections(&config("Glm4ForCausalLM"), 0);
        assert_eq!(parts.map(|part| part.len()), [3, 1, 1, 1, 0, 0, 0]);
    }

    #[test]
    fn memory_is_counted_for_the_tensors_that_a_model_has() {
        for class in CLASSES {
            let config = config(class);
            let tensors = base_tensors(&config).into_iter();
            let scalars: usize = tensors
                .filter(|(name, _)| !is_never_trained(name))
                .map(|(_, shape)| shape.iter().product::<usize>())
                .sum();
            assert_eq!(config.shape().parameters(), scalars as u64, "{class}");
        }
    }

    fn job(method: &str) -> JobSpec {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("job.yaml");
        let text = format!("base_model: m\ndatasets: d.jsonl\noptimizer: adamw_8bit\n{method}");
        std::fs::write(&path, text).unwrap();
        let file = Some(path);
        load(JobSources {
            file,
            ..Default::default()
        })
        .unwrap()
    }

    /// Bytes of the state by the sizes of the model, and by the tensors that are trained.
    fn state_bytes(class: &str, hidden_size: usize, job: &JobSpec) -> [u64; 2] {
        let config = config_of(class, hidden_size).for_job(job);
        let adapted = adapter_ranks(&config, job).unwrap();
        let counted = Work::of(job, adapted, false).state_bytes(&config.shape());
        let tensors = match &job.method {
            Method::Full => unfrozen_tensors(&config, &job.unfrozen).unwrap(),
            Method::Lora(lora) => {
                let modules = adapted_modules(&config, lora).unwrap();
                let beside = tensors_beside(&config, &modules, lora);
                module_tensors(&modules, lora).chain(beside).collect()
            }
        };
        let layout = Layout::new(tensors).with_moments(job.optimizer.moments());
        let layout = layout.with_weights(job.trained_dtype());
        [counted, layout.state_bytes() as u64]
    }

    /// With moments of 8 bits it matters which tensors are large: norms and biases are in the wider model.
    #[test]
    fn a_state_is_counted_as_large_as_its_tensors_make_it() {
        for full in [job(""), job("pure_bf16: true\n")] {
            for (class, hidden_size) in CLASSES.into_iter().flat_map(|c| [(c, 64), (c, 4096)]) {
                let [counted, made] = state_bytes(class, hidden_size, &full);
                assert_eq!(counted, made, "{class} {hidden_size}");
            }
        }
        for fields in [
            "use_dora: true\nbias: all\n",
            "use_dora: true\nbias: lora_only\nlora_target_modules: [o_proj, q_proj]\n",
            "lora_bias: true\nlora_target_modules: [q_proj]\n",
            "init_lora_weights: pissa\nlora_r: 16\n",
            "lora_modules_to_save: [lm_head]\n",
            "lora_modules_to_save: [embed_tokens, lm_head]\n",
            "trainable_token_indices: {embed_tokens: [1, 2], lm_head: [3]}\n",
            "lora_target_modules: [embed_tokens, lm_head, q_proj]\n",
            "lora_target_modules: [lm_head]\nuse_dora: true\nrank_pattern: {lm_head: 40}\n",
            "lora_target_modules: [embed_tokens]\nlora_modules_to_save: [lm_head]\n",
            "init_lora_weights: pissa\nlora_r: 16\nlora_target_modules: [lm_head, v_proj]\n",
        ] {
            for (rank, hidden_size) in [(16, 64), (64, 64), (16, 4096)] {
                let rank = match fields.contains("lora_r") {
                    true => String::new(),
                    false => format!("lora_r: {rank}\n"),
                };
                let job = job(&format!("adapter: lora\n{rank}{fields}"));
                let [counted, made] = state_bytes("Qwen2ForCausalLM", hidden_size, &job);
                assert_eq!(counted, made, "{hidden_size} {fields}");
            }
        }
        for fields in [
            "use_dora: true\nbias: all\n",
            "lora_target_modules: [q_proj, v_proj, per_layer_model_projection]\n",
        ] {
            let job = job(&format!("adapter: lora\n{fields}"));
            let [counted, made] = state_bytes("Gemma4ForCausalLM", 64, &job);
            assert_eq!(counted, made, "{fields}");
        }
        for class in ["Qwen3MoeForCausalLM", "GptOssForCausalLM"] {
            for fields in [
                "lora_target_parameters: [experts.gate_up_proj, experts.down_proj]\n",
                "lora_target_parameters: [down_proj, gate.weight, router.weight]\nlora_target_linear: true\nrank_pattern: {down_proj: 3}\n",
            ] {
                let job = job(&format!("adapter: lora\n{fields}"));
                let [counted, made] = state_bytes(class, 64, &job);
                assert_eq!(counted, made, "{class} {fields}");
            }
        }
    }
}
