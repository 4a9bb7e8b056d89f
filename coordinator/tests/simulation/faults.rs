//! What happens to a run, drawn from its seed: who comes when, who dies, hangs, is cut off or becomes slow.

use crate::dice::Dice;
use crate::net::{COORDINATOR, Node};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A process starts, for the first time or again.
    Start(Node),
    Kill(Node),
    /// SIGTERM: a worker hands over and leaves.
    Drain(Node),
    Freeze(Node),
    Thaw(Node),
    Cut(Node, Node),
    Heal(Node, Node),
    /// Connections between two machines break.
    Reset(Node, Node),
    Slow(Node),
    Fast(Node),
}

impl Fault {
    /// It makes something work again.
    pub fn mends(self) -> bool {
        matches!(self, Self::Thaw(_) | Self::Heal(..) | Self::Fast(_))
    }
}

/// One run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub min_workers: usize,
    pub max_workers: Option<usize>,
    /// Some slots have gradients that are not finite.
    pub not_finite: bool,
    /// A worker computes wrongly at this step.
    pub wrong: Option<(Node, u64)>,
    /// The state after this step arrives with other weights, once.
    pub spoiled: Option<u64>,
    /// Some lines between coordinator and workers are far slower in one direction than others are.
    pub uneven_lines: bool,
    /// By time, in milliseconds.
    pub faults: Vec<(u64, Fault)>,
}

const WORKERS: u64 = 4;
/// Longer than any run that goes on takes.
pub const PARTED_MS: u64 = 600_000;

impl Plan {
    /// One worker that nothing happens to.
    pub fn quiet() -> Self {
        Self {
            seed: 0,
            min_workers: 1,
            max_workers: None,
            not_finite: false,
            wrong: None,
            spoiled: None,
            uneven_lines: false,
            faults: vec![(0, Fault::Start(1))],
        }
    }

    /// Everything at once, or what else the seed says.
    pub fn random(seed: u64) -> Self {
        let dice = Dice::new(seed);
        let workers = 1 + dice.below(WORKERS, &[1]);
        let mut faults = Vec::new();
        for node in 1..=workers {
            let late = match dice.chance(30, &[2, node]) {
                true => dice.below(6_000, &[3, node]),
                false => dice.below(300, &[3, node]),
            };
            faults.push((late, Fault::Start(node as Node)));
        }
        for number in 0..dice.below(8, &[4]) {
            let at = 200 + dice.below(8_000, &[5, number]);
            add(&mut faults, dice, number, at, workers);
        }
        // Equal times stay in the order in which they were drawn.
        faults.sort_by_key(|(at, _)| *at);
        let min_workers = 1 + dice.below(workers.min(3), &[6]) as usize;
        Self {
            seed,
            min_workers,
            max_workers: dice
                .chance(25, &[7])
                .then(|| min_workers + dice.below(2, &[8]) as usize),
            not_finite: dice.chance(20, &[9]),
            wrong: None,
            spoiled: None,
            uneven_lines: dice.chance(50, &[11]),
            faults,
        }
    }

    /// One of four workers computes wrongly; nothing else happens.
    pub fn wrong(seed: u64) -> Self {
        let dice = Dice::new(seed);
        let start = |node: u64| (dice.below(300, &[3, node]), Fault::Start(node as Node));
        let mut faults: Vec<_> = (1..=4).map(start).collect();
        faults.sort_by_key(|(at, _)| *at);
        Self {
            seed,
            min_workers: 4,
            max_workers: None,
            not_finite: false,
            wrong: Some((1 + dice.below(4, &[1]) as Node, 1 + dice.below(6, &[2]))),
            spoiled: None,
            uneven_lines: false,
            faults,
        }
    }

    /// One of several workers and the others do not reach each other any more, for longer than the run may take; the
    /// coordinator reaches all.
    pub fn parted(seed: u64) -> Self {
        let dice = Dice::new(seed);
        let workers = 3 + dice.below(2, &[1]);
        let start = |node: u64| (dice.below(300, &[3, node]), Fault::Start(node as Node));
        let mut faults: Vec<_> = (1..=workers).map(start).collect();
        let (alone, at) = (1 + dice.below(workers, &[2]), dice.below(1_500, &[4]));
        part(&mut faults, alone, workers, (at, at + PARTED_MS));
        faults.sort_by_key(|(at, _)| *at);
        Self {
            seed,
            min_workers: 2,
            max_workers: None,
            not_finite: false,
            wrong: None,
            spoiled: None,
            uneven_lines: false,
            faults,
        }
    }

    /// The coordinator and two of three workers die; the third is out of its sight, and comes back when a new worker has
    /// begun without it.
    pub fn deserted(seed: u64) -> Self {
        let dice = Dice::new(seed);
        let start = |node: u64| (dice.below(300, &[3, node]), Fault::Start(node as Node));
        let mut faults: Vec<_> = (1..=3).map(start).collect();
        let at = 1_000 + dice.below(6_000, &[1]);
        let (leaves, returns) = match dice.chance(50, &[2]) {
            true => (Fault::Freeze(1), Fault::Thaw(1)),
            false => (Fault::Cut(COORDINATOR, 1), Fault::Heal(COORDINATOR, 1)),
        };
        for fault in [
            leaves,
            Fault::Kill(COORDINATOR),
            Fault::Kill(2),
            Fault::Kill(3),
        ] {
            faults.push((at, fault));
        }
        let again = at + 100;
        for fault in [Fault::Start(COORDINATOR), Fault::Start(4)] {
            faults.push((again, fault));
        }
        faults.push((again + dice.below(8_000, &[5]), returns));
        faults.sort_by_key(|(at, _)| *at);
        Self {
            seed,
            faults,
            ..Self::quiet()
        }
    }

    /// A checkpoint, or the result, comes with other weights than its step; nothing else happens.
    pub fn spoiled(seed: u64) -> Self {
        Self {
            wrong: None,
            spoiled: Some([2, 4, 6, 7][seed as usize % 4]),
            ..Self::wrong(seed)
        }
    }
}

/// Cuts one worker off from all others.
fn part(faults: &mut Vec<(u64, Fault)>, alone: u64, workers: u64, (from, to): (u64, u64)) {
    for other in (1..=workers).filter(|other| *other != alone) {
        let (a, b) = (alone as Node, other as Node);
        faults.extend([(from, Fault::Cut(a, b)), (to, Fault::Heal(a, b))]);
    }
}

fn add(faults: &mut Vec<(u64, Fault)>, dice: Dice, number: u64, at: u64, workers: u64) {
    let draw = |bound: u64, what: u64| dice.below(bound, &[10, number, what]);
    let node = 1 + draw(workers, 1) as Node;
    let other = 1 + draw(workers, 2) as Node;
    let mut push = |at, fault| faults.push((at, fault));
    // Most troubles are short; some outlast every deadline.
    let lasts = match draw(4, 3) {
        0 => 5_000 + draw(30_000, 4),
        _ => 20 + draw(2_500, 4),
    };
    match draw(13, 0) {
        0..=2 => {
            push(at, Fault::Kill(node));
            push(at + lasts, Fault::Start(node));
        }
        3 => {
            push(at, Fault::Freeze(node));
            push(at + lasts, Fault::Thaw(node));
        }
        4 => {
            push(at, Fault::Cut(COORDINATOR, node));
            push(at + lasts, Fault::Heal(COORDINATOR, node));
        }
        5 if node != other => {
            push(at, Fault::Cut(node, other));
            push(at + lasts, Fault::Heal(node, other));
        }
        6 if node != other => push(at, Fault::Reset(node, other)),
        7 => push(at, Fault::Reset(COORDINATOR, node)),
        8 => {
            push(at, Fault::Kill(COORDINATOR));
            push(at + lasts.min(6_000), Fault::Start(COORDINATOR));
        }
        11 => part(faults, node.into(), workers, (at, at + lasts)),
        9..=10 => {
            push(at, Fault::Drain(node));
            // Where it takes its time to leave, it cannot start again before that.
            for later in [lasts, 60_000, 300_000] {
                push(at + later, Fault::Start(node));
            }
        }
        _ => {
            push(at, Fault::Slow(node));
            push(at + lasts, Fault::Fast(node));
        }
    }
}
