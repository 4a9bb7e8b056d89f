//! Attention on the GPU beside that on processors: values and gradients, windows, limits, rows within wider ones, bits.

use super::*;
use crate::engine::cuda::testing::{assert_near, gpu};
use crate::engine::ops::attention as plain;
use crate::engine::ops::element::Element;
use crate::engine::ops::segments::Segments;
use crate::engine::testing::random_values;
use half::bf16;

fn layout(heads: usize, key_value_heads: usize, head_dim: usize) -> HeadLayout {
    HeadLayout {
        heads,
        key_value_heads,
        head_dim,
    }
}

struct Case {
    layout: HeadLayout,
    lengths: Vec<usize>,
    /// Scalars between one row of the context and the next.
    gap: usize,
    /// Of all values.
    factor: f32,
    window: Option<usize>,
    scale: f32,
    cap: Option<f32>,
    /// Whether heads have sinks.
    sinks: bool,
}

/// All that the operation gives: rows of the context with their gaps, log sums, and the gradients of qkv and of the sinks.
struct Results<E> {
    context: Vec<E>,
    log_sums: Vec<f32>,
    d_qkv: Vec<E>,
    d_sinks: Vec<f32>,
}

impl Case {
    fn new(layout: HeadLayout, lengths: &[usize]) -> Self {
        let lengths = lengths.to_vec();
        Self {
            layout,
            lengths,
            gap: 0,
            factor: 1.0,
            window: None,
            scale: 1.0 / (layout.head_dim as f32).sqrt(),
            cap: None,
            sinks: false,
        }
    }

    /// One of each head, small and large ones.
    fn sinks(&self) -> Option<Vec<f32>> {
        let sinks = random_values(self.layout.heads, 7);
        let sinks = sinks.into_iter().map(|sink| 4.0 * sink).collect();
        self.sinks.then_some(sinks)
    }

    fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    fn out_width(&self) -> usize {
        self.layout.heads * self.layout.head_dim
    }

    /// Of each token, the first that it sees and the one after the last that sees it.
    fn borders(&self) -> [Vec<u32>; 2] {
        let window = self.window.unwrap_or(usize::MAX);
        let (mut starts, mut ends) = (Vec::new(), Vec::new());
        for &length in &self.lengths {
            let start = starts.len();
            for token in start..start + length {
                starts.push((token + 1).saturating_sub(window).max(start) as u32);
                ends.push(token.saturating_add(window).min(start + length) as u32);
            }
        }
        [starts, ends]
    }

    /// Values and the gradient of the context, as both types can hold them.
    fn input<E: Element>(&self) -> [Vec<E>; 2] {
        let lengths = [self.layout.width(), self.out_width()];
        [0, 1].map(|which| {
            let values = random_values(self.tokens() * lengths[which], which as u64 + 1);
            values
                .into_iter()
                .map(|x| E::round_from(bf16::from_f32(x * self.factor).to_f32()))
                .collect()
        })
    }

    fn run<E: GpuElement + Element>(&self, gpu: &Gpu) -> Results<E> {
        let [qkv, d_context] = self.input::<E>().map(|values| gpu.upload(&values).unwrap());
        let [starts, ends] = self.borders().map(|values| gpu.upload(&values).unwrap());
        let sinks = self.sinks().map(|sinks| gpu.upload(&sinks).unwrap());
        let attention = Attention {
            layout: self.layout,
            starts: starts.as_view(),
            ends: ends.as_view(),
            scale: self.scale,
            cap: self.cap,
            sinks: sinks.as_ref().map(DeviceBuffer::as_view),
        };
        let (tokens, stride) = (self.tokens(), self.out_width() + self.gap);
        let (rows, sums) = (tokens * stride, self.layout.heads * tokens);
        let mut context = gpu.upload(&vec![E::round_from(7.0); rows]).unwrap();
        let mut log_sums = gpu.take::<f32>(sums).unwrap();
        attention
            .forward(
                gpu,
                &qkv.as_view(),
                &mut context.as_view_mut(),
                stride,
                &mut log_sums.as_view_mut(),
            )
            .unwrap();
        let mut d_qkv = gpu.take::<E>(qkv.len()).unwrap();
        let saved = Saved {
            qkv: &qkv.as_view(),
            context: &context.as_view(),
            stride,
            log_sums: &log_sums.as_view(),
            d_context: &d_context.as_view(),
        };
        attention
            .backward(gpu, &saved, &mut d_qkv.as_view_mut())
            .unwrap();
        let mut d_sinks = gpu.zeroed::<f32>(self.layout.heads).unwrap();
        attention
            .backward_sinks(gpu, &saved, &mut d_sinks.as_view_mut())
            .unwrap();
        Results {
            context: gpu.download(&context, rows).unwrap(),
            log_sums: gpu.download(&log_sums, sums).unwrap(),
            d_qkv: gpu.download(&d_qkv, qkv.len()).unwrap(),
            d_sinks: gpu.download(&d_sinks, self.layout.heads).unwrap(),
        }
    }

    fn expected(&self) -> Results<f32> {
        let [qkv, d_context] = self.input::<f32>();
        let segments = Segments::new(&self.lengths);
        let segments = match self.window {
            Some(window) => segments.windowed(window),
            None => segments,
        };
        let sinks = self.sinks();
        let attention = plain::Attention {
            layout: self.layout,
            segments: &segments,
            scale: self.scale,
            cap: self.cap,
            sinks: sinks.as_deref(),
        };
        let mut results = Results {
            context: vec![0.0; d_context.len()],
            log_sums: vec![0.0; self.layout.heads * self.tokens()],
            d_qkv: vec![0.0; qkv.len()],
            d_sinks: vec![0.0; self.layout.heads],
        };
        attention.forward(&qkv, &mut results.context, &mut results.log_sums);
        let saved = plain::Saved {
            qkv: &qkv,
            out: &results.context,
            d_out: &d_context,
            log_sums: &results.log_sums,
        };
        attention.backward(&saved, &mut results.d_qkv);
        attention.backward_sinks(&saved, &mut results.d_sinks, false);
        results
    }

    fn check<E: GpuElement + Element>(&self, gpu: &Gpu, tolerance: f32) {
        let wide = |values: &[E]| -> Vec<f32> { values.iter().map(|x| x.wide()).collect() };
        let (found, expected) = (self.run::<E>(gpu), self.expected());
        let what = |what: &str| {
            let suffix = E::SUFFIX;
            let (window, cap) = (self.window, self.cap);
            format!(
                "{what}, {suffix}, {:?}, {:?}, window {window:?}, cap {cap:?}",
                self.layout, self.lengths
            )
        };
        let context = wide(&found.context);
        let rows = context.chunks_exact(self.out_width() + self.gap);
        let (context, gaps): (Vec<_>, Vec<_>) =
            rows.map(|row| row.split_at(self.out_width())).unzip();
        assert!(gaps.concat().iter().all(|x| *x == 7.0), "{}", what("gaps"));
        assert_near(
            &what("context"),
            &context.concat(),
            &expected.context,
            tolerance,
        );
        assert_near(&what("log sums"), &found.log_sums, &expected.log_sums, 1e-5);
        assert_near(
            &what("d_qkv"),
            &wide(&found.d_qkv),
            &expected.d_qkv,
            tolerance,
        );
        assert_near(
            &what("d_sinks"),
            &found.d_sinks,
            &expected.d_sinks,
            tolerance,
        );
    }

    fn check_both(&self, gpu: &Gpu) {
        self.check::<f32>(gpu, 1e-5);
        self.check::<bf16>(gpu, 1e-2);
    }
}

#[test]
fn segments_of_all_lengths_equal_those_of_the_processor() {
    let Some(gpu) = gpu() else { return };
    let short: Vec<usize> = (1..=16).collect();
    // Borders on, just before and just after those of tiles.
    let layouts: [&[usize]; 7] = [
        &[1],
        &[1, 149],
        &[63, 70],
        &[64, 65],
        &[64, 64, 1],
        &[129, 1, 1, 33],
        &short,
    ];
    for lengths in layouts {
        Case::new(layout(2, 1, 64), lengths).check_both(gpu);
    }
}

#[test]
fn heads_of_all_widths_and_groups_equal_those_of_the_processor() {
    let Some(gpu) = gpu() else { return };
    let shapes = [
        (1, 1, 8),
        (8, 1, 16),
        (2, 2, 80),
        (4, 2, 128),
        (1, 1, 136),
        (2, 1, 256),
    ];
    for (heads, key_value_heads, head_dim) in shapes {
        Case::new(layout(heads, key_value_heads, head_dim), &[70, 1, 20, 5]).check_both(gpu);
    }
}

/// Windows that end within, at and just beside tiles, and hide whole ones.
#[test]
fn windows_hide_what_they_hide_on_the_processor() {
    let Some(gpu) = gpu() else { return };
    for (window, head_dim) in [
        (1, 64),
        (2, 64),
        (17, 128),
        (31, 256),
        (32, 64),
        (63, 64),
        (64, 128),
        (65, 64),
        (100, 64),
    ] {
        let mut case = Case::new(layout(2, 1, head_dim), &[150, 1, 70]);
        case.window = Some(window);
        case.check_both(gpu);
    }
}

#[test]
fn scores_are_scaled_and_limited_as_on_the_processor() {
    let Some(gpu) = gpu() else { return };
    for (heads, key_value_heads, head_dim, cap) in [
        (2, 1, 64, 1.5),
        (4, 2, 128, 50.0),
        (1, 1, 136, 0.4),
        (2, 1, 256, 3.0),
    ] {
        let mut case = Case::new(layout(heads, key_value_heads, head_dim), &[70, 1, 20, 5]);
        case.cap = Some(cap);
        case.scale *= 3.0;
        case.check_both(gpu);
        case.window = Some(33);
        case.check_both(gpu);
    }
    let mut scaled = Case::new(layout(2, 1, 64), &[40, 31]);
    scaled.scale = 0.5;
    scaled.check_both(gpu);
}

#[test]
fn sinks_take_their_share_of_every_row() {
    let Some(gpu) = gpu() else { return };
    for (heads, key_value_heads, head_dim) in [(4, 2, 64), (2, 1, 128), (3, 1, 200)] {
        let mut case = Case::new(layout(heads, key_value_heads, head_dim), &[70, 1, 20, 5]);
        let without = case.run::<f32>(gpu);
        case.sinks = true;
        case.check_both(gpu);
        let with = case.run::<f32>(gpu);
        assert!(with.d_sinks.iter().all(|d| *d != 0.0));
        let mut sums = with.log_sums.iter().zip(&without.log_sums);
        assert!(sums.all(|(with, without)| with > without));
        (case.window, case.gap) = (Some(33), 8);
        case.check_both(gpu);
    }
}

#[test]
fn rows_of_the_context_lie_within_wider_ones() {
    let Some(gpu) = gpu() else { return };
    for gap in [3, 8] {
        let mut case = Case::new(layout(2, 1, 24), &[40, 31]);
        case.gap = gap;
        case.check_both(gpu);
    }
}

#[test]
fn the_same_input_gives_the_same_bits() {
    let Some(gpu) = gpu() else { return };
    let mut case = Case::new(layout(4, 2, 64), &[50, 80]);
    let bits = |case: &Case| {
        let Results {
            context,
            log_sums,
            d_qkv,
            d_sinks,
        } = case.run::<bf16>(gpu);
        let wide = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
        let [log_sums, d_sinks]: [Vec<u32>; 2] = [log_sums, d_sinks].map(wide);
        let narrow = |values: Vec<bf16>| values.into_iter().map(bf16::to_bits).collect();
        let [context, d_qkv]: [Vec<u16>; 2] = [context, d_qkv].map(narrow);
        (context, log_sums, d_qkv, d_sinks)
    };
    assert_eq!(bits(&case), bits(&case));
    (case.window, case.cap, case.sinks) = (Some(40), Some(2.0), true);
    assert_eq!(bits(&case), bits(&case));
}

#[test]
fn large_scores_stay_finite() {
    let Some(gpu) = gpu() else { return };
    let mut case = Case::new(layout(1, 1, 64), &[66]);
    case.factor = 1e3;
    for cap in [None, Some(30.0)] {
        case.cap = cap;
        let found = case.run::<bf16>(gpu);
        let mut values = found.context.iter().chain(&found.d_qkv);
        assert!(values.all(|x| x.is_finite()), "{cap:?}");
    }
}
