//! Sums over all members by NCCL, on the GPU.
//!
//! In: a member's sums, which stay as they are. Out: the mean gradient. Exact sums are added as the integers that they are, in
//! any order; each member turns its share of them into float32, and those are gathered: the bits are those of the exchange
//! over TCP.
//!
//! NCCL has a stream of its own, and events order it and the engine's: while a member computes the means of a bucket, the
//! next one is summed. Only a few buckets are begun ahead, so that one that hangs is noticed.

use common::memory::gpu::EXCHANGE_BUCKET;
use cudarc::driver::{CudaEvent, DevicePtr, DevicePtrMut, DeviceRepr};

use super::error::NcclError;
use super::group::Group;
use super::library::{Call, DataType, Operation};
use crate::engine::cuda::Gpu;
use crate::engine::cuda::engine::{GpuMeanGradient, SumsOnGpu};
use crate::engine::cuda::gpu::DeviceBuffer;
use crate::engine::cuda::ops::update::exact_means;
use crate::engine::cuda::sums::DeviceSums;

/// Shares are a multiple of so many scalars, unless they are smaller: NCCL is slow with memory that is not aligned.
const ALIGNED: usize = 64;

/// Sums over all members. Returns the mean gradient, the same bits on each.
///
/// It takes memory on the GPU until it is dropped, which must be before the next slot: that memory is counted on then.
pub fn all_reduce(group: &Group, held: &SumsOnGpu) -> Result<GpuMeanGradient, NcclError> {
    let SumsOnGpu { gpu, sums, scalars } = *held;
    let mean = match sums {
        DeviceSums::Exact(sums) => exact_mean(gpu, group, sums, scalars)?,
        DeviceSums::Fast(sums) => fast_mean(gpu, group, sums, scalars)?,
    };
    Ok(GpuMeanGradient::Values(mean))
}

/// The mean gradient that the exact sums of all members stand for.
pub(super) fn exact_mean(
    gpu: &Gpu,
    group: &Group,
    sums: &DeviceBuffer<i64>,
    scalars: usize,
) -> Result<DeviceBuffer<f32>, NcclError> {
    exact_mean_in(EXCHANGE_BUCKET, gpu, group, sums, scalars)
}

/// Sums exact sums over all members in buckets of so many scalars, the same on every member, and returns the mean gradient.
pub(super) fn exact_mean_in(
    bucket: usize,
    gpu: &Gpu,
    group: &Group,
    sums: &DeviceBuffer<i64>,
    scalars: usize,
) -> Result<DeviceBuffer<f32>, NcclError> {
    let mean = gpu.take::<f32>(scalars)?;
    let (buckets, whole) = buckets(bucket, group.size(), scalars);
    let mut exchange = Exchange::new(gpu, group, sums, mean);
    exchange.run(&buckets)?;
    let Exchange { mut mean, .. } = exchange;
    if whole < scalars {
        // Fewer than members have a share of; nothing is added to them.
        let rest = scalars - whole;
        let share = rest.div_ceil(group.size());
        let mut padded = gpu.zeroed::<i64>(share * group.size())?;
        gpu.copy(&sums.slice(whole..scalars), &mut padded.slice_mut(..rest))?;
        let padded_mean = gpu.take::<f32>(share * group.size())?;
        let mut exchange = Exchange::new(gpu, group, &padded, padded_mean);
        exchange.run(&[Bucket { start: 0, share }])?;
        gpu.copy(
            &exchange.mean.slice(..rest),
            &mut mean.slice_mut(whole..scalars),
        )?;
    }
    Ok(mean)
}

/// Consecutive sums, of which each member turns so many into means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bucket {
    start: usize,
    share: usize,
}

/// Buckets of up to `bucket` scalars of which every member has an equal share, and where they end.
fn buckets(bucket: usize, members: usize, scalars: usize) -> (Vec<Bucket>, usize) {
    let mut share = aligned((bucket / members).max(1));
    let (mut buckets, mut start) = (Vec::new(), 0);
    loop {
        while start + share * members <= scalars {
            buckets.push(Bucket { start, share });
            start += share * members;
        }
        match aligned((scalars - start) / members) {
            0 => return (buckets, start),
            smaller => share = smaller,
        }
    }
}

fn aligned(share: usize) -> usize {
    match share {
        ..ALIGNED => share,
        _ => share - share % ALIGNED,
    }
}

/// An exchange of exact sums, as many on every member.
struct Exchange<'a> {
    gpu: &'a Gpu,
    group: &'a Group,
    sums: &'a DeviceBuffer<i64>,
    mean: DeviceBuffer<f32>,
    /// Buffers for the sums of our share, of a bucket and of the next one.
    own: Vec<DeviceBuffer<i64>>,
}

impl<'a> Exchange<'a> {
    fn new(
        gpu: &'a Gpu,
        group: &'a Group,
        sums: &'a DeviceBuffer<i64>,
        mean: DeviceBuffer<f32>,
    ) -> Self {
        Self {
            gpu,
            group,
            sums,
            mean,
            own: Vec::new(),
        }
    }

    /// Exchanges all buckets. Returns when all of it is done on the GPU.
    fn run(&mut self, buckets: &[Bucket]) -> Result<(), NcclError> {
        let done = self.run_overlapped(buckets);
        held_back(self.gpu, done)
    }

    fn run_overlapped(&mut self, buckets: &[Bucket]) -> Result<(), NcclError> {
        // No later one is larger.
        for bucket in buckets.iter().take(2) {
            self.own.push(self.gpu.take(bucket.share)?);
        }
        let ready = self.gpu.mark(self.gpu.stream())?;
        self.gpu.order(&ready, self.gpu.exchange_stream())?;
        let mut before = None;
        for (index, bucket) in buckets.iter().enumerate() {
            // Into the memory of the last but one, whose means were computed before they were gathered.
            let summed = self.sum(bucket, index % 2)?;
            if let Some((bucket, own, summed)) = before.replace((bucket, index % 2, summed)) {
                self.gather(bucket, own, &summed)?;
            }
        }
        if let Some((bucket, own, summed)) = before {
            self.gather(bucket, own, &summed)?;
        }
        self.group.finish()
    }

    /// Sums our share of a bucket over all members. Returns the event at the end of that.
    fn sum(&mut self, bucket: &Bucket, own: usize) -> Result<CudaEvent, NcclError> {
        let gpu = self.gpu;
        self.group.begin(Call {
            operation: Operation::ReduceScatter,
            from: address(gpu, self.sums, bucket.start),
            to: self.own[own].device_ptr_mut(gpu.stream()).0,
            count: bucket.share,
            data_type: DataType::Int64,
        })?;
        Ok(gpu.mark(gpu.exchange_stream())?)
    }

    /// Computes the means of our share of a bucket once it is summed, and gathers those of all members.
    fn gather(&mut self, bucket: &Bucket, own: usize, summed: &CudaEvent) -> Result<(), NcclError> {
        let (gpu, share) = (self.gpu, bucket.share);
        let ours = bucket.start + self.group.rank() * share;
        gpu.order(summed, gpu.stream())?;
        let means = &mut self.mean.slice_mut(ours..ours + share);
        exact_means(gpu, &self.own[own].slice(..share), means)?;
        let computed = gpu.mark(gpu.stream())?;
        gpu.order(&computed, gpu.exchange_stream())?;
        self.group.begin(Call {
            operation: Operation::AllGather,
            from: address(gpu, &self.mean, ours),
            to: address(gpu, &self.mean, bucket.start),
            count: share,
            data_type: DataType::Float32,
        })?;
        self.group.pace()
    }
}

/// The mean gradient from float32 sums in fast mode, added in whatever order NCCL adds.
pub(super) fn fast_mean(
    gpu: &Gpu,
    group: &Group,
    sums: &DeviceBuffer<f32>,
    scalars: usize,
) -> Result<DeviceBuffer<f32>, NcclError> {
    let mean = gpu.take::<f32>(scalars)?;
    let done = add_up(gpu, group, sums, &mean, scalars);
    held_back(gpu, done)?;
    Ok(mean)
}

fn add_up(
    gpu: &Gpu,
    group: &Group,
    sums: &DeviceBuffer<f32>,
    mean: &DeviceBuffer<f32>,
    scalars: usize,
) -> Result<(), NcclError> {
    let ready = gpu.mark(gpu.stream())?;
    gpu.order(&ready, gpu.exchange_stream())?;
    for start in (0..scalars).step_by(EXCHANGE_BUCKET) {
        group.begin(Call {
            operation: Operation::AllReduce,
            from: address(gpu, sums, start),
            to: address(gpu, mean, start),
            count: EXCHANGE_BUCKET.min(scalars - start),
            data_type: DataType::Float32,
        })?;
        group.pace()?;
    }
    group.finish()
}

/// Where an exchange failed, the memory that it gives back is others' only once NCCL's stream is past it.
fn held_back(gpu: &Gpu, done: Result<(), NcclError>) -> Result<(), NcclError> {
    done.inspect_err(|_| gpu.follow_exchange())
}

/// Address on the device of one scalar of a buffer.
fn address<T: DeviceRepr>(gpu: &Gpu, buffer: &DeviceBuffer<T>, scalar: usize) -> u64 {
    buffer.device_ptr(gpu.stream()).0 + (scalar * size_of::<T>()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_equal_shares_of_all_but_fewer_scalars_than_members() {
        for (members, scalars) in [(2, 7), (3, 1000), (4, 100_003), (7, 6), (8, 1 << 20)] {
            let (buckets, whole) = buckets(10_000, members, scalars);
            let mut start = 0;
            for bucket in &buckets {
                assert_eq!(bucket.start, start);
                assert!(bucket.share > 0 && bucket.share * members <= 10_000);
                start += bucket.share * members;
            }
            assert!(start == whole && scalars - whole < members);
        }
        let share = 4992;
        let starts = [0, 2 * share].map(|start| Bucket { start, share });
        assert_eq!(buckets(10_000, 2, 4 * share), (starts.to_vec(), 4 * share));
    }
}
