//! [`crate::engine::ops::routing`] on the GPU: which experts each token goes through, and what their results are weighted by.
//!
//! Rows lie sorted by expert and within an expert by token, and each expert's are filled up with rows of nobody, so that products of
//! few different shapes are asked for; these rows are zeros wherever a sum goes over them. How many rows each expert has is read from
//! the GPU, once in a layer: products are asked for expert by expert.

use common::memory::{EXPERT_ROWS_MULTIPLE, expert_rows};
use cudarc::driver::{CudaView, CudaViewMut, DevicePtr};

use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu, Grid};
use crate::engine::ops::routing::Routing;
use crate::launch;

const THREADS: u32 = 256;
/// Tokens that a block has, one in each warp.
const WARPS: usize = THREADS as usize / 32;

/// The rows of a batch: each a token in one of its experts.
pub struct Routes {
    routing: Routing,
    batch_tokens: usize,
    /// Token of each row; `u32::MAX` where it is nobody's.
    tokens: DeviceBuffer<u32>,
    /// Expert of each row.
    experts: DeviceBuffer<u32>,
    /// Weight of each row; 0 where it is nobody's.
    weights: DeviceBuffer<f32>,
    /// The rows of each token, `[tokens][per_token]`.
    of_token: DeviceBuffer<u32>,
    /// The experts of each token, ascending, `[tokens][per_token]`.
    chosen: DeviceBuffer<u32>,
    /// Tokens of each expert.
    counts: Vec<u32>,
}

/// The rows of one expert, those of nobody among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    pub expert: usize,
    /// Its first row among those of all experts.
    pub first: usize,
    pub rows: usize,
}

impl Routes {
    /// Turns logits into probabilities, `[tokens][experts]`, and chooses the experts of each token by them. Waits for the GPU.
    pub fn new(
        gpu: &Gpu,
        routing: Routing,
        probabilities: &mut CudaViewMut<f32>,
    ) -> Result<Self, GpuError> {
        let Routing {
            experts, per_token, ..
        } = routing;
        let batch_tokens = probabilities.len() / experts;
        assert_eq!(
            probabilities.len(),
            batch_tokens * experts,
            "logits of all experts"
        );
        assert!((1..=experts).contains(&per_token), "experts of a token");
        let rows = expert_rows(batch_tokens, per_token, experts);
        let mut routes = Self {
            routing,
            batch_tokens,
            tokens: gpu.take(rows)?,
            experts: gpu.take(rows)?,
            weights: gpu.take(rows)?,
            of_token: gpu.take(batch_tokens * per_token)?,
            chosen: gpu.take(batch_tokens * per_token)?,
            counts: vec![0; experts],
        };
        if batch_tokens > 0 {
            routes.choose(gpu, probabilities)?;
            let counts = routes.place(gpu, &probabilities.as_view())?;
            gpu.read(&counts.slice(..experts), &mut routes.counts)?;
        }
        Ok(routes)
    }

    fn choose(&mut self, gpu: &Gpu, probabilities: &mut CudaViewMut<f32>) -> Result<(), GpuError> {
        let [tokens, experts, per_token] = self.sizes();
        let grid = Grid::rows(self.batch_tokens.div_ceil(WARPS), THREADS);
        // SAFETY: there is a row of logits, and room for the chosen experts, of each token.
        unsafe {
            launch!(
                gpu,
                "route_tokens",
                grid,
                [
                    probabilities,
                    &mut self.chosen,
                    &tokens,
                    &experts,
                    &per_token
                ]
            )
        }
    }

    /// Places the rows, and returns how many tokens each expert has.
    fn place(
        &mut self,
        gpu: &Gpu,
        probabilities: &CudaView<f32>,
    ) -> Result<DeviceBuffer<u32>, GpuError> {
        let [tokens, experts, per_token] = self.sizes();
        let mut counts = gpu.take::<u32>(self.routing.experts)?;
        let grid = Grid::rows(self.routing.experts, THREADS);
        let multiple = EXPERT_ROWS_MULTIPLE as i32;
        // SAFETY: there is a count of each expert; and rows for every token in each of its experts, and for those that fill up.
        unsafe {
            launch!(
                gpu,
                "count_routes",
                grid,
                [&self.chosen, &mut counts, &tokens, &per_token]
            )?;
            launch!(
                gpu,
                "place_routes",
                grid,
                [
                    &self.chosen,
                    probabilities,
                    &counts,
                    &mut self.tokens,
                    &mut self.experts,
                    &mut self.weights,
                    &mut self.of_token,
                    &tokens,
                    &experts,
                    &per_token,
                    &multiple
                ]
            )?;
        }
        if self.routing.normalises {
            let grid = Grid::scalars(self.batch_tokens);
            // SAFETY: each token has its rows, and each row a weight.
            unsafe {
                launch!(
                    gpu,
                    "normalise_routes",
                    grid,
                    [&self.of_token, &mut self.weights, &tokens, &per_token]
                )?;
            }
        }
        Ok(counts)
    }

    /// Writes the gradient of the logits, rounded, from that of each row's weight. `of_loss` is what the router's own loss adds to the
    /// gradient of each probability, if there is one.
    pub fn backward<E: GpuElement>(
        &self,
        gpu: &Gpu,
        probabilities: &CudaView<f32>,
        d_weights: &CudaView<f32>,
        of_loss: Option<&CudaView<f32>>,
        d_logits: &mut CudaViewMut<E>,
    ) -> Result<(), GpuError> {
        let scalars = self.batch_tokens * self.routing.experts;
        assert!(
            probabilities.len() == scalars
                && d_logits.len() == scalars
                && d_weights.len() >= self.rows()
                && of_loss.is_none_or(|of_loss| of_loss.len() == self.routing.experts),
            "gradients of a router"
        );
        if scalars == 0 {
            return Ok(());
        }
        let of_loss = of_loss.map(|of_loss| of_loss.device_ptr(gpu.stream()));
        // None is a null pointer.
        let of_loss_at = of_loss.as_ref().map_or(0, |(at, _guard)| *at);
        let [tokens, experts, per_token] = self.sizes();
        let normalises = i32::from(self.routing.normalises);
        let grid = Grid::rows(self.batch_tokens.div_ceil(WARPS), THREADS);
        // SAFETY: all lengths have just been checked, and rows and experts of tokens are those of this batch.
        unsafe {
            launch!(
                gpu,
                &format!("routing_backward_{}", E::SUFFIX),
                grid,
                [
                    probabilities,
                    &self.chosen,
                    &self.of_token,
                    &self.weights,
                    d_weights,
                    &of_loss_at,
                    d_logits,
                    &tokens,
                    &experts,
                    &per_token,
                    &normalises
                ]
            )
        }
    }

    /// The rows of each expert, one after the other; 0 where no token goes through it.
    pub fn groups(&self) -> impl Iterator<Item = Group> {
        let mut first = 0;
        self.counts.iter().enumerate().map(move |(expert, count)| {
            let rows = (*count as usize).next_multiple_of(EXPERT_ROWS_MULTIPLE);
            let group = Group {
                expert,
                first,
                rows,
            };
            first += rows;
            group
        })
    }

    /// Number of rows of all experts, those of nobody among them.
    pub fn rows(&self) -> usize {
        self.groups().map(|group| group.rows).sum()
    }

    /// The most rows that such a batch has: what buffers of rows hold.
    pub fn most_rows(&self) -> usize {
        let Routing {
            experts, per_token, ..
        } = self.routing;
        expert_rows(self.batch_tokens, per_token, experts)
    }

    /// Tokens of each expert.
    pub fn counts(&self) -> Vec<usize> {
        self.counts.iter().map(|count| *count as usize).collect()
    }

    /// Number of tokens of the batch.
    pub fn batch_tokens(&self) -> usize {
        self.batch_tokens
    }

    /// Number of experts of each token.
    pub fn per_token(&self) -> usize {
        self.routing.per_token
    }

    /// Token of each row.
    pub fn tokens(&self) -> CudaView<'_, u32> {
        self.tokens.slice(..self.rows())
    }

    /// Expert of each row.
    pub fn experts(&self) -> CudaView<'_, u32> {
        self.experts.slice(..self.rows())
    }

    /// Weight of each row.
    pub fn weights(&self) -> CudaView<'_, f32> {
        self.weights.slice(..self.rows())
    }

    /// The rows of each token, `[tokens][per_token]`.
    pub fn of_token(&self) -> CudaView<'_, u32> {
        self.of_token
            .slice(..self.batch_tokens * self.routing.per_token)
    }

    /// The sizes as the kernels take them: tokens, experts, experts of a token.
    fn sizes(&self) -> [i32; 3] {
        let Routing {
            experts, per_token, ..
        } = self.routing;
        [self.batch_tokens, experts, per_token].map(|size| size as i32)
    }
}

/// Sums the probabilities `[tokens][experts]` of each expert, in float64. Waits for the GPU.
pub fn probability_sums(
    gpu: &Gpu,
    probabilities: &CudaView<f32>,
    experts: usize,
) -> Result<Vec<f64>, GpuError> {
    let mut sums = gpu.take::<f64>(experts)?;
    let tokens = (probabilities.len() / experts) as i32;
    let (grid, width) = (Grid::rows(experts, THREADS), experts as i32);
    // SAFETY: there is a sum for each expert, and a probability of it for each token.
    unsafe {
        launch!(
            gpu,
            "probability_sums",
            grid,
            [probabilities, &mut sums, &tokens, &width]
        )?;
    }
    gpu.download(&sums, experts)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
