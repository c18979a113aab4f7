//! Products by cuBLASLt: the algorithm for each shape is asked for once and kept.
//!
//! cuBLASLt counts matrices by columns. A row-major y [m, n] = a·b is, by columns, yᵀ = bᵀ·aᵀ in the same memory, so
//! that b is its first factor and a its second.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::mem::size_of;
use std::sync::Mutex;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::driver::{Cuda, DeviceMemory, lock};
use crate::ops::Product;

/// Memory that algorithms may use beside the matrices: what NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;

/// Element types of the two factors; the result is f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// f32, multiplied in f32.
    F32,
    /// f32, rounded to TF32 while multiplying.
    Tf32,
    /// bf16, summed in f32.
    Bf16,
}

/// What an algorithm depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    kind: Kind,
    batch: usize,
    size: [usize; 3],
    transposed: [bool; 2],
    accumulate: bool,
    bias: bool,
    /// Powers of two that divide the addresses, at most 256.
    alignment: [u32; 3],
}

/// cuBLASLt's description of one product.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// cuBLASLt and the plans made so far.
pub(super) struct Gemm {
    handle: sys::cublasLtHandle_t,
    plans: Mutex<HashMap<Key, Plan>>,
    workspace: std::sync::OnceLock<DeviceMemory>,
}

/// Where the factors and the result of a product lie.
#[derive(Clone, Copy)]
pub(super) struct Places {
    pub a: u64,
    pub b: u64,
    /// Added to each row of the result, or 0.
    pub bias: u64,
    pub y: u64,
}

impl Gemm {
    pub(super) fn open() -> Result<Gemm, CublasError> {
        let handle = result::create_handle()?;
        Ok(Gemm { handle, plans: Mutex::default(), workspace: std::sync::OnceLock::new() })
    }
}

impl Cuda {
    /// y = scale · op(a) · op(b) (+ bias), or added to y; shapes as [`Product`] says, all of them not empty. False where
    /// cuBLASLt has nothing for such bf16 factors: nothing was done then.
    #[must_use]
    pub(super) fn multiply(&self, kind: Kind, p: Product, at: Places) -> bool {
        if self.has_failed() || at.a == 0 || at.b == 0 || at.y == 0 {
            return true;
        }
        self.here();
        let started = self.profile.start(self);
        match self.try_multiply(kind, p, at) {
            Ok(()) => {
                let accumulated = if p.accumulate { ", added" } else { "" };
                self.profile.stop(self, started, || format!("{}x{}x{} {kind:?}{accumulated}", p.m, p.k, p.n));
                true
            }
            Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) if kind == Kind::Bf16 => false,
            Err(e) => {
                self.fail(format!("product {p:?} in {kind:?}: {e:?}"));
                true
            }
        }
    }

    fn try_multiply(&self, kind: Kind, p: Product, at: Places) -> Result<(), CublasError> {
        let align = |address: u64| 1u32 << address.trailing_zeros().min(8);
        let key = Key {
            kind,
            batch: p.batch,
            size: [p.m, p.k, p.n],
            transposed: [p.transpose_a, p.transpose_b],
            accumulate: p.accumulate,
            bias: at.bias != 0,
            alignment: [align(at.a), align(at.b), align(at.y)],
        };
        let workspace = self.gemm.workspace.get_or_init(|| self.take(WORKSPACE)).arg().address();
        let mut plans = lock(&self.gemm.plans);
        let plan = match plans.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(free) => free.insert(plan(self.gemm.handle, key)?),
        };
        let (alpha, beta) = (p.scale, if p.accumulate { 1.0f32 } else { 0.0 });
        // SAFETY: the descriptions live in the map, whose lock is held; the memory is held by the caller until the call is on
        // the stream and is as large as the layouts say; both factors of the sum are f32, as the description says.
        unsafe {
            if at.bias != 0 {
                use sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER as BIAS;
                describe(plan.product, BIAS, &at.bias)?;
            }
            result::matmul(
                self.gemm.handle,
                plan.product,
                std::ptr::from_ref(&alpha).cast(),
                std::ptr::from_ref(&beta).cast(),
                at.b as *const c_void,
                plan.b,
                at.a as *const c_void,
                plan.a,
                at.y as *const c_void,
                plan.y,
                at.y as *mut c_void,
                plan.y,
                &plan.algorithm,
                workspace as *mut c_void,
                if workspace == 0 { 0 } else { WORKSPACE },
                self.stream().cast(),
            )
        }
    }
}

/// Sets one attribute of a product.
///
/// # Safety
/// `T` is the attribute's type.
unsafe fn describe<T>(
    product: sys::cublasLtMatmulDesc_t,
    which: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> Result<(), CublasError> {
    // SAFETY: the caller's promise; the library copies the value.
    unsafe {
        result::set_matmul_desc_attribute(product, which, std::ptr::from_ref(value).cast(), size_of::<T>())
    }
}

fn plan(handle: sys::cublasLtHandle_t, key: Key) -> Result<Plan, CublasError> {
    use sys::cublasLtMatmulDescAttributes_t as Attribute;
    let [m, k, n] = key.size.map(|size| size as u64);
    let single = sys::cudaDataType::CUDA_R_32F;
    let (compute, factor) = match key.kind {
        Kind::F32 => (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, single),
        Kind::Tf32 => (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32, single),
        Kind::Bf16 => (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_16BF),
    };
    let product = result::create_matmul_desc(compute, single)?;
    let transpose = |yes| i32::from(yes);
    // SAFETY: transposition is a 32-bit number, and so is the epilogue.
    unsafe {
        describe(product, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transpose(key.transposed[1]))?;
        describe(product, Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &transpose(key.transposed[0]))?;
        if key.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            describe(product, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        }
    }
    let stored = |rows: u64, columns: u64, transposed: bool| {
        if transposed { (columns, rows) } else { (rows, columns) }
    };
    let (a_rows, a_columns) = stored(m, k, key.transposed[0]);
    let (b_rows, b_columns) = stored(k, n, key.transposed[1]);
    let a = layout(factor, a_rows, a_columns, key.batch)?;
    let b = layout(factor, b_rows, b_columns, key.batch)?;
    let y = layout(single, m, n, key.batch)?;
    let found = choose(handle, product, [b, a, y], key.alignment)?;
    Ok(Plan { product, a, b, y, algorithm: found.algo })
}

/// `batch` row-major matrices [rows, columns] one after another.
fn layout(
    kind: sys::cudaDataType,
    rows: u64,
    columns: u64,
    batch: usize,
) -> Result<sys::cublasLtMatrixLayout_t, CublasError> {
    use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
    let layout = result::create_matrix_layout(kind, columns, rows, columns as i64)?;
    if batch > 1 {
        let (count, stride) = (batch as i32, (rows * columns) as i64);
        // SAFETY: the layout was just made; the count is a 32-bit, the stride a 64-bit number.
        unsafe {
            let set = |which, value: *const c_void, bytes| {
                result::set_matrix_layout_attribute(layout, which, value, bytes)
            };
            set(Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, std::ptr::from_ref(&count).cast(), 4)?;
            set(
                Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                std::ptr::from_ref(&stride).cast(),
                8,
            )?;
        }
    }
    Ok(layout)
}

/// The algorithm that cuBLASLt thinks best for first factor, second factor and result.
fn choose(
    handle: sys::cublasLtHandle_t,
    product: sys::cublasLtMatmulDesc_t,
    [first, second, y]: [sys::cublasLtMatrixLayout_t; 3],
    [a, b, result_at]: [u32; 3],
) -> Result<sys::cublasLtMatmulHeuristicResult_t, CublasError> {
    use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
    let preference = result::create_matmul_pref()?;
    // SAFETY: the preference was just made and is destroyed after its last use; the size is a 64-bit number, alignments are
    // 32-bit ones.
    unsafe {
        let set = |which, value: *const c_void, bytes| {
            result::set_matmul_pref_attribute(preference, which, value, bytes)
        };
        let workspace = WORKSPACE as u64;
        set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, std::ptr::from_ref(&workspace).cast(), 8)?;
        let alignments = [
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &b),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &a),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &result_at),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &result_at),
        ];
        for (which, bytes) in alignments {
            set(which, std::ptr::from_ref(bytes).cast(), 4)?;
        }
        let found = result::get_matmul_algo_heuristic(handle, product, first, second, y, y, preference);
        result::destroy_matmul_pref(preference)?;
        found
    }
}
