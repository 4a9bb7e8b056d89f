//! The rule in chunks, held to the rule token by token.

use candle_core::{DType, Result, Tensor};

use super::*;
use crate::engine::testing::{TestWeights, assert_close, check_op, random_values};

const HEADS: DeltaHeads = DeltaHeads {
    key_heads: 2,
    value_heads: 4,
    key_dim: 12,
    value_dim: 10,
};
const COLUMNS: usize = 2 * 24 + 40 + 2 * 4;

/// Queries, keys and values, then the gates: shares below one, and logarithms below zero.
fn inputs(tokens: usize, seed: u64) -> Vec<f32> {
    let mut values = random_values(tokens * COLUMNS, seed);
    for row in values.chunks_exact_mut(COLUMNS) {
        for written in &mut row[COLUMNS - 8..COLUMNS - 4] {
            *written = 1.0 / (1.0 + written.exp());
        }
        for kept in &mut row[COLUMNS - 4..] {
            *kept = -0.3 * kept.abs();
        }
    }
    values
}

struct Parts {
    qkv: Vec<f32>,
    written: Vec<f32>,
    kept: Vec<f32>,
}

impl Parts {
    fn of(values: &[f32]) -> Self {
        let part = |columns: Range<usize>| {
            let rows = values.chunks_exact(COLUMNS);
            rows.flat_map(|row| row[columns.clone()].to_vec()).collect()
        };
        Self {
            qkv: part(0..COLUMNS - 8),
            written: part(COLUMNS - 8..COLUMNS - 4),
            kept: part(COLUMNS - 4..COLUMNS),
        }
    }

    fn inputs(&self) -> Inputs<'_> {
        Inputs {
            qkv: &self.qkv,
            written: &self.written,
            kept: &self.kept,
        }
    }
}

fn segments(lengths: &[usize]) -> Vec<Range<usize>> {
    let ends = lengths.iter().scan(0, |end, length| {
        *end += length;
        Some(*end - length..*end)
    });
    ends.collect()
}

fn forward(values: &[f32], lengths: &[usize]) -> Vec<f32> {
    let (parts, segments) = (Parts::of(values), segments(lengths));
    let mut out = vec![0.0; values.len() / COLUMNS * HEADS.values()];
    let rule = DeltaRule {
        heads: HEADS,
        segments: &segments,
    };
    rule.forward(parts.inputs(), &mut out);
    out
}

/// The gradient of what [`inputs`] makes.
fn backward(values: &[f32], lengths: &[usize], d_out: &[f32]) -> Vec<f32> {
    let (parts, segments) = (Parts::of(values), segments(lengths));
    let [mut d_qkv, mut written, mut kept] =
        [&parts.qkv, &parts.written, &parts.kept].map(|part| vec![f32::NAN; part.len()]);
    let rule = DeltaRule {
        heads: HEADS,
        segments: &segments,
    };
    let d_gates = Gates {
        written: &mut written[..],
        kept: &mut kept[..],
    };
    rule.backward(parts.inputs(), d_out, &mut d_qkv, d_gates);
    let rows = d_qkv
        .chunks(COLUMNS - 8)
        .zip(written.chunks(4).zip(kept.chunks(4)));
    rows.flat_map(|(qkv, (written, kept))| [qkv, written, kept].concat())
        .collect()
}

/// Token by token, in float64.
fn reference(x: &Tensor, lengths: &[usize]) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F64)?;
    let (heads, key, value) = (HEADS.value_heads, HEADS.key_dim, HEADS.value_dim);
    let unit = |first: usize, row: &Tensor| {
        let x = row.narrow(1, first, 2 * key)?.reshape((2, key))?;
        let length = (x.sqr()?.sum_keepdim(1)? + 1e-6)?.sqrt()?;
        let x = x.broadcast_div(&length)?;
        // Each key serves two heads of values.
        Tensor::cat(&[0, 0, 1, 1].map(|head| x.narrow(0, head, 1).unwrap()), 0)
    };
    let mut rows = Vec::new();
    for segment in segments(lengths) {
        let mut state = Tensor::zeros((heads, key, value), DType::F64, x.device())?;
        for token in segment {
            let row = wide.narrow(0, token, 1)?;
            let query = (unit(0, &row)? / (key as f64).sqrt())?.reshape((heads, 1, key))?;
            let keys = unit(2 * key, &row)?;
            let column = keys.reshape((heads, key, 1))?;
            let values = row.narrow(1, 4 * key, heads * value)?;
            let values = values.reshape((heads, 1, value))?;
            let gate = |first| {
                row.narrow(1, COLUMNS - first, heads)?
                    .reshape((heads, 1, 1))
            };
            state = state.broadcast_mul(&gate(4)?.exp()?)?;
            let read = keys.reshape((heads, 1, key))?.matmul(&state)?;
            let written = (values - read)?.broadcast_mul(&gate(8)?)?;
            state = (state + column.matmul(&written)?)?;
            rows.push(query.matmul(&state)?.reshape((1, heads * value))?);
        }
    }
    Tensor::cat(&rows, 0)?.to_dtype(DType::F32)
}

#[test]
fn chunks_equal_the_rule_token_by_token_in_value_and_gradients() {
    // One, within a chunk, a whole chunk, one more, and several.
    for lengths in [&[1, 5, 64, 2][..], &[65, 3], &[150]] {
        let tokens: usize = lengths.iter().sum();
        let x = Tensor::from_vec(
            inputs(tokens, 1),
            (tokens, COLUMNS),
            &candle_core::Device::Cpu,
        );
        let run = |values: &[f32], d_out: &[f32]| {
            (forward(values, lengths), backward(values, lengths, d_out))
        };
        let check = || {
            let reference = |x: &Tensor| reference(x, lengths);
            check_op(
                x.as_ref().unwrap(),
                &TestWeights::new(&[]),
                &[],
                &run,
                &reference,
            );
        };
        // The reference is a chain of operations as long as the text.
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(64 << 20);
            thread.spawn_scoped(scope, check).unwrap().join().unwrap();
        });
    }
}

#[test]
fn no_bit_depends_on_what_a_segment_is_packed_with() {
    let lengths = [70, 1, 130, 64, 9];
    let tokens: usize = lengths.iter().sum();
    let (values, d_out) = (inputs(tokens, 2), random_values(tokens * HEADS.values(), 3));
    let packed = (
        forward(&values, &lengths),
        backward(&values, &lengths, &d_out),
    );
    for segment in segments(&lengths) {
        let part =
            |all: &[f32], width: usize| all[segment.start * width..segment.end * width].to_vec();
        let (own, d_own) = (part(&values, COLUMNS), part(&d_out, HEADS.values()));
        let length = [segment.len()];
        assert_eq!(forward(&own, &length), part(&packed.0, HEADS.values()));
        assert_eq!(backward(&own, &length, &d_own), part(&packed.1, COLUMNS));
    }
}

#[test]
fn a_text_goes_on_from_the_states_that_it_left() {
    let values = inputs(150, 4);
    let whole = forward(&values, &[150]);
    let mut states = vec![0.0; HEADS.value_heads * HEADS.key_dim * HEADS.value_dim];
    let mut found = Vec::new();
    for tokens in [0..70, 70..71, 71..72, 72..150] {
        let parts = Parts::of(&values[tokens.start * COLUMNS..tokens.end * COLUMNS]);
        let mut out = vec![0.0; tokens.len() * HEADS.values()];
        let segment = 0..tokens.len();
        let rule = DeltaRule {
            heads: HEADS,
            segments: std::slice::from_ref(&segment),
        };
        rule.forward_last(parts.inputs(), &mut states, &mut out);
        found.extend(out);
    }
    assert_close("continued", &found, &whole);
}

/// What fades below anything that float32 holds gives no infinities, nor does a token that writes nothing.
#[test]
fn numbers_stay_finite_where_all_is_forgotten_or_nothing_is_written() {
    for (written, kept) in [(1.0, -1000.0), (0.0, 0.0), (1.0, 0.0)] {
        let mut values = inputs(130, 5);
        for row in values.chunks_exact_mut(COLUMNS) {
            row[COLUMNS - 8..COLUMNS - 4].fill(written);
            row[COLUMNS - 4..].fill(kept);
        }
        let d_out = random_values(130 * HEADS.values(), 6);
        let all = [forward(&values, &[130]), backward(&values, &[130], &d_out)].concat();
        assert!(all.iter().all(|x| x.is_finite()), "{written} {kept}");
    }
}
