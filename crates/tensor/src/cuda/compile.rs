//! The kernels' sources, and their way to machine code: NVRTC compiles each for the card when it is first used.

use std::ffi::{CString, c_char};

use cudarc::nvrtc::{result, sys};
use sha2::{Digest, Sha256};

use super::KernelCache;

const COMMON: &str = include_str!("kernels/common.cuh");
const TENSOR_CORES: &str = include_str!("kernels/tensor_cores.cuh");

/// A file of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Source {
    Attention,
    AttentionMma,
    Choice,
    Dense,
    Elementwise,
    Frozen,
    Rows,
    Sparse,
    Transforms,
}

impl Source {
    #[cfg(test)]
    const ALL: [Source; 9] = [
        Source::Attention,
        Source::AttentionMma,
        Source::Choice,
        Source::Dense,
        Source::Elementwise,
        Source::Frozen,
        Source::Rows,
        Source::Sparse,
        Source::Transforms,
    ];

    /// The file's name without its ending.
    pub(super) fn name(self) -> &'static str {
        match self {
            Source::Attention => "attention",
            Source::AttentionMma => "attention_mma",
            Source::Choice => "choice",
            Source::Dense => "dense",
            Source::Elementwise => "elementwise",
            Source::Frozen => "frozen",
            Source::Rows => "rows",
            Source::Sparse => "sparse",
            Source::Transforms => "transforms",
        }
    }

    /// What the compiler reads: the file behind what it builds on.
    fn text(self) -> String {
        let shared = if self == Source::AttentionMma { TENSOR_CORES } else { "" };
        [COMMON, shared, self.file()].join("\n")
    }

    fn file(self) -> &'static str {
        match self {
            Source::Attention => include_str!("kernels/attention.cu"),
            Source::AttentionMma => include_str!("kernels/attention_mma.cu"),
            Source::Choice => include_str!("kernels/choice.cu"),
            Source::Dense => include_str!("kernels/dense.cu"),
            Source::Elementwise => include_str!("kernels/elementwise.cu"),
            Source::Frozen => include_str!("kernels/frozen.cu"),
            Source::Rows => include_str!("kernels/rows.cu"),
            Source::Sparse => include_str!("kernels/sparse.cu"),
            Source::Transforms => include_str!("kernels/transforms.cu"),
        }
    }
}

/// Machine code of `source` for cards of compute capability `architecture`, from the cache or freshly made.
pub(super) fn cubin(
    source: Source,
    architecture: (i32, i32),
    cache: Option<&dyn KernelCache>,
) -> Result<Vec<u8>, String> {
    let (text, target) = (source.text(), target(architecture));
    let key = Sha256::new().chain_update(&text).chain_update(version()?).finalize();
    let key: String = key.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let file = format!("{}-{target}-{key}.cubin", source.name());
    if let Some(kept) = cache.and_then(|cache| cache.read(&file)) {
        return Ok(kept);
    }
    let image = compile(&text, source.name(), &target)?;
    if let Some(cache) = cache {
        cache.write(&file, &image);
    }
    Ok(image)
}

/// The compiler's version: another one may make other code.
fn version() -> Result<[u8; 8], String> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both places are numbers of the type that the library writes.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }
        .result()
        .map_err(|e| format!("NVRTC does not answer: {e:?}"))?;
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&major.to_le_bytes());
    bytes[4..].copy_from_slice(&minor.to_le_bytes());
    Ok(bytes)
}

/// Whether warps of such cards multiply in groups of four: wgmma, which no other generation has.
pub(super) fn by_groups(architecture: (i32, i32)) -> bool {
    architecture == (9, 0)
}

/// The compiler's name for such cards, with what they alone have.
fn target(architecture: (i32, i32)) -> String {
    let (major, minor) = architecture;
    format!("sm_{major}{minor}{}", if by_groups(architecture) { "a" } else { "" })
}

fn compile(text: &str, name: &str, target: &str) -> Result<Vec<u8>, String> {
    let failed = |what: &str, e: result::NvrtcError| format!("NVRTC, {name}: {what}: {e:?}");
    let source = CString::new(text).map_err(|e| format!("{name}: {e}"))?;
    let program = result::create_program(&source, None).map_err(|e| failed("no program", e))?;
    let options = [format!("--gpu-architecture={target}"), "--std=c++17".into()];
    // SAFETY: the program was just made, and is destroyed after its last use, below.
    let compiled = unsafe { result::compile_program(program, &options) };
    let image = match compiled {
        Ok(()) => image(program).map_err(|e| failed("no image", e)),
        Err(e) => {
            // SAFETY: as above.
            let log = unsafe { result::get_program_log(program) }.unwrap_or_default();
            Err(format!("{}\n{}", failed("does not compile", e), readable(&log)))
        }
    };
    // SAFETY: as above.
    unsafe { result::destroy_program(program) }.map_err(|e| failed("cannot be ended", e))?;
    image
}

fn image(program: sys::nvrtcProgram) -> Result<Vec<u8>, result::NvrtcError> {
    let mut size = 0;
    // SAFETY: the program has been compiled; the image is as long as the first call says.
    unsafe {
        sys::nvrtcGetCUBINSize(program, &mut size).result()?;
        let mut image = vec![0u8; size];
        sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast::<c_char>()).result()?;
        Ok(image)
    }
}

fn readable(log: &[c_char]) -> String {
    let bytes: Vec<u8> = log.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The compiler needs no card: where it is installed, every kernel is compiled for each generation.
    #[test]
    fn every_kernel_compiles() {
        if !super::super::probe::compiler() {
            println!("skipped: NVRTC is not installed here");
            return;
        }
        for source in Source::ALL {
            for architecture in [(8, 0), (8, 9), (9, 0)] {
                let image = cubin(source, architecture, None).unwrap_or_else(|e| panic!("{e}"));
                assert_eq!(&image[..4], b"\x7fELF", "{}", source.name());
            }
        }
    }

    #[test]
    fn what_does_not_compile_says_where() {
        if !super::super::probe::compiler() {
            println!("skipped: NVRTC is not installed here");
            return;
        }
        let message = compile("__global__ void f() { nothing; }", "wrong", "sm_80").unwrap_err();
        assert!(message.contains("nothing") && message.contains("wrong"), "{message}");
    }
}
