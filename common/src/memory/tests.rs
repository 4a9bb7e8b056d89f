//! What the formulas say of a model that is known.

use super::*;
use crate::job::{Optimizer, Quantization, Reduction, TrainedBiases};

/// Qwen3-0.6B.
const SMALL: Shape = Shape {
    vocab_size: 151_936,
    hidden_size: 1024,
    intermediate_size: 3072,
    layers: 28,
    heads: 16,
    key_value_heads: 8,
    head_dim: 128,
    tied: true,
    qkv_bias: false,
    output_bias: false,
    mlp_bias: false,
    fused: Fused::NONE,
    head_norms: [128; 2],
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

fn work(trained: Trained, checkpointing: bool) -> Work {
    Work {
        trained,
        dtype: BaseDtype::Bfloat16,
        trained_dtype: BaseDtype::Float32,
        quantization: None,
        reduction: Reduction::Exact,
        optimizer: Optimizer::Adamw,
        batch: 8,
        sequence_len: 2048,
        checkpointing,
        alone: true,
    }
}

fn adapters() -> Trained {
    Trained::Adapters {
        dropout: false,
        magnitudes: false,
        biases: TrainedBiases::None,
        lora_bias: false,
        ranks: vec![[16; LINEARS]; SMALL.layers],
        experts: Vec::new(),
        tokens: Tokens::default(),
    }
}

#[test]
fn scalars_are_those_that_transformers_and_peft_count() {
    assert_eq!(SMALL.parameters(), 596_049_920);
    assert_eq!(work(adapters(), false).scalars(&SMALL), 10_092_544);
    let dora = Trained::Adapters {
        dropout: false,
        magnitudes: true,
        biases: TrainedBiases::None,
        lora_bias: false,
        ranks: vec![[16; LINEARS]; SMALL.layers],
        experts: Vec::new(),
        tokens: Tokens::default(),
    };
    // One for each row: queries, keys and values, output, gate and up, down.
    let rows = 28 * (2048 + 2 * 1024 + 1024 + 2 * 3072 + 1024);
    assert_eq!(work(dora, false).scalars(&SMALL), 10_092_544 + rows);
    assert_eq!(work(Trained::All, false).scalars(&SMALL), 596_049_920);
}

#[test]
fn a_layer_keeps_its_residuals_and_what_it_projects() {
    let activations = |layers, checkpointing| {
        let shape = Shape { layers, ..SMALL };
        let work = work(Trained::All, checkpointing);
        on_gpu(&shape, &work).activations
    };
    let tokens = 8 * 2048;
    let residual = tokens * 1024 * 4;
    // Queries, keys, values, the context, gate and up in two bytes; the log sums of 16 heads in four.
    let inner = tokens * (2 * (4096 + 2048 + 6144) + 4 * 16) + residual;
    let more = activations(28, false) - activations(27, false);
    assert_eq!(more, residual + inner);
    assert_eq!(activations(28, true) - activations(27, true), residual);
}

#[test]
fn all_weights_take_what_their_training_keeps_of_each() {
    let full = on_gpu(&SMALL, &work(Trained::All, true));
    // Beside two bytes for products: weights and two moments of four, a sum of eight.
    assert_eq!(full.training, 596_049_920 * 20);
    let here = on_processor(&SMALL, &work(Trained::All, true));
    let tile = 4 * processor::SUMS_TILE as u64;
    assert_eq!(here.training, 596_049_920 * 18 + tile);
    let with_others = Work {
        alone: false,
        ..work(Trained::All, true)
    };
    let mean = on_processor(&SMALL, &with_others).training - here.training;
    assert_eq!(mean, 596_049_920 * 4);
    // Lion keeps a moment less.
    let lion = Work {
        optimizer: Optimizer::Lion,
        ..work(Trained::All, true)
    };
    let less = |of: fn(&Shape, &Work) -> Bytes| {
        of(&SMALL, &work(Trained::All, true)).training - of(&SMALL, &lion).training
    };
    assert_eq!([less(on_gpu), less(on_processor)], [596_049_920 * 4; 2]);
    // In 8 bits each of two moments keeps a byte and a 64th of a float32, but four bytes of the embedding and the vectors.
    let eight_bits = Work {
        optimizer: Optimizer::Adamw8bit,
        ..work(Trained::All, true)
    };
    let matrices = 596_049_920 - 151_936 * 1024 - SMALL.vectors();
    let saved = 2 * matrices * 3 - 2 * matrices / 256 * 4;
    let less = |of: fn(&Shape, &Work) -> Bytes| {
        of(&SMALL, &work(Trained::All, true)).training - of(&SMALL, &eight_bits).training
    };
    assert_eq!([less(on_gpu), less(on_processor)], [saved; 2]);
}

#[test]
fn a_base_of_4_bits_stays_so_on_gpus_beside_the_memory_that_it_is_widened_to() {
    let weights = |quantization| {
        let work = Work {
            quantization,
            ..work(adapters(), true)
        };
        on_gpu(&SMALL, &work).weights
    };
    let how = |embeddings| Quantization {
        nested_scales: true,
        embeddings,
        experts: false,
    };
    let (wide, linears, all) = (
        weights(None),
        weights(Some(how(false))),
        weights(Some(how(true))),
    );
    let share = |bytes: u64| bytes as f64 / wide as f64;
    assert!(share(linears) < 0.49, "{}", share(linears));
    assert!(share(all) < 0.35, "{}", share(all));
    // Gate and up with the factors of both adapters, or a tile of the output layer, in two bytes.
    let gate_up = 2 * (6144 + 32) * (1024 + 32);
    let tile = 2 * gpu::WIDENED_TILE as u64;
    let embedding = 151_936 * 1024;
    let saved = 2 * embedding - crate::nf4::bytes(embedding, true) - 64;
    assert_eq!(linears - all, saved - (tile - gate_up));
}

#[test]
fn muon_takes_four_buffers_beside_its_largest_matrix() {
    let short = Work {
        batch: 1,
        sequence_len: 8,
        optimizer: Optimizer::Muon {
            trains_vectors: true,
        },
        ..work(Trained::All, true)
    };
    let peak = on_processor(&SMALL, &short);
    assert_eq!(peak.moment, Moment::Update);
    // Gate and up, 1024 x 3072: direction and product, and two squares.
    assert_eq!(peak.operation, 4 * (2 * 1024 * 3072 + 2 * 1024 * 1024));
}
