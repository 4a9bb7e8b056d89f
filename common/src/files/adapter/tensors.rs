//! Names and shapes of an adapter's tensors, as PEFT 0.21 saves them.

use crate::job::{LoraSpec, MAGNITUDE, TOKEN_MODULES, TrainedRows, TrainedTokens};

/// Path of the embedding.
const EMBEDDING: &str = TOKEN_MODULES[0];

/// One of the tensors of an adapted module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factor {
    /// `A`, of shape `[r, in]`.
    A,
    /// `B`, of shape `[out, r]`.
    B,
    /// `A` of an adapter on the embedding, of shape `[r, vocabulary]`: a column for each token.
    EmbeddingA,
    /// `B` of an adapter on the embedding, of shape `[width, r]`.
    EmbeddingB,
    /// The norms of the rows of the adapted weight, of shape `[out]` (DoRA).
    Magnitude,
    /// The bias of `B`, of shape `[out]`.
    BiasOfB,
    /// The linear's own bias, which is trained in its place, of shape `[out]`.
    Bias,
    /// The bias of a linear that has no factors, likewise.
    BiasAlone,
}

impl Factor {
    /// A name may end as several do: the first is meant.
    const ALL: [Self; 8] = [
        Self::A,
        Self::B,
        Self::EmbeddingA,
        Self::EmbeddingB,
        Self::Magnitude,
        Self::BiasOfB,
        Self::Bias,
        Self::BiasAlone,
    ];

    /// What follows the module's path in PEFT's name.
    fn ending(self) -> &'static str {
        match self {
            Self::A => "lora_A.weight",
            Self::B => "lora_B.weight",
            Self::EmbeddingA => "lora_embedding_A",
            Self::EmbeddingB => "lora_embedding_B",
            Self::Magnitude => MAGNITUDE,
            Self::BiasOfB => "lora_B.bias",
            Self::Bias => "base_layer.bias",
            Self::BiasAlone => "bias",
        }
    }
}

/// PEFT's name for a tensor of the module at this path (`model.layers.0.self_attn.q_proj`).
pub fn tensor_name(module: &str, factor: Factor) -> String {
    format!("base_model.model.{module}.{}", factor.ending())
}

/// A linear that an adapter is put on, or the embedding, whose inputs are tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adapted {
    /// Path of the module, such as `model.layers.0.self_attn.q_proj`.
    pub path: String,
    pub rank: usize,
    pub inputs: usize,
    pub outputs: usize,
    pub has_bias: bool,
}

/// Names and shapes of the tensors that an adapter has for a linear.
pub fn adapter_tensors(
    linear: &Adapted,
    lora: &LoraSpec,
) -> impl Iterator<Item = (String, Vec<usize>)> {
    let Adapted {
        path,
        rank,
        inputs,
        outputs,
        has_bias,
    } = linear;
    let [a, b] = factors_at(path);
    let tensors = [
        (a, vec![*rank, *inputs], true),
        (b, vec![*outputs, *rank], true),
        (Factor::Magnitude, vec![*outputs], lora.use_dora),
        (Factor::BiasOfB, vec![*outputs], lora.lora_bias),
        (
            Factor::Bias,
            vec![*outputs],
            *has_bias && !lora.biases.is_none(),
        ),
    ];
    let there = tensors.into_iter().filter(|(_, _, is_there)| *is_there);
    there.map(move |(factor, shape, _)| (tensor_name(path, factor), shape))
}

/// The factors of the adapter on the module at this path.
pub fn factors_at(path: &str) -> [Factor; 2] {
    match path == EMBEDDING {
        true => [Factor::EmbeddingA, Factor::EmbeddingB],
        false => [Factor::A, Factor::B],
    }
}

/// Whether PEFT saves a tensor of that name beside an adapter on the embedding or the output layer, by its usual settings: the base
/// model's matrix that the adapter is on. `has` says which tensors are there.
pub fn is_kept_beside_factors(name: &str, has: impl Fn(&str) -> bool) -> bool {
    TOKEN_MODULES.into_iter().any(|module| {
        let [a, _] = factors_at(module);
        name == format!("base_model.model.{module}.base_layer.weight")
            && has(&tensor_name(module, a))
    })
}

/// PEFT's name for the rows of a token matrix that are trained by themselves: whole rows, not what is added to them.
pub fn trained_rows_name(module: &str) -> String {
    format!("base_model.model.{module}.token_adapter.trainable_tokens_delta")
}

/// Whether PEFT saves a tensor of that name beside these rows: the matrix that they are of, or, where the output layer is the
/// embedding (`tied`), the same rows again.
pub fn is_kept_beside_tokens(name: &str, tokens: &TrainedTokens, tied: bool) -> bool {
    let has_rows = |rows: &TrainedRows| !rows.listed().is_empty();
    let again = tied && has_rows(&tokens.embedding);
    let head = again || has_rows(&tokens.head);
    (has_rows(&tokens.embedding) && name == rows_matrix_name("model.embed_tokens"))
        || (head && name == rows_matrix_name("lm_head"))
        || (again && name == trained_rows_name("lm_head"))
}

/// PEFT's name for the matrix that trained rows are of.
fn rows_matrix_name(module: &str) -> String {
    format!("base_model.model.{module}.token_adapter.base_layer.weight")
}

/// PEFT's name for a matrix that is trained as a whole beside adapters.
pub fn trained_whole_name(module: &str) -> String {
    format!("base_model.model.{module}.weight")
}

/// The module path and factor of a tensor named by PEFT.
pub fn parse_tensor_name(name: &str) -> Option<(&str, Factor)> {
    let rest = name.strip_prefix("base_model.model.")?;
    Factor::ALL.into_iter().find_map(|factor| {
        let module = rest.strip_suffix(factor.ending())?.strip_suffix('.')?;
        Some((module, factor))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_peft_saves_beside_rows_is_known_for_the_matrices_that_have_some() {
        let rows = |embedding: &[u32], head: &[u32]| TrainedTokens {
            embedding: TrainedRows::These(embedding.to_vec()),
            head: TrainedRows::These(head.to_vec()),
        };
        let of =
            |module: &str, rest: &str| format!("base_model.model.{module}.token_adapter.{rest}");
        let base = of("model.embed_tokens", "base_layer.weight");
        let head_base = of("lm_head", "base_layer.weight");
        let again = of("lm_head", "trainable_tokens_delta");
        for (tokens, tied, kept) in [
            (rows(&[3], &[]), true, [true, true, true]),
            (rows(&[3], &[]), false, [true, false, false]),
            (rows(&[3], &[3]), false, [true, true, false]),
            (rows(&[], &[]), true, [false, false, false]),
        ] {
            let found =
                [&base, &head_base, &again].map(|name| is_kept_beside_tokens(name, &tokens, tied));
            assert_eq!(found, kept, "{tokens:?}, tied: {tied}");
        }
    }

    #[test]
    fn a_matrix_beside_factors_is_known_where_there_are_factors_on_it() {
        let has = |name: &str| name == "base_model.model.model.embed_tokens.lora_embedding_A";
        let base = |module: &str| format!("base_model.model.{module}.base_layer.weight");
        assert!(is_kept_beside_factors(&base("model.embed_tokens"), has));
        assert!(!is_kept_beside_factors(&base("lm_head"), has));
        assert!(!is_kept_beside_factors(
            &base("model.layers.0.mlp.up_proj"),
            |_| true
        ));
    }

    #[test]
    fn tensor_names_are_peft_s() {
        let module = "model.layers.0.self_attn.q_proj";
        for (factor, ending) in [
            (Factor::A, "lora_A.weight"),
            (Factor::B, "lora_B.weight"),
            (Factor::EmbeddingA, "lora_embedding_A"),
            (Factor::EmbeddingB, "lora_embedding_B"),
            (Factor::Magnitude, "lora_magnitude_vector"),
            (Factor::BiasOfB, "lora_B.bias"),
            (Factor::Bias, "base_layer.bias"),
            (Factor::BiasAlone, "bias"),
        ] {
            let name = tensor_name(module, factor);
            assert_eq!(name, format!("base_model.model.{module}.{ending}"));
            assert_eq!(parse_tensor_name(&name), Some((module, factor)));
        }
        assert!(parse_tensor_name("model.norm.weight").is_none());
    }
}
