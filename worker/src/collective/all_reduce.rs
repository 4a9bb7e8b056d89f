//! What the members of a mesh sum together. In: each one's contribution. Out: the mean gradient and the slots in it, the
//! same on all; or what was the first to fail in the generation.

use super::exchange::Exchange;
#[cfg(feature = "cuda")]
use super::frame::FrameKind;
use super::reduce_input::ReduceInput;
use super::start::Start;
use super::tcp::Mesh;
use super::{AllReduced, CollectiveError, Contribution, LocalSums};
use crate::engine::MeanGradient;
use crate::engine::memory;
use crate::engine::slot::HeldSlots;

impl Mesh {
    /// Returns the slots of the step where this worker is the only member, so that its contribution is the sum of all. None where
    /// there are others to exchange with.
    pub fn sum_of_one(
        &self,
        contribution: &Contribution<'_>,
    ) -> Result<Option<HeldSlots>, CollectiveError> {
        self.token.check().map_err(|_| self.token.reason())?;
        match self.size() {
            1 => Start::of(contribution).complete().map(Some),
            _ => Ok(None),
        }
    }

    /// Agrees on the slots of the step without summing gradients, where the sums, so many `scalars`, travel another way.
    ///
    /// Returns the slots of all members, which must make up the step, and how many scalars of theirs were invalid.
    #[cfg(feature = "cuda")]
    pub fn agree(
        &self,
        contribution: &Contribution<'_>,
        scalars: usize,
    ) -> Result<(HeldSlots, u64), CollectiveError> {
        self.token.check().map_err(|_| self.token.reason())?;
        let mut start = Start::of(contribution);
        let bytes = &start.encode(ELSEWHERE, scalars);
        let swap = |peer| -> Result<Start, CollectiveError> {
            let mut receiver = self.receiver(peer)?;
            let theirs = receiver.receive_any_length(FrameKind::Start, 0)?;
            let theirs = Start::decode(&theirs, ELSEWHERE, scalars, &Start::of(contribution));
            theirs.map_err(|fault| receiver.error(&fault))
        };
        let peers = (0..self.size() as u32).filter(|peer| *peer != self.rank());
        let peers: Vec<u32> = peers.collect();
        let starts: Result<Vec<Start>, CollectiveError> = std::thread::scope(|scope| {
            for &peer in &peers {
                // What cannot be sent is not answered either, and ends the generation.
                scope.spawn(move || {
                    let sent = self.sender(peer)?.send(FrameKind::Start, 0, bytes);
                    sent.inspect_err(|error| self.token.fail(error.clone()))
                });
            }
            peers.iter().map(|&peer| swap(peer)).collect()
        });
        self.merge(&mut start, starts)?;
        let invalid = start.invalid;
        Ok((start.complete()?, invalid))
    }

    /// Sums the contributions of all members. On an error the contribution is untouched and the mesh is of no further
    /// use: the next generation has a new one.
    pub fn all_reduce(
        &self,
        contribution: &Contribution<'_>,
    ) -> Result<AllReduced, CollectiveError> {
        self.all_reduce_into(contribution, Vec::new())
    }

    /// Sums as [`all_reduce`](Self::all_reduce) does, into the memory of a vector that is of no more use.
    pub fn all_reduce_into(
        &self,
        contribution: &Contribution<'_>,
        mean: Vec<f32>,
    ) -> Result<AllReduced, CollectiveError> {
        self.token.check().map_err(|_| self.token.reason())?;
        match contribution.sums {
            LocalSums::Exact(sums) => self.reduce(contribution, sums, mean),
            LocalSums::Packed(sums) => self.reduce(contribution, sums, mean),
            LocalSums::Fast(sums) => self.reduce(contribution, sums, mean),
        }
    }

    fn reduce<S: ReduceInput + ?Sized>(
        &self,
        contribution: &Contribution<'_>,
        sums: &S,
        mut mean: Vec<f32>,
    ) -> Result<AllReduced, CollectiveError> {
        let mut start = Start::of(contribution);
        match mean.capacity() < sums.scalars() {
            true => mean = memory::zeros(sums.scalars()),
            false => mean.resize(sums.scalars(), 0.0),
        }
        let (exchange, means) = Exchange::new(self, sums, &mut mean);
        let starts = exchange.run(&start, means);
        drop(exchange);
        self.merge(&mut start, starts)?;
        Ok(AllReduced {
            mean: MeanGradient {
                values: mean,
                invalid: start.invalid,
            },
            slots: start.complete()?,
        })
    }

    /// Adds what the peers brought, or ends the generation and returns the first failure in it. Peers keep their
    /// connections until the next generation, so that a third party's failure is not taken for ours.
    fn merge(
        &self,
        start: &mut Start,
        peers: Result<Vec<Start>, CollectiveError>,
    ) -> Result<(), CollectiveError> {
        let peers = peers.map_err(|error| {
            self.token.fail(error);
            self.token.reason()
        })?;
        peers.into_iter().try_for_each(|peer| start.merge(peer))
    }
}

/// Mode in the first frame of an exchange whose sums do not travel over the mesh.
#[cfg(feature = "cuda")]
const ELSEWHERE: u8 = 3;
