//! Every machine counts: a simulated schedule of workers of unequal speed, in virtual time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::*;

const SLOTS: u32 = 64;
/// Of a message.
const LATENCY: Duration = Duration::from_millis(1);
/// A slot can be abandoned so many times in its course.
const LAYERS: u32 = 24;

/// Seconds that a worker takes for a slot at a time.
type StepStats = Box<dyn Fn(f64) -> f64>;

struct Machine {
    pace: StepStats,
    queue: VecDeque<(u64, PlanKind, u32)>,
    /// Ends then; `abandoned` ends it earlier.
    in_hand: Option<(u64, PlanKind, u32, Instant)>,
    began: Instant,
    abandons_at: Option<Instant>,
    held: BTreeSet<u32>,
    /// As in full training, whose backward pass is not given up half-way.
    ends_every_slot: bool,
}

/// What happens when.
enum Due {
    Up(Event),
    Down(Command),
}

struct Shop {
    scene: Scene,
    began: Instant,
    machines: BTreeMap<WorkerId, Machine>,
    due: BTreeMap<(Instant, u64), Due>,
    sequence: u64,
    steps: u64,
    /// When each step was committed, in seconds.
    committed: Vec<f64>,
    abandoned: u32,
}

impl Shop {
    fn new(steps: u64, paces: Vec<StepStats>) -> Self {
        Self::of(steps, paces, false)
    }

    fn of(steps: u64, paces: Vec<StepStats>, ends_every_slot: bool) -> Self {
        let mut settings = settings();
        settings.min_workers = paces.len();
        let mut job = job(steps, SLOTS);
        job.eval_steps = None;
        job.save_steps = SaveSteps::Never;
        let block = BlockTokens {
            used: 4,
            trained: 1,
        };
        let blocks = vec![block; SLOTS as usize];
        let course = RunSchedule::new(Arc::new(job), u64::from(SLOTS), blocks);
        let now = Instant::now();
        let scene = Scene {
            cluster: Cluster::new(settings, course),
            now,
            unreached: Default::default(),
            notices: Vec::new(),
        };
        let mut shop = Self {
            scene,
            began: now,
            machines: BTreeMap::new(),
            due: BTreeMap::new(),
            sequence: 0,
            steps,
            committed: Vec::new(),
            abandoned: 0,
        };
        for (index, pace) in paces.into_iter().enumerate() {
            let id = WorkerId(index as u64 + 1);
            let machine = Machine {
                pace,
                queue: VecDeque::new(),
                in_hand: None,
                began: now,
                abandons_at: None,
                held: BTreeSet::new(),
                ends_every_slot,
            };
            shop.machines.insert(id, machine);
            shop.handle(join(id));
        }
        let ids: Vec<WorkerId> = shop.machines.keys().copied().collect();
        for id in ids {
            shop.handle(ready(id, 0));
        }
        shop
    }

    fn seconds(&self) -> f64 {
        self.scene.now.duration_since(self.began).as_secs_f64()
    }

    fn handle(&mut self, event: Event) {
        let mut commands = Vec::new();
        let now = self.scene.now;
        self.scene.cluster.handle(now, event, &mut commands);
        for command in commands {
            if let Command::SendProbe { worker, probe } = &command {
                let answer = self.scene.answer(*worker, probe);
                self.handle(answer);
                continue;
            }
            if let Command::Emit(RunEvent::StepCommitted(_)) = &command {
                self.committed.push(self.seconds());
            }
            self.later(LATENCY, Due::Down(command));
        }
    }

    fn later(&mut self, after: Duration, due: Due) {
        self.sequence += 1;
        self.due
            .insert((self.scene.now + after, self.sequence), due);
    }

    fn run(mut self) -> Self {
        while (self.committed.len() as u64) < self.steps {
            let message = self.due.keys().next().map(|(at, _)| *at);
            let machines = self.machines.values();
            let ends = machines.filter_map(|machine| {
                let (.., end) = machine.in_hand?;
                Some(machine.abandons_at.map_or(end, |at| at.min(end)))
            });
            let timer = self.scene.cluster.wakes_at();
            let next = ends.chain(message).chain(timer).min().unwrap();
            assert!(self.seconds() < 1e6, "the schedule does not end");
            self.scene.now = next.max(self.scene.now);
            self.deliver();
            self.finish_slots();
            let ids: Vec<WorkerId> = self.machines.keys().copied().collect();
            for worker in ids {
                self.scene
                    .cluster
                    .failure_detector
                    .hear(worker, self.scene.now);
            }
            self.handle(Event::Ticked);
        }
        self
    }

    fn deliver(&mut self) {
        while let Some(entry) = self.due.first_entry() {
            if entry.key().0 > self.scene.now {
                return;
            }
            match entry.remove() {
                Due::Up(event) => self.handle(event),
                Due::Down(command) => self.obey(command),
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::SendGeneration {
                worker, generation, ..
            } => {
                let entered = entered(worker.0, generation.generation, generation.step, &[]);
                self.later(LATENCY, Due::Up(entered));
            }
            Command::SendLease { worker, lease } => {
                let machine = self.machines.get_mut(&worker).unwrap();
                for slot in lease.slots {
                    let kind = PlanKind::from_wire(lease.kind).unwrap();
                    machine.queue.push_back((lease.step, kind, slot));
                }
                self.begin_next(worker);
            }
            Command::SendWithdraw { worker, withdraw } => self.withdraw(worker, withdraw),
            Command::SendExchange { worker, exchange } => self.exchange(worker, exchange.step),
            Command::Expel { worker, reason } => panic!("{worker:?} was expelled: {reason}"),
            _ => {}
        }
    }

    fn begin_next(&mut self, worker: WorkerId) {
        let seconds = self.seconds();
        let machine = self.machines.get_mut(&worker).unwrap();
        if machine.in_hand.is_none()
            && let Some((step, kind, slot)) = machine.queue.pop_front()
        {
            let end = self.scene.now + Duration::from_secs_f64((machine.pace)(seconds));
            machine.began = self.scene.now;
            machine.in_hand = Some((step, kind, slot, end));
        }
    }

    fn withdraw(&mut self, worker: WorkerId, withdraw: v1::Withdraw) {
        let now = self.scene.now;
        let machine = self.machines.get_mut(&worker).unwrap();
        let mut back = Vec::new();
        for slot in &withdraw.slots {
            if let Some((.., in_hand, end)) = machine.in_hand
                && in_hand == *slot
                && !machine.ends_every_slot
            {
                machine.abandons_at = Some(now + (end - machine.began) / LAYERS);
                self.abandoned += 1;
            }
            let before = machine.queue.len();
            machine.queue.retain(|(.., queued)| queued != slot);
            if machine.queue.len() < before {
                back.push(*slot);
            }
        }
        self.say_withdrawn(worker, withdraw.step, back);
    }

    fn say_withdrawn(&mut self, worker: WorkerId, step: u64, slots: Vec<u32>) {
        if slots.is_empty() {
            return;
        }
        let withdrawn = v1::Withdrawn {
            generation: 1,
            step,
            kind: PlanKind::Train.to_wire(),
            slots,
        };
        let event = Event::SlotsWithdrawn { worker, withdrawn };
        self.later(LATENCY, Due::Up(event));
    }

    fn finish_slots(&mut self) {
        let now = self.scene.now;
        let ids: Vec<WorkerId> = self.machines.keys().copied().collect();
        for worker in ids {
            let machine = self.machines.get_mut(&worker).unwrap();
            let Some((step, kind, slot, end)) = machine.in_hand else {
                continue;
            };
            if end <= now {
                assert!(machine.held.insert(slot), "slot {slot} twice");
                let Event::SlotDone { worker, mut done } = done(worker.0, step, slot) else {
                    unreachable!("done makes a SlotDone")
                };
                done.kind = kind.to_wire();
                done.compute_us = (end - machine.began).as_micros() as u64;
                self.later(LATENCY, Due::Up(Event::SlotDone { worker, done }));
            } else if machine.abandons_at.is_some_and(|at| at <= now) {
                self.say_withdrawn(worker, step, vec![slot]);
            } else {
                continue;
            }
            let machine = self.machines.get_mut(&worker).unwrap();
            machine.in_hand = None;
            machine.abandons_at = None;
            self.begin_next(worker);
        }
    }

    /// The sum over all machines takes no time here, but every slot must be in exactly one accumulator.
    fn exchange(&mut self, worker: WorkerId, step: u64) {
        if worker == WorkerId(1) {
            let held = self.machines.values().flat_map(|machine| &machine.held);
            let mut held: Vec<u32> = held.copied().collect();
            held.sort_unstable();
            let every: Vec<u32> = (0..SLOTS).collect();
            assert_eq!(held, every, "step {step}");
            for machine in self.machines.values_mut() {
                machine.held.clear();
            }
        }
        self.later(LATENCY, Due::Up(reported(worker.0, step + 1, "a")));
    }
}

fn steady(seconds: f64) -> StepStats {
    Box::new(move |_| seconds)
}

/// The slots a second that came out, of the sum of what the workers are able to, without the first step, in which
/// their speeds are not known.
fn efficiency(seconds: &[f64]) -> f64 {
    let paces = seconds.iter().map(|seconds| steady(*seconds)).collect();
    let shop = Shop::new(9, paces).run();
    let elapsed = shop.committed[8] - shop.committed[0];
    let able: f64 = seconds.iter().map(|seconds| 1.0 / seconds).sum();
    f64::from(SLOTS) * 8.0 / elapsed / able
}

#[test]
fn unequal_workers_deliver_the_sum_of_their_speeds() {
    for seconds in [
        &[1.0][..],
        &[1.0, 1.0],
        &[1.0, 2.0],
        &[1.0, 1.0 / 0.3],
        &[1.0, 5.0],
        &[1.0, 2.0, 4.0],
        &[1.0, 1.5, 1.7],
        &[0.1, 0.2],
        &[3.0, 1.0, 1.0, 1.0],
    ] {
        let efficiency = efficiency(seconds);
        assert!(efficiency >= 0.95, "{seconds:?}: {efficiency:.3}");
    }
}

#[test]
fn even_the_first_step_waits_for_no_slow_worker() {
    let shop = Shop::new(1, vec![steady(1.0), steady(10.0)]).run();
    // 64 slots by the fast one alone, and what was tried with the slow one.
    assert!(shop.committed[0] < 66.0, "{:?}", shop.committed);
}

#[test]
fn a_sudden_slowdown_costs_about_a_slot_time() {
    // Two equals for four steps, 32 s each; in the midst of the fifth one of them is ten times as slow.
    for moment in [140.0, 150.0, 157.0, 158.0, 158.9, 159.5] {
        let faltering: StepStats = Box::new(move |at| if at < moment { 1.0 } else { 10.0 });
        let shop = Shop::new(5, vec![steady(1.0), faltering]).run();
        let step_began = shop.committed[3];
        let left = f64::from(SLOTS) - 2.0 * (moment - step_began);
        // At best the other does the rest while this one does its tenth.
        let best = moment + left.max(0.0) / 1.1;
        let cost = shop.committed[4] - best;
        assert!(cost < 2.0, "at {moment}: {cost:.2} s");
    }
}

#[test]
fn slots_are_not_passed_around_when_all_become_slow() {
    // More workers than slots, so that somebody always has time.
    let faltering = || -> StepStats { Box::new(|at| if at < 1.0 { 0.1 } else { 4.0 }) };
    let workers = 3 * SLOTS as usize;
    let shop = Shop::new(20, (0..workers).map(|_| faltering()).collect()).run();
    let slowest = shop.committed.windows(2).map(|pair| pair[1] - pair[0]);
    let slowest = slowest.fold(0.0, f64::max);
    // What was tried in vain on the way from 0.1 to 4 s.
    assert!(slowest < 12.0, "{slowest:.1} s");
    let abandoned = shop.abandoned;
    assert!(abandoned < 6 * SLOTS, "{abandoned}");
}

#[test]
fn equal_workers_are_asked_for_nothing_back() {
    let wobbly: StepStats = Box::new(|at| 1.0 + 0.2 * (at * 7.0).sin());
    let shop = Shop::new(6, vec![steady(1.0), wobbly, steady(1.1)]).run();
    assert_eq!(shop.abandoned, 0);
}

#[test]
fn a_machine_that_was_slow_for_a_while_gets_its_share_again() {
    let recovering: StepStats = Box::new(|at| if at < 100.0 { 40.0 } else { 1.0 });
    let shop = Shop::new(30, vec![steady(1.0), recovering]).run();
    let last = shop.committed[29] - shop.committed[28];
    assert!(last < 34.0, "{last}");
}

#[test]
fn a_slow_worker_that_cannot_give_up_a_slot_is_not_taken_for_one_that_hangs() {
    // Of steps so short that silence is allowed for the shortest time, and one slot takes the worker far longer.
    for slow in [4.0, 9.0] {
        let paces = vec![steady(0.02), steady(0.02), steady(slow)];
        let shop = Shop::of(40, paces, true).run();
        assert_eq!(shop.abandoned, 0);
        assert_eq!(shop.scene.cluster.members.count(), 3);
        // And not just because nothing was asked of it.
        assert!(shop.committed[0] > slow, "{:?}", shop.committed[0]);
    }
    // One that becomes slow later.
    let faltering: StepStats = Box::new(|at| if at < 20.0 { 0.5 } else { 12.0 });
    let shop = Shop::of(20, vec![steady(0.05), faltering], true).run();
    assert_eq!(shop.scene.cluster.members.count(), 2);
}

#[test]
fn an_engine_that_does_not_answer_is_expelled() {
    let mut scene = Scene::with_workers(2);
    scene.cluster.settings.min_workers = 1;
    let timed = |id, slot| done_after(id, 0, slot, 1_000_000);
    scene.now += Duration::from_secs(1);
    for (worker, slot) in [(1, 0), (1, 1), (2, 2)] {
        scene.after(timed(worker, slot));
    }
    // Slot 3 is late, and its worker lives but says nothing of it.
    assert_eq!(scene.pass(Duration::from_secs(3), &[]), ["w2 withdraw [3]"]);
    // It may take eight times as long as the slot took so far: perhaps it cannot be given up half-way.
    assert_eq!(scene.pass(Duration::from_secs(45), &[]), [""; 0]);
    let commands = scene.pass(Duration::from_secs(2), &[]);
    assert_eq!(
        commands[0],
        "w2 expel: its engine did not answer for 46.2 s"
    );
}

#[test]
fn a_slot_goes_to_another_only_when_it_was_given_back() {
    let mut scene = Scene::with_workers(2);
    let timed = |id, slot| done_after(id, 0, slot, 1_000_000);
    for (worker, slot) in [(1, 0), (2, 2)] {
        scene.after(timed(worker, slot));
    }
    scene.check(timed(1, 1), &[]);
    scene.now += Duration::from_secs(3);
    scene.check(Event::Ticked, &["w2 withdraw [3]"]);
    // It was done in that very moment.
    scene.check(
        timed(2, 3),
        &[
            "w1 exchange 0",
            "w2 exchange 0",
            "w1 plan train 1",
            "w2 plan train 1",
            "w1 lease [0]",
            "w2 lease [1]",
            "w1 lease [2]",
            "w2 lease [3]",
        ],
    );
}
