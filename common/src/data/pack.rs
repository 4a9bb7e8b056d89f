//! Packing: which examples share a block.
//!
//! Enters: lengths. Leaves: which of them share a block. Best fit, longest first, as TRL's `bfd` packing; equal input
//! gives equal output everywhere.

use std::collections::BTreeSet;

/// Most pieces in a block: segments are numbered from 1 in 16 bits.
const MAX_SEGMENTS: usize = u16::MAX as usize;

/// Groups pieces so that no group is longer than `capacity`: each piece, longest first, goes into the fullest group
/// that still has room for it. Pieces in a group, and groups by their first piece, are in the order of the data.
///
/// No length is 0 or above `capacity`. Time is n log capacity.
pub fn best_fit_decreasing(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|piece| (std::cmp::Reverse(lengths[*piece]), *piece));
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut with_room: Vec<Vec<usize>> = vec![Vec::new(); capacity + 1];
    let mut rooms: BTreeSet<usize> = BTreeSet::new();
    for piece in order {
        let length = lengths[piece];
        debug_assert!(length > 0 && length <= capacity);
        let (group, room) = match rooms.range(length..).next().copied() {
            Some(room) => {
                let group = with_room[room].pop().expect("a listed room has a group");
                if with_room[room].is_empty() {
                    rooms.remove(&room);
                }
                groups[group].push(piece);
                (group, room - length)
            }
            None => {
                groups.push(vec![piece]);
                (groups.len() - 1, capacity - length)
            }
        };
        if room > 0 && groups[group].len() < MAX_SEGMENTS {
            with_room[room].push(group);
            rooms.insert(room);
        }
    }
    for group in &mut groups {
        group.sort_unstable();
    }
    groups.sort_unstable_by_key(|group| group[0]);
    groups
}

/// Groups pieces in their order: each goes to the one before it if there is room, else it begins a group.
///
/// No length is 0 or above `capacity`.
pub fn next_fit(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut room = 0;
    for (piece, length) in lengths.iter().enumerate() {
        match groups.last_mut() {
            Some(group) if *length <= room && group.len() < MAX_SEGMENTS => {
                group.push(piece);
                room -= length;
            }
            _ => {
                groups.push(vec![piece]);
                room = capacity - length;
            }
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::CounterRng;

    #[test]
    fn pieces_in_order_share_a_group_with_those_before_them() {
        let groups = next_fit(&[3, 5, 1, 8, 2, 2], 8);
        assert_eq!(groups, [vec![0, 1], vec![2], vec![3], vec![4, 5]]);
        assert!(next_fit(&[], 8).is_empty());
    }

    #[test]
    fn every_piece_is_packed_once_and_no_group_is_too_long() {
        let mut rng = CounterRng::new(1, &[]);
        let lengths: Vec<usize> = (0..20_000).map(|_| 1 + rng.below(512) as usize).collect();
        let groups = best_fit_decreasing(&lengths, 512);
        let mut seen = vec![false; lengths.len()];
        for group in &groups {
            assert!(group.iter().map(|piece| lengths[*piece]).sum::<usize>() <= 512);
            for piece in group {
                assert!(!std::mem::replace(&mut seen[*piece], true));
            }
        }
        assert!(seen.iter().all(|seen| *seen));
        let used = lengths.iter().sum::<usize>() as f64 / (groups.len() * 512) as f64;
        assert!(used > 0.99, "{used}");
        assert_eq!(groups, best_fit_decreasing(&lengths, 512));
    }

    #[test]
    fn the_fullest_group_with_room_takes_a_piece() {
        assert_eq!(
            best_fit_decreasing(&[3, 7, 6, 4, 1], 10),
            vec![vec![0, 1], vec![2, 3], vec![4]]
        );
    }

    #[test]
    fn segment_numbers_never_overflow() {
        let groups = best_fit_decreasing(&vec![1; 70_000], 1 << 17);
        assert_eq!(groups.len(), 2);
        assert!(groups.iter().all(|group| group.len() <= MAX_SEGMENTS));
    }
}
