//! What befalls a run: failpoints by process and deeds by step, written down or drawn from a seed.

use common::failpoint;
use common::rng::CounterRng;

/// Workers at a time.
pub const SEATS: usize = 3;

/// Something done to a running process from outside.
#[derive(Clone, Debug, PartialEq)]
pub enum Deed {
    /// SIGKILL to the worker in this seat; another takes the seat.
    Kill(usize),
    /// SIGSTOP, and SIGCONT once the others have gone on without it.
    Stop(usize),
    /// Its connection to the coordinator passes nothing on, without closing, until the others have gone on.
    Cut(usize),
    /// SIGTERM: it leaves in good order and another takes the seat.
    Terminate(usize),
    KillCoordinator,
    /// SIGTERM: it saves a checkpoint, ends with the exit code that says so, and is started again.
    TerminateCoordinator,
    /// SIGSTOP, and SIGCONT a while later.
    StopCoordinator,
    /// The coordinator and all workers at once.
    KillEverybody,
}

/// One run and all that happens to it.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    pub steps: u64,
    /// Failpoints of the coordinator's lives, in order; empty for a life without one, as are all after the last.
    pub coordinator: Vec<String>,
    /// Failpoints of the workers: whoever is started takes the next.
    pub workers: Vec<String>,
    /// Done, in this order, when the step is committed.
    pub deeds: Vec<(u64, Deed)>,
    /// Places that must have killed or stopped somebody when the run is over.
    pub expected: Vec<String>,
}

impl Plan {
    pub fn quiet(steps: u64) -> Self {
        Self {
            steps,
            ..Self::default()
        }
    }

    pub fn coordinator(mut self, failpoints: &[&str]) -> Self {
        self.coordinator = failpoints.iter().map(ToString::to_string).collect();
        self
    }

    pub fn workers(mut self, failpoints: &[&str]) -> Self {
        self.workers = failpoints.iter().map(ToString::to_string).collect();
        self
    }

    pub fn deeds(mut self, deeds: &[(u64, Deed)]) -> Self {
        self.deeds = deeds.to_vec();
        self
    }

    pub fn expect(mut self, names: &[&str]) -> Self {
        self.expected = names.iter().map(ToString::to_string).collect();
        self
    }

    /// Drawn from `seed`: equal seeds give equal plans.
    pub fn random(seed: u64, steps: u64) -> Self {
        let mut rng = CounterRng::new(seed, &[0xC4A05]);
        let mut armed = |names: &[&str]| {
            let name = names[rng.below(names.len() as u64) as usize];
            let most = 2 << rng.below(4);
            let nth = 1 + rng.below(most);
            let deed = if rng.below(4) == 0 { "=stop" } else { "" };
            match rng.below(3) {
                0 => String::new(),
                _ => format!("{name}:{nth}{deed}"),
            }
        };
        let coordinator = (0..3).map(|_| armed(failpoint::COORDINATOR)).collect();
        let workers = (0..8).map(|_| armed(failpoint::WORKER)).collect();
        let mut deeds: Vec<(u64, Deed)> = (0..rng.below(8))
            .map(|_| {
                let seat = rng.below(SEATS as u64) as usize;
                let deed = match rng.below(13) {
                    0..4 => Deed::Kill(seat),
                    4..6 => Deed::Stop(seat),
                    6..8 => Deed::Cut(seat),
                    8 => Deed::Terminate(seat),
                    9 => Deed::KillCoordinator,
                    10 => Deed::StopCoordinator,
                    11 => Deed::TerminateCoordinator,
                    _ => Deed::KillEverybody,
                };
                (rng.below(steps), deed)
            })
            .collect();
        deeds.sort_by_key(|(step, _)| *step);
        Self {
            steps,
            coordinator,
            workers,
            deeds,
            expected: Vec::new(),
        }
    }
}
