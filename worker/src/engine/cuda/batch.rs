//! A batch in the GPU's memory, as kernels read it: [`crate::engine::batch`] with what each token sees, through the windows that
//! layers have.

use super::chunks::Chunks;
use super::error::GpuError;
use super::gpu::{DeviceBuffer, Gpu};
use crate::engine::batch::Batch;

/// A batch in the GPU's memory, as kernels read it.
pub struct GpuBatch {
    pub tokens: usize,
    pub ids: DeviceBuffer<u32>,
    /// The row of each token in the tables of rotary positions.
    pub rows: DeviceBuffer<u32>,
    /// The chunks of segments, where layers of the model have linear attention.
    pub chunks: Option<Chunks>,
    whole: Borders,
    windowed: Vec<(usize, Borders)>,
}

/// What tokens see of each other. Both borders never decrease from one token to the next.
pub struct Borders {
    /// For each token, the first token that it sees.
    pub starts: DeviceBuffer<u32>,
    /// For each token, the one after the last token that sees it.
    pub ends: DeviceBuffer<u32>,
}

impl GpuBatch {
    /// Uploads a batch, with the chunks of its segments where `is_chunked`. One of the windows that reaches over the longest segment
    /// hides nothing.
    pub fn upload(
        gpu: &Gpu,
        batch: &Batch,
        rows: &[u32],
        windows: &[usize],
        is_chunked: bool,
    ) -> Result<Self, GpuError> {
        let segments = segments(&batch.positions);
        let longest = batch.longest_segment();
        let narrow = windows.iter().filter(|window| **window < longest);
        Ok(Self {
            tokens: batch.ids.len(),
            ids: gpu.upload(&batch.ids)?,
            rows: gpu.upload(rows)?,
            chunks: match is_chunked {
                true => Some(Chunks::upload(gpu, &batch.positions)?),
                false => None,
            },
            windowed: narrow
                .map(|window| {
                    Ok((
                        *window,
                        Borders::upload(gpu, &windowed(&segments, *window))?,
                    ))
                })
                .collect::<Result<_, GpuError>>()?,
            whole: Borders::upload(gpu, &segments)?,
        })
    }

    /// What tokens see through a window.
    pub fn through(&self, window: Option<usize>) -> &Borders {
        let found = self.windowed.iter().find(|(own, _)| Some(*own) == window);
        found.map_or(&self.whole, |(_, borders)| borders)
    }
}

impl Borders {
    #[cfg(test)]
    pub fn of(gpu: &Gpu, positions: &[u32]) -> Result<Self, GpuError> {
        Self::upload(gpu, &segments(positions))
    }

    fn upload(gpu: &Gpu, [starts, ends]: &[Vec<u32>; 2]) -> Result<Self, GpuError> {
        Ok(Self {
            starts: gpu.upload(starts)?,
            ends: gpu.upload(ends)?,
        })
    }
}

/// For each token the first one of its segment, and the one after the last.
fn segments(positions: &[u32]) -> [Vec<u32>; 2] {
    let tokens = positions.len();
    let starts: Vec<u32> = (0..tokens as u32)
        .zip(positions)
        .map(|(token, position)| token - position)
        .collect();
    let mut ends = vec![tokens as u32; tokens];
    for token in (0..tokens.saturating_sub(1)).rev() {
        ends[token] = match starts[token + 1] == starts[token] {
            true => ends[token + 1],
            false => token as u32 + 1,
        };
    }
    [starts, ends]
}

/// The same segments, in which a token sees no more than `window` tokens, itself among them.
fn windowed([starts, ends]: &[Vec<u32>; 2], window: usize) -> [Vec<u32>; 2] {
    let window = u32::try_from(window).unwrap_or(u32::MAX);
    let starts = (0..).zip(starts);
    let starts = starts.map(|(token, start)| *start.max(&(token + 1u32).saturating_sub(window)));
    let ends = (0..).zip(ends);
    let ends = ends.map(|(token, end)| *end.min(&window.saturating_add(token)));
    [starts.collect(), ends.collect()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn through_a_window_a_token_sees_the_last_few_of_its_segment() {
        let whole = segments(&[0, 1, 2, 3, 4, 0, 1, 2]);
        assert_eq!(whole[0], [0, 0, 0, 0, 0, 5, 5, 5]);
        assert_eq!(whole[1], [5, 5, 5, 5, 5, 8, 8, 8]);
        let narrow = windowed(&whole, 2);
        assert_eq!(narrow[0], [0, 0, 1, 2, 3, 5, 5, 6]);
        assert_eq!(narrow[1], [2, 3, 4, 5, 5, 7, 8, 8]);
        for (query, start) in narrow[0].iter().enumerate() {
            for (key, end) in narrow[1].iter().enumerate() {
                let sees = key <= query && key >= *start as usize;
                assert_eq!(sees, query >= key && query < *end as usize, "{query} {key}");
            }
        }
        assert_eq!(windowed(&whole, usize::MAX), whole);
    }
}
