//! The ends of a simulated connection.

use std::task::{Context, Poll};

use super::state::Item;
use super::{Broken, Net, Payload};

/// Frames of one direction under way or unread before the sender must wait.
const WINDOW: usize = 64;

/// One end of a connection.
pub struct End<P: Payload> {
    pub sender: Sender<P>,
    pub receiver: Receiver<P>,
}

pub struct Sender<P: Payload> {
    pub(super) net: Net<P>,
    pub(super) pipe: usize,
}

pub struct Receiver<P: Payload> {
    pub(super) net: Net<P>,
    pub(super) pipe: usize,
    pub(super) closes_both: bool,
}

impl<P: Payload> Sender<P> {
    pub fn send(&self, frame: P) {
        self.net.state().send(self.pipe, Item::Frame(frame));
        self.net.changed.notify_one();
    }

    /// Waits until the other end can take more. An error where nobody reads any more.
    pub fn poll_ready(&self, context: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let mut state = self.net.state();
        let pipe = &mut state.pipes[self.pipe];
        if pipe.broken || pipe.reader_gone {
            return Poll::Ready(Err(Broken));
        }
        if pipe.flight.len() + pipe.arrived.len() < WINDOW {
            return Poll::Ready(Ok(()));
        }
        pipe.writer = Some(context.waker().clone());
        Poll::Pending
    }

    /// Whether nobody reads any more; the task is woken when that changes.
    pub fn is_over(&self, context: &mut Context<'_>) -> bool {
        let mut state = self.net.state();
        let pipe = &mut state.pipes[self.pipe];
        pipe.writer = Some(context.waker().clone());
        pipe.broken || pipe.reader_gone
    }
}

impl<P: Payload> Drop for Sender<P> {
    /// Closes the connection after what is under way.
    fn drop(&mut self) {
        self.net.state().send(self.pipe, Item::Broken);
        self.net.changed.notify_one();
    }
}

impl<P: Payload> Receiver<P> {
    /// When this is dropped, the other direction ends too.
    pub fn close_both_on_drop(&mut self) {
        self.closes_both = true;
    }

    pub async fn receive(&mut self) -> Result<P, Broken> {
        std::future::poll_fn(|context| self.poll_receive(context)).await
    }

    pub fn poll_receive(&mut self, context: &mut Context<'_>) -> Poll<Result<P, Broken>> {
        let mut state = self.net.state();
        let pipe = &mut state.pipes[self.pipe];
        match pipe.arrived.pop_front() {
            Some(Item::Frame(frame)) => {
                if let Some(writer) = pipe.writer.take() {
                    writer.wake();
                }
                Poll::Ready(Ok(frame))
            }
            Some(Item::Broken) => {
                pipe.arrived.push_back(Item::Broken);
                Poll::Ready(Err(Broken))
            }
            Some(Item::Open) | None => {
                pipe.reader = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl<P: Payload> Drop for Receiver<P> {
    fn drop(&mut self) {
        let mut state = self.net.state();
        let pipe = &mut state.pipes[self.pipe];
        pipe.reader_gone = true;
        pipe.arrived.clear();
        if let Some(writer) = pipe.writer.take() {
            writer.wake();
        }
        let back = pipe.back;
        if self.closes_both {
            state.send(back, Item::Broken);
            if let Some(writer) = state.pipes[back].writer.take() {
                writer.wake();
            }
            drop(state);
            self.net.changed.notify_one();
        }
    }
}
