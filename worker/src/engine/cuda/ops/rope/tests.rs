//! Rotary positions and norms of heads on the GPU beside those on processors: values and gradients.

use super::*;
use crate::engine::cuda::params::FlatRange;
use crate::engine::cuda::sums::SlotGradient;
use crate::engine::cuda::testing::{assert_near, gpu};
use crate::engine::ops::rope as plain;
use crate::engine::testing::{TestWeights, random_values};
use half::bf16;

const TOKENS: usize = 150;

fn layout(head_dim: usize) -> HeadLayout {
    HeadLayout {
        heads: 4,
        key_value_heads: 2,
        head_dim,
    }
}

/// What differs between families.
#[derive(Clone, Copy, Debug)]
struct Kind {
    head_dim: usize,
    /// Whether there are norms, and these are of all heads together.
    norms: Option<bool>,
    offset: bool,
    /// Dimensions of each head that are rotated.
    rotated: usize,
    pairs: RotaryPairs,
}

impl Kind {
    fn new(head_dim: usize, norms: Option<bool>) -> Self {
        Self {
            head_dim,
            norms,
            offset: false,
            rotated: head_dim,
            pairs: RotaryPairs::Halves,
        }
    }
}

struct Case {
    kind: Kind,
    layout: HeadLayout,
    /// The norms' weights.
    weights: TestWeights,
    rows: Vec<u32>,
    table: RopeTable,
    x: Vec<f32>,
    dy: Vec<f32>,
}

/// What comes of a case: the gradients of the queries' and the keys' norm are empty where there is none.
struct Results {
    y: Vec<f32>,
    dx: Vec<f32>,
    norms: [Vec<f32>; 2],
}

impl Case {
    fn new(kind: Kind) -> Self {
        let layout = layout(kind.head_dim);
        let scalars = TOKENS * layout.width();
        let pairs = 0..kind.rotated / 2;
        let frequencies: Vec<f32> = pairs.map(|i| 0.9f32.powi(i as i32)).collect();
        let [query, key] = Self::widths(kind, layout);
        Self {
            kind,
            layout,
            weights: TestWeights::new(&[("k", &[key]), ("q", &[query])]),
            rows: (0..TOKENS as u32).map(|token| token % 37).collect(),
            table: RopeTable::new(&frequencies, 37, 1.2).of_pairs(kind.pairs),
            x: random_values(scalars, 1),
            dy: random_values(scalars, 2),
        }
    }

    /// Widths of the norms of queries and keys.
    fn widths(kind: Kind, layout: HeadLayout) -> [usize; 2] {
        match kind.norms {
            Some(true) => [layout.heads, layout.key_value_heads].map(|heads| heads * kind.head_dim),
            _ => [kind.head_dim; 2],
        }
    }

    fn is_rotated(&self) -> bool {
        self.kind.rotated > 0
    }

    fn on_processor(&self) -> Results {
        let norms = plain::HeadNorms {
            query: self.weights.trainable("q"),
            key: self.weights.trainable("k"),
            epsilon: 1e-6,
            offset: self.kind.offset,
        };
        let rope = plain::Rope {
            layout: self.layout,
            norms: self.kind.norms.map(|_| &norms),
            values: plain::Values::PLAIN,
            rows: &self.rows,
            table: self.is_rotated().then_some(&self.table),
        };
        let (mut y, mut dx) = (vec![0.0f32; self.x.len()], vec![0.0f32; self.x.len()]);
        self.weights.reset_gradients();
        rope.forward(&self.x, &mut y);
        rope.backward(&self.x, &self.dy, &mut dx);
        let norms = match self.kind.norms {
            Some(_) => {
                let gradients = self.weights.gradients(&[]);
                let [query, key] = Self::widths(self.kind, self.layout);
                [&gradients[key..key + query], &gradients[..key]].map(<[f32]>::to_vec)
            }
            None => [Vec::new(), Vec::new()],
        };
        Results { y, dx, norms }
    }

    fn with_rope<R>(&self, gpu: &Gpu, work: impl FnOnce(&Rope) -> R) -> R {
        let [query, key] = Self::widths(self.kind, self.layout);
        let weight = |name, offset, scalars| {
            let range = FlatRange { offset, scalars };
            let values = self.weights.frozen(name);
            Vector::new(gpu, &values.read_f32(), Some(range)).unwrap()
        };
        let norms = HeadNorms {
            query: weight("q", 0, query),
            key: weight("k", query, key),
            epsilon: 1e-6,
            offset: self.kind.offset,
            is_wide: self.kind.norms == Some(true),
        };
        let rows = gpu.upload(&self.rows).unwrap();
        let table = GpuRopeTable::upload(gpu, &self.table).unwrap();
        work(&Rope {
            layout: self.layout,
            norms: self.kind.norms.map(|_| &norms),
            rows: &rows.as_view(),
            table: self.is_rotated().then_some(&table),
        })
    }

    fn forward<E: GpuElement>(&self, gpu: &Gpu, x: &[E]) -> Vec<E> {
        let (qkv, mut out) = (gpu.upload(x).unwrap(), gpu.take::<E>(x.len()).unwrap());
        self.with_rope(gpu, |rope| {
            rope.forward(gpu, &qkv.as_view(), &mut out.as_view_mut())
                .unwrap();
        });
        gpu.download(&out, x.len()).unwrap()
    }

    /// Into rows with room behind them.
    fn on_gpu(&self, gpu: &Gpu) -> Results {
        let width = self.layout.width();
        let [query, key] = Self::widths(self.kind, self.layout);
        let stride = width + 8;
        let (qkv, dy) = (gpu.upload(&self.x).unwrap(), gpu.upload(&self.dy).unwrap());
        let mut norms = SlotGradient(gpu.zeroed(query + key).unwrap());
        let mut d_qkv = gpu.zeroed::<f32>(TOKENS * stride).unwrap();
        self.with_rope(gpu, |rope| {
            let from = (&qkv.as_view(), &dy.as_view());
            let into = (&mut d_qkv.as_view_mut(), stride);
            rope.backward(gpu, from, into, &mut norms).unwrap();
        });
        let rows = gpu.download(&d_qkv, TOKENS * stride).unwrap();
        let rows = rows.chunks_exact(stride);
        Results {
            y: self.forward(gpu, &self.x),
            dx: rows.flat_map(|row| row[..width].to_vec()).collect(),
            norms: match self.kind.norms {
                Some(_) => {
                    let both = gpu.download(&norms.0, query + key).unwrap();
                    [&both[..query], &both[query..]].map(<[f32]>::to_vec)
                }
                None => [Vec::new(), Vec::new()],
            },
        }
    }

    fn check(&self, gpu: &Gpu) {
        let (expected, found) = (self.on_processor(), self.on_gpu(gpu));
        let what = |what: &str| format!("{what}, {:?}", self.kind);
        assert_near(&what("y"), &found.y, &expected.y, 1e-5);
        assert_near(&what("dx"), &found.dx, &expected.dx, 1e-5);
        for (name, which) in [("query norm", 0), ("key norm", 1)] {
            let (found, expected) = (&found.norms[which], &expected.norms[which]);
            assert_near(&what(name), found, expected, 1e-5);
        }
        let narrow: Vec<bf16> = self.x.iter().map(|x| bf16::from_f32(*x)).collect();
        let narrow = self.forward(gpu, &narrow);
        let narrow: Vec<f32> = narrow.into_iter().map(bf16::to_f32).collect();
        assert_near(&what("y in bfloat16"), &narrow, &expected.y, 1e-2);
    }
}

#[test]
fn values_and_gradients_equal_those_of_the_processor() {
    let Some(gpu) = gpu() else { return };
    for (head_dim, norms) in [
        (8, Some(false)),
        (8, None),
        (128, Some(false)),
        (8, Some(true)),
        (80, Some(true)),
    ] {
        Case::new(Kind::new(head_dim, norms)).check(gpu);
    }
}

#[test]
fn norms_of_one_and_weight_parts_of_heads_and_neighbours_are_as_on_the_processor() {
    let Some(gpu) = gpu() else { return };
    for norms in [None, Some(false), Some(true)] {
        for pairs in [RotaryPairs::Halves, RotaryPairs::Neighbours] {
            for rotated in [0, 12, 24] {
                let kind = Kind {
                    offset: rotated == 12,
                    rotated,
                    pairs,
                    ..Kind::new(24, norms)
                };
                Case::new(kind).check(gpu);
            }
        }
    }
}
