//! The toy trainer: arithmetic on eight scalars in place of a model, in simulated time. The real step ([`StepLoop`]) runs on it.
//!
//! [`StepLoop`]: worker::run::step::StepLoop

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::data::block::Block;
use common::files::{Flat, Layout, Snapshot};
use common::wire::PlanKind;
use worker::engine::slot::{HeldSlots, SlotOutcome};
use worker::engine::{Abandon, EngineError, MeanGradient, UpdateOutcome};
use worker::run::backend::StepTrainer;

use crate::heard::Heard;
use crate::mesh::SCALARS;
use crate::net::Node;
use crate::truth::{Weights, digest, layout, scalars, weights};
use crate::world::World;

/// A slot is computed in so many pieces; between two of them it can be abandoned.
const LAYERS: u64 = 4;

pub struct ToyTrainer {
    world: Arc<World>,
    node: Node,
    heard: Heard,
    step: u64,
    weights: Weights,
    abandon: Abandon,
    open_step: Option<u64>,
    held: HeldSlots,
    sums: [i64; SCALARS],
    invalid: u64,
    /// The next digest that is asked for is wrong.
    is_wrong: AtomicBool,
}

impl ToyTrainer {
    pub fn new(
        (world, node, heard): (Arc<World>, Node, Heard),
        (step, weights): (u64, Weights),
    ) -> Self {
        Self {
            world,
            node,
            heard,
            step,
            weights,
            abandon: Abandon::default(),
            open_step: None,
            held: HeldSlots::new(),
            sums: [0; SCALARS],
            invalid: 0,
            is_wrong: AtomicBool::default(),
        }
    }

    /// Sums of the slots held, which wrap around.
    pub fn sums(&self) -> &[i64; SCALARS] {
        &self.sums
    }

    pub fn invalid(&self) -> u64 {
        self.invalid
    }

    /// Spends the time of a slot. An error where it was abandoned.
    async fn pass(&self, slot: u32) -> Result<(), EngineError> {
        let slot_ms = self.slot_ms(slot);
        for layer in 0..LAYERS {
            let piece = slot_ms * (layer + 1) / LAYERS - slot_ms * layer / LAYERS;
            self.world.net.sleep(self.node, piece).await;
            if self.abandon.is_asked() {
                return Err(EngineError::Abandoned);
            }
        }
        Ok(())
    }

    /// Machines differ in speed, and so does one machine from slot to slot.
    fn slot_ms(&self, slot: u32) -> u64 {
        let dice = self.world.dice;
        let key = [11, self.node.into()];
        let pace = 10 + dice.below(120, &key);
        pace + dice.below(pace, &[12, self.node.into(), self.step, slot.into()])
    }

    fn update(&mut self, mean: &MeanGradient) -> UpdateOutcome {
        let MeanGradient { values, invalid } = mean;
        let (world, step) = (self.world.clone(), self.step);
        self.weights = world.model.apply(&self.weights, step, values, *invalid);
        self.step += 1;
        world.oracle.updated(step, *invalid, &self.weights);
        if world.computes_wrongly(self.node, self.step) {
            self.is_wrong.store(true, Ordering::SeqCst);
        }
        UpdateOutcome {
            grad_norm: 1.0,
            skipped: *invalid > 0,
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
        SCALARS as u64
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
            self.forget_slots();
            self.open_step = Some(step);
        }
        Ok(())
    }

    fn forget_slots(&mut self) {
        self.open_step = None;
        self.held.clear();
        self.sums = [0; SCALARS];
        self.invalid = 0;
    }

    async fn train_slot(
        &mut self,
        slot: u32,
        blocks: &[Block],
    ) -> Result<SlotOutcome, EngineError> {
        if let Some(outcome) = self.held.get(&slot) {
            return Ok(*outcome);
        }
        // Of the step that was opened, so that a slot that is taken for one of another step changes everything.
        let step = self.open_step.unwrap_or(u64::MAX);
        if !self.heard.is_due(step, slot) {
            let text = format!(
                "worker {} began slot {slot} of step {step}, which was void",
                self.node
            );
            self.world.oracle.violation(text);
        }
        self.pass(slot).await?;
        let model = &self.world.model;
        let result = model.compute(&self.weights, step, (PlanKind::Train, slot), blocks);
        for (sum, part) in self.sums.iter_mut().zip(result.sums) {
            *sum += part;
        }
        self.invalid += result.outcome.invalid_scalars;
        self.held.insert(slot, result.outcome);
        Ok(result.outcome)
    }

    async fn eval_slot(&mut self, blocks: &[Block]) -> Result<SlotOutcome, EngineError> {
        self.pass(u32::MAX).await?;
        let model = &self.world.model;
        let result = model.compute(&self.weights, self.step, (PlanKind::Eval, 0), blocks);
        Ok(result.outcome)
    }

    fn apply(&mut self, mean: &MeanGradient, _: f64) -> Result<UpdateOutcome, EngineError> {
        Ok(self.update(mean))
    }

    fn repeat(&mut self, mean: &MeanGradient, _: f64) -> Result<UpdateOutcome, EngineError> {
        Ok(self.update(mean))
    }

    fn mean_in_memory(&mut self, mean: MeanGradient) -> Result<Vec<f32>, EngineError> {
        Ok(mean.values)
    }

    fn weights_digest(&self) -> Result<String, EngineError> {
        Ok(match self.is_wrong.swap(false, Ordering::SeqCst) {
            true => "f".repeat(64),
            false => digest(&self.weights),
        })
    }

    fn snapshot(&self) -> Result<Snapshot, EngineError> {
        let moments = Flat::from(vec![0.0; SCALARS]);
        Ok(Snapshot {
            step: self.step,
            layout: layout(),
            weights: scalars(&self.weights).into(),
            moments: vec![moments.clone().into(), moments.into()],
        })
    }

    fn restore(&mut self, snapshot: &Snapshot) -> Result<(), EngineError> {
        self.step = snapshot.step;
        self.weights = weights(&snapshot.weights.widened(0..SCALARS));
        self.forget_slots();
        Ok(())
    }
}
