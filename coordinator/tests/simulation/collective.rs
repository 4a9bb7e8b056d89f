//! The toy collective, as the real step uses it: sums over the toy mesh, states over it, and the toy's feeds.

use std::sync::Arc;

use common::files::Layout;
use proto::v1;
use tokio::sync::mpsc;
use tokio_util::sync::DropGuard;
use worker::collective::CollectiveError;
use worker::collective::feed::{News, Source, Update};
use worker::collective::state::StateCopy;
use worker::engine::MeanGradient;
use worker::engine::slot::{self, HeldSlots, SlotOutcome};
use worker::run::backend::{FollowedFeed, StepCollective, StepTrainer};
use worker::run::error::RunError;

use crate::feed::follow;
use crate::heard::Heard;
use crate::mesh::{Collective, Start};
use crate::net::Node;
use crate::session::node_at;
use crate::trainer::ToyTrainer;
use crate::world::World;

pub struct ToyCollective {
    pub world: Arc<World>,
    pub node: Node,
    pub heard: Heard,
    pub collective: Arc<Collective>,
}

impl StepCollective<ToyTrainer> for ToyCollective {
    type Feed = ToyFeed;

    async fn sum_up(
        &mut self,
        generation: u64,
        plan: &v1::Plan,
        trainer: &mut ToyTrainer,
    ) -> Result<(MeanGradient, HeldSlots), RunError> {
        if !self.heard.is_newest(generation) {
            let text = format!(
                "worker {} took part in a generation that was over",
                self.node
            );
            self.world.oracle.violation(text);
        }
        let mesh = self.collective.mesh(generation).await?;
        let start = Start {
            step: plan.step,
            held: slot::to_wire(trainer.held()),
            invalid: trainer.invalid(),
        };
        let reduced = mesh.all_reduce(start, trainer.sums()).await?;
        self.world
            .oracle
            .summed(plan.step, plan.slots, &reduced.slots);
        let slots = reduced.slots.iter().map(|held| (held.slot, outcome(held)));
        let values = reduced.sums.iter().map(|sum| *sum as f32).collect();
        let invalid = reduced.invalid;
        Ok((MeanGradient { values, invalid }, slots.collect()))
    }

    fn reuse(&mut self, _: MeanGradient) {}

    async fn receive_state(
        &self,
        generation: &v1::Generation,
        _: &Arc<Layout>,
    ) -> Result<StateCopy, CollectiveError> {
        let mesh = self.collective.mesh(generation.generation).await?;
        mesh.receive_state(generation.source, generation.step).await
    }

    fn send_state(&self, generation: &v1::Generation, state: StateCopy) {
        let (behind, number) = (generation.behind.clone(), generation.generation);
        let collective = self.collective.clone();
        tokio::spawn(async move {
            if let Ok(mesh) = collective.mesh(number).await {
                mesh.send_state(&behind, &state).await;
            }
        });
    }

    fn follow(&self, source: Source, _: Arc<Layout>) -> ToyFeed {
        let (sender, news) = mpsc::unbounded_channel();
        let attempt = source.attempt;
        let peer = node_at(&source.peer.address);
        let tell = move |news| drop(sender.send(news));
        let net = self.world.net.clone();
        ToyFeed {
            attempt,
            news,
            _guard: follow(net, self.node, peer, (source.worker, attempt), tell),
        }
    }

    fn begin_feed(
        &self,
        _: [u8; 32],
        feed: &v1::Feed,
        copy: impl FnOnce() -> Result<StateCopy, RunError>,
    ) -> Result<(), RunError> {
        let feeds = self.collective.feeds();
        feeds.begin(feed.worker, feed.attempt, copy()?);
        Ok(())
    }

    fn is_followed(&self) -> bool {
        self.collective.feeds().are_followed()
    }

    fn publish(&self, update: Update) {
        self.collective.feeds().publish(&update);
    }

    fn conclude_feeds(&self, members: &[u64], fed: &[u64], step: u64) {
        self.collective.feeds().conclude(members, fed, step);
    }
}

pub struct ToyFeed {
    attempt: u64,
    news: mpsc::UnboundedReceiver<News>,
    _guard: DropGuard,
}

impl FollowedFeed for ToyFeed {
    fn attempt(&self) -> u64 {
        self.attempt
    }

    async fn next(&mut self) -> News {
        match self.news.recv().await {
            Some(news) => news,
            None => std::future::pending().await,
        }
    }
}

fn outcome(held: &v1::HeldSlot) -> SlotOutcome {
    SlotOutcome {
        loss_sum: held.loss_sum,
        trained_tokens: held.trained_tokens,
        correct_tokens: held.correct_tokens,
        invalid_scalars: held.invalid_scalars,
    }
}
