//! The rule on the GPU, held to the processor's.

use std::ops::Range;

use half::bf16;

use super::*;
use crate::engine::cuda::testing::{assert_near, gpu};
use crate::engine::ops::delta_gates::Gates;
use crate::engine::ops::delta_rule as plain;
use crate::engine::testing::random_values;

/// Queries, keys and values; shares below one; and logarithms below zero.
struct Case {
    heads: DeltaHeads,
    lengths: Vec<usize>,
    qkv: Vec<f32>,
    written: Vec<f32>,
    kept: Vec<f32>,
    d_out: Vec<f32>,
}

fn heads([key_heads, value_heads, key_dim, value_dim]: [usize; 4]) -> DeltaHeads {
    DeltaHeads {
        key_heads,
        value_heads,
        key_dim,
        value_dim,
    }
}

impl Case {
    fn new(sizes: [usize; 4], lengths: &[usize]) -> Self {
        let heads = heads(sizes);
        let tokens: usize = lengths.iter().sum();
        let gates = |seed| random_values(tokens * heads.value_heads, seed).into_iter();
        Self {
            heads,
            lengths: lengths.to_vec(),
            qkv: random_values(tokens * heads.width(), 1),
            written: gates(2).map(|x| 1.0 / (1.0 + x.exp())).collect(),
            kept: gates(3).map(|x| -0.3 * x.abs()).collect(),
            d_out: random_values(tokens * heads.values(), 4),
        }
    }

    fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// The result, and the gradients of `qkv` and of both gates, as the processor has them.
    fn expected(&self) -> [Vec<f32>; 4] {
        let ends = self.lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end - length..*end)
        });
        let segments: Vec<Range<usize>> = ends.collect();
        let rule = plain::DeltaRule {
            heads: self.heads,
            segments: &segments,
        };
        let inputs = plain::Inputs {
            qkv: &self.qkv,
            written: &self.written,
            kept: &self.kept,
        };
        let mut out = vec![0.0f32; self.d_out.len()];
        rule.forward(inputs, &mut out);
        let [mut d_qkv, mut written, mut kept] =
            [&self.qkv, &self.written, &self.kept].map(|part| vec![0.0; part.len()]);
        let gates = Gates {
            written: &mut written[..],
            kept: &mut kept[..],
        };
        rule.backward(inputs, &self.d_out, &mut d_qkv, gates);
        [out, d_qkv, written, kept]
    }

    fn found(&self, gpu: &Gpu) -> [Vec<f32>; 4] {
        let positions: Vec<u32> = self.lengths.iter().flat_map(|n| 0..*n as u32).collect();
        let chunks = Chunks::upload(gpu, &positions).unwrap();
        let rule = DeltaRule {
            heads: self.heads,
            chunks: &chunks,
            tokens: self.tokens(),
        };
        let inputs = RuleBuffers {
            qkv: gpu.upload(&self.qkv).unwrap(),
            written: gpu.upload(&self.written).unwrap(),
            kept: gpu.upload(&self.kept).unwrap(),
        };
        let prepared = rule.prepare(gpu, inputs).unwrap();
        let mut out = gpu.take::<f32>(self.d_out.len()).unwrap();
        rule.forward(gpu, &prepared, &mut out.as_view_mut())
            .unwrap();
        let out = gpu.download(&out, self.d_out.len()).unwrap();
        let mut narrow = gpu.take::<bf16>(out.len()).unwrap();
        rule.forward(gpu, &prepared, &mut narrow.as_view_mut())
            .unwrap();
        let narrow = gpu.download(&narrow, out.len()).unwrap();
        let rounded: Vec<bf16> = out.iter().map(|x| bf16::from_f32(*x)).collect();
        assert!(narrow == rounded, "rounded once, behind the same sums");
        let d_out = gpu.upload(&self.d_out).unwrap();
        let gradients = rule.backward(gpu, prepared, &d_out.as_view()).unwrap();
        let read = |buffer: &_, of: &[f32]| gpu.download(buffer, of.len()).unwrap();
        [
            out,
            read(&gradients.qkv, &self.qkv),
            read(&gradients.written, &self.written),
            read(&gradients.kept, &self.kept),
        ]
    }
}

/// Segments within a chunk, of a whole one, of one more, of several; heads that share keys or do not; fewer columns than a tile, and
/// more than one.
#[test]
fn values_and_gradients_equal_those_of_the_processor() {
    let Some(gpu) = gpu() else { return };
    let cases: [([usize; 4], &[usize]); 4] = [
        ([2, 4, 12, 10], &[1, 5, 64, 2]),
        ([1, 3, 40, 36], &[65, 3]),
        ([2, 2, 8, 70], &[150]),
        ([1, 1, 128, 128], &[70, 129]),
    ];
    for (sizes, lengths) in cases {
        let case = Case::new(sizes, lengths);
        let (found, expected) = (case.found(gpu), case.expected());
        for (name, (found, expected)) in ["out", "d_qkv", "d_written", "d_kept"]
            .into_iter()
            .zip(found.iter().zip(&expected))
        {
            let what = format!("{name} of {sizes:?} {lengths:?}");
            assert_near(&what, found, expected, 1e-5);
        }
    }
}

#[test]
fn the_same_inputs_give_the_same_bits_whatever_a_segment_is_packed_with() {
    let Some(gpu) = gpu() else { return };
    let lengths = [70, 1, 130, 9];
    let whole = Case::new([2, 4, 12, 10], &lengths);
    let packed = whole.found(gpu);
    assert_eq!(whole.found(gpu), packed);
    let mut first = 0;
    for length in lengths {
        let part = |all: &[f32]| {
            let width = all.len() / whole.tokens();
            all[first * width..(first + length) * width].to_vec()
        };
        let own = Case {
            heads: whole.heads,
            lengths: vec![length],
            qkv: part(&whole.qkv),
            written: part(&whole.written),
            kept: part(&whole.kept),
            d_out: part(&whole.d_out),
        };
        assert_eq!(own.found(gpu), packed.each_ref().map(|all| part(all)));
        first += length;
    }
}

/// What fades below anything that float32 holds gives no infinities, nor does a token that writes nothing.
#[test]
fn numbers_stay_finite_where_all_is_forgotten_or_nothing_is_written() {
    let Some(gpu) = gpu() else { return };
    for (written, kept) in [(1.0, -1000.0), (0.0, 0.0), (1.0, 0.0)] {
        let mut case = Case::new([1, 2, 8, 6], &[130]);
        case.written.fill(written);
        case.kept.fill(kept);
        let all = case.found(gpu).concat();
        assert!(all.iter().all(|x| x.is_finite()), "{written} {kept}");
    }
}

#[test]
fn heads_whose_state_has_no_room_are_refused() {
    let Some(gpu) = gpu() else { return };
    check_heads(gpu, heads([1, 1, 256, 256])).unwrap();
    let refused = check_heads(gpu, heads([1, 1, 4096, 128]));
    let told = refused.unwrap_err().to_string();
    assert!(
        told.contains("heads of 4096") && told.contains("--device cpu"),
        "{told}"
    );
}
