//! The chunks of a batch's segments in the GPU's memory, as the kernels of linear attention go through them.

use common::memory::STATE_TOKENS;

use super::error::GpuError;
use super::gpu::{DeviceBuffer, Gpu};

/// Stands for the state at a border where there is none: at the beginning of a segment it is zero, and behind its end nobody reads it.
const NONE: u32 = u32::MAX;

/// The chunks of a batch's segments, which begin with each.
pub struct Chunks {
    /// Of each chunk its first token, its tokens, and the numbers of the states before and behind it.
    pub table: DeviceBuffer<u32>,
    /// The first chunk of each segment, and the number of all.
    pub segments: DeviceBuffer<u32>,
    pub count: usize,
    pub segment_count: usize,
    /// Number of borders between chunks of one segment.
    pub states: usize,
}

impl Chunks {
    /// Uploads the chunks of tokens at these positions of their segments.
    pub fn upload(gpu: &Gpu, positions: &[u32]) -> Result<Self, GpuError> {
        let (table, segments) = chunks(positions);
        let states = table.iter().filter(|chunk| chunk[2] != NONE).count();
        Ok(Self {
            count: table.len(),
            segment_count: segments.len() - 1,
            states,
            table: gpu.upload(table.as_flattened())?,
            segments: gpu.upload(&segments)?,
        })
    }
}

/// The rows of the table, and the borders of segments among them.
fn chunks(positions: &[u32]) -> (Vec<[u32; 4]>, Vec<u32>) {
    let (mut table, mut segments) = (Vec::new(), vec![0]);
    let (mut first, mut states) = (0, 0);
    for text in positions.chunk_by(|position, next| next > position) {
        let count = text.len().div_ceil(STATE_TOKENS);
        for (index, tokens) in text.chunks(STATE_TOKENS).enumerate() {
            let before = if index > 0 { states - 1 } else { NONE };
            let behind = if index + 1 < count { states } else { NONE };
            table.push([first, tokens.len() as u32, before, behind]);
            first += tokens.len() as u32;
            states += u32::from(behind != NONE);
        }
        segments.push(table.len() as u32);
    }
    (table, segments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_begin_with_segments_and_number_the_states_between_them() {
        let lengths = [3, 130, 64, 65];
        let positions: Vec<u32> = lengths.iter().flat_map(|length| 0..*length).collect();
        let (table, segments) = chunks(&positions);
        assert_eq!(
            table,
            [
                [0, 3, NONE, NONE],
                [3, 64, NONE, 0],
                [67, 64, 0, 1],
                [131, 2, 1, NONE],
                [133, 64, NONE, NONE],
                [197, 64, NONE, 2],
                [261, 1, 2, NONE],
            ]
        );
        assert_eq!(segments, [0, 1, 4, 5, 7]);
    }
}
