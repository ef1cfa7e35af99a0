//! An activation as a type, so that a kernel is compiled for it and does not
//! ask which it is at every vector.

use crate::Activation;

/// A type that stands for an [`Activation`].
pub(crate) trait ConstActivation: Send + Sync + 'static {
    /// The one.
    const ACTIVATION: Activation;
}

/// [`Activation::None`].
pub(crate) struct Identity;
/// [`Activation::Silu`].
pub(crate) struct Silu;
/// [`Activation::Gelu`].
pub(crate) struct Gelu;
/// [`Activation::QuickGelu`].
pub(crate) struct QuickGelu;

impl ConstActivation for Identity {
    const ACTIVATION: Activation = Activation::None;
}
impl ConstActivation for Silu {
    const ACTIVATION: Activation = Activation::Silu;
}
impl ConstActivation for Gelu {
    const ACTIVATION: Activation = Activation::Gelu;
}
impl ConstActivation for QuickGelu {
    const ACTIVATION: Activation = Activation::QuickGelu;
}

/// Evaluates an expression with a type alias for the [`ConstActivation`] of an
/// [`Activation`]: `with_activation!(activation, A => kernel::<A>(x))`.
macro_rules! with_activation {
    ($activation:expr, $A:ident => $body:expr) => {
        match $activation {
            $crate::Activation::None => {
                type $A = $crate::simd::constant::Identity;
                $body
            }
            $crate::Activation::Silu => {
                type $A = $crate::simd::constant::Silu;
                $body
            }
            $crate::Activation::Gelu => {
                type $A = $crate::simd::constant::Gelu;
                $body
            }
            $crate::Activation::QuickGelu => {
                type $A = $crate::simd::constant::QuickGelu;
                $body
            }
        }
    };
}
pub(crate) use with_activation;
