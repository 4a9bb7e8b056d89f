//! NCCL, loaded where it is first asked for: no machine needs it to start this program.
//!
//! In: plain calls. Out: what NCCL answers, as numbers, because a later version may have more of them than this one knows.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::OnceLock;

use libloading::Library;

/// File names of the library, in the order in which they are looked for.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// Oldest version that can be used, 2.18: the first whose configuration is the one below.
const OLDEST: u32 = 21_800;
const MAGIC: c_uint = 0xcafe_beef;
/// Value of a setting that NCCL decides.
const UNDEFINED: c_int = c_int::MIN;

pub const SUCCESS: c_int = 0;
pub const IN_PROGRESS: c_int = 7;

pub type Comm = *mut c_void;
pub type Stream = *mut c_void;

/// Identifier by which the members of a communicator find each other: where rank 0 waits for the others. Serves one
/// communicator.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct UniqueId(pub [u8; 128]);

/// `ncclConfig_t` of NCCL 2.18, which later ones complete by themselves.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

/// `ncclDataType_t`.
#[derive(Clone, Copy, Debug)]
#[repr(i32)]
pub enum DataType {
    Int64 = 4,
    Float32 = 7,
}

/// `ncclSum`.
const SUM: c_int = 0;

type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
type GetUniqueId = unsafe extern "C" fn(*mut UniqueId) -> c_int;
type CommInitRankConfig =
    unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_int;
type CommGetAsyncError = unsafe extern "C" fn(Comm, *mut c_int) -> c_int;
type CommAbort = unsafe extern "C" fn(Comm) -> c_int;
type GetString = unsafe extern "C" fn(c_int) -> *const c_char;
type GetLastError = unsafe extern "C" fn(Comm) -> *const c_char;
/// `ncclAllGather`: from, to, count, type, communicator, stream.
type AllGather =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, Stream) -> c_int;
/// `ncclReduceScatter` and `ncclAllReduce`: from, to, count, type, operation, communicator, stream.
type Reduce =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;

/// The functions of NCCL that are used here.
pub struct Nccl {
    /// Keeps the library loaded: the functions below are of no use without it.
    _library: Library,
    pub version: u32,
    get_unique_id: GetUniqueId,
    init_rank_config: CommInitRankConfig,
    get_async_error: CommGetAsyncError,
    abort: CommAbort,
    get_error_string: GetString,
    get_last_error: GetLastError,
    reduce_scatter: Reduce,
    all_reduce: Reduce,
    all_gather: AllGather,
}

/// The library, or why there is none. Looked for once in a process.
pub fn nccl() -> Result<&'static Nccl, &'static str> {
    static NCCL: OnceLock<Result<Nccl, String>> = OnceLock::new();
    let loaded = NCCL.get_or_init(Nccl::load).as_ref();
    loaded.map_err(String::as_str)
}

impl Nccl {
    fn load() -> Result<Self, String> {
        // SAFETY: a library of NVIDIA's, which may be loaded at any time.
        let found = NAMES
            .iter()
            .find_map(|name| unsafe { Library::new(*name).ok() });
        let library = found.ok_or_else(|| format!("{} cannot be loaded", NAMES[0]))?;
        macro_rules! function {
            ($kind:ty, $name:literal) => {{
                // SAFETY: the type is that of the function with this name.
                let function = unsafe { library.get::<$kind>($name.as_bytes()) };
                *function.map_err(|_| format!("{} has no {}", NAMES[0], $name))?
            }};
        }
        let get_version = function!(GetVersion, "ncclGetVersion");
        let mut version = 0;
        // SAFETY: writes the version.
        let answer = unsafe { get_version(&raw mut version) };
        let version = u32::try_from(version).unwrap_or(0);
        if answer != SUCCESS || version < OLDEST {
            return Err(format!(
                "its version is {version}, {OLDEST} or later is needed"
            ));
        }
        Ok(Self {
            version,
            get_unique_id: function!(GetUniqueId, "ncclGetUniqueId"),
            init_rank_config: function!(CommInitRankConfig, "ncclCommInitRankConfig"),
            get_async_error: function!(CommGetAsyncError, "ncclCommGetAsyncError"),
            abort: function!(CommAbort, "ncclCommAbort"),
            get_error_string: function!(GetString, "ncclGetErrorString"),
            get_last_error: function!(GetLastError, "ncclGetLastError"),
            reduce_scatter: function!(Reduce, "ncclReduceScatter"),
            all_reduce: function!(Reduce, "ncclAllReduce"),
            all_gather: function!(AllGather, "ncclAllGather"),
            _library: library,
        })
    }

    pub fn unique_id(&self) -> Result<UniqueId, c_int> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: writes the identifier.
        match unsafe { (self.get_unique_id)(&raw mut id) } {
            SUCCESS => Ok(id),
            code => Err(code),
        }
    }

    /// Begins to form a communicator of `size` ranks on the GPU of this thread.
    ///
    /// It is to be aborted whatever the answer, unless it is null.
    pub fn init(&self, size: usize, id: UniqueId, rank: u32) -> (Comm, c_int) {
        let mut config = Config {
            size: size_of::<Config>(),
            magic: MAGIC,
            version: OLDEST,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: ptr::null(),
            split_share: UNDEFINED,
        };
        let mut comm = ptr::null_mut();
        // SAFETY: writes the communicator, and reads the configuration before it returns.
        let code = unsafe {
            (self.init_rank_config)(
                &raw mut comm,
                size as c_int,
                id,
                rank as c_int,
                &raw mut config,
            )
        };
        (comm, code)
    }

    /// What became of the last call: [`IN_PROGRESS`], [`SUCCESS`] or an error.
    ///
    /// # Safety
    /// `comm` must not have been aborted.
    pub unsafe fn async_error(&self, comm: Comm) -> c_int {
        let mut state = SUCCESS;
        // SAFETY: the caller's.
        match unsafe { (self.get_async_error)(comm, &raw mut state) } {
            SUCCESS => state,
            code => code,
        }
    }

    /// Ends a communicator whatever it is at, and what it runs on the GPU.
    ///
    /// # Safety
    /// `comm` must not be used again.
    pub unsafe fn abort(&self, comm: Comm) -> c_int {
        // SAFETY: the caller's.
        unsafe { (self.abort)(comm) }
    }

    /// Begins a collective call on `stream`, without waiting for it.
    ///
    /// # Safety
    /// The memory of the call must be as [`Call`] says.
    pub unsafe fn begin(&self, comm: Comm, stream: Stream, call: &Call) -> c_int {
        let (from, to) = (call.from as *const c_void, call.to as *mut c_void);
        let (count, data_type) = (call.count, call.data_type as c_int);
        // SAFETY: the caller's.
        unsafe {
            match call.operation {
                Operation::ReduceScatter => {
                    (self.reduce_scatter)(from, to, count, data_type, SUM, comm, stream)
                }
                Operation::AllReduce => {
                    (self.all_reduce)(from, to, count, data_type, SUM, comm, stream)
                }
                Operation::AllGather => (self.all_gather)(from, to, count, data_type, comm, stream),
            }
        }
    }

    /// What an answer of NCCL means, in words. `comm` may be null.
    pub fn explain(&self, comm: Comm, code: c_int) -> String {
        // SAFETY: both give back strings that stay, or null.
        let (meaning, detail) =
            unsafe { ((self.get_error_string)(code), (self.get_last_error)(comm)) };
        let [meaning, detail] = [meaning, detail].map(|text| {
            if text.is_null() {
                return String::new();
            }
            // SAFETY: not null, see above.
            let text = unsafe { CStr::from_ptr(text) };
            text.to_string_lossy().trim().to_owned()
        });
        match detail.is_empty() {
            true => meaning,
            false => format!("{meaning}: {detail}"),
        }
    }
}

/// A collective call on memory of the device: addresses, and how many scalars each rank takes or gives.
///
/// The memory at `from` and `to` must hold what the operation reads and writes there, of the type named, until it has ended on
/// the stream or the communicator was aborted.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub operation: Operation,
    pub from: u64,
    pub to: u64,
    pub count: usize,
    pub data_type: DataType,
}

/// A collective operation of NCCL.
#[derive(Clone, Copy, Debug)]
pub enum Operation {
    /// Sums `count` scalars for each rank; every rank gets those of its own share.
    ReduceScatter,
    /// Sums `count` scalars over all ranks; every rank gets all sums.
    AllReduce,
    /// Gathers `count` scalars of each rank; every rank gets those of all.
    AllGather,
}
