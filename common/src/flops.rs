//! How much arithmetic training takes, and what share of a device's peak that is. In: the shapes of a model and of the work on
//! it. Out: operations; a multiplication and an addition are two.
//!
//! Model FLOP utilisation as PaLM defines it (Chowdhery et al., 2022, appendix B): tokens a second times the operations that
//! the model needs for each, over the peak of the devices. What is computed again, for want of memory, is not counted. Attention
//! is causal, so half of PaLM's. Frozen weights have no gradient of their own, so four operations for each instead of six. Of a mixture
//! of experts those count that a token goes through.

use crate::memory::{OwnTensor, Shape, Trained, Work};

/// Operations for a token, forward and backward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PerToken {
    products: f64,
    /// For each token of the text that it attends in.
    attention: f64,
}

impl PerToken {
    /// Where texts have so many tokens, on average over their tokens: a long one counts as often as it has tokens.
    pub fn in_context(&self, tokens: f64) -> f64 {
        self.products + self.attention * tokens
    }
}

/// Of the work's model and method; its sizes are no part of it.
pub fn per_token(shape: &Shape, work: &Work) -> PerToken {
    // The embedding is looked up; the output layer is a product, tied or not.
    let head = (shape.vocab_size * shape.hidden_size) as u64;
    let [_, active] = shape.layer_matrices();
    let linears = active + head;
    let products = match &work.trained {
        Trained::All => 6 * linears,
        Trained::Some(own) => {
            let learned = own.iter().map(|tensor| multiplied(shape, tensor));
            4 * linears + 2 * learned.sum::<u64>()
        }
        Trained::Adapters {
            tokens, experts, ..
        } => {
            // Of an adapter on the embedding, the columns of A are looked up.
            let looked_up = (tokens.ranks[0] * shape.vocab_size) as u64;
            let idle = looked_up + shape.idle_factors(experts);
            4 * linears + 6 * (work.scalars(shape) - idle)
        }
    };
    // Scores and values, over half of the text on average; backward is twice as much.
    let queries = shape.layers_with_attention();
    let queries: usize = queries.map(|layer| shape.queries(layer)).sum();
    let attention = 3 * 2 * queries as u64;
    // A state is decayed, read for what it says of a key, written to, and read by a query (Yang et al., 2024), one token
    // after the other: seven operations on each of its scalars. In chunks it takes some more.
    let states = (0..shape.layers).filter_map(|layer| shape.linear_attention_of(layer));
    let states = states.map(|sizes| 3 * 7 * (sizes.values() * sizes.key_dim) as u64);
    PerToken {
        products: (products + states.sum::<u64>()) as f64,
        attention: attention as f64,
    }
}

/// Scalars of one of the model's own tensors that a token is multiplied by.
fn multiplied(shape: &Shape, tensor: &OwnTensor) -> u64 {
    let scalars = tensor.shape.iter().product::<usize>() as u64;
    let is_of_layers = tensor.name.contains("embed_tokens_per_layer");
    let is_looked_up = is_of_layers || (!shape.tied && tensor.name.contains("embed_tokens"));
    match &shape.experts {
        _ if tensor.shape.len() < 2 || is_looked_up => 0,
        Some(experts) if tensor.name.contains(".experts.") => {
            scalars * experts.per_token as u64 / experts.count as u64
        }
        _ => scalars,
    }
}

/// The published peak of a GPU's matrix products in bfloat16 summed in float32, without sparsity, in operations a second
/// (NVIDIA's data sheets). None: the name is none that is known here, or that of a slice of a GPU.
pub fn published_peak(gpu: &str) -> Option<f64> {
    // Slower than what their names begin with.
    const OTHERS: [&str; 5] = ["MIG", "Laptop", "Max-Q", "H800 PCIe", "RTX 4090 D"];
    if OTHERS.iter().any(|name| names(gpu, name)) {
        return None;
    }
    // The first that matches counts, so longer names come first.
    const TERAFLOPS: [(&str, f64); 16] = [
        ("GB200", 2500.0),
        ("B200", 2250.0),
        ("B100", 1750.0),
        ("GH200", 989.4),
        ("H200 NVL", 835.5),
        ("H200", 989.4),
        ("H100 NVL", 835.5),
        ("H100 PCIe", 756.5),
        ("H100", 989.4),
        ("H800", 989.4),
        ("H20", 148.0),
        ("A100", 311.8),
        ("A800", 311.8),
        ("A40", 149.7),
        ("L40S", 362.05),
        ("RTX 4090", 165.2),
    ];
    let known = TERAFLOPS.iter().find(|(name, _)| names(gpu, name))?;
    Some(known.1 * 1e12)
}

/// Whether `name` is in `gpu` as words of its own: an H20 is no H200.
fn names(gpu: &str, name: &str) -> bool {
    gpu.match_indices(name).any(|(at, _)| {
        let outside = |c: Option<char>| c.is_none_or(|c| !c.is_ascii_alphanumeric());
        outside(gpu[..at].chars().next_back()) && outside(gpu[at + name.len()..].chars().next())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{BaseDtype, Reduction};
    use crate::memory::{Experts, Fused, LINEARS};

    /// Llama 3.1 8B.
    const LARGE: Shape = Shape {
        vocab_size: 128_256,
        hidden_size: 4096,
        intermediate_size: 14_336,
        layers: 32,
        heads: 32,
        key_value_heads: 8,
        head_dim: 128,
        tied: false,
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        fused: Fused::NONE,
        head_norms: [0; 2],
        layer_norms: 2,
        adds_apart: false,
        norms_behind: false,
        windows: Vec::new(),
        rotary: 128,
        sinks: 0,
        experts: None,
        output_gate: false,
        linear_attention: None,
        layer_sizes: Vec::new(),
        layer_inputs: None,
    };

    fn work(trained: Trained) -> Work {
        Work {
            trained,
            dtype: BaseDtype::Bfloat16,
            trained_dtype: BaseDtype::Float32,
            quantization: None,
            reduction: Reduction::Exact,
            optimizer: Default::default(),
            batch: 1,
            sequence_len: 4096,
            checkpointing: false,
            alone: true,
        }
    }

    #[test]
    fn of_some_weights_those_count_twice_more_that_are_trained() {
        let own = |name: &str, shape: &[usize]| OwnTensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
        };
        let of = |own: Vec<OwnTensor>| per_token(&LARGE, &work(Trained::Some(own))).products;
        let (all, none) = (
            per_token(&LARGE, &work(Trained::All)).products,
            of(Vec::new()),
        );
        assert_eq!(none, all * 4.0 / 6.0);
        let some = vec![
            own("model.embed_tokens.weight", &[128_256, 4096]),
            own("model.norm.weight", &[4096]),
            own("model.layers.3.mlp.down_proj.weight", &[4096, 14_336]),
        ];
        assert_eq!(of(some) - none, 2.0 * 4096.0 * 14_336.0);
    }

    #[test]
    fn full_training_takes_six_operations_a_weight_and_adapters_four() {
        let full = per_token(&LARGE, &work(Trained::All)).in_context(4096.0);
        // 8.03e9 parameters, of which the embedding's 0.53e9 are no product; and attention.
        let attention = 6.0 * 32.0 * 4096.0 * 4096.0;
        assert!(
            (full / (6.0 * 7.504_9e9 + attention) - 1.0).abs() < 1e-3,
            "{full:e}"
        );
        let ranks = vec![[16; LINEARS]; LARGE.layers];
        let lora = Trained::Adapters {
            dropout: false,
            magnitudes: false,
            biases: Default::default(),
            lora_bias: false,
            ranks,
            experts: Vec::new(),
            tokens: Default::default(),
        };
        // 41.9e6 scalars of adapters.
        let expected = 4.0 * 7.504_9e9 + 6.0 * 41.943e6 + attention;
        let lora = per_token(&LARGE, &work(lora));
        let whole = lora.in_context(4096.0);
        assert!((whole / expected - 1.0).abs() < 1e-3, "{whole:e}");
        // Short texts that share a block do not see each other.
        let packed = lora.in_context(64.0);
        let expected = expected - attention * (1.0 - 64.0 / 4096.0);
        assert!((packed / expected - 1.0).abs() < 1e-3, "{packed:e}");
    }

    #[test]
    fn of_adapters_on_experts_those_count_that_a_token_goes_through() {
        let shape = Shape {
            experts: Some(Experts {
                count: 8,
                per_token: 2,
                width: 1024,
                shared: None,
                layers: vec![true; LARGE.layers],
                biased: false,
                beside_dense: false,
            }),
            ..LARGE
        };
        let of = |ranks: [usize; 3]| {
            let lora = Trained::Adapters {
                dropout: false,
                magnitudes: false,
                biases: Default::default(),
                lora_bias: false,
                ranks: vec![[0; LINEARS]; LARGE.layers],
                experts: vec![ranks; LARGE.layers],
                tokens: Default::default(),
            };
            per_token(&shape, &work(lora)).products
        };
        let (gate_up, down, router) = (4096 + 2048, 1024 + 4096, 4096 + 8);
        let scalars = 32 * (2 * (16 * gate_up + 4 * down) + 8 * router);
        assert_eq!(of([16, 4, 8]) - of([0; 3]), 6.0 * f64::from(scalars));
    }

    #[test]
    fn a_gpu_is_known_by_its_name() {
        assert_eq!(published_peak("NVIDIA H200"), Some(989.4e12));
        assert_eq!(published_peak("NVIDIA H100 80GB HBM3"), Some(989.4e12));
        assert_eq!(published_peak("NVIDIA H100 PCIe"), Some(756.5e12));
        assert_eq!(published_peak("NVIDIA H20"), Some(148.0e12));
        assert_eq!(published_peak("NVIDIA A100-SXM4-80GB"), Some(311.8e12));
        assert_eq!(published_peak("emulated GPU"), None);
    }

    #[test]
    fn a_part_of_a_gpu_has_no_published_peak() {
        for gpu in [
            "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
            "NVIDIA H800 PCIe",
            "NVIDIA GeForce RTX 4090 D",
            "NVIDIA GeForce RTX 4090 Laptop GPU",
        ] {
            assert_eq!(published_peak(gpu), None, "{gpu}");
        }
    }
}
