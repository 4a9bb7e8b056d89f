//! What the network knows, and what happens next in it. Locked for single operations only.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::fmt::Write;
use std::task::Waker;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::link::End;
use super::{Kind, Net, Node, Payload, name};
use crate::dice::Dice;

pub(super) enum Item<P> {
    /// The first on its way to the called machine.
    Open,
    Frame(P),
    Broken,
}

pub(super) struct Pipe<P> {
    pub(super) from: Node,
    pub(super) to: Node,
    pub(super) kind: Kind,
    /// The other direction.
    pub(super) back: usize,
    /// Number on the line, when it is due, what it is.
    pub(super) flight: VecDeque<(u64, u64, Item<P>)>,
    pub(super) arrived: VecDeque<Item<P>>,
    /// A delivery is due in the queue.
    pub(super) scheduled: bool,
    /// Nothing more is taken.
    pub(super) broken: bool,
    /// The reader knows, or will when it looks.
    pub(super) told: bool,
    pub(super) reader_gone: bool,
    pub(super) line: LineKey,
    pub(super) reader: Option<Waker>,
    pub(super) writer: Option<Waker>,
}

/// From, to, and which exchange connection; 0 is the line of all calls.
pub(super) type LineKey = (Node, Node, u64);

/// One direction of one TCP connection.
#[derive(Clone, Copy, Default)]
pub(super) struct Line {
    pub(super) sent: u64,
    pub(super) last_due: u64,
}

/// When something is due; what comes first of several at one time does not depend on when they were planned.
pub(super) type Due = (u64, LineKey, u64);

pub(super) enum Action {
    Deliver(usize),
    Wake(oneshot::Sender<()>, Node),
    /// The keep-alive of calls between two machines that have not heard of each other since then.
    Expire(Node, Node, u64),
}

pub(super) struct Machine<P: Payload> {
    /// Who takes connections.
    pub(super) listener: mpsc::UnboundedSender<End<P>>,
    pub(super) frozen: bool,
    /// Due while it was frozen.
    pub(super) overslept: Vec<oneshot::Sender<()>>,
}

pub(super) struct State<P: Payload> {
    pub(super) dice: Dice,
    /// Some lines of calls are slow in one direction.
    pub(super) uneven_lines: bool,
    pub(super) started: Instant,
    pub(super) queue: BinaryHeap<Reverse<Due>>,
    pub(super) actions: BTreeMap<u64, Action>,
    pub(super) next_action: u64,
    pub(super) pipes: Vec<Pipe<P>>,
    pub(super) machines: BTreeMap<Node, Machine<P>>,
    /// Pairs that cannot reach each other, lower first, and since when.
    pub(super) cuts: BTreeMap<(Node, Node), u64>,
    pub(super) slow: BTreeSet<Node>,
    pub(super) lines: BTreeMap<LineKey, Line>,
    /// Exchange connections between two machines so far.
    pub(super) exchanges: BTreeMap<(Node, Node), u64>,
    pub(super) trace: Trace,
}

/// What happened, as a digest and, if asked for, on the terminal.
pub(super) struct Trace {
    pub(super) hasher: blake3::Hasher,
    pub(super) readable: bool,
}

impl<P: Payload> State<P> {
    pub(super) fn new(dice: Dice, uneven_lines: bool, readable: bool) -> Self {
        Self {
            dice,
            uneven_lines,
            started: Instant::now(),
            queue: BinaryHeap::new(),
            actions: BTreeMap::new(),
            next_action: 0,
            pipes: Vec::new(),
            machines: BTreeMap::new(),
            cuts: BTreeMap::new(),
            slow: BTreeSet::new(),
            lines: BTreeMap::new(),
            exchanges: BTreeMap::new(),
            trace: Trace {
                hasher: blake3::Hasher::new(),
                readable,
            },
        }
    }

    pub(super) fn now(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    pub(super) fn note(&mut self, line: impl FnOnce() -> String) {
        let mut text = format!("{:>7} ms  ", self.now());
        let _ = writeln!(text, "{}", line());
        self.trace.hasher.update(text.as_bytes());
        if self.trace.readable {
            print!("{text}");
        }
    }

    pub(super) fn schedule(&mut self, due: u64, action: Action) {
        let line = match &action {
            Action::Deliver(pipe) => self.pipes[*pipe].line,
            Action::Wake(_, node) => (*node, *node, 0),
            Action::Expire(..) => (0, 0, 0),
        };
        self.queue.push(Reverse((due, line, self.next_action)));
        self.actions.insert(self.next_action, action);
        self.next_action += 1;
    }

    pub(super) fn open(&mut self, from: Node, to: Node, kind: Kind, back: usize) {
        let number = match kind {
            Kind::Call => 0,
            Kind::Peer => {
                let number = self.exchanges.entry((from, to)).or_default();
                *number += 1;
                *number
            }
        };
        self.pipes.push(Pipe {
            from,
            to,
            kind,
            back,
            flight: VecDeque::new(),
            arrived: VecDeque::new(),
            scheduled: false,
            broken: false,
            told: false,
            reader_gone: false,
            line: (from, to, number),
            reader: None,
            writer: None,
        });
    }

    pub(super) fn send(&mut self, index: usize, item: Item<P>) {
        let now = self.now();
        let pipe = &mut self.pipes[index];
        if pipe.broken {
            return;
        }
        let line = self.lines.entry(pipe.line).or_default();
        line.sent += 1;
        let key = [pipe.from.into(), pipe.to.into(), pipe.line.2, line.sent];
        let draw = |bound: u64, what: u64| {
            self.dice
                .below(bound, &[key[0], key[1], key[2], key[3], what])
        };
        let mut delay = 1 + draw(8, 0);
        if draw(40, 1) == 0 {
            delay += draw(250, 2);
        }
        if self.slow.contains(&pipe.from) || self.slow.contains(&pipe.to) {
            delay *= 20;
        }
        // So that what two workers say, or hear, at one moment is up to half a second apart, however fast each line usually is.
        let is_uneven = self.uneven_lines && pipe.kind == Kind::Call;
        if is_uneven && self.dice.chance(33, &[key[0], key[1], 4]) {
            delay += draw(500, 5);
        }
        line.last_due = (line.last_due + 1).max(now + delay);
        pipe.broken |= matches!(item, Item::Broken);
        pipe.flight.push_back((line.sent, line.last_due, item));
        self.plan(index);
    }

    /// Forgets sleeps that nobody waits for any more.
    pub(super) fn drop_abandoned(&mut self) {
        while let Some(Reverse((.., key))) = self.queue.peek()
            && let Some(Action::Wake(sleeper, _)) = self.actions.get(key)
            && sleeper.is_closed()
        {
            self.actions.remove(key);
            self.queue.pop();
        }
    }

    /// Sees to it that the first frame under way is delivered when it is due.
    pub(super) fn plan(&mut self, index: usize) {
        let pipe = &mut self.pipes[index];
        if let Some((_, due, _)) = pipe.flight.front()
            && !pipe.scheduled
        {
            pipe.scheduled = true;
            let due = *due;
            self.schedule(due, Action::Deliver(index));
        }
    }

    pub(super) fn act(&mut self, action: Action, net: &Net<P>) {
        match action {
            Action::Deliver(index) => self.deliver(index, net),
            Action::Wake(sleeper, node) => match self.machines.get_mut(&node) {
                Some(machine) if machine.frozen => machine.overslept.push(sleeper),
                // A dead machine's sleepers are gone.
                _ => drop(sleeper.send(())),
            },
            Action::Expire(a, b, since) => {
                let cut = self.cuts.get(&pair(a, b)) == Some(&since);
                let frozen = |node| self.machines.get(&node).is_some_and(|m| m.frozen);
                if cut || frozen(a) || frozen(b) {
                    self.expire(a, b);
                }
            }
        }
    }

    pub(super) fn deliver(&mut self, index: usize, net: &Net<P>) {
        let pipe = &mut self.pipes[index];
        pipe.scheduled = false;
        let (from, to, back) = (pipe.from, pipe.to, pipe.back);
        let frozen = self.machines.get(&to).is_some_and(|m| m.frozen);
        if self.cuts.contains_key(&pair(from, to)) || frozen {
            return;
        }
        let Some((.., item)) = self.pipes[index].flight.pop_front() else {
            return;
        };
        match item {
            Item::Open => {
                let machine = self.machines.get(&to);
                let listener = machine.map(|m| &m.listener).filter(|l| !l.is_closed());
                // An end must not be dropped here, where the network is locked: only who listens gets one.
                if listener.is_none_or(|listener| listener.send(net.end(back, index)).is_err()) {
                    self.send(back, Item::Broken);
                    self.pipes[index].broken = true;
                }
            }
            item => {
                let line = match &item {
                    Item::Frame(frame) => frame.describe(),
                    _ => "broken".to_owned(),
                };
                if !line.is_empty() && !self.pipes[index].reader_gone {
                    self.note(|| format!("{} -> {}  {line}", name(from), name(to)));
                }
                let pipe = &mut self.pipes[index];
                pipe.told |= matches!(item, Item::Broken);
                pipe.arrived.push_back(item);
                if let Some(reader) = pipe.reader.take() {
                    reader.wake();
                }
            }
        }
        self.plan(index);
    }

    /// Loses the end of what is under way, then ends both directions of every connection that fits.
    pub(super) fn break_where(&mut self, fits: impl Fn(&Pipe<P>) -> bool, dead: Option<Node>) {
        for index in 0..self.pipes.len() {
            let pipe = &self.pipes[index];
            if pipe.broken || !fits(pipe) {
                continue;
            }
            // All pipes of a line lose what was sent after the same moment.
            let sent = self.lines.get(&pipe.line).map_or(0, |line| line.sent);
            let key = [pipe.from.into(), pipe.to.into(), pipe.line.2, sent, 3];
            let last = sent - self.dice.below(sent.min(6) + 1, &key);
            let pipe = &mut self.pipes[index];
            pipe.flight.retain(|(number, ..)| *number <= last);
            if dead == Some(pipe.to) {
                self.break_at_once(index);
            }
        }
        for index in 0..self.pipes.len() {
            if !self.pipes[index].broken && fits(&self.pipes[index]) {
                self.send(index, Item::Broken);
            }
        }
    }

    /// The reader learns now, whatever is under way.
    pub(super) fn break_at_once(&mut self, index: usize) {
        let pipe = &mut self.pipes[index];
        pipe.flight.clear();
        (pipe.broken, pipe.told) = (true, true);
        pipe.arrived.push_back(Item::Broken);
        for waker in [pipe.reader.take(), pipe.writer.take()]
            .into_iter()
            .flatten()
        {
            waker.wake();
        }
    }

    pub(super) fn expire(&mut self, a: Node, b: Node) {
        self.note(|| format!("-- calls between {} and {} time out", name(a), name(b)));
        for index in 0..self.pipes.len() {
            let pipe = &self.pipes[index];
            if pipe.told || pipe.kind != Kind::Call || !between(pipe, a, b) {
                continue;
            }
            match self.machines.get(&pipe.to).is_some_and(|m| m.frozen) {
                // It learns of it when it wakes.
                true => self.send(index, Item::Broken),
                false => self.break_at_once(index),
            }
        }
    }

    /// Goes on with what could not be delivered.
    pub(super) fn resume(&mut self, fits: impl Fn(&Pipe<P>) -> bool) {
        for index in 0..self.pipes.len() {
            if fits(&self.pipes[index]) {
                self.plan(index);
            }
        }
    }
}

pub(super) fn pair(a: Node, b: Node) -> (Node, Node) {
    (a.min(b), a.max(b))
}

pub(super) fn between<P>(pipe: &Pipe<P>, a: Node, b: Node) -> bool {
    pair(pipe.from, pipe.to) == pair(a, b)
}
