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
use super::frame::FrameKind;
use super::narrow;
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
        let (exchange, means) = Exchange::new(self, sums, &mut mean);
        let starts = exchange.run(&start, means);
        drop(exchange);
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

/// Scalars of a sub-chunk: few enough that receiving, adding and sending one stay within a core's cache.
const PIECE: usize = 16 << 10;

/// What the two kinds of sums do differently.
trait Scalar: bytemuck::Pod + Send + Sync {
    const MODE: u8;
    /// The order of addition matters: contributions are added by rank.
    const ORDERED: bool;
    /// The bytes of a part on its way, in `buffer` where they are not those in memory.
    fn encode<'a>(part: &'a [Self], buffer: &'a mut Vec<u8>) -> &'a [u8];
    /// Bytes that `encode` needs at most.
    fn encoded_limit(scalars: usize) -> usize;
    fn decode(bytes: &[u8], part: &mut [Self]) -> Result<(), String>;
    fn add(sum: &mut [Self], part: &[Self]);
    /// The mean gradients.
    fn finish(sums: &[Self], means: &mut [f32]);
}

impl Scalar for i64 {
    const MODE: u8 = 1;
    const ORDERED: bool = false;

    fn encode<'a>(part: &'a [Self], buffer: &'a mut Vec<u8>) -> &'a [u8] {
        narrow::encode(part, buffer);
        buffer
    }

    fn encoded_limit(scalars: usize) -> usize {
        narrow::encoded_limit(scalars)
    }

    fn decode(bytes: &[u8], part: &mut [Self]) -> Result<(), String> {
        narrow::decode(bytes, part)
    }

    fn add(sum: &mut [Self], part: &[Self]) {
        for (sum, part) in sum.iter_mut().zip(part) {
            // Partial sums may leave the range and come back (common::exact).
            *sum = sum.wrapping_add(*part);
        }
    }

    fn finish(sums: &[Self], means: &mut [f32]) {
        narrow::finish(sums, means);
    }
}

impl Scalar for f32 {
    const MODE: u8 = 2;
    const ORDERED: bool = true;

    fn encode<'a>(part: &'a [Self], _: &'a mut Vec<u8>) -> &'a [u8] {
        bytemuck::cast_slice(part)
    }

    fn encoded_limit(scalars: usize) -> usize {
        scalars * size_of::<f32>()
    }

    fn decode(bytes: &[u8], part: &mut [Self]) -> Result<(), String> {
        let part: &mut [u8] = bytemuck::cast_slice_mut(part);
        if bytes.len() != part.len() {
            return Err(format!(
                "sent a part of {} bytes where {} were due",
                bytes.len(),
                part.len()
            ));
        }
        part.copy_from_slice(bytes);
        Ok(())
    }

    fn add(sum: &mut [Self], part: &[Self]) {
        for (sum, part) in sum.iter_mut().zip(part) {
            *sum += *part;
        }
    }

    fn finish(sums: &[Self], means: &mut [f32]) {
        means.copy_from_slice(sums);
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
    let starts = chunk.step_by(PIECE);
    starts.map(move |start| start..end.min(start + PIECE))
}

/// One exchange in progress, shared by its threads.
struct Exchange<'a, S: Summands + ?Sized> {
    mesh: &'a Mesh,
    sums: &'a S,
    /// Of our own chunk.
    pieces: Vec<Piece<'a, S::Scalar>>,
    /// Buffers of finished pieces, for those to come.
    spare: Mutex<Vec<Vec<S::Scalar>>>,
    /// Woken whenever a piece has taken a contribution that somebody may wait for.
    turn: Mutex<()>,
    changed: Condvar,
}

struct Piece<'a, T> {
    state: Mutex<PieceState<'a, T>>,
    finished: OnceLock<&'a [f32]>,
}

struct PieceState<'a, T> {
    /// Of the contributions so far; ours is among them as soon as it is its turn.
    sum: Vec<T>,
    /// Contributions of others.
    contributions: usize,
    /// Our part of the result, until it is finished.
    mean: &'a mut [f32],
}

impl<'a, S: Summands + ?Sized> Exchange<'a, S> {
    /// Cuts `mean`, where the result goes: the chunks of the other ranks come back.
    fn new(mesh: &'a Mesh, sums: &'a S, mean: &'a mut [f32]) -> (Self, Vec<(u32, &'a mut [f32])>) {
        let mut rest = mean;
        let mut pieces = Vec::new();
        let mut others = Vec::new();
        for rank in 0..mesh.size() as u32 {
            let length = chunk(sums.scalars(), mesh.size(), rank).len();
            let (mean, tail) = rest.split_at_mut(length);
            rest = tail;
            match rank == mesh.rank() {
                true => pieces.extend(mean.chunks_mut(PIECE).map(Piece::new)),
                false => others.push((rank, mean)),
            }
        }
        let exchange = Self {
            mesh,
            sums,
            pieces,
            spare: Mutex::default(),
            turn: Mutex::new(()),
            changed: Condvar::new(),
        };
        (exchange, others)
    }

    /// Fills the chunks of the others, and our own; returns what each peer brought.
    fn run(
        &self,
        start: &Start,
        means: Vec<(u32, &mut [f32])>,
    ) -> Result<Vec<Start>, CollectiveError> {
        let start_bytes = start.encode(S::Scalar::MODE, self.sums.scalars());
        let start_bytes = &start_bytes;
        std::thread::scope(|scope| {
            let receivers: Vec<_> = means
                .into_iter()
                .map(|(peer, mean)| {
                    scope.spawn(move || self.guarded(|| self.send_to(peer, start_bytes)));
                    scope.spawn(move || self.guarded(|| self.receive_from(peer, start, mean)))
                })
                .collect();
            // Once all have sent their parts, ours is finished too.
            let starts = receivers
                .into_iter()
                .map(|thread| thread.join().unwrap_or(Err(CollectiveError::Superseded)));
            let starts = starts.collect::<Result<Vec<_>, _>>()?;
            if starts.is_empty() {
                self.finish_alone();
            }
            Ok(starts)
        })
    }

    /// Where nobody else is, our chunk is all there is.
    fn finish_alone(&self) {
        let mut part = self.piece(self.sums.scalars());
        for (piece, range) in self.pieces.iter().zip(pieces(0..self.sums.scalars())) {
            let part = &mut part[..range.len()];
            self.sums.read(range.start, part);
            S::Scalar::finish(part, lock(&piece.state).mean);
        }
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
        let mut part = self.piece(theirs.len());
        let mut buffer = Vec::new();
        for (index, range) in pieces(theirs).enumerate() {
            let part = &mut part[..range.len()];
            self.sums.read(range.start, part);
            let bytes = S::Scalar::encode(part, &mut buffer);
            sender.send(FrameKind::Part, index, bytes)?;
            failpoint::reached("exchange");
        }
        for (index, piece) in self.pieces.iter().enumerate() {
            let mean = self.wait_for_mean(piece)?;
            sender.send(FrameKind::Finished, index, bytemuck::cast_slice(mean))?;
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
        let own = chunk(self.sums.scalars(), self.mesh.size(), self.mesh.rank());
        let mut part = self.piece(own.len());
        let mut bytes = vec![0; S::Scalar::encoded_limit(part.len())];
        for (index, range) in pieces(own).enumerate() {
            let part = &mut part[..range.len()];
            let length = receiver.receive_up_to(FrameKind::Part, index, &mut bytes)?;
            S::Scalar::decode(&bytes[..length], part).map_err(|fault| receiver.error(&fault))?;
            self.contribute(index, peer, part, range.start)?;
        }
        for (index, mean) in mean.chunks_mut(PIECE).enumerate() {
            receiver.receive(FrameKind::Finished, index, bytemuck::cast_slice_mut(mean))?;
        }
        Ok(theirs)
    }

    /// Room for a piece of a chunk.
    fn piece(&self, chunk: usize) -> Vec<S::Scalar> {
        vec![bytemuck::Zeroable::zeroed(); chunk.min(PIECE)]
    }

    /// Adds a peer's part to a piece of our chunk, and ours, `own` onwards, when it is its turn; the last one finishes
    /// the piece.
    fn contribute(
        &self,
        index: usize,
        peer: u32,
        part: &mut [S::Scalar],
        own: usize,
    ) -> Result<(), CollectiveError> {
        let (piece, rank) = (&self.pieces[index], self.mesh.rank());
        let place = peer as usize - usize::from(peer > rank);
        if S::Scalar::ORDERED {
            self.wait_until(|| lock(&piece.state).contributions == place)?;
        }
        let mut state = lock(&piece.state);
        if state.contributions == 0 {
            state.sum = lock(&self.spare).pop().unwrap_or_default();
            state.sum.clear();
            state.sum.extend_from_slice(part);
        } else {
            S::Scalar::add(&mut state.sum, part);
        }
        // By rank: after the one before ours, and where ours is the first, with the next, which is the same sum.
        let turn = match S::Scalar::ORDERED {
            true => rank.max(1) as usize - 1,
            false => 0,
        };
        if state.contributions == turn {
            self.sums.read(own, part);
            S::Scalar::add(&mut state.sum, part);
        }
        state.contributions += 1;
        let finished = state.contributions == self.mesh.size() - 1;
        if finished {
            let (sum, mean) = (
                std::mem::take(&mut state.sum),
                std::mem::take(&mut state.mean),
            );
            S::Scalar::finish(&sum, mean);
            // Only the last contribution comes here, so it is empty.
            let _ = piece.finished.set(mean);
            lock(&self.spare).push(sum);
        }
        drop(state);
        if finished || S::Scalar::ORDERED {
            drop(lock(&self.turn));
            self.changed.notify_all();
        }
        Ok(())
    }

    fn wait_for_mean(&self, piece: &Piece<'a, S::Scalar>) -> Result<&'a [f32], CollectiveError> {
        self.wait_until(|| piece.finished.get().is_some())?;
        Ok(piece.finished.get().copied().unwrap_or_default())
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

impl<'a, T> Piece<'a, T> {
    fn new(mean: &'a mut [f32]) -> Self {
        Self {
            state: Mutex::new(PieceState {
                sum: Vec::new(),
                contributions: 0,
                mean,
            }),
            finished: OnceLock::new(),
        }
    }
}
