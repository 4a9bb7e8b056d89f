//! The trainable tensors of the work on a model, by their sizes: as many scalars, and moments of as many bits, as those that the
//! engine trains ([`Layout`](crate::files::layout::Layout)).

use super::{F32, LINEARS, OwnTensor, Shape, Tokens, Trained, Work};
use crate::files::moments::{BLOCK_SCALARS, has_8bit_moments, is_whole_embedding};
use crate::job::TrainedBiases;

/// Trainable tensors of one size.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tensors {
    count: u64,
    /// Of each.
    scalars: u64,
    is_embedding: bool,
}

impl Tensors {
    fn of(count: usize, scalars: usize) -> Self {
        Self {
            count: count as u64,
            scalars: scalars as u64,
            is_embedding: false,
        }
    }

    fn own(tensor: &OwnTensor) -> Self {
        Self {
            is_embedding: is_whole_embedding(&tensor.name),
            ..Self::of(1, tensor.shape.iter().product())
        }
    }

    fn embedding(scalars: usize) -> Self {
        Self {
            is_embedding: true,
            ..Self::of(1, scalars)
        }
    }

    /// Number of scalars of all of them.
    pub fn scalars(&self) -> u64 {
        self.count * self.scalars
    }

    /// Bytes of a moment of 8 bits of all of them: a code of each scalar and the largest magnitude of each block, or float32.
    pub fn bytes_of_8bit(&self) -> u64 {
        let bytes = match has_8bit_moments(self.scalars as usize, self.is_embedding) {
            true => self.scalars + self.scalars.div_ceil(BLOCK_SCALARS as u64) * F32,
            false => self.scalars * F32,
        };
        self.count * bytes
    }
}

/// The tensors that the work trains.
pub(super) fn trained(shape: &Shape, work: &Work) -> Vec<Tensors> {
    let (ranks, experts, tokens, magnitudes, biases, lora_bias) = match &work.trained {
        Trained::All => return of_model(shape),
        Trained::Some(own) => return own.iter().map(Tensors::own).collect(),
        Trained::Adapters {
            ranks,
            experts,
            tokens,
            magnitudes,
            biases,
            lora_bias,
            ..
        } => (ranks, experts, tokens, magnitudes, biases, lora_bias),
    };
    let mut tensors = of_tokens(shape, tokens, *magnitudes);
    for (layer, ranks) in experts.iter().enumerate() {
        let count = shape.experts_of(layer).map_or(0, |experts| experts.count);
        let factors = shape.expert_factors(layer, *ranks);
        let factors = factors.as_flattened().iter();
        tensors.extend(factors.map(|scalars| Tensors::of(1, count * scalars)));
        let of_router = [shape.hidden_size, count].map(|side| Tensors::of(1, ranks[2] * side));
        tensors.extend(of_router);
    }
    for (layer, ranks) in ranks.iter().enumerate() {
        for ((width, out, bias), rank) in linears(shape, layer, ranks) {
            let is_adapted = rank > 0;
            let own = match biases {
                TrainedBiases::None => false,
                TrainedBiases::LoraOnly => bias && is_adapted,
                TrainedBiases::All => bias,
            };
            let vectors = [*magnitudes && is_adapted, *lora_bias && is_adapted, own];
            let vectors = vectors.into_iter().filter(|is_there| *is_there).count();
            tensors.push(Tensors::of(1, rank * width));
            tensors.push(Tensors::of(1, rank * out));
            tensors.push(Tensors::of(vectors, out));
        }
    }
    tensors
}

/// The linears of a layer, with the ranks of their adapters.
fn linears(
    shape: &Shape,
    layer: usize,
    ranks: &[usize; LINEARS],
) -> impl Iterator<Item = ((usize, usize, bool), usize)> {
    let linears = shape.linears(layer).into_iter().zip(*ranks);
    linears.filter(|((_, out, _), _)| *out > 0)
}

fn of_tokens(shape: &Shape, tokens: &Tokens, magnitudes: bool) -> Vec<Tensors> {
    let matrix = shape.vocab_size * shape.hidden_size;
    let [embedding, head] = tokens.whole.map(|is_whole| match is_whole {
        true => matrix,
        false => 0,
    });
    let rows = tokens
        .rows
        .map(|rows| Tensors::of(1, rows * shape.hidden_size));
    let whole = [Tensors::embedding(embedding), Tensors::of(1, head)];
    // The factors of adapters: what the one has of tokens the other has of the model's width.
    let factors = tokens.ranks.into_iter().flat_map(|rank| {
        [shape.vocab_size, shape.hidden_size].map(|size| Tensors::of(1, rank * size))
    });
    let of_head = usize::from(magnitudes && tokens.ranks[1] > 0);
    let of_head = [Tensors::of(of_head, shape.vocab_size)];
    let all = rows.into_iter().chain(whole).chain(factors).chain(of_head);
    all.chain(of_inputs(shape, tokens.inputs, magnitudes))
        .collect()
}

/// The adapter on what projects the own inputs of all layers.
fn of_inputs(shape: &Shape, rank: usize, magnitudes: bool) -> [Tensors; 3] {
    let columns = shape.layer_inputs.map_or(0, |own| own.width * shape.layers);
    let magnitudes = usize::from(magnitudes && rank > 0);
    [
        Tensors::of(1, rank * shape.hidden_size),
        Tensors::of(1, rank * columns),
        Tensors::of(magnitudes, columns),
    ]
}

fn of_model(shape: &Shape) -> Vec<Tensors> {
    let (hidden, matrix) = (shape.hidden_size, shape.vocab_size * shape.hidden_size);
    let heads = usize::from(!shape.tied);
    let mut tensors = vec![
        Tensors::embedding(matrix),
        Tensors::of(heads, matrix),
        // Norms of the layers, and the one behind them.
        Tensors::of(shape.layers * shape.layer_norms + 1, hidden),
    ];
    for layer in shape.layers_with_attention() {
        let [query, key] = shape.head_norms_of(layer);
        tensors.extend([shape.sinks, query, key].map(|scalars| Tensors::of(1, scalars)));
    }
    if let Some(inputs) = shape.layer_inputs {
        let [embedding, projection] = shape.input_matrices();
        tensors.push(Tensors::embedding(embedding as usize));
        tensors.extend([projection as usize, inputs.width].map(|scalars| Tensors::of(1, scalars)));
    }
    for layer in 0..shape.layers {
        if let Some(sizes) = shape.linear_attention_of(layer) {
            tensors.extend(sizes.vectors().map(|scalars| Tensors::of(1, scalars)));
        }
        for (width, out, bias) in shape.linears(layer) {
            tensors.push(Tensors::of(1, width * out));
            tensors.push(Tensors::of(usize::from(bias), out));
        }
        let Some(experts) = shape.experts_of(layer) else {
            continue;
        };
        let (count, inner) = (experts.count, experts.width);
        if experts.beside_dense {
            let own = experts.vectors_beside(hidden).into_iter();
            let stacked = [count * 2 * inner * hidden, count * hidden * inner];
            tensors.extend(own.chain(stacked).map(|scalars| Tensors::of(1, scalars)));
            continue;
        }
        tensors.push(Tensors::of(1, count * hidden));
        match experts.biased {
            true => tensors.extend(
                // The router's bias; gate and up, and down, of all experts together, with theirs.
                [
                    count,
                    count * hidden * 2 * inner,
                    count * 2 * inner,
                    count * inner * hidden,
                    count * hidden,
                ]
                .map(|scalars| Tensors::of(1, scalars)),
            ),
            false => tensors.push(Tensors::of(3 * count, hidden * inner)),
        }
    }
    tensors
}
