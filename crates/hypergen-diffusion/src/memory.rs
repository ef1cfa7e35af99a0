//! Whether a picture fits into memory. Linux grants memory that is not there
//! and later kills the process that touches it, so a server has to look first.

use std::fs;

use hypergen_tensor::DType;

use crate::models::vae::VaeConfig;
use crate::{Error, ErrorKind, Size};

/// Refuses a picture whose decoding does not fit into what is free now.
///
/// # Errors
/// With [`ErrorKind::OutOfMemory`], and both figures in the message.
pub(crate) fn check(size: Size, vae: &VaeConfig, dtype: DType) -> Result<(), Error> {
    let needed = decoding(size, vae, dtype);
    match available() {
        Some(free) if needed > free => Err(Error {
            kind: ErrorKind::OutOfMemory,
            param: Some("size"),
            message: format!(
                "out of memory: drawing {size} takes about {:.1} GB and {:.1} GB are free; ask for a smaller size",
                needed as f64 / 1e9,
                free as f64 / 1e9
            ),
        }),
        _ => Ok(()),
    }
}

/// Refuses a picture whose decoding this machine could not hold if all of its
/// memory were free: what can be said before anything waits.
///
/// # Errors
/// With [`ErrorKind::OutOfMemory`], and both figures in the message.
pub(crate) fn check_total(size: Size, vae: &VaeConfig, dtype: DType) -> Result<(), Error> {
    let needed = decoding(size, vae, dtype);
    match total() {
        Some(total) if needed > total => Err(Error {
            kind: ErrorKind::OutOfMemory,
            param: Some("size"),
            message: format!(
                "out of memory: drawing {size} takes about {:.1} GB and this machine has {:.1} GB; ask for a smaller size",
                needed as f64 / 1e9,
                total as f64 / 1e9
            ),
        }),
        _ => Ok(()),
    }
}

/// Refuses a LoRA whose merged weights do not fit into what is free now.
///
/// # Errors
/// With [`ErrorKind::OutOfMemory`], and both figures in the message.
pub(crate) fn check_lora(needed: usize) -> Result<(), Error> {
    match available() {
        Some(free) if needed as u64 > free => Err(Error::new(
            ErrorKind::OutOfMemory,
            format!(
                "out of memory: the weights with this LoRA take {:.1} GB and {:.1} GB are free; free some memory, or load the model in bfloat16",
                needed as f64 / 1e9,
                free as f64 / 1e9
            ),
        )),
        _ => Ok(()),
    }
}

/// Bytes that decoding holds at once. Its last level is by far the largest:
/// input, normalised input, output and shortcut of its first residual block,
/// at the picture's full size.
fn decoding(size: Size, vae: &VaeConfig, dtype: DType) -> u64 {
    let finest = vae.block_out_channels[0];
    let next = vae.block_out_channels.get(1).copied().unwrap_or(finest);
    let channels = 2 * next + 2 * finest;
    (size.width * size.height) as u64 * (channels * dtype.size()) as u64
}

/// Bytes that the process may still take: what the machine has free, or what
/// the control group leaves of its limit, whichever is less. `None` where the
/// system does not say.
fn available() -> Option<u64> {
    let machine = meminfo("MemAvailable:")?;
    Some(group().map_or(machine, |(limit, used)| machine.min(limit.saturating_sub(used))))
}

/// The same if nothing were in use.
fn total() -> Option<u64> {
    let machine = meminfo("MemTotal:")?;
    Some(group().map_or(machine, |(limit, _)| machine.min(limit)))
}

/// The control group's limit, and what is in use of it.
fn group() -> Option<(u64, u64)> {
    let number =
        |file: &str| fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?.trim().parse::<u64>().ok();
    let version_2 = number("memory.max").zip(number("memory.current"));
    version_2.or_else(|| number("memory/memory.limit_in_bytes").zip(number("memory/memory.usage_in_bytes")))
}

fn meminfo(name: &str) -> Option<u64> {
    meminfo_line(&fs::read_to_string("/proc/meminfo").ok()?, name)
}

fn meminfo_line(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sd() -> VaeConfig {
        VaeConfig { block_out_channels: vec![128, 256, 512, 512], ..VaeConfig::default() }
    }

    #[test]
    fn a_megapixel_of_stable_diffusion_takes_gigabytes() {
        let size = Size { width: 1024, height: 1024 };
        assert_eq!(decoding(size, &sd(), DType::Bf16), 1024 * 1024 * 768 * 2);
        assert_eq!(decoding(size, &sd(), DType::F32), 1024 * 1024 * 768 * 4);
    }

    #[test]
    fn what_cannot_fit_is_refused_with_both_figures() {
        let absurd = Size { width: 1 << 20, height: 1 << 20 };
        if available().is_some() {
            let error = check(absurd, &sd(), DType::F32).expect_err("a petabyte is not free");
            assert_eq!(error.kind, ErrorKind::OutOfMemory);
            assert!(error.message.contains("1048576x1048576") && error.message.contains("free"), "{error}");
            let error = check_total(absurd, &sd(), DType::F32).expect_err("nor is there one at all");
            assert_eq!(error.kind, ErrorKind::OutOfMemory);
            assert!(error.message.contains("this machine has"), "{error}");
            assert_eq!(check_total(Size { width: 8, height: 8 }, &sd(), DType::F32), Ok(()));
        }
    }

    #[test]
    fn reads_what_the_kernel_writes() {
        let free = |text| meminfo_line(text, "MemAvailable:");
        assert_eq!(free("MemTotal: 9 kB\nMemAvailable:   20480 kB\n"), Some(20480 * 1024));
        assert_eq!(free("MemTotal: 9 kB\n"), None);
        assert_eq!(free("MemAvailable: many kB\n"), None);
    }
}
