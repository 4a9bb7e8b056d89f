//! Who sends which file to whom, so that many workers that come at once do not all pull a large model from one port.
//!
//! In: who holds which file, who asks, and what has been sent so far. Out: the source for each caller, or that it waits. The
//! coordinator sends a file to a few at a time; whoever has it passes it on to a few more. It knows no clock and no network.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use proto::v1;

use crate::cluster::WorkerId;

/// Callers to whom the coordinator, or a worker, sends one file at a time.
const MAX_RECEIVERS: usize = 2;
/// Workers that may fail a caller before the coordinator sends it everything itself.
const MAX_UNUSABLE: usize = 3;
/// A sending of fewer bytes a second than this, or of none for [`STALL`], is not waited for: the next caller is served beside it.
pub const LEAST_BYTES_PER_SECOND: u64 = 1 << 20;
const STALL: Duration = Duration::from_secs(5);
/// How long whoever got a file may take to verify it, before nobody waits for that.
const VERIFYING: Duration = Duration::from_secs(30);
/// How long a caller waits at most, before the coordinator sends it the file whatever else it sends.
const MAX_WAIT: Duration = Duration::from_secs(600);

/// Who is to send a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Coordinator,
    /// This worker, from its exchange's port.
    Worker(v1::Member),
}

/// Who asks for a file.
#[derive(Clone, Debug)]
pub struct Caller {
    pub worker: WorkerId,
    /// Whether it calls from the coordinator's own machine, where it reaches what only the loopback has.
    pub is_local: bool,
    /// Workers from whom it did not get a file.
    pub unusable: Vec<WorkerId>,
    /// How long it has waited for its turn.
    pub waited: Duration,
}

/// Number of a sending, from its beginning to its end.
pub type Number = u64;

/// Who holds and who sends which of the run's files.
#[derive(Debug, Default)]
pub struct Sharing {
    next: Number,
    /// Those that hold a file, by its digest.
    holders: HashMap<String, BTreeMap<WorkerId, v1::Member>>,
    sendings: HashMap<Number, Sending>,
}

/// A file on its way to a caller.
#[derive(Debug)]
struct Sending {
    digest: String,
    source: Source,
    began: Instant,
    bytes: u64,
    moved: Instant,
    /// Whether all of it was sent, so that it is being verified.
    is_sent: bool,
}

impl Sending {
    fn is_moving(&self, now: Instant) -> bool {
        let longest = if self.is_sent { VERIFYING } else { STALL };
        now.saturating_duration_since(self.moved) < longest
    }

    /// Whether it moves so fast that others wait for it.
    fn is_worth_waiting(&self, now: Instant) -> bool {
        let seconds = now.saturating_duration_since(self.began).as_secs();
        let is_fast = seconds < STALL.as_secs() || self.bytes / seconds >= LEAST_BYTES_PER_SECOND;
        self.is_moving(now) && (self.is_sent || is_fast)
    }
}

impl Sharing {
    /// A worker has a file, and passes it on.
    pub fn hold(&mut self, holder: &v1::Member, digest: &str) {
        let holders = self.holders.entry(digest.to_owned()).or_default();
        holders.insert(WorkerId(holder.worker), holder.clone());
    }

    /// A worker is gone: nobody is sent to it any more.
    pub fn forget(&mut self, worker: WorkerId) {
        for holders in self.holders.values_mut() {
            holders.remove(&worker);
        }
    }

    /// Chooses who sends a file to a caller, and begins that sending; None where the caller waits for its turn.
    pub fn begin(
        &mut self,
        digest: &str,
        caller: &Caller,
        now: Instant,
    ) -> Option<(Source, Number)> {
        let is_due = caller.waited >= MAX_WAIT || caller.unusable.len() > MAX_UNUSABLE;
        let source = match is_due {
            true => Source::Coordinator,
            false => self.choose(digest, caller, now)?,
        };
        let number = self.next;
        self.next += 1;
        let sending = Sending {
            digest: digest.to_owned(),
            source: source.clone(),
            began: now,
            bytes: 0,
            moved: now,
            is_sent: false,
        };
        self.sendings.insert(number, sending);
        Some((source, number))
    }

    /// The coordinator where it sends nothing else, since whoever calls reaches it; then the worker that sends least, so that the
    /// coordinator's port stays free; then the coordinator again.
    fn choose(&self, digest: &str, caller: &Caller, now: Instant) -> Option<Source> {
        let own = self
            .sendings
            .values()
            .filter(|sending| sending.source == Source::Coordinator && sending.is_moving(now));
        let own: Vec<&Sending> = own.collect();
        if own.is_empty() {
            return Some(Source::Coordinator);
        }
        let of_this_file = own
            .iter()
            .filter(|sending| sending.digest == digest && sending.is_worth_waiting(now));
        let is_free = of_this_file.count() < MAX_RECEIVERS;
        self.idlest_holder(digest, caller)
            .map(|holder| Source::Worker(holder.clone()))
            .or(is_free.then_some(Source::Coordinator))
    }

    /// The worker that holds a file and sends least, if one has room for this caller.
    fn idlest_holder(&self, digest: &str, caller: &Caller) -> Option<&v1::Member> {
        let holders = self.holders.get(digest)?.iter();
        let reachable = holders.filter(|(worker, holder)| {
            **worker != caller.worker
                && !caller.unusable.contains(worker)
                && (caller.is_local || !is_loopback(&holder.address))
        });
        let (_, holder) = reachable
            .map(|(_, holder)| (self.receivers_of(holder.worker), holder))
            .filter(|(receivers, _)| *receivers < MAX_RECEIVERS)
            .min_by_key(|(receivers, holder)| (*receivers, holder.worker))?;
        Some(holder)
    }

    fn receivers_of(&self, worker: u64) -> usize {
        let is_of = |sending: &&Sending| matches!(&sending.source, Source::Worker(holder) if holder.worker == worker);
        self.sendings.values().filter(is_of).count()
    }

    /// So many bytes more of a sending are on their way.
    pub fn moved(&mut self, number: Number, bytes: u64, now: Instant) {
        if let Some(sending) = self.sendings.get_mut(&number) {
            sending.bytes += bytes;
            sending.moved = now;
        }
    }

    /// All of a file was sent: the receiver verifies it, and passes it on then.
    pub fn sent(&mut self, number: Number, now: Instant) {
        if let Some(sending) = self.sendings.get_mut(&number) {
            sending.is_sent = true;
            sending.moved = now;
        }
    }

    /// The receiver has verified the file, or has gone.
    pub fn end(&mut self, number: Number) {
        self.sendings.remove(&number);
    }
}

/// Whether an address is of a machine's own, which no other machine reaches.
fn is_loopback(address: &str) -> bool {
    let address: Result<std::net::SocketAddr, _> = address.parse();
    address.is_ok_and(|address| address.ip().is_loopback())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const FILE: &str = "file";
    const HOST: &str = "10.0.0.1";

    fn caller(worker: u64) -> Caller {
        Caller {
            worker: WorkerId(worker),
            is_local: false,
            unusable: Vec::new(),
            waited: Duration::ZERO,
        }
    }

    /// Two callers are being sent the file by the coordinator.
    fn busy(now: Instant) -> (Sharing, [Number; 2]) {
        let mut sharing = Sharing::default();
        let numbers = [1, 2].map(|worker| {
            let (source, number) = sharing.begin(FILE, &caller(worker), now).unwrap();
            assert_eq!(source, Source::Coordinator);
            number
        });
        (sharing, numbers)
    }

    fn holder(worker: u64, host: &str) -> v1::Member {
        v1::Member {
            worker,
            name: format!("w{worker}"),
            address: format!("{host}:{worker}"),
        }
    }

    fn worker(number: u64) -> Option<Source> {
        Some(Source::Worker(holder(number, HOST)))
    }

    fn begin(sharing: &mut Sharing, caller: &Caller, now: Instant) -> Option<Source> {
        sharing
            .begin(FILE, caller, now)
            .map(|(source, _number)| source)
    }

    #[test]
    fn the_third_caller_waits_until_somebody_can_send() {
        let now = Instant::now();
        let (mut sharing, [first, _]) = busy(now);
        assert_eq!(begin(&mut sharing, &caller(3), now), None);
        // Another file is another matter.
        assert!(sharing.begin("other", &caller(3), now).is_some());
        sharing.end(first);
        let source = begin(&mut sharing, &caller(3), now);
        assert_eq!(source, Some(Source::Coordinator));
        assert_eq!(begin(&mut sharing, &caller(4), now), None);
        sharing.hold(&holder(1, HOST), FILE);
        assert_eq!(begin(&mut sharing, &caller(4), now), worker(1));
    }

    #[test]
    fn whoever_holds_a_file_sends_it_to_two_at_a_time_the_idle_first() {
        let now = Instant::now();
        let (mut sharing, _) = busy(now);
        sharing.hold(&holder(1, HOST), FILE);
        sharing.hold(&holder(2, HOST), FILE);
        let mut sources = [3, 4, 5, 6, 7].map(|number| begin(&mut sharing, &caller(number), now));
        sources.sort_by_key(|source| format!("{source:?}"));
        let (one, two) = (worker(1), worker(2));
        assert_eq!(sources, [None, one.clone(), one, two.clone(), two]);
    }

    #[test]
    fn nobody_is_sent_to_itself_to_who_failed_it_or_to_who_is_gone() {
        let now = Instant::now();
        let (mut sharing, _) = busy(now);
        sharing.hold(&holder(1, HOST), FILE);
        assert_eq!(begin(&mut sharing, &caller(1), now), None);
        let failed = Caller {
            unusable: vec![WorkerId(1)],
            ..caller(3)
        };
        assert_eq!(begin(&mut sharing, &failed, now), None);
        sharing.forget(WorkerId(1));
        assert_eq!(begin(&mut sharing, &caller(4), now), None);
        // Whoever was failed often does not wait any more.
        let unlucky = Caller {
            unusable: (10..14).map(WorkerId).collect(),
            ..caller(5)
        };
        let source = begin(&mut sharing, &unlucky, now);
        assert_eq!(source, Some(Source::Coordinator));
    }

    #[test]
    fn a_worker_on_the_loopback_sends_only_to_its_own_machine() {
        let now = Instant::now();
        let (mut sharing, _) = busy(now);
        sharing.hold(&holder(1, "127.0.0.1"), FILE);
        assert_eq!(begin(&mut sharing, &caller(3), now), None);
        let here = Caller {
            is_local: true,
            ..caller(3)
        };
        assert!(begin(&mut sharing, &here, now).is_some());
    }

    #[test]
    fn a_single_caller_is_sent_the_file_by_the_coordinator_and_the_next_by_who_has_it() {
        let now = Instant::now();
        let mut sharing = Sharing::default();
        sharing.hold(&holder(1, HOST), FILE);
        let source = begin(&mut sharing, &caller(2), now);
        assert_eq!(source, Some(Source::Coordinator));
        assert_eq!(begin(&mut sharing, &caller(3), now), worker(1));
    }

    #[test]
    fn where_the_coordinators_port_is_slow_whoever_has_the_file_sends_it() {
        let now = Instant::now();
        let (mut sharing, numbers) = busy(now);
        let later = now + 4 * STALL;
        for number in numbers {
            sharing.moved(number, LEAST_BYTES_PER_SECOND, later);
        }
        sharing.hold(&holder(1, HOST), FILE);
        assert_eq!(begin(&mut sharing, &caller(3), later), worker(1));
    }

    #[test]
    fn nobody_waits_for_ever() {
        let now = Instant::now();
        let (mut sharing, _) = busy(now);
        let waited = |waited| Caller {
            waited,
            ..caller(3)
        };
        assert_eq!(begin(&mut sharing, &waited(MAX_WAIT / 2), now), None);
        let source = begin(&mut sharing, &waited(MAX_WAIT), now);
        assert_eq!(source, Some(Source::Coordinator));
    }

    #[test]
    fn a_slow_or_stuck_receiver_holds_nobody_up() {
        let now = Instant::now();
        let (mut sharing, [slow, quick]) = busy(now);
        let later = now + 4 * STALL;
        sharing.moved(quick, 20 * LEAST_BYTES_PER_SECOND, later);
        sharing.moved(slow, LEAST_BYTES_PER_SECOND, later);
        let source = begin(&mut sharing, &caller(3), later);
        assert_eq!(source, Some(Source::Coordinator));
        assert_eq!(begin(&mut sharing, &caller(4), later), None);
        // One that was sent is waited for while it is verified.
        let (mut verifying, [first, second]) = busy(now);
        verifying.sent(first, now);
        verifying.sent(second, now);
        assert_eq!(begin(&mut verifying, &caller(3), now + 2 * STALL), None);
        assert!(begin(&mut verifying, &caller(3), now + VERIFYING).is_some());
        // The quick one has stopped.
        let source = begin(&mut sharing, &caller(4), later + STALL);
        assert_eq!(source, Some(Source::Coordinator));
    }
}
