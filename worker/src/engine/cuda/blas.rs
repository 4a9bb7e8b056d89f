//! Matrix products through cuBLASLt. In: row-major matrices of float32 or bfloat16. Out: their product in either, summed in
//! float32.
//!
//! The algorithm is a function of the product's shape and of the library's version, and each one adds in an order of its own
//! that never changes, so the same product has the same bits every time.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use common::memory::gpu::WORKSPACE_BYTES;
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::{self, cublasComputeType_t, cudaDataType};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr};
use half::bf16;

use super::error::{BlasError, GpuError};

/// Most shapes of products whose algorithm is remembered.
const MAX_PLANS: usize = 4096;

/// The type that activations are stored as on the GPU.
pub trait GpuElement: DeviceRepr + Copy + Default + Send + Sync + 'static {
    /// What the names of the kernels for this type end with.
    const SUFFIX: &'static str;
    const TYPE: cudaDataType;
}

impl GpuElement for f32 {
    const SUFFIX: &'static str = "f32";
    const TYPE: cudaDataType = cudaDataType::CUDA_R_32F;
}

impl GpuElement for bf16 {
    const SUFFIX: &'static str = "bf16";
    const TYPE: cudaDataType = cudaDataType::CUDA_R_16BF;
}

/// A row-major matrix, or the transpose of one.
pub struct Matrix<'a, E> {
    data: &'a CudaView<'a, E>,
    /// Rows of the matrix as the product reads it, after transposing.
    rows: usize,
    columns: usize,
    /// Scalars from one stored row to the next.
    stride: usize,
    transposed: bool,
}

impl<'a, E> Matrix<'a, E> {
    pub fn new(data: &'a CudaView<'a, E>, rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// A matrix of some columns of a wider one, which begin where `data` does.
    pub fn strided(data: &'a CudaView<'a, E>, rows: usize, columns: usize, stride: usize) -> Self {
        assert!(columns <= stride, "rows that overlap");
        assert!(
            data.len() >= needed(rows, columns, stride),
            "a matrix of {rows} x {columns} in {} scalars",
            data.len()
        );
        Self {
            data,
            rows,
            columns,
            stride,
            transposed: false,
        }
    }

    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            transposed: !self.transposed,
            ..self
        }
    }
}

/// Where a product goes: `data = scale · product (+ onto)`, rows `stride` scalars apart.
pub struct Target<'a, 'b, O> {
    data: &'a mut CudaViewMut<'b, O>,
    stride: usize,
    scale: f32,
    onto: Option<&'a CudaView<'a, O>>,
}

impl<'a, 'b, O> Target<'a, 'b, O> {
    pub fn new(data: &'a mut CudaViewMut<'b, O>, stride: usize) -> Self {
        Self {
            data,
            stride,
            scale: 1.0,
            onto: None,
        }
    }

    pub fn scaled(self, scale: f32) -> Self {
        Self { scale, ..self }
    }

    /// Adds the product to `onto`, which has the shape and stride of `data`.
    pub fn onto(self, onto: &'a CudaView<'a, O>) -> Self {
        let onto = Some(onto);
        Self { onto, ..self }
    }
}

/// What decides the algorithm of a product.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    /// Rows and columns of the result, and the length of the sums.
    m: usize,
    n: usize,
    k: usize,
    strides: [usize; 3],
    transposed: [bool; 2],
    narrow: [bool; 2],
    /// Alignments in bytes, of the two factors and the result.
    alignments: [u32; 3],
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { m, n, k, .. } = self;
        let kind = |narrow| if narrow { "bfloat16" } else { "float32" };
        let turned = self.transposed.map(|turned| if turned { "ᵀ" } else { "" });
        write!(
            f,
            "[{m}, {k}]{} x [{k}, {n}]{} in {} to {}, rows {:?} apart, aligned to {:?} bytes",
            turned[0],
            turned[1],
            kind(self.narrow[0]),
            kind(self.narrow[1]),
            self.strides,
            self.alignments
        )
    }
}

struct Addresses {
    a: u64,
    b: u64,
    onto: Option<u64>,
    out: u64,
}

/// Descriptors for the products of one shape. Freed with the [`Blas`].
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// cuBLASLt on one stream, with the algorithms that were chosen so far.
pub struct Blas {
    handle: sys::cublasLtHandle_t,
    stream: Arc<CudaStream>,
    workspace: cudarc::driver::CudaSlice<u8>,
    plans: Mutex<HashMap<Shape, Plan>>,
}

// SAFETY: cuBLASLt's handle and descriptors may be used from any thread; plans are behind a lock.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Blas {
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self, GpuError> {
        let handle = library("opening the library", result::create_handle())?;
        // SAFETY: its content is written before it is read, by the library alone.
        let workspace = unsafe { stream.alloc::<u8>(WORKSPACE_BYTES) };
        Ok(Self {
            handle,
            stream: stream.clone(),
            workspace: workspace.map_err(|_| BlasError::Workspace)?,
            plans: Mutex::default(),
        })
    }

    /// Version of the library: another one may choose other algorithms.
    pub fn version() -> usize {
        // SAFETY: it has no preconditions.
        unsafe { sys::cublasLtGetVersion() }
    }

    /// Computes `out = scale · a · b (+ onto)`. Where a side is empty, nothing is done to `out`.
    pub fn product<E: GpuElement, O: GpuElement>(
        &self,
        out: Target<O>,
        a: Matrix<E>,
        b: Matrix<E>,
    ) -> Result<(), GpuError> {
        assert_eq!(a.columns, b.rows, "factors of a product");
        let length = needed(a.rows, b.columns, out.stride);
        assert!(out.data.len() >= length, "a result of {length} scalars");
        let (a_at, _a) = a.data.device_ptr(&self.stream);
        let (b_at, _b) = b.data.device_ptr(&self.stream);
        let (out_at, _out) = out.data.device_ptr_mut(&self.stream);
        let onto_at = out.onto.map(|onto| {
            assert!(onto.len() >= length, "what a product is added to");
            onto.device_ptr(&self.stream).0
        });
        let shape = Shape {
            m: a.rows,
            n: b.columns,
            k: a.columns,
            strides: [a.stride, b.stride, out.stride],
            transposed: [a.transposed, b.transposed],
            narrow: [E::TYPE, O::TYPE].map(|kind| kind == cudaDataType::CUDA_R_16BF),
            alignments: [a_at, b_at, out_at | onto_at.unwrap_or(0)].map(alignment),
        };
        let addresses = Addresses {
            a: a_at,
            b: b_at,
            onto: onto_at,
            out: out_at,
        };
        self.run::<E, O>(shape, addresses, out.scale)
    }

    /// Multiplies the first `columns` of each row of `x` by `b`, and writes the product right behind them in the row.
    pub fn product_behind<E: GpuElement>(
        &self,
        rows: usize,
        (x, columns, stride): (&mut CudaViewMut<E>, usize, usize),
        b: Matrix<E>,
    ) -> Result<(), GpuError> {
        assert_eq!(columns, b.rows, "factors of a product");
        assert!(
            columns + b.columns <= stride && x.len() >= needed(rows, columns + b.columns, stride),
            "rows with room behind them"
        );
        let (b_at, _b) = b.data.device_ptr(&self.stream);
        let (x_at, _x) = x.device_ptr_mut(&self.stream);
        let out_at = x_at + (columns * size_of::<E>()) as u64;
        let narrow = E::TYPE == cudaDataType::CUDA_R_16BF;
        let shape = Shape {
            m: rows,
            n: b.columns,
            k: columns,
            strides: [stride, b.stride, stride],
            transposed: [false, b.transposed],
            narrow: [narrow, narrow],
            alignments: [x_at, b_at, out_at].map(alignment),
        };
        let addresses = Addresses {
            a: x_at,
            b: b_at,
            onto: None,
            out: out_at,
        };
        self.run::<E, E>(shape, addresses, 1.0)
    }

    /// Runs a product at addresses whose buffers hold the shape.
    fn run<E: GpuElement, O: GpuElement>(
        &self,
        shape: Shape,
        at: Addresses,
        scale: f32,
    ) -> Result<(), GpuError> {
        if shape.m == 0 || shape.n == 0 || shape.k == 0 {
            return Ok(());
        }
        let bound = self.stream.context().bind_to_thread();
        bound.map_err(|error| BlasError::Library {
            what: "taking the device",
            reason: error.to_string(),
        })?;
        let named = |error| BlasError::Product {
            error: Box::new(error),
            shape: shape.to_string(),
        };
        // Held until the product is asked for: another thread may make room for its own plans.
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = self.plan::<E, O>(&mut plans, shape).map_err(named)?;
        let [a_layout, b_layout, out_layout] = plan.layouts;
        let (workspace, _workspace) = self.workspace.device_ptr(&self.stream);
        let keep = f32::from(u8::from(at.onto.is_some()));
        // SAFETY: the layouts were made for this shape, and the buffers were checked to hold it. The library sees columns
        // where we see rows, so the factors change places.
        let run = unsafe {
            result::matmul(
                self.handle,
                plan.description,
                (&raw const scale).cast(),
                (&raw const keep).cast(),
                at.b as *const c_void,
                b_layout,
                at.a as *const c_void,
                a_layout,
                at.onto.unwrap_or(at.out) as *const c_void,
                out_layout,
                at.out as *mut c_void,
                out_layout,
                &raw const plan.algorithm,
                workspace as *mut c_void,
                WORKSPACE_BYTES,
                self.stream.cu_stream().cast(),
            )
        };
        Ok(library("a product", run).map_err(named)?)
    }

    fn plan<'a, E: GpuElement, O: GpuElement>(
        &self,
        plans: &'a mut HashMap<Shape, Plan>,
        shape: Shape,
    ) -> Result<&'a Plan, BlasError> {
        if plans.len() >= MAX_PLANS && !plans.contains_key(&shape) {
            plans.drain().for_each(|(_, plan)| plan.free());
        }
        match plans.entry(shape) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(new) => Ok(new.insert(self.make_plan::<E, O>(shape)?)),
        }
    }

    fn make_plan<E: GpuElement, O: GpuElement>(&self, shape: Shape) -> Result<Plan, BlasError> {
        let description = library(
            "describing a product",
            result::create_matmul_desc(
                cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cudaDataType::CUDA_R_32F,
            ),
        )?;
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let [a_transposed, b_transposed] = shape.transposed;
        for (attribute, transposed) in [
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSA, b_transposed),
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, a_transposed),
        ] {
            let operation = i32::from(transposed);
            // SAFETY: the attribute is an int, and the library copies it.
            let set = unsafe {
                result::set_matmul_desc_attribute(
                    description,
                    attribute,
                    (&raw const operation).cast(),
                    size_of::<i32>(),
                )
            };
            library("describing a product", set)?;
        }
        let [a_stride, b_stride, out_stride] = shape.strides;
        let layouts = [
            layout(E::TYPE, stored(shape.m, shape.k, a_transposed), a_stride)?,
            layout(E::TYPE, stored(shape.k, shape.n, b_transposed), b_stride)?,
            layout(O::TYPE, (shape.m, shape.n), out_stride)?,
        ];
        let algorithm = self.algorithm(description, layouts, shape.alignments)?;
        Ok(Plan {
            description,
            layouts,
            algorithm,
        })
    }

    fn algorithm(
        &self,
        description: sys::cublasLtMatmulDesc_t,
        [a, b, out]: [sys::cublasLtMatrixLayout_t; 3],
        [a_aligned, b_aligned, out_aligned]: [u32; 3],
    ) -> Result<sys::cublasLtMatmulAlgo_t, BlasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = library("choosing an algorithm", result::create_matmul_pref())?;
        let workspace = WORKSPACE_BYTES;
        // SAFETY: the attribute is a size_t, and the library copies it.
        let set = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                size_of::<usize>(),
            )
        };
        library("choosing an algorithm", set)?;
        for (attribute, bytes) in [
            (
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                b_aligned,
            ),
            (
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                a_aligned,
            ),
            (
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                out_aligned,
            ),
            (
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                out_aligned,
            ),
        ] {
            // SAFETY: the attribute is a uint32_t, and the library copies it.
            let set = unsafe {
                result::set_matmul_pref_attribute(
                    preference,
                    attribute,
                    (&raw const bytes).cast(),
                    size_of::<u32>(),
                )
            };
            library("choosing an algorithm", set)?;
        }
        // SAFETY: all descriptors were made above and are alive; the preference is not used after it is freed.
        let found = unsafe {
            let found = result::get_matmul_algo_heuristic(
                self.handle,
                description,
                b,
                a,
                out,
                out,
                preference,
            );
            library(
                "freeing a preference",
                result::destroy_matmul_pref(preference),
            )?;
            found
        };
        Ok(library("choosing an algorithm", found)?.algo)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        let plans = self.plans.get_mut().unwrap_or_else(PoisonError::into_inner);
        plans.drain().for_each(|(_, plan)| plan.free());
        // Whoever ends has no use for an error.
        // SAFETY: nothing uses the handle any more.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Plan {
    fn free(self) {
        for layout in self.layouts {
            // SAFETY: it was made with the plan, and is freed once.
            let _ = unsafe { result::destroy_matrix_layout(layout) };
        }
        // SAFETY: as above.
        let _ = unsafe { result::destroy_matmul_desc(self.description) };
    }
}

/// Rows and columns of a matrix as they lie in memory.
fn stored(rows: usize, columns: usize, transposed: bool) -> (usize, usize) {
    match transposed {
        true => (columns, rows),
        false => (rows, columns),
    }
}

/// Describes a row-major matrix to the library, which sees it as the transpose in columns.
fn layout(
    kind: cudaDataType,
    (rows, columns): (usize, usize),
    stride: usize,
) -> Result<sys::cublasLtMatrixLayout_t, BlasError> {
    let made = result::create_matrix_layout(kind, columns as u64, rows as u64, stride as i64);
    library("describing a matrix", made)
}

/// Scalars from the first row to the end of the last, whose rest up to the stride does not count.
fn needed(rows: usize, columns: usize, stride: usize) -> usize {
    match rows {
        0 => 0,
        rows => (rows - 1) * stride + columns,
    }
}

/// The largest power of two that divides the address, as far as the library cares.
fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}

fn library<T>(what: &'static str, result: Result<T, CublasError>) -> Result<T, BlasError> {
    result.map_err(|error| BlasError::Library {
        what,
        reason: error.to_string(),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::cuda::testing::{assert_near, gpu};
    use crate::engine::testing::random_values;

    /// Rows of `a` times rows of `b`.
    fn plain(a: &[f32], b: &[f32], sums: usize) -> Vec<f32> {
        let row = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum();
        let rows = a.chunks_exact(sums);
        rows.flat_map(|a| b.chunks_exact(sums).map(move |b| row(a, b)))
            .collect()
    }

    fn transpose(x: &[f32], columns: usize) -> Vec<f32> {
        (0..columns)
            .flat_map(|column| x.iter().skip(column).step_by(columns).copied())
            .collect()
    }

    #[test]
    fn products_of_either_layout_equal_the_plain_ones() {
        let Some(gpu) = gpu() else { return };
        let (m, n, k) = (5, 16, 24);
        let (a, b) = (random_values(m * k, 1), random_values(n * k, 2));
        let expected = plain(&a, &b, k);
        for (a_transposed, b_transposed) in
            [(false, true), (true, true), (false, false), (true, false)]
        {
            let a_stored = if a_transposed {
                transpose(&a, k)
            } else {
                a.clone()
            };
            let b_stored = if b_transposed {
                b.clone()
            } else {
                transpose(&b, k)
            };
            let (a_gpu, b_gpu) = (
                gpu.upload(&a_stored).unwrap(),
                gpu.upload(&b_stored).unwrap(),
            );
            let (a_gpu, b_gpu) = (a_gpu.as_view(), b_gpu.as_view());
            let left = match a_transposed {
                true => Matrix::new(&a_gpu, k, m).transposed(),
                false => Matrix::new(&a_gpu, m, k),
            };
            let right = match b_transposed {
                true => Matrix::new(&b_gpu, n, k).transposed(),
                false => Matrix::new(&b_gpu, k, n),
            };
            let base = random_values(m * n, 3);
            let (onto, mut out) = (gpu.upload(&base).unwrap(), gpu.take::<f32>(m * n).unwrap());
            let (onto, mut view) = (onto.as_view(), out.as_view_mut());
            let target = Target::new(&mut view, n).scaled(0.5).onto(&onto);
            gpu.blas().product(target, left, right).unwrap();
            let sums: Vec<f32> = expected
                .iter()
                .zip(&base)
                .map(|(p, b)| 0.5 * p + b)
                .collect();
            assert_near("product", &gpu.download(&out, m * n).unwrap(), &sums, 1e-5);
        }
    }

    #[test]
    fn parts_of_wider_matrices_are_read_and_written_where_they_lie() {
        let Some(gpu) = gpu() else { return };
        let (m, n, k, wide) = (3, 8, 16, 32);
        let (a, b) = (random_values(m * wide, 1), random_values(n * k, 2));
        let part: Vec<f32> = a
            .chunks_exact(wide)
            .flat_map(|row| row[8..8 + k].to_vec())
            .collect();
        let expected = plain(&part, &b, k);
        let (a, b) = (gpu.upload(&a).unwrap(), gpu.upload(&b).unwrap());
        let (a, b) = (a.slice(8..), b.as_view());
        let mut out = gpu.zeroed::<f32>(m * wide).unwrap();
        let mut view = out.slice_mut(16..);
        let factors = (
            Matrix::strided(&a, m, k, wide),
            Matrix::new(&b, n, k).transposed(),
        );
        gpu.blas()
            .product(Target::new(&mut view, wide), factors.0, factors.1)
            .unwrap();
        let out = gpu.download(&out, m * wide).unwrap();
        let found: Vec<f32> = out
            .chunks_exact(wide)
            .flat_map(|row| row[16..16 + n].to_vec())
            .collect();
        assert_near("product", &found, &expected, 1e-5);
        assert!(
            out.chunks_exact(wide)
                .all(|row| row[..16].iter().all(|x| *x == 0.0))
        );
    }
}
