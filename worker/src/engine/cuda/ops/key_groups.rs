//! [`crate::engine::ops::key_groups`] on the GPU.

use cudarc::driver::CudaViewMut;

use super::elementwise::Rows;
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{Gpu, Grid};
use crate::engine::ops::delta_rule::DeltaHeads;
use crate::engine::ops::key_groups::KeyGroups;
use crate::launch;

const THREADS: u32 = 256;

/// Refuses rows that a block has no room for.
pub fn check_rows<E: GpuElement>(gpu: &Gpu, groups: KeyGroups) -> Result<(), GpuError> {
    if groups.width() * size_of::<E>() <= gpu.shared_memory()? {
        return Ok(());
    }
    Err(GpuError::Heads {
        head_dim: groups.0.key_dim,
        name: gpu.name().to_owned(),
        reason: "all that linear attention reads of a token is larger than a block's shared memory",
    })
}

/// Puts the columns of each row part by part, where they lay key head by key head.
pub fn split<E: GpuElement>(
    gpu: &Gpu,
    groups: KeyGroups,
    rows: (&mut CudaViewMut<E>, Rows),
) -> Result<(), GpuError> {
    reorder(gpu, groups, rows, 0)
}

/// Undoes [`split`].
pub fn join<E: GpuElement>(
    gpu: &Gpu,
    groups: KeyGroups,
    rows: (&mut CudaViewMut<E>, Rows),
) -> Result<(), GpuError> {
    reorder(gpu, groups, rows, 1)
}

fn reorder<E: GpuElement>(
    gpu: &Gpu,
    groups: KeyGroups,
    (x, rows): (&mut CudaViewMut<E>, Rows),
    joins: i32,
) -> Result<(), GpuError> {
    assert!(
        rows.columns == groups.width() && x.len() >= rows.len(),
        "rows of these heads"
    );
    let DeltaHeads {
        key_heads,
        value_heads,
        key_dim,
        value_dim,
    } = groups.0;
    let [key_heads, value_heads, key_dim, value_dim] =
        [key_heads, value_heads, key_dim, value_dim].map(|size| size as i32);
    let (width, stride) = (rows.columns as i32, rows.stride as i64);
    let name = format!("key_groups_{}", E::SUFFIX);
    let grid = Grid {
        shared: (rows.columns * size_of::<E>()) as u32,
        ..Grid::rows(rows.rows, THREADS)
    };
    // SAFETY: x was checked to hold its rows, and a block has the memory for one.
    unsafe {
        launch!(
            gpu,
            &name,
            grid,
            [
                x,
                &width,
                &stride,
                &joins,
                &key_heads,
                &value_heads,
                &key_dim,
                &value_dim
            ]
        )
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::cuda::testing::gpu;
    use crate::engine::testing::random_values;

    #[test]
    fn columns_go_where_the_processor_has_them_and_back() {
        let Some(gpu) = gpu() else { return };
        for (key_heads, value_heads, key_dim, value_dim) in [(2, 4, 3, 5), (3, 3, 8, 2)] {
            let groups = KeyGroups(DeltaHeads {
                key_heads,
                value_heads,
                key_dim,
                value_dim,
            });
            let width = groups.width();
            let given = random_values(7 * width, 1);
            let mut expected = given.clone();
            groups.split(&mut expected[..]);
            let mut found = gpu.upload(&given).unwrap();
            let rows = Rows::new(7, width);
            split(gpu, groups, (&mut found.as_view_mut(), rows)).unwrap();
            assert_eq!(gpu.download(&found, given.len()).unwrap(), expected);
            join(gpu, groups, (&mut found.as_view_mut(), rows)).unwrap();
            assert_eq!(gpu.download(&found, given.len()).unwrap(), given);
        }
    }

    #[test]
    fn what_lies_behind_rows_is_left_alone() {
        let Some(gpu) = gpu() else { return };
        let groups = KeyGroups(DeltaHeads {
            key_heads: 2,
            value_heads: 4,
            key_dim: 3,
            value_dim: 2,
        });
        let rows = Rows::strided(3, groups.width(), groups.width() + 4);
        let given = random_values(3 * rows.stride, 2);
        let mut found = gpu.upload(&given).unwrap();
        split(gpu, groups, (&mut found.as_view_mut(), rows)).unwrap();
        let found = gpu.download(&found, given.len()).unwrap();
        for (found, given) in found.chunks(rows.stride).zip(given.chunks(rows.stride)) {
            assert_eq!(found[rows.columns..], given[rows.columns..]);
            let mut expected = given[..rows.columns].to_vec();
            groups.split(&mut expected[..]);
            assert_eq!(found[..rows.columns], expected);
        }
    }
}
