//! The second half of adapters that begin with a part of their weight: it takes off what the first half begins with, and no update
//! may move it.

use common::files::adapter::{Factor, parse_tensor_name};
use common::files::layout::Layout;
use common::job::LoraSpec;

/// Where the second halves lie in the flat weights.
#[derive(Default)]
pub struct SecondHalves(Vec<Runs>);

/// Runs of scalars that lie one like the other.
struct Runs {
    first: usize,
    length: usize,
    /// Scalars from the beginning of one to that of the next.
    stride: usize,
    count: usize,
}

impl SecondHalves {
    /// None of an adapter that has no such half.
    pub fn of(layout: &Layout, lora: &LoraSpec) -> Self {
        if !lora.init.is_from_base() {
            return Self::default();
        }
        let sizes = lora.sizes();
        let runs = layout.tensors.iter().filter_map(|tensor| {
            let (module, factor) = parse_tensor_name(&tensor.name)?;
            let trained = sizes.trained_rank(module);
            let [rows, columns] = tensor.shape[..] else {
                return None;
            };
            let runs = match factor {
                Factor::A => Runs {
                    first: tensor.offset + trained * columns,
                    length: (rows - trained) * columns,
                    stride: tensor.scalars(),
                    count: 1,
                },
                Factor::B => Runs {
                    first: tensor.offset + trained,
                    length: columns - trained,
                    stride: columns,
                    count: rows,
                },
                // The adapter of an embedding never has one.
                Factor::EmbeddingA | Factor::EmbeddingB => return None,
                Factor::Magnitude | Factor::BiasOfB | Factor::Bias | Factor::BiasAlone => {
                    return None;
                }
            };
            Some(runs)
        });
        Self(runs.collect())
    }

    /// A copy of them.
    pub fn copy(&self, weights: &[f32]) -> Vec<f32> {
        let scalars = self.0.iter().map(|runs| runs.count * runs.length).sum();
        let mut copy = Vec::with_capacity(scalars);
        for start in self.starts() {
            copy.extend_from_slice(&weights[start.0..start.0 + start.1]);
        }
        copy
    }

    /// Puts them back as they were.
    pub fn put_back(&self, weights: &mut [f32], mut copy: &[f32]) {
        for (start, length) in self.starts() {
            let (run, rest) = copy.split_at(length);
            weights[start..start + length].copy_from_slice(run);
            copy = rest;
        }
    }

    /// First scalar and length of each run.
    fn starts(&self) -> impl Iterator<Item = (usize, usize)> {
        let runs = self.0.iter();
        runs.flat_map(|runs| {
            (0..runs.count).map(|index| (runs.first + index * runs.stride, runs.length))
        })
    }
}
