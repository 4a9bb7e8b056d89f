//! The step's collective over the mesh, and over NCCL where gradients travel from GPU to GPU.

use std::sync::Arc;

use common::files::Layout;
use proto::v1;

use super::backend::{FollowedFeed, StepCollective};
use super::error::RunError;
use super::on_engine::Mean;
use crate::collective::feed::{FeedTimeouts, Follower, News, Source, Update};
#[cfg(feature = "cuda")]
use crate::collective::nccl::{self, Group, NcclError};
use crate::collective::state::StateCopy;
use crate::collective::{AllReduced, Collective, CollectiveError, Contribution, LocalSums};
use crate::engine::Trainer;
use crate::engine::accumulator::{self, Accumulator};
use crate::engine::slot::HeldSlots;

/// A [`Collective`] as the step uses it. Its waits block the thread, which is the engine's own.
pub struct MeshCollective {
    collective: Arc<Collective>,
    /// Memory of the last mean gradient, used again for the next one.
    spare: Vec<f32>,
}

impl MeshCollective {
    pub fn new(collective: Arc<Collective>) -> Self {
        Self {
            collective,
            spare: Vec::new(),
        }
    }

    /// Agrees on the slots over the mesh, and sums the gradients over NCCL, from GPU to GPU.
    #[cfg(feature = "cuda")]
    fn sum_up_over_nccl(
        &self,
        generation: u64,
        plan: &v1::Plan,
        trainer: &Trainer,
        group: &Group,
    ) -> Result<(Mean, HeldSlots), RunError> {
        let mesh = self.collective.mesh(generation)?;
        let contribution = Contribution {
            step: plan.step,
            slots: plan.slots,
            held: trainer.held(),
            sums: LocalSums::Exact(&[]),
            invalid: trainer.invalid()?,
        };
        let (slots, invalid) = mesh.agree(&contribution, trainer.layout().scalars)?;
        let mean = nccl::all_reduce(group, &trainer.sums_on_gpu());
        let mean = mean.map_err(|error| match error {
            NcclError::Collective(error) => RunError::Collective(error),
            error => RunError::Nccl(error),
        })?;
        Ok((Mean::OnGpu { mean, invalid }, slots))
    }
}

impl StepCollective<Trainer> for MeshCollective {
    type Feed = Follower;

    async fn sum_up(
        &mut self,
        generation: u64,
        plan: &v1::Plan,
        trainer: &mut Trainer,
    ) -> Result<(Mean, HeldSlots), RunError> {
        #[cfg(feature = "cuda")]
        if let Some(group) = self.collective.group(generation) {
            return self.sum_up_over_nccl(generation, plan, trainer, &group);
        }
        let mesh = self.collective.mesh(generation)?;
        if mesh.size() > 1 {
            trainer.collect()?;
        }
        let accumulator = trainer.accumulator();
        let contribution = Contribution {
            step: plan.step,
            slots: plan.slots,
            held: trainer.held(),
            sums: sums(accumulator),
            invalid: accumulator.invalid(),
        };
        if let Some(slots) = mesh.sum_of_one(&contribution)? {
            return Ok((Mean::Held, slots));
        }
        let spare = std::mem::take(&mut self.spare);
        let AllReduced { mean, slots } = mesh.all_reduce_into(&contribution, spare)?;
        Ok((Mean::Here(mean), slots))
    }

    fn reuse(&mut self, mean: Mean) {
        if let Mean::Here(mean) = mean {
            self.spare = mean.values;
        }
    }

    async fn receive_state(
        &self,
        generation: &v1::Generation,
        layout: &Arc<Layout>,
    ) -> Result<StateCopy, CollectiveError> {
        let mesh = self.collective.mesh(generation.generation)?;
        mesh.receive_state(generation.source, generation.step, layout)
    }

    fn send_state(&self, generation: &v1::Generation, state: StateCopy) {
        let (behind, number) = (generation.behind.clone(), generation.generation);
        let collective = self.collective.clone();
        std::thread::spawn(move || {
            let sent = collective.mesh(number).and_then(|mesh| {
                behind
                    .iter()
                    .try_for_each(|rank| mesh.send_state(*rank, &state))
            });
            // The receiver notices too, and reports it.
            if let Err(error) = sent {
                tracing::debug!("state could not be sent: {error}");
            }
        });
    }

    fn follow(&self, source: Source, layout: Arc<Layout>) -> Follower {
        Follower::start(source, layout, FeedTimeouts::default())
    }

    fn begin_feed(
        &self,
        run_id: [u8; 32],
        feed: &v1::Feed,
        copy: impl FnOnce() -> Result<StateCopy, RunError>,
    ) -> Result<(), RunError> {
        let feeds = self.collective.feeds();
        feeds.begin(run_id, feed.worker, feed.attempt, copy)
    }

    fn is_followed(&self) -> bool {
        self.collective.feeds().is_followed()
    }

    fn publish(&self, update: Update) {
        self.collective.feeds().publish(update);
    }

    fn conclude_feeds(&self, members: &[u64], fed: &[u64], step: u64) {
        self.collective.feeds().conclude(members, fed, step);
    }
}

impl FollowedFeed for Follower {
    fn attempt(&self) -> u64 {
        Self::attempt(self)
    }

    async fn next(&mut self) -> News {
        Self::next(self).await
    }
}

fn sums(accumulator: &Accumulator) -> LocalSums<'_> {
    match accumulator.sums() {
        accumulator::Sums::Exact { sums, .. } => LocalSums::Packed(sums),
        accumulator::Sums::Fast { sums } => LocalSums::Fast(sums),
    }
}
