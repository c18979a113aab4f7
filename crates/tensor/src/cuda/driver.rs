//! The card: its context and stream, memory from a caching pool, launches, and copies from and to the host.
//!
//! Everything goes to one stream, so calls happen in the order in which they are made, and memory that is given back
//! may be handed out again at once. The first failure is kept: from then on nothing more is asked of the card, and the
//! next read on the host reports it.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};

use cudarc::driver::{result, sys};

use super::compile::{self, Source};
use super::gemm::Gemm;
use super::profile::Profile;
use crate::memory::class_of;

/// A CUDA device, in use by the whole process.
pub(crate) struct Cuda {
    context: sys::CUcontext,
    stream: sys::CUstream,
    architecture: (i32, i32),
    processors: usize,
    /// Bytes of shared memory that a block may have.
    block_memory: i32,
    total_memory: usize,
    driver: i32,
    cache: Option<Box<dyn super::KernelCache>>,
    functions: Mutex<HashMap<(Source, &'static str), Function>>,
    modules: Mutex<HashMap<Source, usize>>,
    failure: Mutex<Option<String>>,
    has_failed: AtomicBool,
    ran_out: AtomicBool,
    memory: Memory,
    bf16: AtomicBool,
    pub(crate) profile: Profile,
    pub(super) gemm: Gemm,
}

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: handles of the driver may be used from any thread that has the context, which each call sees to.
unsafe impl Send for Function {}
// SAFETY: as above; what changes is behind locks.
unsafe impl Send for Cuda {}
// SAFETY: as above.
unsafe impl Sync for Cuda {}

/// Bytes taken from the card, and memory that was given back: by size, as a step asks for what the one before it gave back.
#[derive(Default)]
struct Memory {
    live: AtomicUsize,
    peak: AtomicUsize,
    free: Mutex<HashMap<usize, Vec<u64>>>,
}

/// Bytes that the smallest memory has.
const LEAST_BYTES: usize = 512;

/// Sizes of up to eight dimensions, as `struct Dims` of the kernels.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct Dims([i64; 8]);

impl Dims {
    /// The sizes, the slowest first; 1 behind them.
    pub(super) fn of(sizes: &[usize]) -> Dims {
        assert!(sizes.len() <= 8, "kernels know up to eight dimensions, not {}", sizes.len());
        let mut dims = [1; 8];
        dims.iter_mut().zip(sizes).for_each(|(d, &s)| *d = s as i64);
        Dims(dims)
    }
}

/// An argument of a kernel.
#[derive(Clone, Copy)]
pub(crate) enum Arg {
    /// Memory of the card.
    Ptr(u64),
    I64(i64),
    U64(u64),
    I32(i32),
    U32(u32),
    F32(f32),
    Dims(Dims),
}

impl Arg {
    /// No memory.
    pub(super) const NULL: Arg = Arg::Ptr(0);

    fn place(&self) -> *mut c_void {
        let place: *const c_void = match self {
            Arg::Ptr(v) | Arg::U64(v) => std::ptr::from_ref(v).cast(),
            Arg::I64(v) => std::ptr::from_ref(v).cast(),
            Arg::I32(v) => std::ptr::from_ref(v).cast(),
            Arg::U32(v) => std::ptr::from_ref(v).cast(),
            Arg::F32(v) => std::ptr::from_ref(v).cast(),
            Arg::Dims(v) => std::ptr::from_ref(v).cast(),
        };
        place.cast_mut()
    }

    /// The memory `bytes` further on.
    pub(crate) fn offset(&self, bytes: usize) -> Arg {
        match self.address() {
            0 => Arg::NULL,
            at => Arg::Ptr(at + bytes as u64),
        }
    }

    /// The address, for libraries that are called with it.
    pub(super) fn address(&self) -> u64 {
        match self {
            Arg::Ptr(at) => *at,
            _ => unreachable!("asked of memory only"),
        }
    }
}

/// Memory of the card, given back when dropped.
pub(crate) struct DeviceMemory {
    at: u64,
    bytes: usize,
}

impl DeviceMemory {
    pub(crate) fn arg(&self) -> Arg {
        Arg::Ptr(self.at)
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.at != 0
            && let Some(card) = super::card()
        {
            card.give(self.at, self.bytes);
        }
    }
}

/// Launches have at most this many blocks where a kernel goes over elements in a loop.
const MOST_BLOCKS: usize = 1 << 16;

impl Cuda {
    /// Opens card `ordinal`; compiled kernels are kept in `cache`.
    pub(super) fn open(ordinal: usize, cache: Option<Box<dyn super::KernelCache>>) -> Result<Cuda, String> {
        super::probe::libraries()?;
        let said = |what: &'static str| move |e: result::DriverError| format!("{what}: {e:?}");
        result::init().map_err(said("the driver does not start"))?;
        let count = result::device::get_count().map_err(said("the driver does not count its cards"))?;
        let ordinal = i32::try_from(ordinal).unwrap_or(i32::MAX);
        if ordinal >= count {
            return Err(format!("expected a card below {count}, found {ordinal}"));
        }
        let device = result::device::get(ordinal).map_err(said("the card does not answer"))?;
        let attribute = |which| {
            // SAFETY: `device` came from the driver.
            unsafe { result::device::get_attribute(device, which) }.map_err(said("the card does not answer"))
        };
        use sys::CUdevice_attribute_enum as Has;
        let architecture = (
            attribute(Has::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Has::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if architecture.0 < 8 {
            let (major, minor) = architecture;
            return Err(format!("expected a card of compute capability 8.0 or more, found {major}.{minor}"));
        }
        let block_memory = attribute(Has::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let processors = attribute(Has::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        // SAFETY: `device` came from the driver.
        let total_memory =
            unsafe { result::device::total_mem(device) }.map_err(said("the card does not answer"))?;
        // SAFETY: `device` came from the driver; the context is kept for the life of the process.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(said("no context"))?;
        // SAFETY: the context was just retained.
        unsafe { result::ctx::set_current(context) }.map_err(said("no context"))?;
        keep_freed_memory(device).map_err(said("no memory pool"))?;
        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(said("no stream"))?;
        let gemm = Gemm::open().map_err(|e| format!("cuBLASLt does not start: {e}"))?;
        Ok(Cuda {
            context,
            stream,
            architecture,
            processors,
            block_memory,
            total_memory,
            driver: super::probe::driver_version(),
            cache,
            functions: Mutex::default(),
            modules: Mutex::default(),
            failure: Mutex::default(),
            has_failed: AtomicBool::new(false),
            ran_out: AtomicBool::new(false),
            memory: Memory::default(),
            bf16: AtomicBool::new(false),
            profile: Profile::default(),
            gemm,
        })
    }

    /// The generation of the card, its size and its driver: what decides a result's last bits.
    pub(crate) fn name(&self) -> String {
        let (major, minor) = self.architecture;
        format!("cuda {major}.{minor}, {} processors, driver {}", self.processors, self.driver)
    }

    /// Bytes of memory that the card has.
    pub(crate) fn total_memory(&self) -> usize {
        self.total_memory
    }

    /// Whether kernels multiply by groups of warps.
    pub(super) fn by_groups(&self) -> bool {
        compile::by_groups(self.architecture)
    }

    /// Whether memory was asked for that it did not have.
    pub(crate) fn ran_out(&self) -> bool {
        self.ran_out.load(Relaxed)
    }

    /// Number of multiprocessors.
    pub(super) fn processors(&self) -> usize {
        self.processors
    }

    /// Whether factors may be rounded to bf16 or TF32 that are not frozen weights.
    pub(super) fn bf16_allowed(&self) -> bool {
        self.bf16.load(Relaxed)
    }

    pub(crate) fn allow_bf16(&self, allowed: bool) {
        self.bf16.store(allowed, Relaxed);
    }

    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Makes the context that of the calling thread. Costs some ten nanoseconds where it is already.
    pub(super) fn here(&self) {
        // SAFETY: the context lives as long as the process.
        if let Err(e) = unsafe { result::ctx::set_current(self.context) } {
            self.fail(format!("no context: {e:?}"));
        }
    }

    /// Keeps the first failure.
    pub(super) fn fail(&self, what: String) {
        lock(&self.failure).get_or_insert(what);
        self.has_failed.store(true, Relaxed);
    }

    /// Whether anything went wrong.
    pub(super) fn has_failed(&self) -> bool {
        self.has_failed.load(Relaxed)
    }

    /// What went wrong, if anything did.
    pub(crate) fn failure(&self) -> Option<String> {
        lock(&self.failure).clone()
    }

    /// Bytes in use now and the most that were.
    pub(crate) fn memory(&self) -> (usize, usize) {
        (self.memory.live.load(Relaxed), self.memory.peak.load(Relaxed))
    }

    pub(crate) fn reset_peak(&self) {
        self.memory.peak.store(self.memory.live.load(Relaxed), Relaxed);
    }

    /// `bytes` of arbitrary contents.
    pub(crate) fn take(&self, bytes: usize) -> DeviceMemory {
        let bytes = class_of(bytes.max(LEAST_BYTES));
        if self.has_failed() {
            return DeviceMemory { at: 0, bytes };
        }
        let kept = lock(&self.memory.free).get_mut(&bytes).and_then(Vec::pop);
        let at = kept.map_or_else(|| self.take_from_driver(bytes), Ok);
        match at {
            Ok(at) => {
                let live = self.memory.live.fetch_add(bytes, Relaxed) + bytes;
                self.memory.peak.fetch_max(live, Relaxed);
                DeviceMemory { at, bytes }
            }
            Err(e) => {
                let free = result::mem_get_info().map_or(0, |(free, _)| free);
                let live = self.memory.live.load(Relaxed);
                let mib = |bytes: usize| bytes >> 20;
                self.ran_out.store(true, Relaxed);
                self.fail(format!(
                    "out of memory: {} MiB asked for, {} MiB in use here, {} MiB free on the card ({e:?})",
                    mib(bytes),
                    mib(live),
                    mib(free)
                ));
                DeviceMemory { at: 0, bytes }
            }
        }
    }

    /// Memory that is not kept here; where there is none, what is kept goes back to the driver first.
    fn take_from_driver(&self, bytes: usize) -> Result<u64, result::DriverError> {
        self.here();
        // SAFETY: the stream is ours, and the context is that of this thread.
        let take = || unsafe { result::malloc_async(self.stream, bytes) };
        take().or_else(|_| {
            for at in std::mem::take(&mut *lock(&self.memory.free)).into_values().flatten() {
                // SAFETY: nobody holds what was given back, and what still reads it was put on the stream before.
                unsafe { result::free_async(at, self.stream) }?;
            }
            // SAFETY: the stream is ours; what it frees is there when it has come to it.
            unsafe { result::stream::synchronize(self.stream) }?;
            take()
        })
    }

    /// What is put on the stream from now on may use this memory for something else.
    fn give(&self, at: u64, bytes: usize) {
        self.memory.live.fetch_sub(bytes, Relaxed);
        lock(&self.memory.free).entry(bytes).or_default().push(at);
    }

    /// Copies `values` to new memory of the card.
    pub(crate) fn upload<T: bytemuck::Pod>(&self, values: &[T]) -> DeviceMemory {
        let memory = self.take(size_of_val(values));
        self.write(values, &memory, 0);
        memory
    }

    /// Copies `values` to `memory` from byte `at` on.
    pub(super) fn write<T: bytemuck::Pod>(&self, values: &[T], memory: &DeviceMemory, at: usize) {
        if memory.at == 0 || values.is_empty() {
            return;
        }
        assert!(at + size_of_val(values) <= memory.bytes, "more is written than the memory holds");
        self.here();
        // SAFETY: the memory holds the bytes (just asserted); the driver has read pageable memory when the call returns.
        if let Err(e) = unsafe { result::memcpy_htod_async(memory.at + at as u64, values, self.stream) } {
            self.fail(format!("copying to the card: {e:?}"));
        }
    }

    /// Waits for everything and copies memory of the card to `values`.
    pub(crate) fn read<T: bytemuck::Pod>(&self, from: Arg, values: &mut [T]) {
        if from.address() == 0 || values.is_empty() || self.has_failed() {
            return;
        }
        self.here();
        // SAFETY: `from` is memory that a tensor or buffer of this length holds; waited for before it is looked at.
        let done = unsafe {
            result::memcpy_dtoh_async(values, from.address(), self.stream)
                .and_then(|()| result::stream::synchronize(self.stream))
        };
        if let Err(e) = done {
            self.fail(format!("a kernel or a copy failed: {e:?}"));
        }
    }

    /// Waits for everything that was asked for.
    pub(crate) fn wait(&self) {
        self.here();
        // SAFETY: the stream is ours.
        if let Err(e) = unsafe { result::stream::synchronize(self.stream) } {
            self.fail(format!("a kernel failed: {e:?}"));
        }
    }

    /// Copies `bytes` on the card.
    pub(super) fn copy(&self, from: u64, to: u64, bytes: usize) {
        if bytes == 0 || from == 0 || to == 0 {
            return;
        }
        self.here();
        // SAFETY: both ranges lie in memory that the caller holds.
        if let Err(e) = unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) } {
            self.fail(format!("copying on the card: {e:?}"));
        }
    }

    /// Launches `kernel` of `source`; nothing where the grid is empty.
    pub(super) fn launch(
        &self,
        source: Source,
        kernel: &'static str,
        grid: [usize; 3],
        block: [u32; 3],
        shared_bytes: usize,
        args: &[Arg],
    ) {
        if grid.contains(&0) || self.has_failed() {
            return;
        }
        self.here();
        let Some(function) = self.function(source, kernel) else { return };
        let started = self.profile.start(self);
        let mut places: Vec<*mut c_void> = args.iter().map(Arg::place).collect();
        let grid = grid.map(|n| u32::try_from(n).expect("grids are below 2³²"));
        // SAFETY: the function was loaded from our own source, whose parameters `args` are; memory that they name is held
        // by the caller until the call is on the stream.
        let launched = unsafe {
            result::launch_kernel(
                function.0,
                grid.into(),
                block.into(),
                shared_bytes as u32,
                self.stream,
                &mut places,
            )
        };
        if let Err(e) = launched {
            self.fail(format!("kernel {kernel} with grid {grid:?}, block {block:?}: {e:?}"));
        }
        self.profile.stop(self, started, || kernel.to_owned());
    }

    /// Launches `kernel` over `n` elements that it goes over in a loop.
    pub(super) fn launch_over(&self, source: Source, kernel: &'static str, n: usize, args: &[Arg]) {
        let blocks = n.div_ceil(256).min(MOST_BLOCKS);
        self.launch(source, kernel, [blocks, 1, 1], [256, 1, 1], 0, args);
    }

    /// The function, compiled and loaded when it is first asked for.
    fn function(&self, source: Source, kernel: &'static str) -> Option<Function> {
        if let Some(known) = lock(&self.functions).get(&(source, kernel)) {
            return Some(*known);
        }
        match self.load(source, kernel) {
            Ok(function) => {
                lock(&self.functions).insert((source, kernel), function);
                Some(function)
            }
            Err(message) => {
                self.fail(message);
                None
            }
        }
    }

    fn load(&self, source: Source, kernel: &'static str) -> Result<Function, String> {
        let mut modules = lock(&self.modules);
        let module = match modules.get(&source) {
            Some(module) => *module as sys::CUmodule,
            None => {
                let image = compile::cubin(source, self.architecture, self.cache.as_deref())?;
                // SAFETY: the image is what NVRTC made, for this card.
                let module = unsafe { result::module::load_data(image.as_ptr().cast()) }
                    .map_err(|e| format!("the kernels of {} do not load: {e:?}", source.name()))?;
                modules.insert(source, module as usize);
                module
            }
        };
        let name = CString::new(kernel).map_err(|e| e.to_string())?;
        // SAFETY: modules are never unloaded.
        let function = unsafe { result::module::get_function(module, name) }
            .map_err(|e| format!("no kernel {kernel} in {}: {e:?}", source.name()))?;
        // What is more than 48 KiB has to be asked for; all that there is beside the kernel's own is asked for at once.
        use sys::CUfunction_attribute_enum as Has;
        let no_memory = |e| format!("kernel {kernel} gets no shared memory: {e:?}");
        // SAFETY: the function was just loaded.
        unsafe {
            let own = Has::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
            let own = result::function::get_function_attribute(function, own).map_err(no_memory)?;
            let most = Has::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            result::function::set_function_attribute(function, most, self.block_memory - own)
                .map_err(no_memory)?;
        }
        Ok(Function(function))
    }
}

/// The driver's pool keeps what is given back, instead of returning it to the system at the next wait.
fn keep_freed_memory(device: sys::CUdevice) -> Result<(), result::DriverError> {
    use sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD as THRESHOLD;
    // SAFETY: the pool is the device's own; the attribute is a 64-bit number.
    unsafe {
        let pool = result::device::get_default_mem_pool(device)?;
        let mut threshold = u64::MAX;
        result::mem_pool::set_attribute(pool, THRESHOLD, (&raw mut threshold).cast())
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
