//! SDXL's micro-conditioning: what the network is told of sizes and crops
//! (Podell et al. 2023, <https://arxiv.org/abs/2307.01952>, section 2.2). The
//! names are diffusers'; the size that is drawn is not decided here.

use std::fmt;
use std::str::FromStr;

use crate::Size;

/// Largest side and crop; the network learned from pictures below it.
const MAX: usize = 16384;

/// Width and height of a picture that need not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Pixels, at least 1.
    pub width: usize,
    /// Pixels, at least 1.
    pub height: usize,
}

impl FromStr for Extent {
    type Err = String;

    /// Reads `WIDTHxHEIGHT`.
    fn from_str(text: &str) -> Result<Self, String> {
        match pair(text, 'x') {
            Some((width @ 1.., height @ 1..)) => Ok(Self { width, height }),
            _ => Err(format!("must be WIDTHxHEIGHT, each between 1 and {MAX}, for example 1024x1024")),
        }
    }
}

/// The corner at which a training picture was cut out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Corner {
    /// Pixels above it.
    pub top: usize,
    /// Pixels to its left.
    pub left: usize,
}

impl FromStr for Corner {
    type Err = String;

    /// Reads `TOP,LEFT`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (top, left) = pair(text, ',')
            .ok_or_else(|| format!("must be TOP,LEFT, each between 0 and {MAX}, for example 0,0"))?;
        Ok(Self { top, left })
    }
}

fn pair(text: &str, between: char) -> Option<(usize, usize)> {
    let number = |s: &str| {
        let digits = !s.is_empty() && s.len() <= 6 && s.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| s.parse().ok()).flatten().filter(|&n| n <= MAX)
    };
    let (first, second) = text.split_once(between)?;
    Some((number(first)?, number(second)?))
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

/// What one side of guidance is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SizeConditioning {
    /// Size of the training picture before it was scaled; `None`: as drawn.
    pub original_size: Option<Extent>,
    /// Where it was cut.
    pub crop: Corner,
    /// Size that is wanted; `None`: as drawn.
    pub target_size: Option<Extent>,
}

impl SizeConditioning {
    /// The six numbers in the network's order, for a picture drawn at `size`.
    pub(crate) fn time_ids(&self, size: Size) -> [f32; 6] {
        let drawn = Extent { width: size.width, height: size.height };
        let (original, target) = (self.original_size.unwrap_or(drawn), self.target_size.unwrap_or(drawn));
        [original.height, original.width, self.crop.top, self.crop.left, target.height, target.width]
            .map(|n| n as f32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_sizes_and_corners() {
        assert_eq!("1x16384".parse(), Ok(Extent { width: 1, height: 16384 }));
        assert_eq!("0,7".parse(), Ok(Corner { top: 0, left: 7 }));
        for wrong in
            ["", "x", "0x8", "8x0", "8", "8x8x8", "16385x1", "+8x8", "8 x8", "99999999999999999999x1"]
        {
            assert!(wrong.parse::<Extent>().is_err(), "{wrong}");
        }
        for wrong in ["", ",", "1", "1,-1", "1, 1", "0x0"] {
            assert!(wrong.parse::<Corner>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_not_given_is_the_size_that_is_drawn() {
        let size = Size { width: 64, height: 32 };
        assert_eq!(SizeConditioning::default().time_ids(size), [32.0, 64.0, 0.0, 0.0, 32.0, 64.0]);
        let all = SizeConditioning {
            original_size: Some(Extent { width: 1, height: 2 }),
            crop: Corner { top: 3, left: 4 },
            target_size: Some(Extent { width: 5, height: 6 }),
        };
        assert_eq!(all.time_ids(size), [2.0, 1.0, 3.0, 4.0, 6.0, 5.0]);
    }
}
