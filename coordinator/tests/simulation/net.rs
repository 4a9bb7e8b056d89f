//! The simulated network: machines, connections between them, and everything that can go wrong with those.
//!
//! A line keeps its order, as TCP does: all calls between two machines share one, every exchange connection has its own.
//! Different lines overtake each other. Delays are a function of the seed, the two machines and the number of the frame.
//! One thing happens in a millisecond of simulated time, and the next only when everything that followed from it is done,
//! so equal seeds give equal runs.

pub mod link;
mod state;

use std::cmp::Reverse;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};

use self::link::{End, Receiver, Sender};
use self::state::{Action, Item, Machine, State, between, pair};
use crate::dice::Dice;

/// A machine: 0 is the coordinator's, the others are the workers'.
pub type Node = u32;
pub const COORDINATOR: Node = 0;

/// A silent connection to the coordinator is given up after so long (HTTP/2 keep-alive, interval and time-out).
const KEEPALIVE_MS: u64 = 15_000;
/// The connection is no more: the other end closed it, died, or could not be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("the connection broke")
    }
}

impl std::error::Error for Broken {}

/// What a connection is for: calls of the coordinator, or an exchange between workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Call,
    Peer,
}

/// What travels.
pub trait Payload: Send + 'static {
    /// For the trace: equal content gives equal words.
    fn describe(&self) -> String;
}

/// Handle to the network; clones are the same network.
pub struct Net<P: Payload> {
    state: Arc<Mutex<State<P>>>,
    changed: Arc<Notify>,
}

impl<P: Payload> Clone for Net<P> {
    fn clone(&self) -> Self {
        Self {
            state: self.state.clone(),
            changed: self.changed.clone(),
        }
    }
}

impl<P: Payload> Net<P> {
    pub fn new(dice: Dice, uneven_lines: bool, readable: bool) -> Self {
        Self {
            state: Arc::new(Mutex::new(State::new(dice, uneven_lines, readable))),
            changed: Arc::default(),
        }
    }

    /// Lets things happen, one a millisecond, for ever.
    pub async fn run(self) {
        let mut last = 0;
        loop {
            let (next, started) = {
                let mut state = self.state();
                state.drop_abandoned();
                (state.queue.peek().map(|Reverse(key)| *key), state.started)
            };
            let Some((due, ..)) = next else {
                self.changed.notified().await;
                continue;
            };
            let due = due.max(last + 1);
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(started + Duration::from_millis(due)) => {}
                () = self.changed.notified() => continue,
            }
            last = due;
            let mut state = self.state();
            let next = state.queue.pop();
            if let Some(action) = next.and_then(|Reverse((.., key))| state.actions.remove(&key)) {
                state.act(action, &self);
            }
        }
    }

    pub fn now_ms(&self) -> u64 {
        self.state().now()
    }

    pub fn digest(&self) -> String {
        self.state().trace.hasher.finalize().to_hex().to_string()
    }

    /// Puts a line into the trace.
    pub fn note(&self, line: impl FnOnce() -> String) {
        self.state().note(line);
    }

    /// A while on that machine's clock; it stands still while the machine hangs.
    pub async fn sleep(&self, node: Node, ms: u64) {
        let (sender, over) = oneshot::channel();
        {
            let mut state = self.state();
            let due = state.now() + ms;
            state.schedule(due, Action::Wake(sender, node));
        }
        self.changed.notify_one();
        // The sender is dropped only with the network.
        let _ = over.await;
    }

    /// Starts a machine, or starts it again. What calls it arrives at the receiver.
    pub fn start(&self, node: Node) -> mpsc::UnboundedReceiver<End<P>> {
        let (sender, incoming) = mpsc::unbounded_channel();
        let machine = Machine {
            listener: sender,
            frozen: false,
            overslept: Vec::new(),
        };
        self.state().machines.insert(node, machine);
        incoming
    }

    pub fn connect(&self, from: Node, to: Node, kind: Kind) -> End<P> {
        let mut state = self.state();
        let (up, down) = (state.pipes.len(), state.pipes.len() + 1);
        state.open(from, to, kind, down);
        state.open(to, from, kind, up);
        state.send(up, Item::Open);
        drop(state);
        self.changed.notify_one();
        self.end(up, down)
    }

    fn end(&self, out: usize, back: usize) -> End<P> {
        End {
            sender: Sender {
                net: self.clone(),
                pipe: out,
            },
            receiver: Receiver {
                net: self.clone(),
                pipe: back,
                closes_both: false,
            },
        }
    }

    /// The machine's process dies: what it sent last may be lost, what it was sent is.
    pub fn kill(&self, node: Node) {
        let mut state = self.state();
        state.note(|| format!("-- {} dies", name(node)));
        state.machines.remove(&node);
        state.break_where(|pipe| pipe.from == node || pipe.to == node, Some(node));
        drop(state);
        self.changed.notify_one();
    }

    /// All connections between two machines break.
    pub fn reset(&self, a: Node, b: Node) {
        let mut state = self.state();
        state.note(|| format!("-- connections of {} and {} break", name(a), name(b)));
        state.break_where(|pipe| between(pipe, a, b), None);
        drop(state);
        self.changed.notify_one();
    }

    /// Nothing passes between two machines until [`heal`](Self::heal).
    pub fn cut(&self, a: Node, b: Node) {
        let mut state = self.state();
        let now = state.now();
        state.note(|| format!("-- {} and {} are cut off", name(a), name(b)));
        state.cuts.entry(pair(a, b)).or_insert(now);
        state.schedule(now + KEEPALIVE_MS, Action::Expire(a, b, now));
        drop(state);
        self.changed.notify_one();
    }

    pub fn heal(&self, a: Node, b: Node) {
        let mut state = self.state();
        state.note(|| format!("-- {} and {} reach each other", name(a), name(b)));
        state.cuts.remove(&pair(a, b));
        state.resume(|pipe| between(pipe, a, b));
        drop(state);
        self.changed.notify_one();
    }

    /// The machine's process stands still; its kernel goes on taking what it is sent.
    pub fn freeze(&self, node: Node) {
        let mut state = self.state();
        let now = state.now();
        state.note(|| format!("-- {} hangs", name(node)));
        if let Some(machine) = state.machines.get_mut(&node) {
            machine.frozen = true;
        }
        state.schedule(now + KEEPALIVE_MS, Action::Expire(COORDINATOR, node, now));
        drop(state);
        self.changed.notify_one();
    }

    pub fn thaw(&self, node: Node) {
        let mut state = self.state();
        state.note(|| format!("-- {} goes on", name(node)));
        let now = state.now();
        let mut overslept = Vec::new();
        if let Some(machine) = state.machines.get_mut(&node) {
            machine.frozen = false;
            overslept = std::mem::take(&mut machine.overslept);
        }
        for sleeper in overslept {
            state.schedule(now + 1, Action::Wake(sleeper, node));
        }
        state.resume(|pipe| pipe.to == node);
        drop(state);
        self.changed.notify_one();
    }

    /// Everything from and to the machine takes long.
    pub fn slow(&self, node: Node, is_slow: bool) {
        let mut state = self.state();
        state.note(|| format!("-- {} slow: {is_slow}", name(node)));
        match is_slow {
            true => state.slow.insert(node),
            false => state.slow.remove(&node),
        };
    }

    pub fn is_up(&self, node: Node) -> bool {
        self.state().machines.contains_key(&node)
    }

    fn state(&self) -> MutexGuard<'_, State<P>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub fn name(node: Node) -> String {
    match node {
        COORDINATOR => "C ".to_owned(),
        node => format!("w{node}"),
    }
}
