//! Tests that read back, with other people's decoders, what `encode` wrote.

use std::io::Cursor;

use hypergen_diffusion::{Picture, Size};

use super::*;

const QUALITIES: [u8; 5] = [0, 50, 75, 90, 99];

/// A picture with smooth colour, hard edges and a little noise.
fn picture(width: usize, height: usize) -> Picture {
    let mut rgb = Vec::with_capacity(3 * width * height);
    let mut noise = 1u32;
    for y in 0..height {
        for x in 0..width {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let grain = (noise >> 29) as usize;
            let disc = (2 * x).abs_diff(width).pow(2) + (2 * y).abs_diff(height).pow(2) < width * height / 2;
            let (r, g, b) = if disc { (220, 40, 30) } else { (x * 200 / width, y * 200 / height, 90) };
            rgb.extend([(r + grain) as u8, (g + grain) as u8, (b + grain) as u8]);
        }
    }
    Picture { size: Size { width, height }, rgb, warnings: Vec::new() }
}

fn metadata(prompt: &str, negative: Option<&str>) -> Metadata {
    Metadata {
        prompt: prompt.to_owned(),
        negative_prompt: negative.map(str::to_owned),
        steps: 20,
        sampler: "ddim".to_owned(),
        guidance_scale: 7.5,
        seed: u64::MAX,
        size: Size { width: 64, height: 64 },
        model: "emoji".to_owned(),
        prompt_syntax: hypergen_diffusion::prompt::PromptSyntax::Plain,
        clip_skip: 0,
        guidance_rescale: 0.0,
        loras: vec![],
    }
}

const LAST_LINE: &str = concat!(
    "Steps: 20, Sampler: ddim, CFG scale: 7.5, Seed: 18446744073709551615, Size: 64x64, Model: emoji, \
     Version: hypergen ",
    env!("CARGO_PKG_VERSION")
);

/// Pixels, and the text of the chunk `parameters` with whether it was an iTXt chunk.
fn read_png(file: &[u8]) -> (Vec<u8>, Option<(String, bool)>) {
    let mut reader = png::Decoder::new(Cursor::new(file)).read_info().expect("a PNG header");
    let mut rgb = vec![0; reader.output_buffer_size().expect("a size")];
    reader.next_frame(&mut rgb).expect("the pixels");
    let info = reader.info();
    let plain = info.uncompressed_latin1_text.iter().find(|c| c.keyword == "parameters");
    let international = info.utf8_text.iter().find(|c| c.keyword == "parameters");
    assert!(plain.is_none() || international.is_none(), "two chunks of the same name");
    let text = plain
        .map(|c| (c.text.clone(), false))
        .or_else(|| international.map(|c| (c.get_text().expect("text"), true)));
    (rgb, text)
}

fn read_webp(file: &[u8]) -> Vec<u8> {
    let mut decoder = webp::WebPDecoder::new(Cursor::new(file)).expect("a WebP header");
    let mut rgb = vec![0; decoder.output_buffer_size().expect("a size")];
    decoder.read_image(&mut rgb).expect("the pixels");
    rgb
}

fn read_jpeg(file: &[u8]) -> Vec<u8> {
    jpeg_decoder::Decoder::new(file).decode().expect("a JPEG")
}

/// The user comment of a JPEG's or WebP's EXIF block.
fn read_comment(file: &[u8]) -> Option<String> {
    let exif = ::exif::Reader::new().read_from_container(&mut Cursor::new(file)).ok()?;
    assert!(!exif.little_endian(), "the tools assume a big-endian block");
    let field = exif.get_field(::exif::Tag::UserComment, ::exif::In::PRIMARY).expect("a user comment");
    let ::exif::Value::Undefined(bytes, _) = &field.value else { panic!("not bytes: {field:?}") };
    let text = bytes.strip_prefix(b"UNICODE\0").expect("the mark of UTF-16");
    let units: Vec<u16> = text.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect();
    Some(String::from_utf16(&units).expect("whole characters"))
}

/// Peak signal-to-noise ratio in decibels.
fn psnr(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len());
    let sum: f64 = a.iter().zip(b).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum();
    10.0 * (255.0f64.powi(2) * a.len() as f64 / sum.max(1e-9)).log10()
}

#[test]
fn png_keeps_every_byte() {
    for (width, height) in [(1, 1), (8, 8), (64, 64), (72, 40), (3, 517)] {
        let picture = picture(width, height);
        let file = encode(&picture, ImageFormat::Png, 100, None).expect("a PNG");
        let (rgb, text) = read_png(&file);
        assert_eq!(rgb, picture.rgb, "{width}x{height}");
        assert_eq!(text, None, "no metadata was given");
        assert_eq!(
            file,
            encode(&picture, ImageFormat::Png, 0, None).expect("a PNG"),
            "quality has no effect"
        );
    }
}

#[test]
fn webp_at_100_keeps_every_byte() {
    for (width, height) in [(1, 1), (8, 8), (64, 64), (72, 40), (3, 517)] {
        let picture = picture(width, height);
        for quality in [100, 255] {
            let file = encode(&picture, ImageFormat::Webp, quality, None).expect("a WebP");
            assert_eq!(read_webp(&file), picture.rgb, "{width}x{height}");
        }
    }
}

#[test]
fn lossy_pictures_improve_with_quality() {
    let picture = picture(136, 104);
    for (format, read, floors) in [
        (ImageFormat::Jpeg, read_jpeg as fn(&[u8]) -> Vec<u8>, [15.0, 26.0, 28.0, 30.0, 35.0]),
        (ImageFormat::Webp, read_webp, [15.0, 24.0, 26.0, 29.0, 31.0]),
    ] {
        let mut last = (0.0, 0);
        for (quality, floor) in QUALITIES.into_iter().zip(floors) {
            let file = encode(&picture, format, quality, None).expect("a file");
            let now = (psnr(&picture.rgb, &read(&file)), file.len());
            assert!(now.0 > floor, "{format} at {quality}: {:.1} dB", now.0);
            assert!(now.0 > last.0 && now.1 > last.1, "{format} at {quality}: {now:?} after {last:?}");
            last = now;
        }
    }
}

#[test]
fn awkward_sizes_survive_lossy_encoding() {
    for (width, height) in [(1, 1), (8, 24), (17, 16), (3, 517)] {
        let picture = picture(width, height);
        for quality in [0, 75, 90] {
            let jpeg = encode(&picture, ImageFormat::Jpeg, quality, None).expect("a JPEG");
            assert_eq!(read_jpeg(&jpeg).len(), picture.rgb.len(), "{width}x{height} at {quality}");
            let webp = encode(&picture, ImageFormat::Webp, quality, None).expect("a WebP");
            assert_eq!(read_webp(&webp).len(), picture.rgb.len(), "{width}x{height} at {quality}");
        }
    }
}

#[test]
fn the_parameters_stand_in_every_format() {
    let picture = picture(64, 64);
    let metadata = metadata("red apple, blue background", Some("blurry"));
    let expected = format!("red apple, blue background\nNegative prompt: blurry\n{LAST_LINE}");
    let png = encode(&picture, ImageFormat::Png, 100, Some(&metadata)).expect("a PNG");
    assert_eq!(read_png(&png), (picture.rgb.clone(), Some((expected.clone(), false))));
    let jpeg = encode(&picture, ImageFormat::Jpeg, 90, Some(&metadata)).expect("a JPEG");
    assert_eq!(read_comment(&jpeg), Some(expected.clone()));
    assert_eq!(read_jpeg(&jpeg).len(), picture.rgb.len());
    for quality in [80, 100] {
        let webp = encode(&picture, ImageFormat::Webp, quality, Some(&metadata)).expect("a WebP");
        assert_eq!(read_comment(&webp), Some(expected.clone()));
        assert_eq!(read_webp(&webp).len(), picture.rgb.len());
    }
}

#[test]
fn without_metadata_no_file_tells_the_prompt() {
    let picture = picture(64, 64);
    for format in [ImageFormat::Jpeg, ImageFormat::Webp] {
        let file = encode(&picture, format, 90, None).expect("a file");
        assert_eq!(read_comment(&file), None, "{format}");
    }
}

#[test]
fn hostile_prompts_round_trip_or_are_cleaned() {
    let long = "a very long prompt, ".repeat(5_000); // 100 kB
    let emoji = "🍎".repeat(30_000);
    for (prompt, kept, international) in [
        ("", "", false),
        ("café façade", "café façade", false),
        ("çığ 北京 🍎 e\u{301}", "çığ 北京 🍎 e\u{301}", true),
        ("two\nlines\r\nthree\rfour", "two\nlines\nthree\nfour", false),
        ("nul\0bell\u{7}escape\u{1b}[31m", "nul bell escape [31m", false),
        ("Steps: 1, Sampler: lies, Seed: 0", "Steps: 1, Sampler: lies, Seed: 0", false),
        ("\u{feff}\u{202e}right to left", "\u{feff}\u{202e}right to left", true),
        (long.as_str(), long.as_str(), false),
        (emoji.as_str(), emoji.as_str(), true),
    ] {
        let picture = picture(8, 8);
        let metadata = metadata(prompt, None);
        let expected = format!("{kept}\n{LAST_LINE}");
        let png = encode(&picture, ImageFormat::Png, 100, Some(&metadata)).expect("a PNG");
        assert_eq!(read_png(&png), (picture.rgb.clone(), Some((expected.clone(), international))));
        let webp = encode(&picture, ImageFormat::Webp, 100, Some(&metadata)).expect("a WebP");
        assert_eq!(read_comment(&webp), Some(expected.clone()));
        let jpeg = encode(&picture, ImageFormat::Jpeg, 100, Some(&metadata)).expect("a JPEG");
        let comment = read_comment(&jpeg).expect("a comment");
        assert!(comment.ends_with(LAST_LINE), "the parameters are never cut");
        if expected.encode_utf16().count() <= exif::JPEG_ROOM {
            assert_eq!(comment, expected);
        }
    }
}

#[test]
fn what_a_jpeg_has_no_room_for_is_cut_at_whole_characters() {
    let picture = picture(8, 8);
    let long = "🍎x".repeat(40_000);
    for (prompt, negative) in
        [(long.as_str(), None), (long.as_str(), Some(long.as_str())), ("short", Some(long.as_str()))]
    {
        let jpeg =
            encode(&picture, ImageFormat::Jpeg, 75, Some(&metadata(prompt, negative))).expect("a JPEG");
        let comment = read_comment(&jpeg).expect("a comment");
        let units = comment.encode_utf16().count();
        let room = exif::JPEG_ROOM;
        assert!(units <= room && units + 8 > room, "{units} of {room}");
        assert!(comment.ends_with(LAST_LINE));
        assert_eq!(comment.contains("\nNegative prompt: 🍎x"), negative.is_some());
        assert!(comment.contains("…\n"));
    }
}

#[test]
fn text_within_a_room_never_exceeds_it() {
    let text = metadata("prompt 🍎🍎🍎 prompt", Some("négative 🍎 words"));
    let least = text.to_text_within(0).encode_utf16().count();
    for room in least..text.to_text().encode_utf16().count() + 2 {
        assert!(text.to_text_within(room).encode_utf16().count() <= room, "{room}");
    }
    assert_eq!(text.to_text_within(10_000), text.to_text());
}

#[test]
fn what_most_pictures_do_without_is_told_where_it_was_used() {
    let unusual = Metadata {
        clip_skip: 1,
        guidance_rescale: 0.7,
        loras: vec![("ink".to_owned(), 0.8), ("paint".to_owned(), 1.0)],
        prompt_syntax: hypergen_diffusion::prompt::PromptSyntax::A1111,
        ..metadata("(x:1.2)", None)
    };
    let text = unusual.to_text();
    let extras = "Model: emoji, Clip skip: 2, CFG Rescale: 0.7, LoRA: \"ink: 0.8, paint: 1\", Prompt syntax: a1111, Version: ";
    assert!(text.contains(extras), "{text}");
}

#[test]
fn a_model_keeps_its_name_and_loses_its_folder() {
    let request = hypergen_diffusion::Request {
        negative_prompt: Some(String::new()),
        size: Size { width: 8, height: 16 },
        steps: 4,
        guidance_scale: 1.0,
        seed: 7,
        ..hypergen_diffusion::Request::new("p")
    };
    let info = |name: &str| hypergen_diffusion::ModelInfo {
        name: name.to_owned(),
        family: String::new(),
        native_size: Size { width: 64, height: 64 },
        sampler: "pndm".to_owned(),
        device: "cpu".to_owned(),
        isa: "portable".to_owned(),
        dtype: "float32".to_owned(),
        threads: 1,
        weight_bytes: 0,
        default_steps: None,
        default_guidance: None,
        min_guidance: 1.0,
    };
    for (name, expected) in [
        ("/home/someone/models/sd-1.5/", "sd-1.5"),
        ("C:\\models\\xl", "xl"),
        ("org/name", "name"),
        ("emoji", "emoji"),
        ("a, b: \"c\"\n", r#""a, b: \"c\"\n""#),
    ] {
        let text = Metadata::new(&request, &info(name)).to_text();
        let version = env!("CARGO_PKG_VERSION");
        assert_eq!(
            text,
            format!(
                "p\nSteps: 4, Sampler: pndm, CFG scale: 1, Seed: 7, Size: 8x16, Model: {expected}, \
                 Version: hypergen {version}"
            )
        );
    }
}

#[test]
fn wrong_pictures_are_errors() {
    for (size, bytes) in [((8, 8), 3), ((8, 8), 193), ((0, 8), 0), ((usize::MAX, 2), 6)] {
        let picture = Picture {
            size: Size { width: size.0, height: size.1 },
            rgb: vec![0; bytes],
            warnings: Vec::new(),
        };
        for format in ImageFormat::ALL {
            let error = encode(&picture, format, 100, None).expect_err("no such picture");
            assert!(matches!(error, EncodeError::WrongLength { found, .. } if found == bytes), "{error}");
        }
    }
    let wide =
        Picture { size: Size { width: 16_384, height: 1 }, rgb: vec![0; 3 * 16_384], warnings: Vec::new() };
    let error = encode(&wide, ImageFormat::Webp, 100, None).expect_err("too wide for WebP");
    assert!(error.to_string().contains("16383"), "{error}");
    assert!(encode(&wide, ImageFormat::Png, 100, None).is_ok());
    assert!(encode(&wide, ImageFormat::Jpeg, 100, None).is_ok());
}

#[test]
fn names_and_extensions_are_one_to_one() {
    for format in ImageFormat::ALL {
        assert_eq!(format.name().parse(), Ok(format));
        assert_eq!(ImageFormat::from_extension(format.name()), Some(format));
        assert_eq!(format.media_type(), format!("image/{format}"));
    }
    assert_eq!(ImageFormat::from_extension("JPG"), Some(ImageFormat::Jpeg));
    assert_eq!(ImageFormat::from_extension("gif"), None);
    let error = "gif".parse::<ImageFormat>().expect_err("no such format");
    assert_eq!(error.to_string(), "unknown output_format 'gif': use png, jpeg or webp");
}

#[test]
fn the_webp_scale_is_the_known_one() {
    assert_eq!(linear_webp_quality(0), 0);
    assert_eq!(linear_webp_quality(75), 79);
    assert_eq!(linear_webp_quality(100), 100);
    assert!((0..100).all(|q| linear_webp_quality(q) <= linear_webp_quality(q + 1)));
}
