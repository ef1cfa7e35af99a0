//! The two types that activations and weights are stored in.

use half::bf16;

/// Names an [`Element`] type at run time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementKind {
    /// IEEE single precision.
    F32,
    /// bfloat16: the upper half of a float32.
    Bf16,
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
}

/// A number as it is stored: `f32` or [`bf16`]. Sealed, because kernels are
/// written for exactly these two.
pub trait Element:
    sealed::Sealed + Copy + Default + Send + Sync + std::fmt::Debug + PartialEq + 'static
{
    /// Which of the two this is.
    const KIND: ElementKind;
    /// Widens to float32, exactly.
    fn to_f32(self) -> f32;
    /// Rounds a float32 to the nearest value, ties to even.
    fn from_f32(value: f32) -> Self;
    /// Takes a bfloat16, which both types hold exactly.
    fn from_bf16(value: bf16) -> Self;
}

impl Element for f32 {
    const KIND: ElementKind = ElementKind::F32;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn from_bf16(value: bf16) -> Self {
        value.to_f32()
    }
}

impl Element for bf16 {
    const KIND: ElementKind = ElementKind::Bf16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
    #[inline(always)]
    fn from_bf16(value: bf16) -> Self {
        value
    }
}

/// The same values by their own name, where `T` is bfloat16.
#[cfg(target_arch = "x86_64")]
pub(crate) fn as_bf16<T: Element>(x: &[T]) -> Option<&[bf16]> {
    // SAFETY: the trait is sealed and this kind belongs to one type alone.
    (T::KIND == ElementKind::Bf16).then(|| unsafe { std::slice::from_raw_parts(x.as_ptr().cast(), x.len()) })
}
