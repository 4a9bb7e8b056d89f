//! Which checkpoint is pushed next. Pure: reads no clock and does no I/O.
//!
//! In: checkpoints as they are saved, and what became of those that were tried. Out: the next one, never an older one after a
//! newer one.

use std::collections::BTreeSet;

/// Most checkpoints that wait to be pushed.
const MAX_WAITING: usize = 1000;

/// The checkpoints that wait to be pushed, by step.
#[derive(Debug)]
pub(super) struct Queue {
    /// Whether each of them is pushed; else only the newest, as it stands in the place of those before it.
    keeps_all: bool,
    waiting: BTreeSet<u64>,
    /// The newest whose push has begun: none before it follows.
    begun: u64,
    /// Whether one has come since the last was handed out.
    has_arrived: bool,
    /// Whether the next may be tried. After a failure it may not, until another comes.
    is_due: bool,
}

impl Queue {
    /// An empty queue. `begun` is the newest checkpoint whose push has begun, in this process or one before it.
    pub fn new(keeps_all: bool, begun: u64) -> Self {
        Self {
            keeps_all,
            waiting: BTreeSet::new(),
            begun,
            has_arrived: false,
            is_due: false,
        }
    }

    /// Adds a checkpoint. Returns one that gives way to it although each should be pushed, as too many wait.
    pub fn add(&mut self, step: u64) -> Option<u64> {
        if step < self.begun {
            return None;
        }
        if !self.keeps_all {
            self.waiting.clear();
        }
        self.waiting.insert(step);
        self.has_arrived = true;
        self.is_due = true;
        let is_full = self.waiting.len() > MAX_WAITING;
        is_full.then(|| self.waiting.pop_first()).flatten()
    }

    /// Takes the checkpoint to push now.
    pub fn next(&mut self) -> Option<u64> {
        let step = self.is_due.then(|| self.waiting.pop_first()).flatten()?;
        self.has_arrived = false;
        self.begun = step;
        Some(step)
    }

    /// Takes one back whose push failed: it is tried once more with the next that comes, unless that stands in its place.
    pub fn put_back(&mut self, step: u64) {
        if self.keeps_all || self.waiting.is_empty() {
            self.waiting.insert(step);
        }
        self.is_due = self.has_arrived;
    }

    /// No more checkpoints come: what waits is tried once more.
    pub fn finish(&mut self) {
        self.is_due = true;
    }

    /// Drops what waits, as something newer takes its place.
    pub fn clear(&mut self) {
        self.waiting.clear();
    }

    /// The checkpoints that wait, oldest first.
    pub fn waiting(&self) -> impl Iterator<Item = u64> {
        self.waiting.iter().copied()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn drained(queue: &mut Queue) -> Vec<u64> {
        std::iter::from_fn(|| queue.next()).collect()
    }

    #[test]
    fn the_newest_takes_the_place_of_those_that_wait() {
        let mut queue = Queue::new(false, 0);
        queue.add(2);
        assert_eq!(queue.next(), Some(2));
        queue.add(4);
        queue.add(6);
        assert_eq!(drained(&mut queue), [6]);
    }

    #[test]
    fn where_each_is_pushed_they_go_in_their_order() {
        let mut queue = Queue::new(true, 0);
        queue.add(4);
        queue.add(2);
        queue.add(6);
        assert_eq!(drained(&mut queue), [2, 4, 6]);
    }

    #[test]
    fn none_goes_after_a_newer_one() {
        let mut queue = Queue::new(true, 6);
        queue.add(4);
        assert_eq!(queue.next(), None);
        // It was begun, and perhaps never came to its end.
        queue.add(6);
        queue.add(8);
        assert_eq!(drained(&mut queue), [6, 8]);
        queue.add(7);
        assert_eq!(queue.next(), None);
    }

    #[test]
    fn a_failed_one_waits_for_the_next_to_come() {
        for (keeps_all, expected) in [(true, vec![2, 4]), (false, vec![4])] {
            let mut queue = Queue::new(keeps_all, 0);
            queue.add(2);
            let step = queue.next().unwrap();
            queue.put_back(step);
            assert_eq!(queue.next(), None, "it would fail again at once");
            queue.add(4);
            assert_eq!(drained(&mut queue), expected);
        }
    }

    #[test]
    fn a_failed_one_gives_way_to_one_that_came_meanwhile() {
        for (keeps_all, expected) in [(true, vec![2, 4]), (false, vec![4])] {
            let mut queue = Queue::new(keeps_all, 0);
            queue.add(2);
            let step = queue.next().unwrap();
            queue.add(4);
            queue.put_back(step);
            assert_eq!(drained(&mut queue), expected);
        }
    }

    #[test]
    fn at_the_end_what_waits_is_tried_once_more() {
        let mut queue = Queue::new(true, 0);
        queue.add(2);
        queue.add(4);
        let step = queue.next().unwrap();
        queue.put_back(step);
        queue.finish();
        assert_eq!(queue.next(), Some(2));
        queue.put_back(2);
        assert_eq!(queue.next(), None);
        assert_eq!(queue.waiting().collect::<Vec<_>>(), [2, 4]);
    }

    #[test]
    fn the_oldest_gives_way_where_too_many_wait() {
        let mut queue = Queue::new(true, 0);
        let dropped: Vec<u64> = (1..=MAX_WAITING as u64 + 2)
            .filter_map(|step| queue.add(step))
            .collect();
        assert_eq!(dropped, [1, 2]);
    }
}
