//! How an exchange is cut: a chunk for each rank, and pieces of a chunk, with what has come of each piece so far.
//!
//! In: numbers of scalars and members. Out: the same cuts on every member. Adds and sends nothing.

use std::ops::Range;
use std::sync::{Mutex, OnceLock};

use super::reduce_input::BLOCK;

/// Most scalars of a piece: few enough that receiving, adding and sending all its parts stay within a core's cache.
const MAX_PIECE: usize = 64 << 10;
/// Most scalars of a piece with two members: it has only one part beside our own, so twice the size stays within the cache.
const MAX_PIECE_OF_TWO: usize = 128 << 10;
/// Least scalars of a piece: below this the overhead of each frame counts.
const MIN_PIECE: usize = 8 << 10;
/// Most scalars of all parts that wait for the slowest peer, where more than one piece does.
const MAX_WAITING: usize = 192 << 10;
/// Pieces that a chunk is cut into, where they are not too small: while one is in transfer, others are added.
const PIECES: usize = 4;

/// Scalars of a piece in an exchange of `scalars` between `size` members: the same on every member.
pub(super) fn piece_scalars(scalars: usize, size: usize) -> usize {
    let wanted = scalars.div_ceil(size).div_ceil(PIECES);
    let most = match size {
        ..=2 => MAX_PIECE_OF_TWO,
        _ => MAX_PIECE,
    };
    wanted.next_multiple_of(BLOCK).clamp(MIN_PIECE, most)
}

/// Pieces that a peer may be ahead of the slowest one: the parts that wait for that peer are to stay within the cache too.
pub(super) fn pieces_ahead(piece_scalars: usize, size: usize) -> usize {
    let parts = piece_scalars * size.saturating_sub(1).max(1);
    (MAX_WAITING / parts).max(1)
}

/// The range of scalars that `rank` owns: it sums them and sends the others their means.
pub(super) fn chunk(scalars: usize, size: usize, rank: u32) -> Range<usize> {
    let cut = |rank: usize| (scalars as u128 * rank as u128 / size as u128) as usize;
    cut(rank as usize)..cut(rank as usize + 1)
}

/// The range of scalars of each piece of a chunk.
pub(super) fn pieces(chunk: Range<usize>, scalars: usize) -> impl Iterator<Item = Range<usize>> {
    let end = chunk.end;
    let starts = chunk.step_by(scalars);
    starts.map(move |start| start..end.min(start + scalars))
}

/// A piece of our own chunk: what has come of it, and its means once all parts have.
pub(super) struct Piece<'a, T> {
    pub state: Mutex<PieceState<'a, T>>,
    /// The means of the piece and their checksum, which is the same for all who get them.
    pub finished: OnceLock<(&'a [f32], u64)>,
}

/// Parts of a piece that have come so far.
pub(super) struct PieceState<'a, T> {
    /// Sum of the first contributions; empty while none was added. Ours is among them as soon as it is its turn.
    pub sum: Vec<T>,
    /// Contributions of others that `sum` holds.
    pub added: usize,
    /// Contributions of others that are not in `sum` yet, as they were sent.
    pub waiting: Vec<Part>,
    /// Where the means of the piece go; taken once it is finished.
    pub mean: &'a mut [f32],
}

/// A peer's part of a piece, at the start of a buffer.
pub(super) struct Part {
    pub buffer: Vec<u8>,
    pub length: usize,
}

impl Part {
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[..self.length]
    }
}

impl<T> PieceState<'_, T> {
    /// Contributions of others that have come, added or not.
    pub fn contributions(&self) -> usize {
        self.added + self.waiting.len()
    }
}

impl<'a, T> Piece<'a, T> {
    pub fn new(mean: &'a mut [f32]) -> Self {
        Self {
            state: Mutex::new(PieceState {
                sum: Vec::new(),
                added: 0,
                waiting: Vec::new(),
                mean,
            }),
            finished: OnceLock::new(),
        }
    }
}
