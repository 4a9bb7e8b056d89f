//! What the step works with, as traits: a trainer that computes and a collective that sums.
//!
//! Each has two implementations: [`on_engine`](super::on_engine) and [`on_mesh`](super::on_mesh), which train, and a
//! deterministic toy in the coordinator's simulation, so that every seed of it runs the same step as a real worker does.

use std::sync::Arc;

use common::data::block::Block;
use common::files::{Layout, Snapshot};
use proto::v1;

use super::error::RunError;
use crate::collective::CollectiveError;
use crate::collective::feed::{News, Source, Update};
use crate::collective::state::StateCopy;
use crate::engine::slot::{HeldSlots, SlotOutcome};
use crate::engine::{Abandon, EngineError, MeanGradient, UpdateOutcome};

/// The state of one worker: weights, moments and accumulator, and what is computed on them.
pub trait StepTrainer: Send {
    /// The mean gradient of a step, wherever it stands.
    type Mean: Send;

    /// Number of updates seen, skipped ones included.
    fn step(&self) -> u64;

    fn layout(&self) -> Arc<Layout>;

    /// Scalars of the whole model, frozen and trainable.
    fn total_scalars(&self) -> u64;

    /// Most memory that the device held so far, in bytes; 0 where it is not known.
    fn peak_memory_bytes(&self) -> u64;

    /// The step whose slots are held.
    fn open_step(&self) -> Option<u64>;

    /// The slots in the accumulator, with their outcomes.
    fn held(&self) -> &HeldSlots;

    /// The handle by which another task asks for the slot in hand to be given up.
    fn abandon(&self) -> Abandon;

    /// Opens `step` for slots. What is held stays if it is this step's already. `trained_tokens` and `slots` are those of the whole
    /// step, over all workers.
    fn begin_step(
        &mut self,
        step: u64,
        trained_tokens: u64,
        slots: usize,
    ) -> Result<(), EngineError>;

    /// Empties the accumulator.
    fn forget_slots(&mut self);

    /// Adds the gradient of a slot of the open step to the accumulator, unless it is held already.
    fn train_slot(
        &mut self,
        slot: u32,
        blocks: &[Block],
    ) -> impl Future<Output = Result<SlotOutcome, EngineError>> + Send;

    /// Computes the loss of a slot, without a gradient.
    fn eval_slot(
        &mut self,
        blocks: &[Block],
    ) -> impl Future<Output = Result<SlotOutcome, EngineError>> + Send;

    /// Updates weights and moments with the mean gradient of a step, and counts a step.
    fn apply(
        &mut self,
        mean: &Self::Mean,
        learning_rate: f64,
    ) -> Result<UpdateOutcome, EngineError>;

    /// Updates as [`apply`](Self::apply) does, with a mean gradient that came from another worker.
    fn repeat(
        &mut self,
        mean: &MeanGradient,
        learning_rate: f64,
    ) -> Result<UpdateOutcome, EngineError>;

    /// The mean gradient in this process's memory, in layout order.
    fn mean_in_memory(&mut self, mean: Self::Mean) -> Result<Vec<f32>, EngineError>;

    /// Digest of the trainable weights as they are now.
    fn weights_digest(&self) -> Result<String, EngineError>;

    fn snapshot(&self) -> Result<Snapshot, EngineError>;

    /// Takes over a state of the same layout. Slots held are forgotten: their gradients were of other weights.
    fn restore(&mut self, snapshot: &Snapshot) -> Result<(), EngineError>;
}

/// This worker's end of the exchange of gradients and states. It reads accumulators and never changes them.
pub trait StepCollective<Trainer: StepTrainer>: Send {
    type Feed: FollowedFeed;

    /// Sums over all members of `generation`. Returns the mean gradient and the outcomes of all slots of the step, whoever held them.
    fn sum_up(
        &mut self,
        generation: u64,
        plan: &v1::Plan,
        trainer: &mut Trainer,
    ) -> impl Future<Output = Result<(Trainer::Mean, HeldSlots), RunError>> + Send;

    /// Takes a mean gradient back that is of no more use: its memory may serve the next one.
    fn reuse(&mut self, mean: Trainer::Mean);

    /// Receives the state that the generation begins with from the member that has it.
    fn receive_state(
        &self,
        generation: &v1::Generation,
        layout: &Arc<Layout>,
    ) -> impl Future<Output = Result<StateCopy, CollectiveError>> + Send;

    /// Sends this worker's state to the members that are behind, while the step goes on.
    fn send_state(&self, generation: &v1::Generation, state: StateCopy);

    /// Begins to follow a member.
    fn follow(&self, source: Source, layout: Arc<Layout>) -> Self::Feed;

    /// Lets another worker follow this one. `copy` is called only where there is no copy of the state to share.
    fn begin_feed(
        &self,
        run_id: [u8; 32],
        feed: &v1::Feed,
        copy: impl FnOnce() -> Result<StateCopy, RunError>,
    ) -> Result<(), RunError>;

    /// Whether anyone follows this worker.
    fn is_followed(&self) -> bool;

    /// Hands an update to whoever follows.
    fn publish(&self, update: Update);

    /// Ends the feeds of followers that are now `members`; the `fed` of them still need the updates up to `step`.
    fn conclude_feeds(&self, members: &[u64], fed: &[u64], step: u64);
}

/// A feed that is being followed; it ends when it is dropped.
pub trait FollowedFeed: Send {
    /// Number of the coordinator's order that is obeyed.
    fn attempt(&self) -> u64;

    /// Waits for what comes next. Nothing is lost where the wait is given up.
    fn next(&mut self) -> impl Future<Output = News> + Send;
}
