//! The number types of stored tensors, and how each is read as float32. A
//! model's weights come in three of them; what stands beside weights, such as
//! the alpha of an adapter, comes in whichever its trainer happened to have.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Number types that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileDType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE double precision.
    F64,
    /// Eight bits, four of them the exponent, without infinity (Micikevicius
    /// et al. 2022, arXiv 2209.05433).
    F8E4M3,
    /// Eight bits, five of them the exponent: the upper half of a half.
    F8E5M2,
    /// Signed integers.
    I64,
    /// As above.
    I32,
    /// As above.
    I16,
    /// As above.
    I8,
    /// Unsigned integers.
    U64,
    /// As above.
    U32,
    /// As above.
    U16,
    /// As above.
    U8,
}

impl FileDType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 | Self::U16 => 2,
            Self::F8E4M3 | Self::F8E5M2 | Self::I8 | Self::U8 => 1,
        }
    }

    /// Whether its numbers are whole.
    pub fn is_integer(self) -> bool {
        !matches!(self, Self::F32 | Self::F16 | Self::Bf16 | Self::F64 | Self::F8E4M3 | Self::F8E5M2)
    }

    /// Whether a model's weights are stored so.
    pub(super) fn is_of_weights(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// The type that a file calls so, or its name, where it is not read.
    pub(super) fn of(dtype: safetensors::Dtype) -> Result<Self, String> {
        use safetensors::Dtype;
        Ok(match dtype {
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::BF16 => Self::Bf16,
            Dtype::F64 => Self::F64,
            Dtype::F8_E4M3 => Self::F8E4M3,
            Dtype::F8_E5M2 => Self::F8E5M2,
            Dtype::I64 => Self::I64,
            Dtype::I32 => Self::I32,
            Dtype::I16 => Self::I16,
            Dtype::I8 => Self::I8,
            Dtype::U64 => Self::U64,
            Dtype::U32 => Self::U32,
            Dtype::U16 => Self::U16,
            Dtype::U8 => Self::U8,
            other => return Err(format!("{other:?}")),
        })
    }

    /// The name that files give it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::F64 => "F64",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E5M2 => "F8_E5M2",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::I16 => "I16",
            Self::I8 => "I8",
            Self::U64 => "U64",
            Self::U32 => "U32",
            Self::U16 => "U16",
            Self::U8 => "U8",
        }
    }
}

/// Reads stored numbers as float32.
pub(super) fn widen(bytes: &[u8], dtype: FileDType, out: &mut [f32]) {
    fn each<const N: usize>(bytes: &[u8], out: &mut [f32], read: impl Fn([u8; N]) -> f32) {
        for (out, b) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
            *out = read(*b);
        }
    }
    match dtype {
        FileDType::F32 => each(bytes, out, f32::from_le_bytes),
        FileDType::F16 => {
            // A slice at once: single values are widened far slower.
            let mut halves = [f16::ZERO; 256];
            for (out, bytes) in out.chunks_mut(halves.len()).zip(bytes.chunks(2 * halves.len())) {
                let halves = &mut halves[..out.len()];
                for (half, b) in halves.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *half = f16::from_le_bytes(*b);
                }
                halves.convert_to_f32_slice(out);
            }
        }
        FileDType::Bf16 => each(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        FileDType::F64 => each(bytes, out, |b| f64::from_le_bytes(b) as f32),
        FileDType::F8E4M3 => each(bytes, out, |[b]| e4m3(b)),
        FileDType::F8E5M2 => each(bytes, out, |[b]| f16::from_le_bytes([0, b]).to_f32()),
        FileDType::I64 => each(bytes, out, |b| i64::from_le_bytes(b) as f32),
        FileDType::I32 => each(bytes, out, |b| i32::from_le_bytes(b) as f32),
        FileDType::I16 => each(bytes, out, |b| i16::from_le_bytes(b).into()),
        FileDType::I8 => each(bytes, out, |b| i8::from_le_bytes(b).into()),
        FileDType::U64 => each(bytes, out, |b| u64::from_le_bytes(b) as f32),
        FileDType::U32 => each(bytes, out, |b| u32::from_le_bytes(b) as f32),
        FileDType::U16 => each(bytes, out, |b| u16::from_le_bytes(b).into()),
        FileDType::U8 => each(bytes, out, |[b]| b.into()),
    }
}

/// One sign, four bits of exponent with bias 7, three of mantissa.
fn e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let size = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2.0_f32.powi(-9),
        _ => (8.0 + mantissa) * 2.0_f32.powi(exponent - 10),
    };
    if bits & 128 == 0 { size } else { -size }
}

#[cfg(test)]
// Groups are sign, exponent and mantissa.
#[allow(clippy::unusual_byte_groupings)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_read() {
        let read = |dtype: FileDType, bytes: &[u8]| {
            assert_eq!(bytes.len(), dtype.size(), "{}", dtype.name());
            let mut out = [0.0];
            widen(bytes, dtype, &mut out);
            out[0]
        };
        for (dtype, bytes) in [
            (FileDType::F32, &(-6.0_f32).to_le_bytes()[..]),
            (FileDType::F16, &f16::from_f32(-6.0).to_le_bytes()),
            (FileDType::Bf16, &bf16::from_f32(-6.0).to_le_bytes()),
            (FileDType::F64, &(-6.0_f64).to_le_bytes()),
            (FileDType::F8E4M3, &[0b1_1001_100]),
            (FileDType::F8E5M2, &[0b1_10001_10]),
            (FileDType::I64, &(-6_i64).to_le_bytes()),
            (FileDType::I32, &(-6_i32).to_le_bytes()),
            (FileDType::I16, &(-6_i16).to_le_bytes()),
            (FileDType::I8, &(-6_i8).to_le_bytes()),
        ] {
            assert_eq!(read(dtype, bytes), -6.0, "{}", dtype.name());
            assert_eq!(dtype.is_integer(), dtype.name().starts_with('I'));
        }
        for (dtype, bytes) in [
            (FileDType::U64, &200_u64.to_le_bytes()[..]),
            (FileDType::U32, &200_u32.to_le_bytes()),
            (FileDType::U16, &200_u16.to_le_bytes()),
            (FileDType::U8, &[200]),
        ] {
            assert_eq!(read(dtype, bytes), 200.0, "{}", dtype.name());
            assert!(dtype.is_integer());
        }
    }

    /// The table of the format's paper.
    #[test]
    fn eight_bits_are_what_their_paper_says() {
        for (bits, value) in [
            (0b0_1111_110, 448.0),
            (0b0_0001_000, 2.0_f32.powi(-6)),
            (0b0_0000_111, 0.875 * 2.0_f32.powi(-6)),
            (0b0_0000_001, 2.0_f32.powi(-9)),
            (0b1_0000_000, 0.0),
        ] {
            assert_eq!(e4m3(bits), value, "{bits:08b}");
        }
        assert!(e4m3(0b1_1111_111).is_nan());
    }
}
