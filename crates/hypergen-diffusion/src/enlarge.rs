//! Enlarging of pictures that a model can only draw small.

use fast_image_resize::images::Image;
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use crate::{Error, ErrorKind, Size};

/// Longest side that is drawn, in native sides: beyond that a picture is cropped.
const LONGEST: usize = 3;

/// The size to draw for a requested one: its shape, with the native length
/// for the shorter side.
pub(crate) fn canvas(requested: Size, native: Size) -> Size {
    let side = native.width.min(native.height);
    let short = requested.width.min(requested.height).max(1);
    let scaled = |length: usize| {
        let exact = length * side / short;
        (exact.div_ceil(Size::MULTIPLE) * Size::MULTIPLE).clamp(side, LONGEST * side)
    };
    Size { width: scaled(requested.width), height: scaled(requested.height) }
}

/// Scales RGB so that it covers the new size, and crops what stands over,
/// evenly on both sides. Catmull-Rom: sharp, and without the rings that
/// Lanczos leaves around flat shapes.
pub(crate) fn enlarge(rgb: Vec<u8>, from: Size, to: Size) -> Result<Vec<u8>, Error> {
    if from == to {
        return Ok(rgb);
    }
    let failed = |e: &dyn std::fmt::Display| {
        Error::new(ErrorKind::Internal, format!("cannot enlarge the picture: {e}"))
    };
    let side = |s: usize| u32::try_from(s).map_err(|e| failed(&e));
    let source = Image::from_vec_u8(side(from.width)?, side(from.height)?, rgb, PixelType::U8x3)
        .map_err(|e| failed(&e))?;
    let mut target = Image::new(side(to.width)?, side(to.height)?, PixelType::U8x3);
    let options = ResizeOptions::new()
        .resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom))
        .fit_into_destination(Some((0.5, 0.5)));
    Resizer::new().resize(&source, &mut target, &options).map_err(|e| failed(&e))?;
    Ok(target.into_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(width: usize, height: usize) -> Size {
        Size { width, height }
    }

    #[test]
    fn the_shorter_side_is_native_and_the_shape_is_kept() {
        let native = size(64, 64);
        for (requested, drawn) in [
            (size(1024, 1024), size(64, 64)),
            (size(64, 64), size(64, 64)),
            (size(32, 32), size(64, 64)),
            (size(1024, 768), size(88, 64)),
            (size(768, 1024), size(64, 88)),
            (size(4096, 8), size(192, 64)),
        ] {
            assert_eq!(canvas(requested, native), drawn, "{requested}");
        }
    }

    #[test]
    fn flat_colour_stays_flat_and_the_size_is_exact() {
        let rgb = [10, 200, 30].repeat(64 * 88);
        let large = enlarge(rgb, size(88, 64), size(1024, 768)).expect("enlarges");
        assert_eq!(large.len(), 3 * 1024 * 768);
        assert!(large.chunks_exact(3).all(|p| p == [10, 200, 30]));
    }
}
