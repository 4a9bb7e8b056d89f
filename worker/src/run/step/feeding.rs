//! Feeds, as the step sees them: a newcomer takes what its feed brings, a member hands its updates on.
//!
//! Both happen between two orders, so that whatever else the coordinator says is obeyed as soon as without a feed.

use proto::v1;
use proto::v1::worker_message::Message as Up;

use super::super::backend::{FollowedFeed, StepCollective, StepTrainer};
use super::super::error::RunError;
use super::StepLoop;
use super::handover::updates_in;
use crate::collective::feed::{MEMBER, News, Source, Update};
use crate::engine::MeanGradient;
use crate::engine::slot::HeldSlots;

impl<Trainer, Collective> StepLoop<Trainer, Collective>
where
    Trainer: StepTrainer,
    Collective: StepCollective<Trainer>,
{
    /// Follows `source` and nobody else.
    pub(super) fn follow(&mut self, source: Source) {
        // The feed before it ends first: its state need not fit beside the new one.
        self.following = None;
        self.entering = None;
        let layout = self.trainer.layout();
        self.following = Some(self.collective.follow(source, layout));
    }

    /// Takes what the feed has brought.
    pub(super) async fn take(&mut self, news: News) -> Result<(), RunError> {
        let Some(attempt) = self.following.as_ref().map(FollowedFeed::attempt) else {
            return Ok(());
        };
        let report = match news {
            News::State(state) => {
                match updates_in(&state.memory) {
                    Ok(updates) => self.take_over(&state.snapshot, updates)?,
                    Err(reason) => {
                        self.lose_feed(attempt, reason).await;
                        return Ok(());
                    }
                }
                None
            }
            // The one before it was taken as well: a feed has no gaps.
            News::Update(update) => Some(self.repeat(update)?),
            News::Lost(reason) => {
                self.lose_feed(attempt, reason).await;
                return Ok(());
            }
        };
        let step = self.trainer.step();
        self.send(Up::Synced(v1::Synced {
            attempt,
            step,
            report,
        }))
        .await;
        self.save_state()?;
        // As a member already, where its last updates were on their way when the generation began.
        match self.entering.take_if(|generation| generation.step <= step) {
            Some(generation) => self.enter(&generation).await,
            None => Ok(()),
        }
    }

    async fn lose_feed(&mut self, attempt: u64, reason: String) {
        self.following = None;
        self.entering = None;
        match reason == MEMBER {
            // As every feed ends: the generation that it led into has begun.
            true => tracing::debug!("the feed of this worker's state is over: {reason}"),
            false => tracing::warn!("the feed of this worker's state was lost: {reason}"),
        }
        self.send(Up::FeedLost(v1::FeedLost { attempt, reason }))
            .await;
    }

    /// Makes an update as the members made it.
    fn repeat(&mut self, update: Update) -> Result<v1::StepReport, RunError> {
        // A skipped one comes without a gradient, only with the mark that makes it skip.
        let mean = MeanGradient {
            invalid: u64::from(update.skipped),
            values: update.mean,
        };
        let outcome = self.trainer.repeat(&mean, update.learning_rate)?;
        let report = v1::StepReport {
            step: self.trainer.step(),
            grad_norm: outcome.grad_norm,
            skipped: outcome.skipped,
            weights_digest: match update.digest {
                true => self.trainer.weights_digest()?,
                false => String::new(),
            },
            ..v1::StepReport::default()
        };
        self.remember(report.clone(), &update.slots);
        Ok(report)
    }

    /// Ends the feeds that a new generation makes needless: a member follows nobody, and those who followed it and are members
    /// now need no more.
    pub(super) fn conclude_feeds(&mut self, generation: &v1::Generation) {
        self.following = None;
        let members: Vec<u64> = generation.members.iter().map(|m| m.worker).collect();
        let fed = generation.fed.iter();
        let fed: Vec<u64> = fed
            .filter_map(|rank| members.get(*rank as usize).copied())
            .collect();
        self.collective
            .conclude_feeds(&members, &fed, generation.step);
    }

    /// Lets a newcomer follow this worker, from a copy of its state.
    pub(super) fn feed(&self, run_id: [u8; 32], feed: &v1::Feed) -> Result<(), RunError> {
        self.collective
            .begin_feed(run_id, feed, || self.state_copy())
    }

    /// Hands the update that was just made to whoever follows.
    pub(super) fn publish(
        &mut self,
        plan: &v1::Plan,
        skipped: bool,
        mean: Trainer::Mean,
        slots: HeldSlots,
    ) -> Result<(), RunError> {
        let mean = match !skipped && self.collective.is_followed() {
            true => self.trainer.mean_in_memory(mean)?,
            false => {
                self.collective.reuse(mean);
                Vec::new()
            }
        };
        self.collective.publish(Update {
            step: plan.step,
            learning_rate: plan.learning_rate,
            skipped,
            digest: plan.digest,
            slots,
            mean,
        });
        Ok(())
    }
}
