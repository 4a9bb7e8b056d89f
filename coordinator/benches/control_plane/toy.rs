//! What the step works on here: slots that only take their time, and exchanges that are made as soon as they are asked for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::data::block::Block;
use common::files::{Flat, Layout, Snapshot};
use proto::v1;
use worker::collective::CollectiveError;
use worker::collective::feed::{News, Source, Update};
use worker::collective::state::StateCopy;
use worker::engine::slot::{HeldSlots, SlotOutcome};
use worker::engine::{Abandon, EngineError, MeanGradient, UpdateOutcome};
use worker::run::backend::{FollowedFeed, StepCollective, StepTrainer};
use worker::run::error::RunError;

use crate::crowd::{POLL, Shared};

/// Of a slot, at most. After each it is seen whether the slot is wanted back.
const LAYER_MS: u64 = 100;

pub struct ToyTrainer {
    shared: Arc<Shared>,
    /// The newest that was heard of: a slot without an end is given up for it.
    newest_generation: Arc<AtomicU64>,
    abandon: Abandon,
    step: u64,
    open_step: Option<u64>,
    held: HeldSlots,
}

impl ToyTrainer {
    pub fn new(shared: Arc<Shared>, newest_generation: Arc<AtomicU64>) -> Self {
        Self {
            shared,
            newest_generation,
            abandon: Abandon::default(),
            step: 0,
            open_step: None,
            held: HeldSlots::new(),
        }
    }

    /// Spends the time of a slot, layer by layer. Where workers only are there, it has no end. An error where it was abandoned.
    async fn pass(&self) -> Result<(), EngineError> {
        let begun_under = self.newest_generation.load(Ordering::SeqCst);
        let mut passed_ms = 0;
        loop {
            let slot_ms = self.shared.slot_ms();
            let left_ms = slot_ms.map_or(LAYER_MS, |slot_ms| slot_ms.saturating_sub(passed_ms));
            if left_ms == 0 {
                return Ok(());
            }
            let layer_ms = left_ms.min(LAYER_MS);
            tokio::time::sleep(Duration::from_millis(layer_ms)).await;
            passed_ms += layer_ms;
            let is_over = self.newest_generation.load(Ordering::SeqCst) != begun_under;
            if self.abandon.is_asked() || slot_ms.is_none() && is_over {
                return Err(EngineError::Abandoned);
            }
        }
    }

    fn update(&mut self) -> UpdateOutcome {
        self.step += 1;
        self.shared.steps.fetch_max(self.step, Ordering::SeqCst);
        UpdateOutcome {
            grad_norm: 1.0,
            skipped: false,
        }
    }
}

impl StepTrainer for ToyTrainer {
    type Mean = MeanGradient;

    fn step(&self) -> u64 {
        self.step
    }

    fn layout(&self) -> Arc<Layout> {
        layout()
    }

    fn total_scalars(&self) -> u64 {
        1
    }

    fn peak_memory_bytes(&self) -> u64 {
        0
    }

    fn open_step(&self) -> Option<u64> {
        self.open_step
    }

    fn held(&self) -> &HeldSlots {
        &self.held
    }

    fn abandon(&self) -> Abandon {
        self.abandon.clone()
    }

    fn begin_step(&mut self, step: u64, _: u64, _: usize) -> Result<(), EngineError> {
        if self.open_step != Some(step) {
            self.held.clear();
            self.open_step = Some(step);
        }
        Ok(())
    }

    fn forget_slots(&mut self) {
        self.open_step = None;
        self.held.clear();
    }

    async fn train_slot(
        &mut self,
        slot: u32,
        blocks: &[Block],
    ) -> Result<SlotOutcome, EngineError> {
        self.pass().await?;
        let outcome = SlotOutcome {
            loss_sum: 1.0,
            trained_tokens: blocks.iter().map(Block::trained_tokens).sum(),
            correct_tokens: 1,
            invalid_scalars: 0,
        };
        self.held.insert(slot, outcome);
        self.shared.slots.fetch_add(1, Ordering::SeqCst);
        Ok(outcome)
    }

    async fn eval_slot(&mut self, _: &[Block]) -> Result<SlotOutcome, EngineError> {
        Ok(SlotOutcome::default())
    }

    fn apply(&mut self, _: &MeanGradient, _: f64) -> Result<UpdateOutcome, EngineError> {
        Ok(self.update())
    }

    fn repeat(&mut self, _: &MeanGradient, _: f64) -> Result<UpdateOutcome, EngineError> {
        Ok(self.update())
    }

    fn mean_in_memory(&mut self, mean: MeanGradient) -> Result<Vec<f32>, EngineError> {
        Ok(mean.values)
    }

    fn weights_digest(&self) -> Result<String, EngineError> {
        Ok(blake3::hash(&self.step.to_le_bytes()).to_hex().to_string())
    }

    fn snapshot(&self) -> Result<Snapshot, EngineError> {
        Ok(state_after(self.step))
    }

    fn restore(&mut self, snapshot: &Snapshot) -> Result<(), EngineError> {
        self.step = snapshot.step;
        self.forget_slots();
        Ok(())
    }
}

/// No peer is ever called: what would come from one is known, because all workers hold the same.
pub struct ToyCollective(pub Arc<Shared>);

impl StepCollective<ToyTrainer> for ToyCollective {
    type Feed = ToyFeed;

    async fn sum_up(
        &mut self,
        _: u64,
        _: &v1::Plan,
        trainer: &mut ToyTrainer,
    ) -> Result<(MeanGradient, HeldSlots), RunError> {
        let (values, invalid) = (vec![0.0], 0);
        Ok((MeanGradient { values, invalid }, trainer.held().clone()))
    }

    fn reuse(&mut self, _: MeanGradient) {}

    async fn receive_state(
        &self,
        generation: &v1::Generation,
        _: &Arc<Layout>,
    ) -> Result<StateCopy, CollectiveError> {
        Ok(copy_after(generation.step))
    }

    fn send_state(&self, _: &v1::Generation, _: StateCopy) {}

    fn follow(&self, source: Source, _: Arc<Layout>) -> ToyFeed {
        ToyFeed {
            shared: self.0.clone(),
            attempt: source.attempt,
            step: None,
        }
    }

    fn begin_feed(
        &self,
        _: [u8; 32],
        _: &v1::Feed,
        _: impl FnOnce() -> Result<StateCopy, RunError>,
    ) -> Result<(), RunError> {
        Ok(())
    }

    fn is_followed(&self) -> bool {
        false
    }

    fn publish(&self, _: Update) {}

    fn conclude_feeds(&self, _: &[u64], _: &[u64], _: u64) {}
}

/// Brings the state that the others have by now, then every step that they make.
pub struct ToyFeed {
    shared: Arc<Shared>,
    attempt: u64,
    step: Option<u64>,
}

impl FollowedFeed for ToyFeed {
    fn attempt(&self) -> u64 {
        self.attempt
    }

    async fn next(&mut self) -> News {
        loop {
            let newest = self.shared.steps.load(Ordering::SeqCst);
            match self.step {
                None => {
                    self.step = Some(newest);
                    return News::State(Box::new(copy_after(newest)));
                }
                Some(step) if step < newest => {
                    self.step = Some(step + 1);
                    return News::Update(update_after(step));
                }
                Some(_) => tokio::time::sleep(POLL).await,
            }
        }
    }
}

fn layout() -> Arc<Layout> {
    Arc::new(Layout::new([("toy".to_owned(), vec![1])]))
}

fn state_after(step: u64) -> Snapshot {
    let flat = Flat::from(vec![0.0]);
    Snapshot {
        step,
        layout: layout(),
        weights: flat.clone().into(),
        moments: vec![flat.clone().into(), flat.into()],
    }
}

fn copy_after(step: u64) -> StateCopy {
    StateCopy {
        snapshot: state_after(step),
        memory: Vec::new(),
    }
}

fn update_after(step: u64) -> Update {
    Update {
        step,
        learning_rate: 0.0,
        skipped: false,
        digest: true,
        slots: HeldSlots::new(),
        mean: vec![0.0],
    }
}
