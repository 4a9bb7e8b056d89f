//! Groups of sums that share a width: how they are cut, and each one to bytes and back, in any processor's instructions.

use common::exact::dequantize;

/// Number of scalars that share a width.
pub(super) const GROUP: usize = 128;

/// Encodes sums group by group: `write` gets a group, its width and all the room from its place on, which is enough for it.
#[inline(always)]
pub(super) fn encode_with(
    sums: &[i64],
    widths: &mut [u8],
    data: &mut [u8],
    mut write: impl FnMut(&[i64], usize, &mut [u8]),
) -> usize {
    let mut length = 0;
    for (group, width_byte) in sums.chunks(GROUP).zip(widths) {
        let width = width_of(group);
        *width_byte = width as u8;
        let (room, used) = (&mut data[length..], width * group.len());
        assert!(used <= room.len(), "the buffer is shorter than its limit");
        write(group, width, room);
        length += used;
    }
    length
}

/// Decodes sums group by group: `read` gets all the bytes from a group's place on, which are enough, its width, and the group.
#[inline(always)]
pub(super) fn decode_with<'a>(
    widths: &[u8],
    mut data: &'a [u8],
    sums: &mut [i64],
    mut read: impl FnMut(&[u8], usize, &mut [i64]),
) -> &'a [u8] {
    for (group, width) in sums.chunks_mut(GROUP).zip(widths) {
        let width = usize::from(*width);
        let rest = &data[width * group.len()..];
        read(data, width, group);
        data = rest;
    }
    data
}

pub(super) fn write_plain(group: &[i64], width: usize, room: &mut [u8]) {
    for (sum, bytes) in group.iter().zip(room.chunks_exact_mut(width.max(1))) {
        bytes[..width].copy_from_slice(&sum.to_le_bytes()[..width]);
    }
}

pub(super) fn read_plain(bytes: &[u8], width: usize, group: &mut [i64]) {
    if width == 0 {
        return group.fill(0);
    }
    for (sum, bytes) in group.iter_mut().zip(bytes.chunks_exact(width)) {
        let mut word = [0; 8];
        word[8 - width..].copy_from_slice(bytes);
        *sum = i64::from_le_bytes(word) >> (64 - 8 * width);
    }
}

#[inline(always)]
pub(super) fn finish_each(sums: &[i64], means: &mut [f32]) {
    for (mean, sum) in means.iter_mut().zip(sums) {
        *mean = dequantize(*sum);
    }
}

/// Bytes that hold each sum of `group` with its sign.
#[inline(always)]
pub(super) fn width_of(group: &[i64]) -> usize {
    // Flipping the bits of negative ones leaves only those that count.
    let used = group.iter().fold(0, |used, sum| used | (sum ^ (sum >> 63)));
    match used {
        0 if group.iter().all(|sum| *sum == 0) => 0,
        _ => (65 - used.leading_zeros() as usize).div_ceil(8),
    }
}
