//! Operations of one pass over rows: rounding, adding, sums of columns, and rows by number.

use cudarc::driver::{CudaView, CudaViewMut};

use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{Gpu, Grid};
use crate::launch;

/// Rows whose sum is made by one thread, in order. Part of the numerics.
pub(super) const COLUMN_TILE: usize = 128;
const THREADS: u32 = 256;

/// Where rows lie in a buffer: `rows` of `columns`, the first scalars of each `stride`.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    pub rows: usize,
    pub columns: usize,
    pub stride: usize,
}

impl Rows {
    pub fn new(rows: usize, columns: usize) -> Self {
        Self::strided(rows, columns, columns)
    }

    pub fn strided(rows: usize, columns: usize, stride: usize) -> Self {
        assert!(columns <= stride, "rows that overlap");
        Self {
            rows,
            columns,
            stride,
        }
    }

    /// Scalars from the first row to the end of the last.
    pub fn len(&self) -> usize {
        match self.rows {
            0 => 0,
            rows => (rows - 1) * self.stride + self.columns,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.rows * self.columns == 0
    }
}

/// `to = scale · from`, rounded to the nearest.
pub fn round_rows<E: GpuElement>(
    gpu: &Gpu,
    (from, from_rows): (&CudaView<f32>, Rows),
    (to, to_rows): (&mut CudaViewMut<E>, Rows),
    scale: f32,
) -> Result<(), GpuError> {
    let Rows { rows, columns, .. } = from_rows;
    assert_eq!((rows, columns), (to_rows.rows, to_rows.columns), "rows");
    assert!(
        from.len() >= from_rows.len() && to.len() >= to_rows.len(),
        "rows to round"
    );
    if from_rows.is_empty() {
        return Ok(());
    }
    let name = format!("narrow_rows_{}", E::SUFFIX);
    let grid = Grid::scalars(rows * columns);
    let (rows, columns) = (rows as i64, columns as i32);
    let (from_stride, to_stride) = (from_rows.stride as i32, to_rows.stride as i32);
    // SAFETY: both sides were checked to hold their rows.
    unsafe {
        launch!(
            gpu,
            &name,
            grid,
            [from, to, &rows, &columns, &from_stride, &to_stride, &scale]
        )
    }
}

/// `sum += x`
pub fn add_in_place<E: GpuElement>(
    gpu: &Gpu,
    sum: &mut CudaViewMut<E>,
    x: &CudaView<E>,
) -> Result<(), GpuError> {
    assert_eq!(sum.len(), x.len(), "a sum of two");
    let name = format!("add_in_place_{}", E::SUFFIX);
    let scalars = sum.len() as i64;
    // SAFETY: both are as long as the kernel goes.
    unsafe { launch!(gpu, &name, Grid::scalars(x.len()), [sum, x, &scalars]) }
}

/// Adds `scale · row` to every row of `y`.
pub fn add_to_rows<E: GpuElement>(
    gpu: &Gpu,
    (y, rows): (&mut CudaViewMut<E>, Rows),
    row: &CudaView<f32>,
    scale: f32,
) -> Result<(), GpuError> {
    assert!(
        y.len() >= rows.len() && row.len() == rows.columns,
        "a row for each row"
    );
    if rows.is_empty() {
        return Ok(());
    }
    let name = format!("add_to_rows_{}", E::SUFFIX);
    let grid = Grid::scalars(rows.rows * rows.columns);
    let (count, columns, stride) = (rows.rows as i64, rows.columns as i32, rows.stride as i32);
    // SAFETY: y was checked to hold its rows.
    unsafe {
        launch!(
            gpu,
            &name,
            grid,
            [y, row, &count, &columns, &stride, &scale]
        )
    }
}

/// Sums each column, over tiles of rows and then over the tiles, both in order.
pub fn column_sums<E: GpuElement>(
    gpu: &Gpu,
    (x, rows): (&CudaView<E>, Rows),
    sums: &mut CudaViewMut<f32>,
) -> Result<(), GpuError> {
    assert!(
        x.len() >= rows.len() && sums.len() == rows.columns,
        "sums of columns"
    );
    let tiles = rows.rows.div_ceil(COLUMN_TILE);
    let mut partials = gpu.take::<f32>(tiles * rows.columns)?;
    tile_sums(gpu, (x, rows), &mut partials.as_view_mut(), COLUMN_TILE)?;
    add_partials(gpu, &partials.as_view(), tiles, sums)
}

/// Sums `tiles` rows of partial sums in order.
pub(super) fn add_partials(
    gpu: &Gpu,
    partials: &CudaView<f32>,
    tiles: usize,
    sums: &mut CudaViewMut<f32>,
) -> Result<(), GpuError> {
    let rows = Rows::new(tiles, sums.len());
    tile_sums(gpu, (partials, rows), sums, tiles.max(1))
}

fn tile_sums<E: GpuElement>(
    gpu: &Gpu,
    (x, rows): (&CudaView<E>, Rows),
    partials: &mut CudaViewMut<f32>,
    tile: usize,
) -> Result<(), GpuError> {
    if rows.is_empty() {
        return gpu.fill_zero(partials);
    }
    let grid = columns_grid(rows, tile);
    let name = format!("tile_sums_{}", E::SUFFIX);
    let (count, columns, stride) = (rows.rows as i32, rows.columns as i32, rows.stride as i32);
    let tile = tile as i32;
    // SAFETY: x was checked to hold its rows, and there is a partial sum for each tile.
    unsafe {
        launch!(
            gpu,
            &name,
            grid,
            [x, partials, &count, &columns, &stride, &tile]
        )
    }
}

/// A grid with a thread for each column, and a row of blocks for each tile.
pub(super) fn columns_grid(rows: Rows, tile: usize) -> Grid {
    Grid {
        blocks: (
            rows.columns.div_ceil(THREADS as usize) as u32,
            rows.rows.div_ceil(tile) as u32,
            1,
        ),
        threads: THREADS,
        shared: 0,
    }
}

/// `out[i] = scale · x[rows[i]]`, widened. Every number is that of a row of `x`.
pub fn gather_rows<E: GpuElement>(
    gpu: &Gpu,
    x: &CudaView<E>,
    rows: &CudaView<u32>,
    (out, width): (&mut CudaViewMut<f32>, usize),
    scale: f32,
) -> Result<(), GpuError> {
    assert_eq!(out.len(), rows.len() * width, "rows by number");
    let name = format!("gather_rows_{}", E::SUFFIX);
    let (count, columns) = (rows.len() as i64, width as i32);
    // SAFETY: the batch was checked to name rows that there are.
    unsafe {
        launch!(
            gpu,
            &name,
            Grid::scalars(out.len()),
            [x, rows, out, &count, &columns, &scale]
        )
    }
}

/// `out[rows[i]] += x[i]`. No two numbers are the same, and every one is that of a row of `out`.
pub fn scatter_rows(
    gpu: &Gpu,
    x: &CudaView<f32>,
    rows: &CudaView<u32>,
    out: &mut CudaViewMut<f32>,
    width: usize,
) -> Result<(), GpuError> {
    assert_eq!(x.len(), rows.len() * width, "rows by number");
    let (count, columns) = (rows.len() as i64, width as i32);
    // SAFETY: the batch was checked to name rows that there are.
    unsafe {
        launch!(
            gpu,
            "scatter_rows",
            Grid::scalars(x.len()),
            [x, rows, out, &count, &columns]
        )
    }
}
