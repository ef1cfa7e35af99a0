//! Finished pictures to PNG, JPEG and WebP files in memory, with the
//! generation parameters inside.
//!
//! Everything here is plain computation on the caller's thread: a few
//! milliseconds for a 512x512 PNG, some tens for a lossy WebP. Nothing here
//! touches a file or a socket, and nothing here decodes.

mod exif;
mod parameters;

use std::fmt;
use std::str::FromStr;

use hypergen_diffusion::{Picture, Range};
use thiserror::Error;

pub use parameters::Metadata;

/// `output_compression` as OpenAI's API has it: how much of the picture's
/// quality a JPEG or WebP keeps, in percent. PNG is always exact; so is WebP
/// at 100, which is then written in its lossless form.
pub const OUTPUT_COMPRESSION: Range<u8> =
    Range { name: "output_compression", min: 0, max: 100, default: 100 };

/// Key of the text chunk in which users' tools look for the parameters.
const PARAMETERS: &str = "parameters";

/// Form of a picture file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ImageFormat {
    /// Exact, and the largest.
    #[default]
    Png,
    /// Small, for photographs.
    Jpeg,
    /// Smaller than JPEG; exact at quality 100.
    Webp,
}

impl ImageFormat {
    /// Every format, in the order in which they are listed to users.
    pub const ALL: [ImageFormat; 3] = [Self::Png, Self::Jpeg, Self::Webp];

    /// The API's name, which is also the usual file extension but for JPEG's.
    pub fn name(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg => "jpeg",
            Self::Webp => "webp",
        }
    }

    /// The media type for `Content-Type`.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Png => "image/png",
            Self::Jpeg => "image/jpeg",
            Self::Webp => "image/webp",
        }
    }

    /// The format that a file extension (without its dot) stands for, in
    /// either case.
    pub fn from_extension(extension: &str) -> Option<Self> {
        match extension.to_ascii_lowercase().as_str() {
            "png" => Some(Self::Png),
            "jpg" | "jpeg" => Some(Self::Jpeg),
            "webp" => Some(Self::Webp),
            _ => None,
        }
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ImageFormat {
    type Err = EncodeError;

    /// Reads the API's name.
    fn from_str(text: &str) -> Result<Self, EncodeError> {
        Self::ALL
            .into_iter()
            .find(|format| format.name() == text)
            .ok_or_else(|| EncodeError::UnknownFormat(text.to_owned()))
    }
}

/// Why a picture cannot be encoded.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// No format of that name.
    #[error("unknown output_format '{0}': use png, jpeg or webp")]
    UnknownFormat(String),
    /// The picture's bytes do not fill its size.
    #[error("a picture of {width}x{height} needs {expected} bytes of RGB, but has {found}")]
    WrongLength {
        /// Pixels from left to right.
        width: usize,
        /// Pixels from top to bottom.
        height: usize,
        /// `3 * width * height`.
        expected: usize,
        /// Length of the buffer.
        found: usize,
    },
    /// The format has no room for such a size.
    #[error("{format} pictures are at most {max} pixels wide and high, but this one is {width}x{height}")]
    TooLarge {
        /// The format.
        format: ImageFormat,
        /// Its longest side.
        max: usize,
        /// Pixels from left to right.
        width: usize,
        /// Pixels from top to bottom.
        height: usize,
    },
    /// The encoder failed.
    #[error("cannot encode the picture as {format}: {message}")]
    Encoder {
        /// The format.
        format: ImageFormat,
        /// The encoder's own words.
        message: String,
    },
}

/// Encodes a picture. `quality` (0 to 100, more is taken as 100) has no
/// effect on PNG; see [`OUTPUT_COMPRESSION`].
///
/// # Errors
/// When the picture's bytes do not fill its size, or the format is too small for it.
pub fn encode(
    picture: &Picture,
    format: ImageFormat,
    quality: u8,
    metadata: Option<&Metadata>,
) -> Result<Vec<u8>, EncodeError> {
    check(picture, format)?;
    match format {
        ImageFormat::Png => encode_png(picture, metadata),
        ImageFormat::Jpeg => encode_jpeg(picture, quality.min(100), metadata),
        ImageFormat::Webp => encode_webp(picture, quality.min(100), metadata),
    }
}

fn check(picture: &Picture, format: ImageFormat) -> Result<(), EncodeError> {
    let (width, height) = (picture.size.width, picture.size.height);
    let expected = width.saturating_mul(height).saturating_mul(3);
    if picture.rgb.len() != expected || expected == 0 {
        return Err(EncodeError::WrongLength { width, height, expected, found: picture.rgb.len() });
    }
    // JPEG counts pixels in 16 bits, WebP in 14, PNG in 31.
    let max = match format {
        ImageFormat::Png => i32::MAX as usize,
        ImageFormat::Jpeg => 65_535,
        ImageFormat::Webp => 16_383,
    };
    if width > max || height > max {
        return Err(EncodeError::TooLarge { format, max, width, height });
    }
    Ok(())
}

/// Wraps the words of an encoder.
fn failed(format: ImageFormat) -> impl Fn(&dyn fmt::Display) -> EncodeError {
    move |e| EncodeError::Encoder { format, message: e.to_string() }
}

/// The compression was chosen by measuring: at 512x512 `Fast` (the deflate of
/// `fdeflate`, with a filter chosen for each row) takes 1.2 to 2 ms, where
/// zlib's level 2 takes 4 to 10 ms and level 6 25 to 70 ms. A photograph is
/// then 328 kB against 304 and 287, an emoji 117 against 99 and 94: fast
/// costs a server the least and a reader little.
fn encode_png(picture: &Picture, metadata: Option<&Metadata>) -> Result<Vec<u8>, EncodeError> {
    let error = failed(ImageFormat::Png);
    let mut file = Vec::with_capacity(picture.rgb.len() / 2);
    let mut encoder = png::Encoder::new(&mut file, picture.size.width as u32, picture.size.height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Fast);
    if let Some(metadata) = metadata {
        let text = metadata.to_text();
        // A tEXt chunk holds Latin-1 only. For all else there is iTXt, which
        // the tools read just as well; they write the same two in this way.
        let added = if text.chars().all(|c| u32::from(c) < 256) {
            encoder.add_text_chunk(PARAMETERS.to_owned(), text)
        } else {
            encoder.add_itxt_chunk(PARAMETERS.to_owned(), text)
        };
        added.map_err(|e| error(&e))?;
    }
    let mut writer = encoder.write_header().map_err(|e| error(&e))?;
    writer.write_image_data(&picture.rgb).map_err(|e| error(&e))?;
    writer.finish().map_err(|e| error(&e))?;
    Ok(file)
}

fn encode_jpeg(picture: &Picture, quality: u8, metadata: Option<&Metadata>) -> Result<Vec<u8>, EncodeError> {
    let error = failed(ImageFormat::Jpeg);
    let mut file = Vec::with_capacity(picture.rgb.len() / 8);
    // Quality 0 is a quantiser of no use to anyone, and no encoder has it.
    // Below 90 the encoder halves the colour's resolution, from 90 on it keeps it.
    let mut encoder = jpeg_encoder::Encoder::new(&mut file, quality.max(1));
    encoder.set_optimized_huffman_tables(true);
    if let Some(metadata) = metadata {
        let comment = exif::user_comment(&metadata.to_text_within(exif::JPEG_ROOM));
        encoder.add_exif_metadata(&comment).map_err(|e| error(&e))?;
    }
    let (width, height) = (picture.size.width as u16, picture.size.height as u16);
    encoder.encode(&picture.rgb, width, height, jpeg_encoder::ColorType::Rgb).map_err(|e| error(&e))?;
    Ok(file)
}

fn encode_webp(picture: &Picture, quality: u8, metadata: Option<&Metadata>) -> Result<Vec<u8>, EncodeError> {
    let error = failed(ImageFormat::Webp);
    let mut file = Vec::with_capacity(picture.rgb.len() / 4);
    let mut encoder = webp::WebPEncoder::new(&mut file);
    let mut params = webp::EncoderParams::default();
    params.use_lossy = quality < 100;
    params.lossy_quality = linear_webp_quality(quality);
    encoder.set_params(params);
    if let Some(metadata) = metadata {
        encoder.set_exif_metadata(exif::user_comment(&metadata.to_text()));
    }
    let (width, height) = (picture.size.width as u32, picture.size.height as u32);
    encoder.encode(&picture.rgb, width, height, webp::ColorType::Rgb8).map_err(|e| error(&e))?;
    Ok(file)
}

/// Our encoder takes the quantiser to be linear in the quality; everyone who
/// has used WebP knows libwebp's curve, whose 75 is a good picture. This maps
/// the known scale to the linear one, so that 75 means what it means elsewhere.
fn linear_webp_quality(quality: u8) -> u8 {
    let q = f64::from(quality.min(100)) / 100.0;
    let bent = if q < 0.75 { q * 2.0 / 3.0 } else { 2.0 * q - 1.0 };
    (100.0 * bent.cbrt()).round() as u8
}

#[cfg(test)]
mod tests;
