//! The exact sum over all members: reduce-scatter of the sums, then gather of the finished means.
//!
//! The flat buffer is cut into one contiguous chunk per rank. Each member sends its part of every chunk straight to the
//! chunk's owner; the owner adds what arrives (integers, so in any order), turns the total into float32 and sends that
//! to everyone. Chunks travel in pieces, parts and finished ones mixed: a piece goes back as soon as it is finished, out
//! of the cache. One sending and one receiving thread per peer; receivers wait for nothing but their socket (and, in fast
//! mode, for the lower ranks' contributions, which arrive on other sockets), and senders for nothing but theirs until
//! they have sent all parts, so no cycle can block.

use std::ops::Range;
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};

use common::failpoint;

use super::fence::TICK;
use super::frame::FrameKind;
use super::start::Start;
use super::summands::{BLOCK, Scalar, Summands};
use super::tcp::{Half, Mesh};
use super::{CollectiveError, Contribution, ReducedSum, Sums, lock};
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

/// Scalars of a piece at most: few enough that receiving, adding and sending one stay within a core's cache.
const MAX_PIECE: usize = 128 << 10;
/// And at least: a frame has its price.
const MIN_PIECE: usize = 8 << 10;
/// Pieces of a chunk, where they are not too small: while one is on its way, others are added.
const PIECES: usize = 4;

/// Scalars of a piece where there are so many in all: the same on every member.
fn piece_scalars(scalars: usize, size: usize) -> usize {
    let wanted = scalars.div_ceil(size).div_ceil(PIECES);
    wanted.next_multiple_of(BLOCK).clamp(MIN_PIECE, MAX_PIECE)
}

/// The scalars that `rank` owns.
fn chunk(scalars: usize, size: usize, rank: u32) -> Range<usize> {
    let cut = |rank: usize| (scalars as u128 * rank as u128 / size as u128) as usize;
    cut(rank as usize)..cut(rank as usize + 1)
}

/// The scalars of each piece of a chunk.
fn pieces(chunk: Range<usize>, scalars: usize) -> impl Iterator<Item = Range<usize>> {
    let end = chunk.end;
    let starts = chunk.step_by(scalars);
    starts.map(move |start| start..end.min(start + scalars))
}

/// One exchange in progress, shared by its threads.
struct Exchange<'a, S: Summands + ?Sized> {
    mesh: &'a Mesh,
    sums: &'a S,
    /// Of each piece but a chunk's last.
    piece_scalars: usize,
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
        let piece_scalars = piece_scalars(sums.scalars(), mesh.size());
        let mut rest = mean;
        let mut pieces = Vec::new();
        let mut others = Vec::new();
        for rank in 0..mesh.size() as u32 {
            let length = chunk(sums.scalars(), mesh.size(), rank).len();
            let (mean, tail) = rest.split_at_mut(length);
            rest = tail;
            match rank == mesh.rank() {
                true => pieces.extend(mean.chunks_mut(piece_scalars).map(Piece::new)),
                false => others.push((rank, mean)),
            }
        }
        let exchange = Self {
            mesh,
            sums,
            piece_scalars,
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
        mut means: Vec<(u32, &mut [f32])>,
    ) -> Result<Vec<Start>, CollectiveError> {
        let start_bytes = start.encode(S::Scalar::MODE, self.sums.scalars());
        let start_bytes = &start_bytes;
        let receive = |peer, mean| self.guarded(|| self.receive_from(peer, start, mean));
        let receive = &receive;
        let Some((here, elsewhere)) = means.split_last_mut() else {
            self.finish_alone();
            return Ok(Vec::new());
        };
        std::thread::scope(|scope| {
            for peer in elsewhere.iter().chain([&*here]).map(|(peer, _)| *peer) {
                scope.spawn(move || self.guarded(|| self.send_to(peer, start_bytes)));
            }
            let threads: Vec<_> = elsewhere
                .iter_mut()
                .map(|(peer, mean)| scope.spawn(move || receive(*peer, mean)))
                .collect();
            let here = receive(here.0, here.1);
            // Once all have sent their parts, ours is finished too.
            let starts = threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or(Err(CollectiveError::Superseded)));
            starts.chain([here]).collect()
        })
    }

    /// Where nobody else is, our chunk is all there is.
    fn finish_alone(&self) {
        let mut block = [bytemuck::Zeroable::zeroed(); BLOCK];
        let mut start = 0;
        for piece in &self.pieces {
            for mean in lock(&piece.state).mean.chunks_mut(BLOCK) {
                let sums = &mut block[..mean.len()];
                self.sums.read(start, sums);
                S::Scalar::finish(sums, mean);
                start += mean.len();
            }
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
        let mut parts = pieces(theirs, self.piece_scalars).enumerate();
        let mut buffer = self.part_buffer();
        for (index, piece) in self.pieces.iter().enumerate() {
            while piece.finished.get().is_none()
                && let Some((index, part)) = parts.next()
            {
                self.send_part(&mut sender, index, part, &mut buffer)?;
            }
            let mean = self.wait_for_mean(piece)?;
            sender.send(FrameKind::Finished, index, bytemuck::cast_slice(mean))?;
        }
        for (index, part) in parts {
            self.send_part(&mut sender, index, part, &mut buffer)?;
        }
        Ok(())
    }

    fn send_part(
        &self,
        sender: &mut Half<'_>,
        index: usize,
        part: Range<usize>,
        buffer: &mut [u8],
    ) -> Result<(), CollectiveError> {
        let bytes = self.sums.encode(part, buffer);
        sender.send(FrameKind::Part, index, bytes)?;
        failpoint::reached("exchange");
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
        let mut parts = pieces(own, self.piece_scalars).enumerate().peekable();
        let mut means = mean.chunks_mut(self.piece_scalars).enumerate().peekable();
        let mut buffer = self.part_buffer();
        while parts.peek().is_some() || means.peek().is_some() {
            let header = receiver.receive_header()?;
            let is_finished = header.kind == FrameKind::Finished as u8 || parts.peek().is_none();
            if is_finished && let Some((index, mean)) = means.next() {
                let bytes = bytemuck::cast_slice_mut(mean);
                receiver.receive_due(&header, FrameKind::Finished, index, bytes)?;
            } else if let Some((index, part)) = parts.next() {
                let kind = FrameKind::Part;
                let length = receiver.receive_due_up_to(&header, kind, index, &mut buffer)?;
                self.wait_for_turn(index, peer)?;
                self.contribute(index, &buffer[..length], part)
                    .map_err(|fault| receiver.error(&fault))?;
            }
        }
        Ok(theirs)
    }

    /// Room for a part on its way.
    fn part_buffer(&self) -> Vec<u8> {
        let scalars = self.piece_scalars.min(self.sums.scalars());
        vec![0; S::Scalar::encoded_limit(scalars)]
    }

    /// Waits until all lower ranks have contributed to a piece of our chunk, where that matters.
    fn wait_for_turn(&self, index: usize, peer: u32) -> Result<(), CollectiveError> {
        if !S::Scalar::ORDERED {
            return Ok(());
        }
        let place = peer as usize - usize::from(peer > self.mesh.rank());
        self.wait_until(|| lock(&self.pieces[index].state).contributions == place)
    }

    /// Adds a peer's part, as it was sent, to a piece of our chunk, and when it is its turn ours, of the scalars `own`; the
    /// last one finishes the piece. An error is a sentence without its subject.
    fn contribute(&self, index: usize, part: &[u8], own: Range<usize>) -> Result<(), String> {
        let piece = &self.pieces[index];
        let mut state = lock(&piece.state);
        let PieceState {
            sum,
            contributions,
            mean,
        } = &mut *state;
        // By rank: after the one before ours, and where ours is the first, with the next, which is the same sum.
        let turn = match S::Scalar::ORDERED {
            true => self.mesh.rank().max(1) as usize - 1,
            false => 0,
        };
        let (is_first, is_turn) = (*contributions == 0, *contributions == turn);
        let is_last = *contributions + 2 == self.mesh.size();
        if is_first && !is_last {
            *sum = lock(&self.spare).pop().unwrap_or_default();
            sum.resize(own.len(), bytemuck::Zeroable::zeroed());
        }
        let mut block = [bytemuck::Zeroable::zeroed(); BLOCK];
        S::Scalar::decode(part, own.len(), |start, values| {
            let place = start..start + values.len();
            if !is_first {
                S::Scalar::add(values, &sum[place.clone()]);
            }
            if is_turn {
                let ours = &mut block[..values.len()];
                self.sums.read(own.start + start, ours);
                S::Scalar::add(values, ours);
            }
            match is_last {
                true => S::Scalar::finish(values, &mut mean[place]),
                false => sum[place].copy_from_slice(values),
            }
        })?;
        *contributions += 1;
        if is_last {
            lock(&self.spare).push(std::mem::take(sum));
            let mean = std::mem::take::<&mut [f32]>(mean);
            // Only the last contribution comes here, so it is empty.
            let _ = piece.finished.set(mean);
        }
        drop(state);
        if is_last || S::Scalar::ORDERED {
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
