//! One run of the quick start with everything that its [`Plan`] does to it, from the first process to the last check.
//!
//! Whoever dies by SIGKILL is replaced, as an operator or Kubernetes would; whoever ends in another way than it should
//! is a failure. Every wait has a bound, and a failure shows the logs of all processes.

use std::collections::{BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::job::{Outcome, outcome, quiet, start_command};
use super::network::{Network, Wire};
use super::plan::{Deed, Plan, SEATS};
use super::process::{Process, was_killed};

/// A run waits below that: every step is exchanged.
const MIN_WORKERS: usize = 2;
/// What a coordinator ends with that was asked to stop.
const RESUMABLE: i32 = 75;
/// For a whole run.
const RUN_TIMEOUT: Duration = Duration::from_secs(240);
const SCENE_POLL_INTERVAL: Duration = Duration::from_millis(10);
/// How long the workers may take to end when the job is done.
const WORKERS_END_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a stopped coordinator stays stopped.
const COORDINATOR_PAUSE: Duration = Duration::from_secs(4);
/// Steps that the others must commit before a stopped or cut worker may come back.
const STEPS_WITHOUT: u64 = 2;
/// How long the others may take for that, and a worker that has left for good to be gone.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(90);

/// Runs a plan to its end and compares what comes out with the quiet run of one worker.
pub fn play(plan: &Plan, network: Network) {
    let quiet = quiet(plan.steps);
    let mut scene = Scene::new(plan, network);
    scene.play();
    scene.check(&quiet);
}

/// A port outside the range that systems draw from, so that nobody else's connection takes it while the coordinator is
/// down.
fn fixed_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let drawn =
            std::process::id() as u16 % 64 * 128 + NEXT.fetch_add(1, Ordering::SeqCst) % 8192;
        let port = 20_000 + drawn % 8192;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A place for a worker, and who is in it.
struct Seat {
    worker: Process,
    wire: Wire,
    /// It was asked to leave.
    is_leaving: bool,
    /// It has ended in good order.
    ended: Option<Instant>,
}

/// Somebody who is stopped or cut off for the time being.
struct Hold {
    /// None: the coordinator.
    seat: Option<usize>,
    is_cut: bool,
    since: Instant,
    until_step: u64,
}

struct Scene<'a> {
    plan: &'a Plan,
    network: Network,
    folder: TempDir,
    port: u16,
    coordinator: Process,
    /// It was asked to stop.
    coordinator_is_leaving: bool,
    seats: Vec<Seat>,
    holds: Vec<Hold>,
    deeds: VecDeque<(u64, Deed)>,
    coordinator_failpoints: VecDeque<String>,
    worker_failpoints: VecDeque<String>,
    lives: usize,
    newcomers: usize,
    /// Places that have killed or stopped somebody.
    reached: BTreeSet<String>,
    /// Of those that are no more.
    stories: Vec<String>,
    began: Instant,
}

impl<'a> Scene<'a> {
    fn new(plan: &'a Plan, network: Network) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = fixed_port();
        let mut coordinator_failpoints: VecDeque<String> = plan.coordinator.clone().into();
        let first = coordinator_failpoints.pop_front().unwrap_or_default();
        let coordinator = start_coordinator(plan, network, folder.path(), port, 0, &first);
        let mut scene = Self {
            plan,
            network,
            folder,
            port,
            coordinator,
            coordinator_is_leaving: false,
            seats: Vec::new(),
            holds: Vec::new(),
            deeds: plan.deeds.clone().into(),
            coordinator_failpoints,
            worker_failpoints: plan.workers.clone().into(),
            lives: 1,
            newcomers: 0,
            reached: BTreeSet::new(),
            stories: Vec::new(),
            began: Instant::now(),
        };
        for _ in 0..SEATS {
            let seat = scene.newcomer();
            scene.seats.push(seat);
        }
        scene
    }

    fn play(&mut self) {
        while !self.coordinator_is_done() {
            for seat in 0..SEATS {
                self.look_after(seat);
            }
            let committed = self.committed();
            self.release(committed);
            while self
                .deeds
                .front()
                .is_some_and(|(step, _)| *step <= committed)
            {
                if let Some((_, deed)) = self.deeds.pop_front() {
                    self.carry_out(&deed, committed);
                }
            }
            if self.began.elapsed() > RUN_TIMEOUT {
                self.fail("the run does not end");
            }
            std::thread::sleep(SCENE_POLL_INTERVAL);
        }
        self.dismiss();
    }

    /// Starts it again where it was killed.
    fn coordinator_is_done(&mut self) -> bool {
        let Some(status) = self.coordinator.end() else {
            if self.coordinator.stops_itself()
                && self.coordinator.is_stopped()
                && !self.is_held(None)
            {
                self.reached.insert(self.coordinator.place().to_owned());
                self.hold(None, false, 0);
            }
            return false;
        };
        if status.success() {
            return true;
        }
        let stopped_as_asked = status.code() == Some(RESUMABLE) && self.coordinator_is_leaving;
        if !was_killed(status) && !stopped_as_asked {
            self.fail(&format!("the coordinator ended: {status}"));
        }
        self.note_death_of_coordinator();
        let failpoint = self.coordinator_failpoints.pop_front().unwrap_or_default();
        let (folder, life) = (self.folder.path(), self.lives);
        self.coordinator =
            start_coordinator(self.plan, self.network, folder, self.port, life, &failpoint);
        self.lives += 1;
        self.coordinator_is_leaving = false;
        // Those whom the last one dismissed before it died.
        for seat in 0..SEATS {
            if self.seats[seat].ended.is_some() {
                self.replace(seat);
            }
        }
        false
    }

    fn note_death_of_coordinator(&mut self) {
        if !self.coordinator.is_felled && !self.coordinator_is_leaving {
            self.reached.insert(self.coordinator.place().to_owned());
        }
        self.holds.retain(|hold| hold.seat.is_some());
        self.stories.push(self.coordinator.story());
    }

    fn look_after(&mut self, number: usize) {
        let seat = &mut self.seats[number];
        if let Some(ended) = seat.ended {
            if ended.elapsed() > PROGRESS_TIMEOUT {
                self.fail(&format!(
                    "a worker in seat {number} left, but the job is not done"
                ));
            }
            return;
        }
        let Some(status) = seat.worker.end() else {
            if seat.worker.stops_itself() && seat.worker.is_stopped() && !self.is_held(Some(number))
            {
                let place = self.seats[number].worker.place().to_owned();
                self.reached.insert(place);
                self.hold(Some(number), false, self.committed());
            }
            return;
        };
        if was_killed(status) {
            if !seat.worker.is_felled {
                self.reached.insert(seat.worker.place().to_owned());
            }
            self.replace(number);
        } else if !status.success() {
            self.fail(&format!("the worker in seat {number} ended: {status}"));
        } else if seat.is_leaving {
            self.replace(number);
        } else {
            seat.ended = Some(Instant::now());
        }
    }

    fn replace(&mut self, number: usize) {
        let newcomer = self.newcomer();
        let before = std::mem::replace(&mut self.seats[number], newcomer);
        self.stories.push(before.worker.story());
        self.holds.retain(|hold| hold.seat != Some(number));
    }

    fn newcomer(&mut self) -> Seat {
        let (folder, number) = (self.folder.path().to_owned(), self.newcomers);
        self.newcomers += 1;
        let failpoint = self.worker_failpoints.pop_front().unwrap_or_default();
        let (worker, wire) = self.network.start_worker(number, self.port, |mut command| {
            command.env("MUSTER_CACHE_DIR", folder.join(format!("cache-{number}")));
            Process::start(format!("worker-{number}"), command, &failpoint, &folder)
        });
        Seat {
            worker,
            wire,
            is_leaving: false,
            ended: None,
        }
    }

    fn carry_out(&mut self, deed: &Deed, committed: u64) {
        match *deed {
            Deed::Kill(seat) => self.fell(seat),
            Deed::Stop(seat) => {
                self.seats[seat].worker.signal("-STOP");
                self.hold(Some(seat), false, committed);
            }
            Deed::Cut(seat) => {
                self.seats[seat].wire.set_cut(true);
                self.hold(Some(seat), true, committed);
            }
            Deed::Terminate(seat) => {
                // One that is stopped or cut off could not leave in good order.
                if !self.is_held(Some(seat)) {
                    self.seats[seat].is_leaving = true;
                    self.seats[seat].worker.signal("-TERM");
                }
            }
            Deed::KillCoordinator => self.coordinator.kill(),
            Deed::TerminateCoordinator => {
                // As for a worker; and a second signal would end it at once.
                if !self.is_held(None) && !self.coordinator_is_leaving {
                    self.coordinator_is_leaving = true;
                    self.coordinator.signal("-TERM");
                }
            }
            Deed::StopCoordinator => {
                self.coordinator.signal("-STOP");
                self.hold(None, false, 0);
            }
            Deed::KillEverybody => {
                self.coordinator.kill();
                (0..SEATS).for_each(|seat| self.fell(seat));
            }
        }
    }

    fn fell(&mut self, seat: usize) {
        if self.seats[seat].ended.is_none() {
            self.seats[seat].worker.kill();
        }
    }

    fn is_held(&self, seat: Option<usize>) -> bool {
        self.holds.iter().any(|hold| hold.seat == seat)
    }

    fn hold(&mut self, seat: Option<usize>, is_cut: bool, committed: u64) {
        self.holds.push(Hold {
            seat,
            is_cut,
            since: Instant::now(),
            until_step: committed + STEPS_WITHOUT,
        });
    }

    /// Lets those go on whom the others no longer wait for.
    fn release(&mut self, committed: u64) {
        let held = (0..SEATS).filter(|seat| self.is_held(Some(*seat)));
        let too_few = SEATS - held.count() < MIN_WORKERS;
        let due = |hold: &Hold| match hold.seat {
            Some(_) => committed >= hold.until_step || too_few,
            None => hold.since.elapsed() > COORDINATOR_PAUSE,
        };
        let (due, holds): (Vec<Hold>, Vec<Hold>) =
            std::mem::take(&mut self.holds).into_iter().partition(due);
        self.holds = holds;
        due.iter().for_each(|hold| self.let_go(hold));
        if self
            .holds
            .iter()
            .any(|hold| hold.since.elapsed() > PROGRESS_TIMEOUT)
        {
            self.fail("the others do not go on without the one that hangs");
        }
    }

    fn let_go(&self, hold: &Hold) {
        match hold.seat {
            Some(seat) if hold.is_cut => self.seats[seat].wire.set_cut(false),
            Some(seat) => self.seats[seat].worker.signal("-CONT"),
            None => self.coordinator.signal("-CONT"),
        }
    }

    /// The job is done: everybody goes, those who missed the news when they are asked to.
    fn dismiss(&mut self) {
        for hold in std::mem::take(&mut self.holds) {
            self.let_go(&hold);
        }
        let began = Instant::now();
        for asked in [false, true] {
            let limit = if asked {
                2 * WORKERS_END_TIMEOUT
            } else {
                WORKERS_END_TIMEOUT / 4
            };
            while began.elapsed() < limit && !self.everybody_is_gone() {
                std::thread::sleep(SCENE_POLL_INTERVAL);
            }
            for seat in self.seats.iter().filter(|seat| seat.ended.is_none()) {
                seat.worker.signal("-CONT");
                seat.worker.signal("-TERM");
            }
        }
        if !self.everybody_is_gone() {
            self.fail("the job is done, but a worker does not end");
        }
    }

    fn everybody_is_gone(&mut self) -> bool {
        for number in 0..SEATS {
            let seat = &mut self.seats[number];
            if seat.ended.is_some() {
                continue;
            }
            match seat.worker.end() {
                None => return false,
                // Its failpoint may be the last thing that it comes to.
                Some(status) if status.success() || was_killed(status) => {
                    seat.ended = Some(Instant::now());
                }
                Some(status) => {
                    self.fail(&format!("the worker in seat {number} ended: {status}"));
                }
            }
        }
        true
    }

    /// The step of the last line on record.
    fn committed(&self) -> u64 {
        let path = self.output().join("metrics.jsonl");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let line = whole.lines().next_back().unwrap_or_default();
        let line: Value = serde_json::from_str(line).unwrap_or_default();
        line["step"].as_u64().unwrap_or(0)
    }

    fn output(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    fn check(&self, quiet: &Outcome) {
        let found = outcome(&self.output());
        if let Some(difference) = found.difference(quiet) {
            self.fail(&difference);
        }
        let missed = |place: &&String| !self.reached.contains(*place);
        if let Some(place) = self.plan.expected.iter().find(missed) {
            self.fail(&format!(
                "nobody came to {place}; reached: {:?}",
                self.reached
            ));
        }
        let left = processes_of(self.folder.path());
        if !left.is_empty() {
            self.fail(&format!("left over: {left:?}"));
        }
    }

    fn fail(&self, reason: &str) -> ! {
        let stories = self.stories.iter().cloned();
        let seats = self.seats.iter().map(|seat| seat.worker.story());
        let logs: String = stories
            .chain([self.coordinator.story()])
            .chain(seats)
            .collect();
        let (plan, seconds) = (self.plan, self.began.elapsed().as_secs());
        panic!(
            "{reason}\nafter {seconds} s, step {}, of {plan:#?}\n{logs}",
            self.committed()
        );
    }
}

fn start_coordinator(
    plan: &Plan,
    network: Network,
    folder: &Path,
    port: u16,
    life: usize,
    failpoint: &str,
) -> Process {
    let mut command = start_command(&folder.join("out"), plan.steps);
    command.args(["--listen", &format!("{}:{port}", network.host())]);
    command.args(["--min-workers", &MIN_WORKERS.to_string()]);
    Process::start(format!("coordinator-{life}"), command, failpoint, folder)
}

/// Processes whose command line or environment names this folder.
fn processes_of(folder: &Path) -> Vec<String> {
    let folder = folder.to_string_lossy().into_owned();
    let entries = std::fs::read_dir("/proc").unwrap();
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let names = |path: &PathBuf, file: &str| {
        let text = std::fs::read(path.join(file)).unwrap_or_default();
        String::from_utf8_lossy(&text).contains(&folder)
    };
    paths
        .filter(|path| names(path, "cmdline") || names(path, "environ"))
        .map(|path| path.display().to_string())
        .collect()
}
