//! One GPU: its stream, its memory and its kernels. In: launches and copies. Out: their results, or what the driver says
//! went wrong.
//!
//! CUDA's libraries are loaded when the first GPU is opened. Where there are none, that is an error and nothing else.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr,
    DevicePtrMut, DeviceRepr, DriverError, LaunchConfig, ValidAsZeroBits,
};
use cudarc::nvrtc::Ptx;

use super::blas::Blas;
use super::error::GpuError;

/// The compiled kernels, a fatbin for each source file.
const KERNELS: &[&[u8]] = include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Memory of the device, freed in the order of the stream.
pub type DeviceBuffer<T> = CudaSlice<T>;

/// Shape of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    pub blocks: (u32, u32, u32),
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

impl Grid {
    /// A grid with a block for each row.
    pub fn rows(rows: usize, threads: u32) -> Self {
        Self {
            blocks: (rows as u32, 1, 1),
            threads,
            shared: 0,
        }
    }

    /// A grid with a thread for each scalar; kernels stride over the rest where there are more than fit.
    pub fn scalars(scalars: usize) -> Self {
        const THREADS: usize = 256;
        const MAX_BLOCKS: usize = 132 * 16;
        let blocks = scalars.div_ceil(THREADS).clamp(1, MAX_BLOCKS) as u32;
        Self::rows(blocks as usize, THREADS as u32)
    }
}

/// Launches a kernel: `launch!(gpu, "name", grid, [&x, &mut y, &length])`, arguments as the kernel takes them.
///
/// # Safety
/// Expands to an unsafe call: the kernel must get arguments of its own types, and buffers as long as it goes.
#[macro_export]
macro_rules! launch {
    ($gpu:expr, $name:expr, $grid:expr, [$($argument:expr),* $(,)?]) => {{
        use cudarc::driver::PushKernelArg as _;
        let gpu: &$crate::engine::cuda::Gpu = $gpu;
        let function = gpu.function($name)?;
        let config = $crate::engine::cuda::gpu::config($grid, &function, gpu)?;
        let mut launch = gpu.stream().launch_builder(&function);
        $(launch.arg($argument);)*
        gpu.checked("a launch", launch.launch(config))
    }};
}

/// One GPU, opened: its streams, its memory and its kernels.
pub struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    exchange: Arc<CudaStream>,
    modules: Vec<Arc<CudaModule>>,
    functions: Mutex<HashMap<String, CudaFunction>>,
    blas: Blas,
    name: String,
    /// Compute capability of the device, major and minor.
    capability: (i32, i32),
}

impl Gpu {
    /// Opens a GPU by its number.
    ///
    /// # Errors
    /// Where there is no driver, no such GPU, one that is too old, or no cuBLAS.
    pub fn open(ordinal: usize) -> Result<Self, GpuError> {
        check_libraries()?;
        check_driver()?;
        let count = match CudaContext::device_count() {
            Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => 0,
            count => driver("counting the devices", count)?,
        };
        let count = usize::try_from(count).unwrap_or(0);
        if ordinal >= count {
            return Err(GpuError::Missing { ordinal, count });
        }
        let context = driver("opening the device", CudaContext::new(ordinal))?;
        let name = driver("reading the device's name", context.name())?;
        let capability = driver("reading its capability", context.compute_capability())?;
        if let (major @ ..8, minor) = capability {
            return Err(GpuError::TooOld {
                ordinal,
                name,
                major,
                minor,
            });
        }
        // SAFETY: all work of this context is on the first stream below, so no event is needed between uses of a buffer; the
        // exchange, which has the second one, orders itself.
        unsafe { context.disable_event_tracking() };
        let stream = driver("making a stream", context.new_stream())?;
        let exchange = driver("making a stream", context.new_stream())?;
        keep_freed_memory(&context)?;
        let modules = KERNELS
            .iter()
            .map(|image| driver("loading the kernels", load(&context, image)))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            blas: Blas::new(&stream)?,
            context,
            stream,
            exchange,
            modules,
            functions: Mutex::default(),
            name,
            capability,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Identifier that tells this GPU from every other one, on whatever machine. Empty where the driver does not say.
    pub fn uuid(&self) -> String {
        let uuid = self.context.uuid();
        let bytes = uuid.map(|uuid| uuid.bytes.map(|byte| byte as u8));
        let hex = |bytes: [u8; 16]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        bytes.map_or_else(|_| String::new(), hex)
    }

    /// The numerics class of this GPU: the chip, and the version of what chooses how products are computed.
    pub fn numerics_class(&self) -> String {
        let (major, minor) = self.capability;
        let blas = Blas::version();
        format!(
            "cuda-{}-{major}.{minor}-cublaslt-{blas}-muster-{}",
            self.name.replace(' ', "-"),
            env!("CARGO_PKG_VERSION")
        )
    }

    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The stream for exchanges, in which other members take part. Nothing orders it and [`Self::stream`] but [`Self::order`].
    pub fn exchange_stream(&self) -> &Arc<CudaStream> {
        &self.exchange
    }

    /// Lets what is asked of the stream `later` from now on begin only after `earlier`.
    pub fn order(&self, earlier: &CudaEvent, later: &CudaStream) -> Result<(), GpuError> {
        driver("ordering streams", later.wait(earlier))
    }

    /// Returns an event at the end of all that was asked of a stream so far.
    pub fn mark(&self, stream: &CudaStream) -> Result<CudaEvent, GpuError> {
        driver("marking a stream", stream.record_event(None))
    }

    /// Lets [`Self::stream`] go on only after what was asked of [`Self::exchange_stream`] so far.
    pub fn follow_exchange(&self) {
        let ended = self.mark(&self.exchange);
        let ordered = ended.and_then(|ended| self.order(&ended, self.stream()));
        if let Err(error) = ordered {
            tracing::error!("{error}");
        }
    }

    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    pub fn blas(&self) -> &Blas {
        &self.blas
    }

    /// Number of multiprocessors of the GPU.
    pub fn processors(&self) -> Result<usize, GpuError> {
        use sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as COUNT;
        let count = driver("reading the processors", self.context.attribute(COUNT))?;
        Ok(usize::try_from(count).unwrap_or(1).max(1))
    }

    /// Bytes of shared memory that a block may ask for.
    pub fn shared_memory(&self) -> Result<usize, GpuError> {
        use sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as BYTES;
        let bytes = driver("reading the shared memory", self.context.attribute(BYTES))?;
        Ok(usize::try_from(bytes).unwrap_or(0))
    }

    /// Bytes that can be taken, and all that the GPU has. What was freed here and is kept for later counts as free.
    pub fn memory(&self) -> Result<(usize, usize), GpuError> {
        use sys::CUmemPool_attribute as Attribute;
        let (free, total) = driver("reading the memory", self.context.mem_get_info())?;
        let kept = self
            .pool_bytes(Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?
            .saturating_sub(self.pool_bytes(Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?);
        Ok((free + usize::try_from(kept).unwrap_or(0), total))
    }

    /// The most bytes that buffers took at a time since the GPU was opened, or since the last reset.
    pub fn peak_memory(&self) -> Result<u64, GpuError> {
        self.pool_bytes(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)
    }

    fn pool_bytes(&self, attribute: sys::CUmemPool_attribute) -> Result<u64, GpuError> {
        let mut bytes = 0u64;
        // SAFETY: the attributes asked for are u64, and the pool is the device's own, which lives as long as the device.
        let result = unsafe {
            let pool = default_pool(&self.context)?;
            sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut bytes).cast())
        };
        driver("reading the memory pool", result.result())?;
        Ok(bytes)
    }

    /// Begins to count [`Self::peak_memory`] anew.
    pub fn reset_peak_memory(&self) -> Result<(), GpuError> {
        let mut zero = 0u64;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        // SAFETY: the attribute is a u64 that may be set to zero alone, and the pool is the device's own.
        let result = unsafe {
            let pool = default_pool(&self.context)?;
            sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut zero).cast())
        };
        driver("counting memory anew", result.result())
    }

    /// Takes memory for `length` scalars, with any content.
    pub fn take<T: DeviceRepr>(&self, length: usize) -> Result<DeviceBuffer<T>, GpuError> {
        // SAFETY: every op writes what it takes before anything reads it.
        let taken = unsafe { self.stream.alloc::<T>(length.max(1)) };
        taken.map_err(|error| self.memory_error(error, length * size_of::<T>()))
    }

    pub fn zeroed<T: DeviceRepr + ValidAsZeroBits>(
        &self,
        length: usize,
    ) -> Result<DeviceBuffer<T>, GpuError> {
        let mut buffer = self.take::<T>(length)?;
        self.fill_zero(&mut buffer)?;
        Ok(buffer)
    }

    pub fn fill_zero<T: DeviceRepr + ValidAsZeroBits>(
        &self,
        buffer: &mut impl DevicePtrMut<T>,
    ) -> Result<(), GpuError> {
        driver("clearing memory", self.stream.memset_zeros(buffer))
    }

    pub fn upload<T: DeviceRepr>(&self, values: &[T]) -> Result<DeviceBuffer<T>, GpuError> {
        let mut buffer = self.take::<T>(values.len())?;
        if !values.is_empty() {
            self.write(values, &mut buffer)?;
        }
        Ok(buffer)
    }

    pub fn write<T: DeviceRepr>(
        &self,
        values: &[T],
        buffer: &mut impl DevicePtrMut<T>,
    ) -> Result<(), GpuError> {
        driver("a copy to the GPU", self.stream.memcpy_htod(values, buffer))
    }

    /// Copies from the GPU, once everything before it on the stream is done.
    pub fn read<T: DeviceRepr>(
        &self,
        buffer: &impl DevicePtr<T>,
        values: &mut [T],
    ) -> Result<(), GpuError> {
        driver(
            "a copy from the GPU",
            self.stream.memcpy_dtoh(buffer, values),
        )?;
        self.wait()
    }

    pub fn download<T: DeviceRepr + Clone + Default>(
        &self,
        buffer: &DeviceBuffer<T>,
        length: usize,
    ) -> Result<Vec<T>, GpuError> {
        let mut values = vec![T::default(); length];
        if length > 0 {
            self.read(&buffer.slice(..length), &mut values)?;
        }
        Ok(values)
    }

    pub fn copy<T: DeviceRepr>(
        &self,
        from: &impl DevicePtr<T>,
        to: &mut impl DevicePtrMut<T>,
    ) -> Result<(), GpuError> {
        driver("a copy on the GPU", self.stream.memcpy_dtod(from, to))
    }

    /// Waits until everything that was asked of the stream is done.
    pub fn wait(&self) -> Result<(), GpuError> {
        driver("waiting for the GPU", self.stream.synchronize())
    }

    pub(crate) fn function(&self, name: &str) -> Result<CudaFunction, GpuError> {
        // The thread may be another than the one that opened the device.
        driver("taking the device", self.context.bind_to_thread())?;
        let mut functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(name) {
            return Ok(function.clone());
        }
        let found = self
            .modules
            .iter()
            .find_map(|module| module.load_function(name).ok());
        let function = found.ok_or_else(|| GpuError::Driver {
            what: "finding a kernel",
            reason: format!("{name} is in none of the modules"),
        })?;
        functions.insert(name.to_owned(), function.clone());
        Ok(function)
    }

    pub(crate) fn checked<T>(
        &self,
        what: &'static str,
        result: Result<T, DriverError>,
    ) -> Result<(), GpuError> {
        driver(what, result).map(drop)
    }

    /// Gives memory that is kept for later back to the system, once everything asked for is done.
    pub fn release_kept_memory(&self) -> Result<(), GpuError> {
        self.wait()?;
        // SAFETY: the pool is the device's own, and what is in use stays.
        let result = unsafe { sys::cuMemPoolTrimTo(default_pool(&self.context)?, 0) };
        driver("giving memory back", result.result())
    }

    fn memory_error(&self, error: DriverError, wanted: usize) -> GpuError {
        match (error.0, self.memory()) {
            (CUresult::CUDA_ERROR_OUT_OF_MEMORY, Ok((free, total))) => GpuError::Memory {
                wanted,
                free,
                total,
            },
            _ => GpuError::Driver {
                what: "taking memory",
                reason: error.to_string(),
            },
        }
    }
}

/// Keeps the processor a few layers ahead of the GPU and no further.
///
/// So a request to give the slot up is noticed while there is still something to leave out.
#[derive(Default)]
pub struct Pace {
    begun: VecDeque<CudaEvent>,
}

impl Pace {
    /// Layers that may be asked for ahead: enough that the GPU never waits for the processor.
    const LAYERS_AHEAD: usize = 3;

    /// Called before a layer: waits until the one that lies so many before it has begun.
    pub fn step(&mut self, gpu: &Gpu) -> Result<(), GpuError> {
        let begun = gpu.stream.record_event(None);
        self.begun.push_back(driver("marking a layer", begun)?);
        if self.begun.len() <= Self::LAYERS_AHEAD {
            return Ok(());
        }
        match self.begun.pop_front() {
            Some(begun) => driver("waiting for a layer", begun.synchronize()),
            None => Ok(()),
        }
    }
}

/// Configuration of a launch, for [`launch`]: more shared memory than every kernel may use is asked for first.
pub(crate) fn config(
    grid: Grid,
    function: &CudaFunction,
    gpu: &Gpu,
) -> Result<LaunchConfig, GpuError> {
    const ALWAYS_GRANTED: u32 = 48 << 10;
    if grid.shared > ALWAYS_GRANTED {
        use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SIZE;
        gpu.checked(
            "asking for shared memory",
            function.set_attribute(SIZE, grid.shared as i32),
        )?;
    }
    Ok(LaunchConfig {
        grid_dim: grid.blocks,
        block_dim: (grid.threads, 1, 1),
        shared_mem_bytes: grid.shared,
    })
}

fn check_libraries() -> Result<(), GpuError> {
    // SAFETY: libraries of NVIDIA's, which may be loaded at any time.
    let (has_driver, has_blas) = unsafe {
        (
            sys::is_culib_present(),
            cudarc::cublaslt::sys::is_culib_present(),
        )
    };
    if !has_driver {
        return Err(GpuError::Library {
            library: "NVIDIA's driver (libcuda.so.1)",
            remedy: "install it where there is a GPU",
        });
    }
    if !has_blas {
        return Err(GpuError::Library {
            library: "cuBLAS (libcublasLt.so)",
            remedy: "install CUDA's runtime libraries and name their folder in LD_LIBRARY_PATH",
        });
    }
    Ok(())
}

/// Checks that the driver can run the kernels: those of one major version run on every driver of that version, and on later
/// ones.
fn check_driver() -> Result<(), GpuError> {
    let (mut version, built) = (0, built_with());
    // SAFETY: it writes one number, and has no preconditions.
    let result = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    driver("reading the driver's version", result.result())?;
    match version / 1000 < built {
        true => Err(GpuError::OldDriver {
            found: format!("{}.{}", version / 1000, version % 1000 / 10),
            needed: built,
        }),
        false => Ok(()),
    }
}

/// The major version of the toolkit that compiled the kernels.
fn built_with() -> i32 {
    env!("KERNELS_CUDA_MAJOR").parse().unwrap_or(0)
}

fn load(context: &Arc<CudaContext>, image: &[u8]) -> Result<Arc<CudaModule>, DriverError> {
    context.load_module(Ptx::from_binary(image.to_vec()))
}

/// Keeps memory that was freed from going back to the system: the next slot takes it again.
fn keep_freed_memory(context: &Arc<CudaContext>) -> Result<(), GpuError> {
    let mut threshold = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute is a u64, and the pool is the device's own.
    let result = unsafe {
        sys::cuMemPoolSetAttribute(
            default_pool(context)?,
            attribute,
            (&raw mut threshold).cast(),
        )
    };
    driver("setting up memory", result.result())
}

fn default_pool(context: &CudaContext) -> Result<sys::CUmemoryPool, GpuError> {
    let mut pool = std::ptr::null_mut();
    // SAFETY: the device of an open context.
    let result = unsafe { sys::cuDeviceGetDefaultMemPool(&raw mut pool, context.cu_device()) };
    driver("finding the memory pool", result.result())?;
    Ok(pool)
}

fn driver<T>(what: &'static str, result: Result<T, DriverError>) -> Result<T, GpuError> {
    result.map_err(|error| GpuError::Driver {
        what,
        reason: error.to_string(),
    })
}
