//! The exact sum over all members: reduce-scatter of the sums, then gather of the finished means.
//!
//! The flat buffer is cut into one contiguous chunk per rank. Each member sends its part of every chunk straight to the
//! chunk's owner; the owner adds all parts in one pass (integers, so in any order), turns the total into float32 and
//! sends that to everyone. Chunks travel in pieces, parts and finished ones mixed: a piece goes back as soon as it is
//! finished, out of the cache. One sending and one receiving thread per peer.
//!
//! Nobody sends a part before all have begun: a member that still has a slot in hand reads nothing, and to be slow to
//! begin is not to be silent. From then on senders wait for nothing but their socket until they have sent all parts.
//! Receivers wait for their socket, for peers that are pieces behind theirs, and in fast mode for the lower ranks'
//! contributions to the same piece; the peer that is furthest behind (the lowest such rank) is never waited with, so no
//! cycle can block.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use common::failpoint;

use super::CollectiveError;
use super::frame::{FrameKind, checksum};
use super::generation_token::GENERATION_CHECK_INTERVAL;
use super::lock::lock;
use super::piece::{Part, Piece, PieceState, chunk, piece_scalars, pieces, pieces_ahead};
use super::reduce_input::{BLOCK, ReduceElement, ReduceInput};
use super::start::Start;
use super::tcp::{Half, Mesh};

/// Parts of a piece that are added in one pass. More would only wait in memory.
const TOGETHER: usize = 4;

/// One exchange in progress, shared by its threads.
pub(super) struct Exchange<'a, S: ReduceInput + ?Sized> {
    mesh: &'a Mesh,
    sums: &'a S,
    /// Scalars of a piece; the last piece of a chunk may be shorter.
    piece_scalars: usize,
    pieces_ahead: usize,
    /// The pieces of our own chunk.
    pieces: Vec<Piece<'a, S::ReduceElement>>,
    /// Number of peers that have begun.
    begun: AtomicUsize,
    /// Lock that waiting on `changed` releases, taken before waking so that nobody who is about to wait misses it.
    turn: Mutex<()>,
    /// Woken when all have begun, and whenever a piece has taken a contribution that somebody may wait for.
    changed: Condvar,
}

impl<'a, S: ReduceInput + ?Sized> Exchange<'a, S> {
    /// Cuts `mean`, where the result goes, into chunks. Returns the exchange and, by rank, the chunks that the others fill.
    pub fn new(
        mesh: &'a Mesh,
        sums: &'a S,
        mean: &'a mut [f32],
    ) -> (Self, Vec<(u32, &'a mut [f32])>) {
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
            pieces_ahead: pieces_ahead(piece_scalars, mesh.size()),
            pieces,
            begun: AtomicUsize::new(0),
            turn: Mutex::new(()),
            changed: Condvar::new(),
        };
        (exchange, others)
    }

    /// Runs the exchange: fills all chunks of the mean gradient, and returns what each peer brought.
    pub fn run(
        &self,
        start: &Start,
        mut means: Vec<(u32, &mut [f32])>,
    ) -> Result<Vec<Start>, CollectiveError> {
        let start_bytes = start.encode(S::ReduceElement::MODE, self.sums.scalars());
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

    /// Finishes our chunk where there is no other member: it is all there is.
    fn finish_alone(&self) {
        let mut block = [bytemuck::Zeroable::zeroed(); BLOCK];
        let mut start = 0;
        for piece in &self.pieces {
            for mean in lock(&piece.state).mean.chunks_mut(BLOCK) {
                let sums = &mut block[..mean.len()];
                self.sums.read(start, sums);
                S::ReduceElement::finish(sums, mean);
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
            self.mesh.token.fail(error.clone());
            self.changed.notify_all();
        })
    }

    fn send_to(&self, peer: u32, start: &[u8]) -> Result<(), CollectiveError> {
        let mut sender = self.mesh.sender(peer)?;
        sender.send(FrameKind::Start, 0, start)?;
        self.wait_until(|| self.all_have_begun())?;
        let theirs = chunk(self.sums.scalars(), self.mesh.size(), peer);
        let mut parts = pieces(theirs, self.piece_scalars).enumerate();
        let mut buffer = self.part_buffer();
        for (index, piece) in self.pieces.iter().enumerate() {
            while piece.finished.get().is_none()
                && let Some((index, part)) = parts.next()
            {
                self.send_part(&mut sender, index, part, &mut buffer)?;
            }
            let (mean, checksum) = self.wait_for_mean(piece)?;
            let bytes = bytemuck::cast_slice(mean);
            sender.send_summed(FrameKind::Finished, index, bytes, checksum)?;
        }
        for (index, part) in parts {
            self.send_part(&mut sender, index, part, &mut buffer)?;
        }
        self.mesh.buffers.give(buffer);
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
        let theirs = Start::decode(&bytes, S::ReduceElement::MODE, self.sums.scalars(), start)
            .map_err(|fault| receiver.error(&fault))?;
        self.begun.fetch_add(1, Ordering::SeqCst);
        if self.all_have_begun() {
            self.wake();
        }
        // Nothing may be due before, but whether the peer is still there shows at once.
        receiver.wait_for_bytes(|| self.all_have_begun())?;
        let own = chunk(self.sums.scalars(), self.mesh.size(), self.mesh.rank());
        let mut parts = pieces(own, self.piece_scalars).enumerate().peekable();
        let mut means = mean.chunks_mut(self.piece_scalars).enumerate().peekable();
        while parts.peek().is_some() || means.peek().is_some() {
            let header = receiver.receive_header()?;
            let is_finished = header.kind == FrameKind::Finished as u8 || parts.peek().is_none();
            if is_finished && let Some((index, mean)) = means.next() {
                let bytes = bytemuck::cast_slice_mut(mean);
                receiver.receive_due(&header, FrameKind::Finished, index, bytes)?;
            } else if let Some((index, own)) = parts.next() {
                self.wait_for_slower_peers(index)?;
                let mut buffer = self.part_buffer();
                let kind = FrameKind::Part;
                let length = receiver.receive_due_up_to(&header, kind, index, &mut buffer)?;
                let part = Part { buffer, length };
                S::ReduceElement::open(part.bytes(), own.len())
                    .map_err(|fault| receiver.error(&fault))?;
                self.wait_for_turn(index, peer)?;
                self.contribute(index, part, own)
                    .map_err(|fault| receiver.error(&fault))?;
            }
        }
        Ok(theirs)
    }

    /// Buffer with room for one encoded part of a piece.
    fn part_buffer(&self) -> Vec<u8> {
        let scalars = self.piece_scalars.min(self.sums.scalars());
        self.mesh
            .buffers
            .take(S::ReduceElement::encoded_limit(scalars))
    }

    /// Leaves a part of a piece in the connection while an earlier piece lacks parts of others.
    ///
    /// What waits in memory would be out of the cache when they come. Waits not so long that the sender would take us for
    /// silent; the slowest peer is never waited with.
    fn wait_for_slower_peers(&self, index: usize) -> Result<(), CollectiveError> {
        let Some(earlier) = index.checked_sub(self.pieces_ahead) else {
            return Ok(());
        };
        let earlier = &self.pieces[earlier].finished;
        let deadline = Instant::now() + self.mesh.membership.silence / 4;
        self.wait_until(|| earlier.get().is_some() || Instant::now() >= deadline)
    }

    /// Waits until all lower ranks have contributed to a piece of our chunk, where the order of addition matters.
    fn wait_for_turn(&self, index: usize, peer: u32) -> Result<(), CollectiveError> {
        if !S::ReduceElement::ORDERED {
            return Ok(());
        }
        let place = peer as usize - usize::from(peer > self.mesh.rank());
        self.wait_until(|| lock(&self.pieces[index].state).contributions() == place)
    }

    /// Takes a peer's part of a piece of our chunk, which holds the scalars `own`. The last part finishes the piece. An error is
    /// a sentence without its subject.
    fn contribute(&self, index: usize, part: Part, own: Range<usize>) -> Result<(), String> {
        let piece = &self.pieces[index];
        let mut state = lock(&piece.state);
        state.waiting.push(part);
        let is_last = state.contributions() + 1 == self.mesh.size();
        if is_last || state.waiting.len() == TOGETHER {
            self.add_up(&mut state, own, is_last)?;
            state.added += state.waiting.len();
            for part in state.waiting.drain(..) {
                self.mesh.buffers.give(part.buffer);
            }
        }
        if is_last {
            state.sum = Vec::new();
            let mean: &[f32] = std::mem::take::<&mut [f32]>(&mut state.mean);
            let checksum = checksum(bytemuck::cast_slice(mean));
            // Only the last contribution comes here, so it is empty.
            let _ = piece.finished.set((mean, checksum));
        }
        drop(state);
        if is_last || S::ReduceElement::ORDERED {
            self.wake();
        }
        Ok(())
    }

    /// Adds the waiting parts of a piece to its sum, and our own when it is its turn, of the scalars `own`.
    ///
    /// Goes block by block, so that the sum stays within a core's first cache. The last call finishes the piece.
    fn add_up(
        &self,
        state: &mut PieceState<'_, S::ReduceElement>,
        own: Range<usize>,
        is_last: bool,
    ) -> Result<(), String> {
        // By rank: after the one before ours, and where ours is the first, with the next, which is the same sum.
        let turn = match S::ReduceElement::ORDERED {
            true => self.mesh.rank().max(1) as usize - 1,
            false => 0,
        };
        let PieceState {
            sum,
            added,
            waiting,
            mean,
        } = state;
        if !is_last {
            sum.resize(own.len(), bytemuck::Zeroable::zeroed());
        }
        let parts = waiting.iter();
        let parts = parts.map(|part| S::ReduceElement::open(part.bytes(), own.len()));
        let mut parts = parts.collect::<Result<Vec<_>, _>>()?;
        let [mut values, mut block] = [[bytemuck::Zeroable::zeroed(); BLOCK]; 2];
        for start in (0..own.len()).step_by(BLOCK) {
            let place = start..own.len().min(start + BLOCK);
            let (values, block) = (&mut values[..place.len()], &mut block[..place.len()]);
            if *added > 0 {
                values.copy_from_slice(&sum[place.clone()]);
            }
            for (contribution, part) in (*added..).zip(&mut parts) {
                match contribution {
                    0 => S::ReduceElement::next(part, values),
                    _ => {
                        S::ReduceElement::next(part, block);
                        S::ReduceElement::add(values, block);
                    }
                }
                if contribution == turn {
                    self.sums.read(own.start + start, block);
                    S::ReduceElement::add(values, block);
                }
            }
            match is_last {
                true => S::ReduceElement::finish(values, &mut mean[place]),
                false => sum[place].copy_from_slice(values),
            }
        }
        Ok(())
    }

    /// Waits for a finished piece of our chunk. Returns its means and their checksum.
    fn wait_for_mean(
        &self,
        piece: &Piece<'a, S::ReduceElement>,
    ) -> Result<(&'a [f32], u64), CollectiveError> {
        self.wait_until(|| piece.finished.get().is_some())?;
        Ok(piece.finished.get().copied().unwrap_or_default())
    }

    fn all_have_begun(&self) -> bool {
        self.begun.load(Ordering::SeqCst) + 1 == self.mesh.size()
    }

    /// Wakes all threads that wait for another, to look again.
    fn wake(&self) {
        drop(lock(&self.turn));
        self.changed.notify_all();
    }

    /// Waits for another thread of this exchange.
    fn wait_until(&self, ready: impl Fn() -> bool) -> Result<(), CollectiveError> {
        let mut turn = lock(&self.turn);
        while !ready() {
            self.mesh.token.check()?;
            turn = self
                .changed
                .wait_timeout(turn, GENERATION_CHECK_INTERVAL)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }
}
