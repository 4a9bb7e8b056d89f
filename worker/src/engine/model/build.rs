//! From a job and its weights to a model on the processor. In: the base model's tensors, and the trainable ones. Out: the
//! model, whose trainable weights are views of the parameters.

mod dense_and_experts;
mod mixer;
mod own_input;

use common::files::adapter::{Factor, tensor_name};
use common::job::{BaseDtype, Quantization, TOKEN_MODULES, TrainedRows};
use common::model::{
    self, EMBEDDING, FINAL_NORM, FUSED_BIAS, FusedExperts, HEAD, LinearShape, ModelConfig,
    projections, token_tensor,
};

use half::bf16;

use super::causal_lm::CausalLm;
use super::layers::decoder::DecoderLayer;
use super::layers::expert::{Expert, ExpertLinear, Gating};
use super::layers::experts::Experts;
use super::layers::feed_forward::FeedForward;
use super::layers::mlp::Mlp;
use super::layers::residual::Residual;
use super::layers::shared_expert::SharedExpert;
use super::weight_parts::TensorPart;
use super::weights::WeightSource;
use crate::engine::EngineError;
use crate::engine::adapter::JobAdapter;
use crate::engine::buffer::Pool;
use crate::engine::ops::clamped_swiglu::ClampedSwiglu;
use crate::engine::ops::embedding::Embedding;
use crate::engine::ops::lora_linear::Lora;
use crate::engine::ops::output_layer::OutputLayer;
use crate::engine::ops::projection::{Linear, Projection};
use crate::engine::ops::rms_norm::RmsNorm;
use crate::engine::ops::routing::Routing;
use crate::engine::ops::token_matrix::{TokenMatrix, TokenRows};
use crate::engine::ops::transposed_linear::TransposedLinear;
use crate::engine::params::{Parameters, Weight};

/// What a model on the processor is built from.
pub struct Parts<'a> {
    pub config: &'a ModelConfig,
    pub source: &'a WeightSource,
    /// The trainable tensors; all others are frozen, and come from the source.
    pub parameters: &'a Parameters,
    pub lora: Option<JobAdapter<'a>>,
    /// Seed of an adapter that is a new one, what of it follows the weights that it is on is made here.
    pub new_adapter: Option<u64>,
    pub dtype: BaseDtype,
    /// How frozen matrices are kept in 4 bits, if they are.
    pub quantization: Option<Quantization>,
}

impl Parts<'_> {
    /// Builds the model with its frozen weights in memory.
    pub fn model(&self, sequence_len: usize) -> Result<CausalLm, EngineError> {
        let embedding = self.token_matrix(EMBEDDING)?;
        let head = match self.config.tied {
            true => embedding.clone(),
            false => self.token_matrix(HEAD)?,
        };
        let head = self.output_layer(head);
        let embedding = Embedding {
            lora: self
                .lora
                .as_ref()
                .and_then(|lora| lora.on_embedding(self.parameters)),
            matrix: embedding,
        };
        let layers = (0..self.config.layers)
            .map(|layer| self.layer(layer))
            .collect::<Result<_, _>>()?;
        let norm = self.norm(FINAL_NORM)?;
        let tokens = (embedding, head);
        // What is trained as a whole is computed in its own type.
        let dtype = match self.lora {
            Some(_) => self.dtype,
            None => self.parameters.layout().weights,
        };
        Ok(
            CausalLm::new((self.config, dtype), tokens, layers, norm, sequence_len)
                .learning_from(self.first_learning())
                .with_own_inputs(self.own_inputs()?),
        )
    }

    /// The first layer that something is trained of.
    fn first_learning(&self) -> usize {
        let layout = self.parameters.layout();
        let layers = layout.tensors.iter().filter_map(|tensor| {
            let (_, behind) = tensor.name.split_once(".layers.")?;
            behind.split('.').next()?.parse().ok()
        });
        layers.min().unwrap_or(self.config.layers)
    }

    fn token_matrix(&self, name: &str) -> Result<TokenMatrix, EngineError> {
        let shape = [self.config.vocab_size, self.config.hidden_size];
        let trained = self.lora.as_ref().map(|lora| match name {
            EMBEDDING => &lora.spec.tokens.embedding,
            _ => &lora.spec.tokens.head,
        });
        let own = trained.and_then(|rows| {
            let weight = self.parameters.weight(&token_tensor(name, rows))?;
            Some((rows, weight))
        });
        if let Some((TrainedRows::All, weight)) = own {
            return Ok(weight.into());
        }
        let quantization = self.quantization.filter(|how| how.embeddings);
        Ok(TokenMatrix {
            weight: self.matrix(name, &shape, quantization)?,
            rows: own.map(|(rows, weight)| TokenRows::new(weight, rows.listed())),
        })
    }

    /// The output layer of this matrix, with its adapter where it has one; the matrix itself may be the embedding, too.
    fn output_layer(&self, matrix: TokenMatrix) -> OutputLayer {
        let path = TOKEN_MODULES[1];
        let Some(lora) = self.lora(path) else {
            return matrix.into();
        };
        let linear = Linear {
            weight: matrix.weight,
            bias: None,
            lora: Some(lora),
        };
        self.start(&linear, path);
        OutputLayer::Adapted(Projection(vec![linear]))
    }

    fn layer(&self, layer: usize) -> Result<DecoderLayer, EngineError> {
        let config = self.config;
        let prefix = format!("model.layers.{layer}.");
        let [qkv, output, gate_up, down, shared, own_gate, own_output] = projections(config, layer);
        Ok(DecoderLayer {
            own_input: self.own_input(layer, &prefix, [&own_gate, &own_output])?,
            scale: self.layer_scale(&prefix)?,
            mixer: self.mixer(layer, &prefix, [&qkv, &output])?,
            mlp: match config.experts_of(layer) {
                None => {
                    let output_norm = config.norms.mlp_output;
                    FeedForward::Dense(Box::new(self.mlp(
                        &prefix,
                        [&gate_up, &down],
                        output_norm,
                    )?))
                }
                Some(experts) if experts.sizes.beside_dense => {
                    let dense = [&gate_up[..], &down];
                    let both = self.dense_and_experts(&prefix, experts, dense, &shared)?;
                    FeedForward::Both(Box::new(both))
                }
                Some(experts) => {
                    let norm = self.layer_norm(&prefix, config.norms.mlp_input)?;
                    let shared = [gate_up, down, shared];
                    FeedForward::Experts(Box::new(self.experts(&prefix, experts, norm, &shared)?))
                }
            },
        })
    }

    /// A dense feed-forward half, by its linears and the norm of what it gives.
    fn mlp(
        &self,
        prefix: &str,
        [gate_up, down]: [&[LinearShape]; 2],
        output_norm: Option<&str>,
    ) -> Result<Mlp, EngineError> {
        Ok(Mlp {
            norm: self.layer_norm(prefix, self.config.norms.mlp_input)?,
            gate_up: self.projection(prefix, gate_up)?,
            down: self.projection(prefix, down)?,
            residual: self.residual(prefix, output_norm)?,
            activation: self.config.activation,
        })
    }

    fn layer_norm(&self, prefix: &str, name: Option<&str>) -> Result<Option<RmsNorm>, EngineError> {
        name.map(|name| self.norm(&format!("{prefix}{name}.weight")))
            .transpose()
    }

    fn residual(&self, prefix: &str, norm: Option<&str>) -> Result<Residual, EngineError> {
        Ok(Residual {
            norm: self.layer_norm(prefix, norm)?,
            scale: self.config.scales.residual as f32,
        })
    }

    /// The experts of a layer; `shared` are the linears of the one that every token goes through, where there is one.
    fn experts(
        &self,
        prefix: &str,
        experts: &model::Experts,
        norm: Option<RmsNorm>,
        shared: &[Vec<LinearShape>; 3],
    ) -> Result<Experts, EngineError> {
        let sizes = &experts.sizes;
        let [gate_up, down, gate] = shared;
        let shared = match sizes.shared {
            None => None,
            Some(_) => Some(SharedExpert {
                gate_up: self.projection(prefix, gate_up)?,
                down: self.projection(prefix, down)?,
                gate: self.projection(prefix, gate)?,
                activation: self.config.activation,
            }),
        };
        let [of_gate_up, of_down, of_router] = match &self.lora {
            Some(lora) => lora.on_experts(prefix, experts, self.parameters),
            None => Default::default(),
        };
        let expert = |index: usize| {
            let adapters = [&of_gate_up, &of_down].map(|all| all.get(index).cloned());
            match &experts.fused {
                None => self.expert(prefix, (experts, index), adapters),
                Some(_) => self.fused_expert(prefix, (experts, index), adapters),
            }
        };
        Ok(Experts {
            norm,
            router: self.router(prefix, experts, of_router.into_iter().next())?,
            own_routing: None,
            routing: Routing {
                experts: sizes.count,
                per_token: sizes.per_token,
                normalises: experts.normalises,
            },
            experts: (0..sizes.count).map(expert).collect::<Result<_, _>>()?,
            shared,
            gating: match experts.fused {
                None => Gating::Halves(self.config.activation),
                Some(FusedExperts { alpha, limit }) => Gating::Alternating(ClampedSwiglu {
                    alpha: alpha as f32,
                    limit: limit as f32,
                }),
            },
        })
    }

    /// The router of a layer, which is never quantised.
    fn router(
        &self,
        prefix: &str,
        experts: &model::Experts,
        lora: Option<Lora>,
    ) -> Result<Projection, EngineError> {
        let (path, count) = (experts.router(), experts.sizes.count);
        let bias = match experts.fused {
            None => None,
            Some(_) => Some(self.weight(&format!("{prefix}{path}.bias"), &[count])?),
        };
        let shape = [count, self.config.hidden_size];
        Ok(Projection(vec![Linear {
            weight: self.matrix(&format!("{prefix}{path}.weight"), &shape, None)?,
            bias,
            lora,
        }]))
    }

    /// How experts are kept in 4 bits, where the job asks for that.
    fn quantization_of_experts(&self) -> Option<Quantization> {
        self.quantization.filter(|how| how.experts)
    }

    /// An expert whose matrices are tensors of their own.
    fn expert(
        &self,
        prefix: &str,
        (experts, index): (&model::Experts, usize),
        [of_gate_up, of_down]: [Option<Lora>; 2],
    ) -> Result<Expert, EngineError> {
        let linear = |path: &str, shape: [usize; 2], lora| -> Result<Linear, EngineError> {
            let name = format!("{prefix}{path}.weight");
            Ok(Linear {
                weight: self.matrix(&name, &shape, self.quantization_of_experts())?,
                bias: None,
                lora,
            })
        };
        let (width, hidden) = (experts.sizes.width, self.config.hidden_size);
        let [gate, up, down] = experts.matrices(index);
        let gate_up = vec![
            linear(&gate, [width, hidden], of_gate_up)?,
            linear(&up, [width, hidden], None)?,
        ];
        let down = vec![linear(&down, [hidden, width], of_down)?];
        Ok(Expert {
            gate_up: ExpertLinear::Apart(Projection(gate_up)),
            down: ExpertLinear::Apart(Projection(down)),
        })
    }

    /// An expert whose layers are parts of tensors that have those of all.
    fn fused_expert(
        &self,
        prefix: &str,
        (experts, index): (&model::Experts, usize),
        [of_gate_up, of_down]: [Option<Lora>; 2],
    ) -> Result<Expert, EngineError> {
        let linear = |name: String, [input, out]: [usize; 2], lora| -> Result<_, EngineError> {
            let (name, count) = (format!("{prefix}{name}"), experts.sizes.count);
            let bias = format!("{name}{FUSED_BIAS}");
            let part = |name, shape| TensorPart { name, shape, index };
            Ok(ExpertLinear::Fused(Box::new(TransposedLinear {
                weight: self.part(part(&name, &[count, input, out]))?,
                bias: self.part(part(&bias, &[count, out]))?,
                lora,
            })))
        };
        let (width, hidden) = (experts.sizes.width, self.config.hidden_size);
        let [gate_up, down] = experts.fused_tensors();
        Ok(Expert {
            gate_up: linear(gate_up, [hidden, 2 * width], of_gate_up)?,
            down: linear(down, [width, hidden], of_down)?,
        })
    }

    fn part(&self, part: TensorPart) -> Result<Weight, EngineError> {
        match self.parameters.part(part.name, part.index) {
            Some(weight) => Ok(weight),
            None => self
                .source
                .part(part, self.dtype, self.quantization_of_experts()),
        }
    }

    fn projection(&self, prefix: &str, shapes: &[LinearShape]) -> Result<Projection, EngineError> {
        let linears = shapes.iter().map(|shape| self.linear(prefix, shape));
        Ok(Projection(linears.collect::<Result<_, _>>()?))
    }

    fn linear(&self, prefix: &str, shape: &LinearShape) -> Result<Linear, EngineError> {
        let path = format!("{prefix}{}", shape.path);
        let bias = match shape.bias {
            true => Some(self.bias(&path, shape.out)?),
            false => None,
        };
        let linear = Linear {
            weight: self.matrix(
                &format!("{path}.weight"),
                &[shape.out, shape.width],
                self.quantization,
            )?,
            bias,
            lora: self.lora(&path),
        };
        self.start(&linear, &path);
        Ok(linear)
    }

    /// Starts what follows the weight of a linear, where its adapter is a new one.
    fn start(&self, linear: &Linear, path: &str) {
        let (Some(seed), Some(lora)) = (self.new_adapter, &self.lora) else {
            return;
        };
        lora.start_from(linear, path, seed);
        let pool = Pool::default();
        match self.dtype {
            BaseDtype::Float32 => linear.start_magnitudes::<f32>(&pool),
            BaseDtype::Bfloat16 => linear.start_magnitudes::<bf16>(&pool),
        }
    }

    /// The bias of a linear, which may be trained beside an adapter.
    fn bias(&self, path: &str, out: usize) -> Result<Weight, EngineError> {
        let beside = [Factor::Bias, Factor::BiasAlone];
        let mut beside = beside.map(|factor| tensor_name(path, factor)).into_iter();
        match beside.find_map(|name| self.parameters.weight(&name)) {
            Some(weight) => Ok(weight),
            None => self.weight(&format!("{path}.bias"), &[out]),
        }
    }

    fn lora(&self, path: &str) -> Option<Lora> {
        self.lora.as_ref()?.on(path, self.parameters)
    }

    fn norm(&self, name: &str) -> Result<RmsNorm, EngineError> {
        self.norm_of(name, self.config.hidden_size)
    }

    /// A norm of so many columns.
    fn norm_of(&self, name: &str, width: usize) -> Result<RmsNorm, EngineError> {
        Ok(RmsNorm {
            weight: self.weight(name, &[width])?,
            epsilon: self.config.rms_norm_epsilon as f32,
            offset: self.config.norm_offset,
        })
    }

    /// A matrix, which where it is frozen may be kept in 4 bits.
    fn matrix(
        &self,
        name: &str,
        shape: &[usize],
        quantization: Option<Quantization>,
    ) -> Result<Weight, EngineError> {
        if let Some(weight) = self.parameters.weight(name) {
            return Ok(weight);
        }
        self.source.matrix(name, shape, self.dtype, quantization)
    }

    fn weight(&self, name: &str, shape: &[usize]) -> Result<Weight, EngineError> {
        let is_narrow = self.parameters.layout().weights == BaseDtype::Bfloat16;
        match self.parameters.weight(name) {
            Some(weight) => Ok(weight),
            // As the model that is written has it.
            None if is_narrow && shape.len() == 1 => self.source.rounded_vector(name, shape),
            None => self.source.tensor(name, shape, self.dtype),
        }
    }
}
