//! The exact sum over all members: reduce-scatter of the sums, then gather of the finished means.
//!
//! The flat buffer is cut into one contiguous chunk per rank. Each member sends its part of every chunk straight to the
//! chunk's owner; the owner adds what arrives (integers, so in any order), turns the total into float32 and sends that
//! to everyone. Chunks travel in pieces: while a piece is being received, the one before is added and an earlier one is
//! already on its way back. One sending and one receiving thread per peer; receivers wait for nothing but their socket
//! (and, in fast mode, for the lower ranks' contributions, which arrive on other sockets), so no cycle can block.

use std::ops::Range;
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};

use common::failpoint;

use super::fence::TICK;
use super::frame::{FrameKind, PIECE_SCALARS};
use super::start::Start;
use super::tcp::Mesh;
use super::{CollectiveError, Contribution, ReducedSum, Sums, lock};
use crate::engine::packed::PackedSums;
use crate::slot::HeldSlots;

impl Mesh {
    /// Where nobody else is, the contribution is the sum of all: only the slots that make up the step. None: there are
    /// others to exchange with.
    pub fn sum_of_one(
        &self,
        contribution: &Contribution<'_>,
    ) -> Result<Option<HeldSlots>, CollectiveError> {
        self.fence.check().map_err(|_| self.fence.reason())?;
        match self.size() {
            1 => Start::of(contribution).complete().map(Some),
            _ => Ok(None),
        }
    }

    /// Sums the contributions of all members. On an error the contribution is untouched and the mesh is of no further
    /// use: the next generation has a new one.
    pub fn all_reduce(
        &self,
        contribution: &Contribution<'_>,
    ) -> Result<ReducedSum, CollectiveError> {
        self.all_reduce_into(contribution, Vec::new())
    }

    /// As [`all_reduce`](Self::all_reduce), into the memory of a vector that is of no more use.
    pub fn all_reduce_into(
        &self,
        contribution: &Contribution<'_>,
        mean: Vec<f32>,
    ) -> Result<ReducedSum, CollectiveError> {
        self.fence.check().map_err(|_| self.fence.reason())?;
        match contribution.sums {
            Sums::Exact(sums) => self.reduce(contribution, sums, mean),
            Sums::Packed(sums) => self.reduce(contribution, sums, mean),
            Sums::Fast(sums) => self.reduce(contribution, sums, mean),
        }
    }

    fn reduce<S: Summands + ?Sized>(
        &self,
        contribution: &Contribution<'_>,
        sums: &S,
        mut mean: Vec<f32>,
    ) -> Result<ReducedSum, CollectiveError> {
        let mut start = Start::of(contribution);
        mean.resize(sums.scalars(), 0.0);
        let exchange = Exchange::new(self, sums);
        let starts = exchange.run(&start, &mut mean);
        // Peers keep their connections until the next generation, so that a third party's failure is not taken for ours.
        let starts = starts.map_err(|error| {
            self.fence.fail(error);
            self.fence.reason()
        })?;
        for peer in starts {
            start.merge(peer)?;
        }
        Ok(ReducedSum {
            mean,
            invalid: start.invalid,
            slots: start.complete()?,
        })
    }
}

/// What the two kinds of sums do differently.
trait Scalar: bytemuck::Pod + Send + Sync {
    const MODE: u8;
    /// The order of addition matters: contributions are added by rank.
    const ORDERED: bool;
    fn add(sum: &mut [Self], part: &[Self]);
    /// The mean gradient.
    fn finish(sum: Self) -> f32;
}

impl Scalar for i64 {
    const MODE: u8 = 1;
    const ORDERED: bool = false;

    fn add(sum: &mut [Self], part: &[Self]) {
        for (sum, part) in sum.iter_mut().zip(part) {
            // Partial sums may leave the range and come back (common::exact).
            *sum = sum.wrapping_add(*part);
        }
    }

    fn finish(sum: Self) -> f32 {
        common::exact::dequantize(sum)
    }
}

impl Scalar for f32 {
    const MODE: u8 = 2;
    const ORDERED: bool = true;

    fn add(sum: &mut [Self], part: &[Self]) {
        for (sum, part) in sum.iter_mut().zip(part) {
            *sum += *part;
        }
    }

    fn finish(sum: Self) -> f32 {
        sum
    }
}

/// What a member brings, read piece by piece.
trait Summands: Sync {
    type Scalar: Scalar;
    fn scalars(&self) -> usize;
    /// Those from `start`, as many as `piece` takes.
    fn read(&self, start: usize, piece: &mut [Self::Scalar]);
}

impl<T: Scalar> Summands for [T] {
    type Scalar = T;

    fn scalars(&self) -> usize {
        self.len()
    }

    fn read(&self, start: usize, piece: &mut [T]) {
        piece.copy_from_slice(&self[start..start + piece.len()]);
    }
}

impl Summands for PackedSums {
    type Scalar = i64;

    fn scalars(&self) -> usize {
        self.len()
    }

    fn read(&self, start: usize, piece: &mut [i64]) {
        PackedSums::read(self, start, piece);
    }
}

/// The scalars that `rank` owns.
fn chunk(scalars: usize, size: usize, rank: u32) -> Range<usize> {
    let cut = |rank: usize| (scalars as u128 * rank as u128 / size as u128) as usize;
    cut(rank as usize)..cut(rank as usize + 1)
}

/// The scalars of each piece of a chunk.
fn pieces(chunk: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = chunk.end;
    let starts = chunk.step_by(PIECE_SCALARS);
    starts.map(move |start| start..end.min(start + PIECE_SCALARS))
}

/// One exchange in progress, shared by its threads.
struct Exchange<'a, S: Summands + ?Sized> {
    mesh: &'a Mesh,
    sums: &'a S,
    /// Of our own chunk.
    pieces: Vec<Piece<S::Scalar>>,
    /// Woken whenever a piece has taken a contribution.
    turn: Mutex<()>,
    changed: Condvar,
}

struct Piece<T> {
    state: Mutex<PieceState<T>>,
    mean: OnceLock<Vec<f32>>,
}

struct PieceState<T> {
    sum: Vec<T>,
    contributions: usize,
}

impl<'a, S: Summands + ?Sized> Exchange<'a, S> {
    fn new(mesh: &'a Mesh, sums: &'a S) -> Self {
        let own = chunk(sums.scalars(), mesh.size(), mesh.rank());
        let pieces = (0..own.len().div_ceil(PIECE_SCALARS)).map(|_| Piece {
            state: Mutex::new(PieceState {
                sum: Vec::new(),
                contributions: 0,
            }),
            mean: OnceLock::new(),
        });
        Self {
            mesh,
            sums,
            pieces: pieces.collect(),
            turn: Mutex::new(()),
            changed: Condvar::new(),
        }
    }

    /// Fills `mean` and returns what each peer brought.
    fn run(&self, start: &Start, mean: &mut [f32]) -> Result<Vec<Start>, CollectiveError> {
        let start_bytes = start.encode(S::Scalar::MODE, self.sums.scalars());
        let (size, rank) = (self.mesh.size(), self.mesh.rank());
        std::thread::scope(|scope| {
            let mut rest = &mut *mean;
            let mut own_mean = Default::default();
            let mut receivers = Vec::new();
            for peer in 0..size as u32 {
                let (chunk_mean, tail) =
                    rest.split_at_mut(chunk(self.sums.scalars(), size, peer).len());
                rest = tail;
                if peer == rank {
                    own_mean = chunk_mean;
                    continue;
                }
                receivers
                    .push(scope.spawn(move || {
                        self.guarded(|| self.receive_from(peer, start, chunk_mean))
                    }));
                let start_bytes = &start_bytes;
                scope.spawn(move || self.guarded(|| self.send_to(peer, start_bytes)));
            }
            let contributed = self.guarded(|| self.contribute_own());
            let starts: Result<Vec<Start>, CollectiveError> = receivers
                .into_iter()
                .map(|thread| thread.join().unwrap_or(Err(CollectiveError::Superseded)))
                .collect();
            contributed?;
            let starts = starts?;
            for (piece, mean) in self.pieces.iter().zip(own_mean.chunks_mut(PIECE_SCALARS)) {
                mean.copy_from_slice(self.wait_for_mean(piece)?);
            }
            Ok(starts)
        })
    }

    /// Runs one thread's share; its failure ends all the others.
    fn guarded<R>(
        &self,
        share: impl FnOnce() -> Result<R, CollectiveError>,
    ) -> Result<R, CollectiveError> {
        share().inspect_err(|error| {
            self.mesh.fence.fail(error.clone());
            self.changed.notify_all();
        })
    }

    fn send_to(&self, peer: u32, start: &[u8]) -> Result<(), CollectiveError> {
        let mut sender = self.mesh.sender(peer)?;
        sender.send(FrameKind::Start, 0, start)?;
        let theirs = chunk(self.sums.scalars(), self.mesh.size(), peer);
        let mut piece = self.piece(theirs.len());
        for (index, range) in pieces(theirs).enumerate() {
            let part = &mut piece[..range.len()];
            self.sums.read(range.start, part);
            sender.send(FrameKind::Part, index, bytemuck::cast_slice(part))?;
            failpoint::reached("exchange");
        }
        for (index, piece) in self.pieces.iter().enumerate() {
            let mean = self.wait_for_mean(piece)?;
            sender.send(FrameKind::Finished, index, bytemuck::cast_slice(mean))?;
        }
        Ok(())
    }

    fn contribute_own(&self) -> Result<(), CollectiveError> {
        let own = chunk(self.sums.scalars(), self.mesh.size(), self.mesh.rank());
        let mut piece = self.piece(own.len());
        for (index, range) in pieces(own).enumerate() {
            let part = &mut piece[..range.len()];
            self.sums.read(range.start, part);
            self.contribute(index, self.mesh.rank(), part)?;
        }
        Ok(())
    }

    fn receive_from(
        &self,
        peer: u32,
        start: &Start,
        mean: &mut [f32],
    ) -> Result<Start, CollectiveError> {
        let mut receiver = self.mesh.receiver(peer)?;
        let bytes = receiver.receive_any_length(FrameKind::Start, 0)?;
        let theirs = Start::decode(&bytes, S::Scalar::MODE, self.sums.scalars(), start)
            .map_err(|fault| receiver.error(&fault))?;
        let own = chunk(self.sums.scalars(), self.mesh.size(), self.mesh.rank()).len();
        let mut part = self.piece(own);
        for index in 0..self.pieces.len() {
            let part = &mut part[..PIECE_SCALARS.min(own - index * PIECE_SCALARS)];
            receiver.receive(FrameKind::Part, index, bytemuck::cast_slice_mut(part))?;
            self.contribute(index, peer, part)?;
        }
        for (index, mean) in mean.chunks_mut(PIECE_SCALARS).enumerate() {
            receiver.receive(FrameKind::Finished, index, bytemuck::cast_slice_mut(mean))?;
        }
        Ok(theirs)
    }

    /// Room for a piece of a chunk.
    fn piece(&self, chunk: usize) -> Vec<S::Scalar> {
        vec![bytemuck::Zeroable::zeroed(); chunk.min(PIECE_SCALARS)]
    }

    /// Adds one member's part to a piece of our chunk; the last one finishes it.
    fn contribute(
        &self,
        index: usize,
        rank: u32,
        part: &[S::Scalar],
    ) -> Result<(), CollectiveError> {
        let piece = &self.pieces[index];
        if S::Scalar::ORDERED {
            self.wait_until(|| lock(&piece.state).contributions == rank as usize)?;
        }
        let mut state = lock(&piece.state);
        match state.contributions {
            0 => state.sum = part.to_vec(),
            _ => S::Scalar::add(&mut state.sum, part),
        }
        state.contributions += 1;
        let finished = state.contributions == self.mesh.size();
        if finished {
            let sum = std::mem::take(&mut state.sum);
            let mean = sum.into_iter().map(S::Scalar::finish).collect();
            // Only the last contribution comes here, so it is empty.
            let _ = piece.mean.set(mean);
        }
        drop(state);
        if finished || S::Scalar::ORDERED {
            drop(lock(&self.turn));
            self.changed.notify_all();
        }
        Ok(())
    }

    fn wait_for_mean<'p>(&self, piece: &'p Piece<S::Scalar>) -> Result<&'p [f32], CollectiveError> {
        self.wait_until(|| piece.mean.get().is_some())?;
        Ok(piece.mean.get().map_or(&[], Vec::as_slice))
    }

    /// Waits for another thread of this exchange.
    fn wait_until(&self, ready: impl Fn() -> bool) -> Result<(), CollectiveError> {
        let mut turn = lock(&self.turn);
        while !ready() {
            self.mesh.fence.check()?;
            turn = self
                .changed
                .wait_timeout(turn, TICK)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }
}
