//! Enlarging of pictures that a model can only draw small.

use fast_image_resize::images::Image;
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use crate::{Error, ErrorKind, Size};

/// Scales RGB until it just fits into the new size. Where the shapes differ,
/// the border's mean colour of each side carries on to the edge: such models
/// draw one thing on a plain ground.
///
/// Catmull-Rom: sharp, and without the rings that Lanczos leaves around flat
/// shapes.
pub(crate) fn enlarge(rgb: Vec<u8>, from: Size, to: Size) -> Result<Vec<u8>, Error> {
    if from == to {
        return Ok(rgb);
    }
    let fitted = fit(from, to);
    let scaled = resize(rgb, from, fitted)?;
    Ok(if fitted == to { scaled } else { pad_with_border(&scaled, fitted, to) })
}

/// The largest size of `from`'s shape within `to`, to the pixel.
fn fit(from: Size, to: Size) -> Size {
    let (by_width, by_height) = (to.width * from.height, to.height * from.width);
    match by_width <= by_height {
        true => Size { width: to.width, height: (by_width / from.width).max(1) },
        false => Size { width: (by_height / from.height).max(1), height: to.height },
    }
}

fn resize(rgb: Vec<u8>, from: Size, to: Size) -> Result<Vec<u8>, Error> {
    let failed = |e: &dyn std::fmt::Display| {
        Error::new(ErrorKind::Internal, format!("cannot enlarge the picture: {e}"))
    };
    let side = |s: usize| u32::try_from(s).map_err(|e| failed(&e));
    let (w, h) = (side(from.width)?, side(from.height)?);
    let source = Image::from_vec_u8(w, h, rgb, PixelType::U8x3).map_err(|e| failed(&e))?;
    let mut target = Image::new(side(to.width)?, side(to.height)?, PixelType::U8x3);
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom));
    Resizer::new().resize(&source, &mut target, &options).map_err(|e| failed(&e))?;
    Ok(target.into_vec())
}

/// Centres a picture in a larger one; the room on each side takes the mean
/// colour of the border that it adjoins.
fn pad_with_border(rgb: &[u8], from: Size, to: Size) -> Vec<u8> {
    let (left, top) = ((to.width - from.width) / 2, (to.height - from.height) / 2);
    let pixel = |x: usize, y: usize| -> [u8; 3] {
        let at = 3 * (y * from.width + x);
        [rgb[at], rgb[at + 1], rgb[at + 2]]
    };
    let column = |x: usize| mean((0..from.height).map(|y| pixel(x, y)));
    let row = |y: usize| mean((0..from.width).map(|x| pixel(x, y)));
    let (first, last) = match left > 0 {
        true => (column(0), column(from.width - 1)),
        false => (row(0), row(from.height - 1)),
    };
    let mut out = Vec::with_capacity(3 * to.width * to.height);
    for y in 0..to.height {
        for x in 0..to.width {
            out.extend(if x < left || y < top {
                first
            } else if x >= left + from.width || y >= top + from.height {
                last
            } else {
                pixel(x - left, y - top)
            });
        }
    }
    out
}

fn mean(pixels: impl ExactSizeIterator<Item = [u8; 3]>) -> [u8; 3] {
    let count = pixels.len().max(1);
    let sum = pixels.fold([0; 3], |sum, p| [0, 1, 2].map(|i| sum[i] + usize::from(p[i])));
    sum.map(|s| ((s + count / 2) / count) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(width: usize, height: usize) -> Size {
        Size { width, height }
    }

    #[test]
    fn the_largest_size_of_the_shape_that_fits() {
        let native = size(64, 64);
        for (to, fitted) in [
            (size(1024, 1024), size(1024, 1024)),
            (size(32, 32), size(32, 32)),
            (size(1024, 768), size(768, 768)),
            (size(768, 1024), size(768, 768)),
            (size(4096, 8), size(8, 8)),
        ] {
            assert_eq!(fit(native, to), fitted, "{to}");
        }
    }

    #[test]
    fn the_native_size_is_untouched() {
        let rgb: Vec<u8> = (0..3 * 64 * 64).map(|i| (i * 7 % 256) as u8).collect();
        assert_eq!(enlarge(rgb.clone(), size(64, 64), size(64, 64)).expect("enlarges"), rgb);
    }

    #[test]
    fn flat_colour_stays_flat_at_any_size() {
        for to in [size(1024, 768), size(768, 1024), size(8, 4096), size(40, 40)] {
            let large = enlarge([10, 200, 30].repeat(64 * 64), size(64, 64), to).expect("enlarges");
            assert_eq!(large.len(), 3 * to.width * to.height);
            assert!(large.chunks_exact(3).all(|p| p == [10, 200, 30]), "{to}");
        }
    }

    #[test]
    fn each_side_carries_its_own_border_on() {
        // Left half black, right half white, in a picture twice as wide.
        let rgb: Vec<u8> = (0..64 * 64).flat_map(|i| [if i % 64 < 32 { 0 } else { 255 }; 3]).collect();
        let wide = enlarge(rgb, size(64, 64), size(128, 64)).expect("enlarges");
        let row: Vec<u8> = wide[..3 * 128].iter().step_by(3).copied().collect();
        assert!(row[..32].iter().all(|&v| v == 0) && row[96..].iter().all(|&v| v == 255), "{row:?}");
    }
}
