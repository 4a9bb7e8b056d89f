//! The sum over all workers: where it comes from and where its mean stands.
//!
//! In: what this worker holds of a step. Out: the mean gradient, which may stay on the GPU or be no more than the sums that are
//! held, and what all slots of the step came to.

use proto::v1;

use super::{Run, RunError};
#[cfg(feature = "cuda")]
use crate::collective::nccl::{self, Group, NcclError};
use crate::collective::{Contribution, ReducedSum, Sums};
use crate::engine::accumulator::{self, Accumulator};
#[cfg(feature = "cuda")]
use crate::engine::cuda::engine::GpuMean;
use crate::engine::slot::HeldSlots;
use crate::engine::trainer::{Reduced, UpdateOutcome};

/// The mean gradient of a step.
pub(super) enum Summed {
    Here(Reduced),
    /// Not computed: this worker holds every slot, so the mean gradient is that of its own sums.
    Held,
    /// The mean gradient on the GPU, where the exchange over NCCL left it. Its memory is free once this is dropped.
    #[cfg(feature = "cuda")]
    OnGpu {
        mean: GpuMean,
        invalid: u64,
    },
}

impl Run {
    /// Sums over all workers. Returns the mean gradient and the outcomes of all slots of the step, whoever held them.
    pub(super) fn sum_up(&mut self, plan: &v1::Plan) -> Result<(Summed, HeldSlots), RunError> {
        #[cfg(feature = "cuda")]
        if let Some(group) = self.channels.collective.group(self.generation) {
            return self.sum_up_over_nccl(plan, &group);
        }
        let mesh = self.channels.collective.mesh(self.generation)?;
        if mesh.size() > 1 {
            self.trainer.collect()?;
        }
        let accumulator = self.trainer.accumulator();
        let contribution = Contribution {
            step: plan.step,
            slots: plan.slots,
            held: self.trainer.held(),
            sums: sums(accumulator),
            invalid: accumulator.invalid(),
        };
        if let Some(slots) = mesh.sum_of_one(&contribution)? {
            return Ok((Summed::Held, slots));
        }
        let spare = std::mem::take(&mut self.spare_mean);
        let ReducedSum {
            mean,
            invalid,
            slots,
        } = mesh.all_reduce_into(&contribution, spare)?;
        Ok((Summed::Here(Reduced { mean, invalid }), slots))
    }

    /// Agrees on the slots over the mesh, and sums the gradients over NCCL, from GPU to GPU.
    #[cfg(feature = "cuda")]
    fn sum_up_over_nccl(
        &mut self,
        plan: &v1::Plan,
        group: &Group,
    ) -> Result<(Summed, HeldSlots), RunError> {
        let mesh = self.channels.collective.mesh(self.generation)?;
        let contribution = Contribution {
            step: plan.step,
            slots: plan.slots,
            held: self.trainer.held(),
            sums: Sums::Exact(&[]),
            invalid: self.trainer.invalid()?,
        };
        let (slots, invalid) = mesh.agree(&contribution, self.trainer.layout().scalars)?;
        let mean = nccl::all_reduce(group, &self.trainer.sums_on_gpu());
        let mean = mean.map_err(|error| match error {
            NcclError::Collective(error) => RunError::Collective(error),
            error => RunError::Nccl(error),
        })?;
        Ok((Summed::OnGpu { mean, invalid }, slots))
    }

    /// Clips the mean gradient and updates weights and moments with it.
    pub(super) fn apply(
        &mut self,
        sum: &Summed,
        learning_rate: f64,
    ) -> Result<UpdateOutcome, RunError> {
        let trainer = &mut self.trainer;
        Ok(match sum {
            Summed::Here(reduced) => trainer.apply(reduced, learning_rate)?,
            Summed::Held => trainer.apply_held(learning_rate)?,
            #[cfg(feature = "cuda")]
            Summed::OnGpu { mean, invalid } => {
                trainer.apply_reduced(mean, *invalid, learning_rate)?
            }
        })
    }

    /// The mean gradient in this process's memory, in layout order.
    pub(super) fn mean_of(&mut self, sum: Summed) -> Result<Vec<f32>, RunError> {
        match sum {
            Summed::Here(reduced) => Ok(reduced.mean),
            Summed::Held => {
                self.trainer.collect()?;
                Ok(self.trainer.accumulator().mean())
            }
            #[cfg(feature = "cuda")]
            Summed::OnGpu { mean, .. } => Ok(self.trainer.download_mean(&mean)?),
        }
    }
}

fn sums(accumulator: &Accumulator) -> Sums<'_> {
    match accumulator.sums() {
        accumulator::Sums::Exact { sums, .. } => Sums::Packed(sums),
        accumulator::Sums::Fast { sums } => Sums::Fast(sums),
    }
}
