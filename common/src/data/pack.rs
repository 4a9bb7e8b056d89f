//! Packing: which examples share a block.
//!
//! Enters: lengths. Leaves: which of them share a block. Best fit, longest first, as TRL's `bfd` packing, or next fit in their
//! order; equal input gives equal output everywhere.

use std::collections::BTreeSet;

/// Most pieces in a block: segments are numbered from 1 in 16 bits.
const MAX_SEGMENTS: u32 = u16::MAX as u32;

/// Pieces in groups, end to end.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Groups {
    pieces: Vec<u32>,
    /// Where each group ends in `pieces`.
    ends: Vec<u32>,
}

impl Groups {
    /// A group for each of so many pieces.
    pub fn of_one(count: u32) -> Self {
        Self {
            pieces: (0..count).collect(),
            ends: (1..=count).collect(),
        }
    }

    /// Number of groups.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &[u32]> + '_ {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts
            .zip(&self.ends)
            .map(|(start, end)| &self.pieces[start as usize..*end as usize])
    }
}

/// Groups pieces so that no group is longer than `capacity`: each piece, longest first, goes into the fullest group
/// that still has room for it. Pieces in a group, and groups by their first piece, are in the order of the data.
///
/// No length is 0 or above `capacity`. There are less than 2^32 pieces. Time is n log capacity, memory 16 bytes a piece.
pub fn best_fit_decreasing(lengths: &[u32], capacity: usize) -> Groups {
    // The group of each piece, in the order in which groups are begun, and how many pieces each has.
    let mut group_of = vec![0_u32; lengths.len()];
    let mut counts: Vec<u32> = Vec::new();
    let mut with_room: Vec<Vec<u32>> = vec![Vec::new(); capacity + 1];
    let mut rooms: BTreeSet<usize> = BTreeSet::new();
    for piece in longest_first(lengths, capacity) {
        let length = lengths[piece as usize] as usize;
        debug_assert!(length > 0 && length <= capacity);
        let (group, room) = match rooms.range(length..).next().copied() {
            Some(room) => {
                let group = with_room[room].pop().expect("a listed room has a group");
                if with_room[room].is_empty() {
                    rooms.remove(&room);
                }
                (group, room - length)
            }
            None => {
                counts.push(0);
                (counts.len() as u32 - 1, capacity - length)
            }
        };
        group_of[piece as usize] = group;
        counts[group as usize] += 1;
        if room > 0 && counts[group as usize] < MAX_SEGMENTS {
            with_room[room].push(group);
            rooms.insert(room);
        }
    }
    drop((with_room, rooms));
    by_first_piece(&group_of, &counts)
}

/// Numbers of the pieces, longest first, equal ones in the order of the data.
fn longest_first(lengths: &[u32], capacity: usize) -> Vec<u32> {
    let mut starts = vec![0_u32; capacity + 2];
    let place = |length: u32| capacity.saturating_sub(length as usize);
    for length in lengths {
        starts[place(*length) + 1] += 1;
    }
    for at in 1..starts.len() {
        starts[at] += starts[at - 1];
    }
    let mut order = vec![0; lengths.len()];
    for (piece, length) in (0..).zip(lengths) {
        let start = &mut starts[place(*length)];
        order[*start as usize] = piece;
        *start += 1;
    }
    order
}

/// The groups in the order of their first pieces.
fn by_first_piece(group_of: &[u32], counts: &[u32]) -> Groups {
    const UNSEEN: u32 = u32::MAX;
    // Where the next piece of each group goes.
    let mut next = vec![UNSEEN; counts.len()];
    let mut ends = Vec::with_capacity(counts.len());
    let mut end = 0;
    for group in group_of {
        if next[*group as usize] == UNSEEN {
            next[*group as usize] = end;
            end += counts[*group as usize];
            ends.push(end);
        }
    }
    let mut pieces = vec![0; group_of.len()];
    for (piece, group) in (0..).zip(group_of) {
        let next = &mut next[*group as usize];
        pieces[*next as usize] = piece;
        *next += 1;
    }
    Groups { pieces, ends }
}

/// Groups pieces in their order: each goes to the one before it if there is room, else it begins a group.
///
/// No length is 0 or above `capacity`.
pub fn next_fit(lengths: &[u32], capacity: usize) -> Groups {
    let mut ends: Vec<u32> = Vec::new();
    let (mut room, mut count) = (0, 0);
    for (end, length) in (1..).zip(lengths) {
        let length = *length as usize;
        match ends.last_mut() {
            Some(last) if length <= room && count < MAX_SEGMENTS => {
                *last = end;
                (room, count) = (room - length, count + 1);
            }
            _ => {
                ends.push(end);
                (room, count) = (capacity - length, 1);
            }
        }
    }
    Groups {
        pieces: (0..lengths.len() as u32).collect(),
        ends,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::CounterRng;

    #[test]
    fn pieces_in_order_share_a_group_with_those_before_them() {
        let groups = next_fit(&[3, 5, 1, 8, 2, 2], 8);
        let groups: Vec<&[u32]> = groups.iter().collect();
        assert_eq!(groups, [&[0, 1][..], &[2], &[3], &[4, 5]]);
        assert!(next_fit(&[], 8).is_empty());
    }

    #[test]
    fn every_piece_is_packed_once_and_no_group_is_too_long() {
        let mut rng = CounterRng::new(1, &[]);
        let lengths: Vec<u32> = (0..20_000).map(|_| 1 + rng.below(512) as u32).collect();
        let groups = best_fit_decreasing(&lengths, 512);
        let mut seen = vec![false; lengths.len()];
        for group in groups.iter() {
            let length: u32 = group.iter().map(|piece| lengths[*piece as usize]).sum();
            assert!(length <= 512);
            assert!(group.is_sorted());
            for piece in group {
                assert!(!std::mem::replace(&mut seen[*piece as usize], true));
            }
        }
        assert!(groups.iter().map(|group| group[0]).is_sorted());
        assert!(seen.iter().all(|seen| *seen));
        let used = lengths.iter().sum::<u32>() as f64 / (groups.len() * 512) as f64;
        assert!(used > 0.99, "{used}");
        assert_eq!(groups, best_fit_decreasing(&lengths, 512));
    }

    #[test]
    fn the_fullest_group_with_room_takes_a_piece() {
        let groups = best_fit_decreasing(&[3, 7, 6, 4, 1], 10);
        let groups: Vec<&[u32]> = groups.iter().collect();
        assert_eq!(groups, [&[0, 1][..], &[2, 3], &[4]]);
    }

    #[test]
    fn segment_numbers_never_overflow() {
        let groups = best_fit_decreasing(&vec![1; 70_000], 1 << 17);
        assert_eq!(groups.len(), 2);
        assert!(
            groups
                .iter()
                .all(|group| group.len() <= MAX_SEGMENTS as usize)
        );
    }
}
