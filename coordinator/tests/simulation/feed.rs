//! The toy feed: a newcomer copies a member's state and repeats its updates, over a connection that may break at any
//! frame; it calls again and goes on where it was.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, DropGuard};
use worker::collective::feed::{News, Update};
use worker::collective::state::StateCopy;

use crate::mesh::PeerFrame;
use crate::net::link::End;
use crate::net::{Kind, Node};
use crate::rpc::{Network, Packet};

/// Connections in a row that bring nothing, after which a follower gives up.
const MAX_CALLS: u32 = 5;
const PAUSE_MS: u64 = 200;
/// How long a source waits to be told of a follower that calls.
const UNKNOWN_MS: u64 = 2_000;

/// The member's side.
#[derive(Default)]
pub struct Feeds {
    /// By the follower's number.
    feeds: Mutex<BTreeMap<u64, Feed>>,
    changed: Notify,
}

struct Feed {
    attempt: u64,
    copy: StateCopy,
    log: Vec<Update>,
    is_over: bool,
    /// Step at which it is over, because its follower has become a member.
    until: Option<u64>,
}

impl Feeds {
    pub fn begin(&self, worker: u64, attempt: u64, copy: StateCopy) {
        let feed = Feed {
            attempt,
            copy,
            log: Vec::new(),
            is_over: false,
            until: None,
        };
        self.feeds().insert(worker, feed);
        self.changed.notify_waiters();
    }

    pub fn publish(&self, update: &Update) {
        for feed in self.feeds().values_mut() {
            // A member that got its state from others has none of the updates between.
            feed.is_over |= feed.copy.snapshot.step + feed.log.len() as u64 != update.step;
            feed.log.push(update.clone());
        }
        self.changed.notify_waiters();
    }

    pub fn are_followed(&self) -> bool {
        self.feeds().values().any(|feed| !feed.is_over)
    }

    /// Followers that are members now need the updates up to `step`, and those that were not fed to the end need none.
    pub fn conclude(&self, members: &[u64], fed: &[u64], step: u64) {
        for (worker, feed) in self.feeds().iter_mut() {
            if members.contains(worker) {
                feed.until = Some(step);
                feed.is_over |= !fed.contains(worker);
            }
        }
        self.changed.notify_waiters();
    }

    /// Serves a follower that has said what it has.
    pub async fn serve(
        &self,
        net: &Network,
        node: Node,
        mut call: End<Packet>,
        (worker, attempt, has): (u64, u64, Option<u64>),
    ) {
        let known = async {
            loop {
                let changed = self.changed.notified();
                if self
                    .feeds()
                    .get(&worker)
                    .is_some_and(|feed| feed.attempt == attempt)
                {
                    return;
                }
                changed.await;
            }
        };
        tokio::select! {
            biased;
            () = known => {}
            () = net.sleep(node, UNKNOWN_MS) => return,
        }
        let mut has = has;
        loop {
            let changed = self.changed.notified();
            match self.next(worker, attempt, &mut has) {
                Err(()) => return,
                Ok(Some(frame)) => {
                    call.sender.send(Packet::Peer(frame));
                    continue;
                }
                Ok(None) => {}
            }
            tokio::select! {
                biased;
                () = changed => {}
                // A follower says nothing more: its connection broke.
                _ = call.receiver.receive() => return,
            }
        }
    }

    /// What the follower lacks. An error where there is nothing for it any more.
    fn next(
        &self,
        worker: u64,
        attempt: u64,
        has: &mut Option<u64>,
    ) -> Result<Option<PeerFrame>, ()> {
        let feeds = self.feeds();
        let feed = feeds.get(&worker).filter(|feed| feed.attempt == attempt);
        let feed = feed.filter(|feed| !feed.is_over).ok_or(())?;
        let Some(step) = *has else {
            *has = Some(feed.copy.snapshot.step);
            return Ok(Some(PeerFrame::State(feed.copy.clone())));
        };
        if feed.until.is_some_and(|until| step >= until) {
            return Err(());
        }
        let index = step.checked_sub(feed.copy.snapshot.step).ok_or(())?;
        let update = feed.log.get(index as usize);
        *has = Some(step + u64::from(update.is_some()));
        Ok(update.cloned().map(PeerFrame::Update))
    }

    fn feeds(&self) -> MutexGuard<'_, BTreeMap<u64, Feed>> {
        self.feeds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Follows a peer, as this worker and by this attempt, until the guard is dropped.
pub fn follow(
    net: Network,
    node: Node,
    peer: Node,
    identity: (u64, u64),
    tell: impl Fn(News) + Send + Sync + 'static,
) -> DropGuard {
    let fence = CancellationToken::new();
    let guard = fence.clone().drop_guard();
    tokio::spawn(async move {
        let mut has = None;
        let mut calls = 0;
        let following = async {
            while calls < MAX_CALLS {
                let before = has;
                receive(&net, node, (peer, identity), &mut has, &tell).await;
                calls = if has == before { calls + 1 } else { 0 };
                net.sleep(node, PAUSE_MS).await;
            }
            tell(News::Lost("it broke off".to_owned()));
        };
        tokio::select! {
            biased;
            () = fence.cancelled() => {}
            () = following => {}
        }
    });
    guard
}

/// One connection.
async fn receive(
    net: &Network,
    node: Node,
    (peer, (worker, attempt)): (Node, (u64, u64)),
    has: &mut Option<u64>,
    tell: &(impl Fn(News) + Sync),
) {
    let mut end = net.connect(node, peer, Kind::Peer);
    end.sender.send(Packet::Peer(PeerFrame::Follow {
        worker,
        attempt,
        has: *has,
    }));
    while let Ok(Packet::Peer(frame)) = end.receiver.receive().await {
        match (frame, *has) {
            (PeerFrame::State(copy), None) => {
                *has = Some(copy.snapshot.step);
                tell(News::State(Box::new(copy)));
            }
            (PeerFrame::Update(update), Some(step)) if update.step == step => {
                *has = Some(step + 1);
                tell(News::Update(update));
            }
            _ => return,
        }
    }
}
