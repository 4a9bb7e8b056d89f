//! Where trainable tensors are among all, and the adapter that two of them make.

use cudarc::driver::CudaView;

use crate::engine::cuda::gpu::DeviceBuffer;

/// Where a tensor lies in the flat buffer of trainable scalars.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub offset: usize,
    pub scalars: usize,
}

impl Place {
    /// The tensor's part of a flat buffer.
    pub fn of<'a, T>(&self, flat: &'a DeviceBuffer<T>) -> CudaView<'a, T> {
        flat.slice(self.offset..self.offset + self.scalars)
    }
}

/// The trainable update of one linear layer: `A` is `[rank][in]`, `B` is `[out][rank]`.
#[derive(Clone, Copy, Debug)]
pub struct Adapter {
    pub a: Place,
    pub b: Place,
    pub rank: usize,
    pub scale: f32,
    /// Probability that an input is dropped.
    pub dropout: f64,
    /// Number of the adapted module, for the dropout mask.
    pub module: u64,
}
