//! Workers that were sent away because of their connections; by name, because whoever comes back has another number.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::pause::doubled;

/// Time for which a worker that was sent away because of its connections may not take part; each time twice that.
const FIRST_ABSENCE: Duration = Duration::from_secs(5);
const LONGEST_ABSENCE: Duration = Duration::from_secs(300);
/// Times that a worker is sent away because of its connections before it is refused.
const MAX_ABSENCES: u32 = 6;
/// Most names of sent-away workers that are remembered.
const MAX_REMEMBERED: usize = 1024;

#[derive(Clone, Copy, Debug)]
struct Absence {
    count: u32,
    /// When it may take part again; None once that is past.
    until: Option<Instant>,
}

/// Who was sent away, how often and until when.
#[derive(Debug, Default)]
pub struct Absences {
    by_name: BTreeMap<String, Absence>,
}

impl Absences {
    /// Notes that a worker of this name is sent away.
    pub fn note(&mut self, now: Instant, name: &str) {
        let absences = &mut self.by_name;
        if absences.len() >= MAX_REMEMBERED && !absences.contains_key(name) {
            let oldest = absences.iter().min_by_key(|(_, absence)| absence.count);
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                absences.remove(&oldest);
            }
        }
        let absence = absences.entry(name.to_owned()).or_insert(Absence {
            count: 0,
            until: None,
        });
        absence.until = Some(now + doubled(FIRST_ABSENCE, absence.count, LONGEST_ABSENCE));
        absence.count += 1;
    }

    /// Whether a worker of this name may not take part yet.
    pub fn is_absent(&self, name: &str) -> bool {
        let absence = self.by_name.get(name);
        absence.is_some_and(|absence| absence.until.is_some())
    }

    /// How often a worker of this name was sent away in a row, where that is too often to let it come back.
    pub fn too_many(&self, name: &str) -> Option<u32> {
        let count = self.by_name.get(name)?.count;
        (count > MAX_ABSENCES).then_some(count)
    }

    /// Ends the absences whose time is up. Whether there was one.
    pub fn expire(&mut self, now: Instant) -> bool {
        let mut is_one_over = false;
        for absence in self.by_name.values_mut() {
            is_one_over |= absence.until.take_if(|until| *until <= now).is_some();
        }
        is_one_over
    }

    /// When the first absence is over.
    pub fn first_end(&self) -> Option<Instant> {
        let absences = self.by_name.values();
        absences.filter_map(|absence| absence.until).min()
    }

    /// Workers of these names took part in a step: their absences count no more.
    pub fn forgive<'a>(&mut self, names: impl Iterator<Item = &'a str>) {
        if !self.by_name.is_empty() {
            for name in names {
                self.by_name.remove(name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absences_grow_until_there_are_too_many_and_a_settled_step_ends_them() {
        let (mut absences, now) = (Absences::default(), Instant::now());
        absences.note(now, "a");
        assert!(absences.is_absent("a") && !absences.is_absent("b"));
        assert!(absences.expire(now + FIRST_ABSENCE) && !absences.is_absent("a"));
        absences.note(now, "a");
        assert_eq!(absences.first_end(), Some(now + 2 * FIRST_ABSENCE));
        assert_eq!(absences.too_many("a"), None);
        for _ in 2..=MAX_ABSENCES {
            absences.note(now, "a");
        }
        assert_eq!(absences.too_many("a"), Some(MAX_ABSENCES + 1));
        absences.forgive(["a"].into_iter());
        assert_eq!(absences.too_many("a"), None);
    }
}
