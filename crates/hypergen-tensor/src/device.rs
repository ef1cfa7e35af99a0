//! Where tensors live and who computes on them.
//!
//! Today that is the CPU. A second kind of device becomes a variant here and a
//! file of operations beside `ops.rs`; models never learn which one they run on.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::profile::{Profile, ProfileEntry, Span};
use crate::tensor::DType;
use half::bf16;
use hypergen_cpu::{AlignedVec, Cpu, CpuConfig, CpuError, Element};

/// How a [`Device`] is set up.
#[derive(Debug, Clone, Default)]
pub struct DeviceConfig {
    /// Threads that share each operation; `None`: all that the process may use.
    pub threads: Option<usize>,
}

/// A handle on a device; cheap to clone.
#[derive(Clone)]
pub struct Device {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    cpu: Cpu,
    f32: FreeList<f32>,
    bf16: FreeList<bf16>,
    profile: Profile,
}

/// Buffers whose tensors are gone, by length. The shapes of a denoising step
/// repeat, so from the second step on nothing is allocated.
type FreeList<T> = Mutex<BTreeMap<usize, Vec<AlignedVec<T>>>>;

/// A buffer serves a tensor of at least this fraction of its length. Pages
/// fresh from the system are cleared by it, which takes as long as computing
/// on them: decoding spent a third of its time so when only lengths that fit
/// exactly were taken.
const LEAST_USE: usize = 2;

impl Device {
    /// The CPU of this machine.
    ///
    /// # Errors
    /// When `HYPERGEN_ISA` asks for an instruction set that the machine lacks.
    pub fn cpu(config: &DeviceConfig) -> Result<Self, CpuError> {
        Self::from_cpu_config(&CpuConfig { threads: config.threads, isa: None })
    }

    /// The CPU with a chosen instruction set, for tests and benches.
    ///
    /// # Errors
    /// When the machine lacks the instruction set.
    pub fn from_cpu_config(config: &CpuConfig) -> Result<Self, CpuError> {
        let cpu = Cpu::new(config)?;
        Ok(Self {
            shared: Arc::new(Shared {
                cpu,
                f32: FreeList::default(),
                bf16: FreeList::default(),
                profile: Profile::default(),
            }),
        })
    }

    /// What the device is called in logs and answers.
    pub fn name(&self) -> &'static str {
        "cpu"
    }

    /// Threads that share each operation.
    pub fn threads(&self) -> usize {
        self.cpu_kernels().threads()
    }

    /// The instruction set in use.
    pub fn isa(&self) -> hypergen_cpu::Isa {
        self.cpu_kernels().isa()
    }

    /// Whether bfloat16 products run at a multiple of float32's speed.
    pub fn multiplies_bf16(&self) -> bool {
        self.isa() >= hypergen_cpu::Isa::Avx512Bf16
    }

    /// The values of a function of `0..count`, computed by all threads in no
    /// particular order: for what a caller prepares outside of operations.
    pub fn map<R: Send + Sync>(&self, count: usize, body: impl Fn(usize) -> R + Sync) -> Vec<R> {
        let results: Vec<OnceLock<R>> = (0..count).map(|_| OnceLock::new()).collect();
        self.cpu_kernels().parallel(count, |i| {
            results[i].get_or_init(|| body(i));
        });
        results.into_iter().filter_map(OnceLock::into_inner).collect()
    }

    /// Gives the memory of tensors that are gone back to the system.
    pub fn release_unused(&self) {
        lock(&self.shared.f32).clear();
        lock(&self.shared.bf16).clear();
    }

    /// Floating-point operations a second that the device's multipliers give
    /// for a type: the limit of every product. Takes a third of a second.
    pub fn measure_peak(&self, dtype: DType) -> f64 {
        let kind = match dtype {
            DType::F32 => hypergen_cpu::ElementKind::F32,
            DType::Bf16 => hypergen_cpu::ElementKind::Bf16,
        };
        self.cpu_kernels().measure_peak(kind)
    }

    /// Floating-point operations of all matrix products, convolutions and
    /// attentions so far, two for each multiply-add.
    pub fn flop(&self) -> u64 {
        self.shared.profile.flop()
    }

    /// Records the time of every operation from now on, forgetting what was
    /// recorded before, or stops recording.
    pub fn record_profile(&self, on: bool) {
        self.shared.profile.record(on);
    }

    /// What was recorded, the longest first.
    pub fn profile(&self) -> Vec<ProfileEntry> {
        self.shared.profile.entries()
    }

    /// Starts an operation; `multiply_adds` are the factors of their number.
    pub(crate) fn span(&self, operation: &'static str, sizes: &[usize], multiply_adds: &[usize]) -> Span<'_> {
        let flop = match multiply_adds {
            [] => 0,
            factors => 2 * factors.iter().map(|&f| f as u64).product::<u64>(),
        };
        self.shared.profile.span(operation, sizes, flop)
    }

    pub(crate) fn cpu_kernels(&self) -> &Cpu {
        &self.shared.cpu
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({:?}, {} threads)", self.name(), self.isa(), self.threads())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A free list is consistent between any two calls, so a panic elsewhere
    // while it was held does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An element type with its free list.
pub(crate) trait Pooled: Element {
    /// The device's list for this type.
    fn free_list(shared: &Shared) -> &FreeList<Self>;
}

impl Pooled for f32 {
    fn free_list(shared: &Shared) -> &FreeList<f32> {
        &shared.f32
    }
}

impl Pooled for bf16 {
    fn free_list(shared: &Shared) -> &FreeList<bf16> {
        &shared.bf16
    }
}

/// Memory of one tensor; returns to its device's free list when dropped.
pub(crate) struct Buffer<T: Pooled> {
    /// `None` only while it is dropped.
    data: Option<AlignedVec<T>>,
    /// Elements in use, from the first.
    len: usize,
    device: Device,
}

impl<T: Pooled> Buffer<T> {
    /// `len` elements of arbitrary, initialised content: every operation
    /// writes all of its output.
    pub(crate) fn new(device: &Device, len: usize) -> Self {
        let recycled = take(&mut lock(T::free_list(&device.shared)), len);
        let data = recycled.unwrap_or_else(|| AlignedVec::zeroed(len));
        Self { data: Some(data), len, device: device.clone() }
    }
}

/// The shortest buffer that is long enough, unless it is far too long.
fn take<T: Pooled>(list: &mut BTreeMap<usize, Vec<AlignedVec<T>>>, len: usize) -> Option<AlignedVec<T>> {
    let (&length, buffers) = list.range_mut(len..=len.saturating_mul(LEAST_USE)).next()?;
    let buffer = buffers.pop();
    if buffers.is_empty() {
        list.remove(&length);
    }
    buffer
}

impl<T: Pooled> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.data.as_ref().map_or(&[], |data| &data.as_slice()[..self.len])
    }
}

impl<T: Pooled> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.data.as_mut().map_or(&mut [], |data| &mut data.as_mut_slice()[..self.len])
    }
}

impl<T: Pooled> Drop for Buffer<T> {
    fn drop(&mut self) {
        if let Some(data) = self.data.take() {
            lock(T::free_list(&self.device.shared)).entry(data.as_slice().len()).or_default().push(data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_keeps_the_order() {
        for threads in [1, 3] {
            let device = Device::cpu(&DeviceConfig { threads: Some(threads) }).expect("a device");
            assert_eq!(device.map(1000, |i| 2 * i), (0..1000).map(|i| 2 * i).collect::<Vec<_>>());
            assert!(device.map(0, |i| i).is_empty());
        }
    }

    #[test]
    fn buffers_return_and_serve_lengths_near_their_own() {
        let device = Device::cpu(&DeviceConfig { threads: Some(1) }).expect("a device");
        let lengths = || lock(&device.shared.f32).keys().copied().collect::<Vec<_>>();
        drop(Buffer::<f32>::new(&device, 100));
        assert_eq!(lengths(), [100]);
        let near = Buffer::<f32>::new(&device, 50);
        assert_eq!((near.len(), lengths()), (50, vec![]));
        let far = Buffer::<f32>::new(&device, 49);
        drop((near, far));
        assert_eq!(lengths(), [49, 100], "a buffer keeps its whole length");
        let too_small = Buffer::<f32>::new(&device, 40);
        assert_eq!((too_small.len(), lengths()), (40, vec![100]), "the shortest that fits is taken");
        device.release_unused();
        assert_eq!(lengths(), [0; 0]);
    }
}
