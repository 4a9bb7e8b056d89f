//! Sums over all members by NCCL, on the GPU.
//!
//! In: a member's sums, which stay as they are. Out: the mean gradient. Exact sums are added as the integers that they are, in
//! any order; each member turns its share of them into float32, and those are gathered: the bits are those of the exchange
//! over TCP. Buckets follow each other on the engine's stream; only a few are begun ahead, so that one that hangs is noticed.

use cudarc::driver::{DevicePtr, DevicePtrMut, DeviceRepr};

use super::library::{Call, DataType, Operation};
use super::{Group, NcclError};
use crate::engine::cuda::Gpu;
use crate::engine::cuda::gpu::DeviceBuffer;
use crate::engine::cuda::ops::update::exact_means;

/// Scalars of a bucket: 64 MiB of exact sums.
const BUCKET: usize = 8 << 20;

/// The mean gradient that the exact sums of all members stand for.
pub fn exact_mean(
    gpu: &Gpu,
    group: &Group,
    sums: &DeviceBuffer<i64>,
    scalars: usize,
) -> Result<DeviceBuffer<f32>, NcclError> {
    exact_mean_in(BUCKET, gpu, group, sums, scalars)
}

/// In buckets of so many scalars; the same on every member.
pub(super) fn exact_mean_in(
    bucket: usize,
    gpu: &Gpu,
    group: &Group,
    sums: &DeviceBuffer<i64>,
    scalars: usize,
) -> Result<DeviceBuffer<f32>, NcclError> {
    let mut mean = gpu.take::<f32>(scalars)?;
    let share = (bucket / group.size()).max(1);
    let whole = scalars - scalars % (share * group.size());
    let own = &mut gpu.take::<i64>(share)?;
    for start in (0..whole).step_by(share * group.size()) {
        let from = address(gpu, sums, start);
        exact_bucket(gpu, group, (from, own), (&mut mean, start), share)?;
    }
    if whole < scalars {
        // Not every member has a share of the rest, so nothing is added to it until all have.
        let rest = scalars - whole;
        let share = rest.div_ceil(group.size());
        let mut padded = gpu.zeroed::<i64>(share * group.size())?;
        gpu.copy(&sums.slice(whole..scalars), &mut padded.slice_mut(..rest))?;
        let mut padded_mean = gpu.take::<f32>(share * group.size())?;
        let from = address(gpu, &padded, 0);
        exact_bucket(gpu, group, (from, own), (&mut padded_mean, 0), share)?;
        gpu.copy(
            &padded_mean.slice(..rest),
            &mut mean.slice_mut(whole..scalars),
        )?;
    }
    group.finish()?;
    Ok(mean)
}

/// The means of `share` scalars for each member, from the sums at `from` to those of `mean` from `start`. `own` has room for
/// the sums of one share.
fn exact_bucket(
    gpu: &Gpu,
    group: &Group,
    (from, own): (u64, &mut DeviceBuffer<i64>),
    (mean, start): (&mut DeviceBuffer<f32>, usize),
    share: usize,
) -> Result<(), NcclError> {
    group.begin(Call {
        operation: Operation::ReduceScatter,
        from,
        to: own.device_ptr_mut(gpu.stream()).0,
        count: share,
        data_type: DataType::Int64,
    })?;
    let ours = start + group.rank() * share;
    exact_means(
        gpu,
        &own.slice(..share),
        &mut mean.slice_mut(ours..ours + share),
    )?;
    group.begin(Call {
        operation: Operation::AllGather,
        from: address(gpu, mean, ours),
        to: address(gpu, mean, start),
        count: share,
        data_type: DataType::Float32,
    })?;
    group.pace()
}

/// The sum of float32 means, in whatever order NCCL adds.
pub fn fast_mean(
    gpu: &Gpu,
    group: &Group,
    sums: &DeviceBuffer<f32>,
    scalars: usize,
) -> Result<DeviceBuffer<f32>, NcclError> {
    let mean = gpu.take::<f32>(scalars)?;
    for start in (0..scalars).step_by(BUCKET) {
        group.begin(Call {
            operation: Operation::AllReduce,
            from: address(gpu, sums, start),
            to: address(gpu, &mean, start),
            count: BUCKET.min(scalars - start),
            data_type: DataType::Float32,
        })?;
        group.pace()?;
    }
    group.finish()?;
    Ok(mean)
}

/// Of a scalar on the device.
fn address<T: DeviceRepr>(gpu: &Gpu, buffer: &DeviceBuffer<T>, scalar: usize) -> u64 {
    buffer.device_ptr(gpu.stream()).0 + (scalar * size_of::<T>()) as u64
}
