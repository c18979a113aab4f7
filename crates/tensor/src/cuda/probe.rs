//! Which of NVIDIA's libraries are there: they are loaded when first asked for, so that one binary runs with and without them.

use cudarc::{cublaslt, driver, nvrtc};

/// An error that names the libraries that a card needs and that are not found.
pub(super) fn libraries() -> Result<(), String> {
    // SAFETY: opening NVIDIA's libraries runs their initializers, which expect nothing.
    let present = unsafe {
        [
            ("the driver (libcuda.so)", driver::sys::is_culib_present()),
            ("NVRTC (libnvrtc.so)", nvrtc::sys::is_culib_present()),
            ("cuBLASLt (libcublasLt.so)", cublaslt::sys::is_culib_present()),
        ]
    };
    let missing: Vec<_> = present.iter().filter(|(_, found)| !found).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(format!(
        "not found: {}; expected where the system looks for libraries (LD_LIBRARY_PATH)",
        missing.join(", ")
    ))
}

/// The driver's version, as it counts it (13000 for 13.0); 0 where it does not say.
pub(super) fn driver_version() -> i32 {
    let mut version = 0;
    // SAFETY: the place is a number of the type that the driver writes.
    let _ = unsafe { driver::sys::cuDriverGetVersion(&mut version) };
    version
}

/// The cards, each by name, memory and compute capability.
pub(super) fn cards() -> Result<Vec<String>, String> {
    libraries()?;
    let said = |e: driver::DriverError| format!("the driver does not answer: {e:?}");
    driver::result::init().map_err(said)?;
    let count = driver::result::device::get_count().map_err(said)?;
    (0..count).map(|ordinal| card(ordinal).map_err(said)).collect()
}

fn card(ordinal: i32) -> Result<String, driver::DriverError> {
    use driver::sys::CUdevice_attribute_enum as Has;
    let device = driver::result::device::get(ordinal)?;
    let name = driver::result::device::get_name(device)?;
    // SAFETY: `device` came from the driver.
    let (bytes, major, minor) = unsafe {
        let attribute = |which| driver::result::device::get_attribute(device, which);
        (
            driver::result::device::total_mem(device)?,
            attribute(Has::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Has::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        )
    };
    Ok(format!("{name}, {} MiB, compute capability {major}.{minor}", bytes >> 20))
}

/// Whether kernels can be compiled here.
#[cfg(test)]
pub(super) fn compiler() -> bool {
    // SAFETY: as above.
    unsafe { nvrtc::sys::is_culib_present() }
}
