//! What is written into picture files of the prompt and the settings, read
//! back by other people's decoders, and by the rules of the tools that look for it.

use std::io::Cursor;

use hypergen_diffusion::prompt::PromptSyntax;
use hypergen_diffusion::{Picture, Size};
use hypergen_server::encode::{ImageFormat, Metadata, encode};

use crate::files;
use crate::targets::itself;

/// File systems have no longer names, and models and LoRAs are called by their files.
const LONGEST_NAME: usize = 255;
/// As many as a request may name.
const MOST_LORAS: usize = 16;

/// Sections of an input are the texts; `numbers` has the rest, a word each.
pub(crate) fn read(data: &[u8]) -> u64 {
    let metadata = metadata(data);
    let size = Size { width: 8, height: 8 };
    let picture = Picture { size, rgb: vec![90; 3 * 8 * 8], warnings: vec![] };
    let text = metadata.to_text();
    for format in ImageFormat::ALL {
        let file = encode(&picture, format, 80, Some(&metadata)).unwrap_or_else(|e| panic!("{format}: {e}"));
        match format {
            ImageFormat::Png => assert_eq!(read_png(&file), text),
            // A JPEG has less room: the ends of the prompts may be missing, nothing else.
            ImageFormat::Jpeg if text.encode_utf16().count() > 32_000 => {
                let read = read_exif(&file);
                assert_eq!(read.lines().last(), text.lines().last());
            }
            ImageFormat::Jpeg | ImageFormat::Webp => assert_eq!(read_exif(&file), text, "{format}"),
        }
    }
    settings_read_back(&metadata, &text);
    itself(data)
}

fn metadata(data: &[u8]) -> Metadata {
    let mut metadata = Metadata {
        prompt: String::new(),
        negative_prompt: None,
        steps: 20,
        sampler: "ddim".to_owned(),
        guidance_scale: 7.5,
        seed: 0,
        size: Size { width: 8, height: 8 },
        model: "emoji".to_owned(),
        prompt_syntax: PromptSyntax::Plain,
        clip_skip: 0,
        guidance_rescale: 0.0,
        loras: vec![],
    };
    for (name, content) in files::sections(data, "prompt") {
        let text = String::from_utf8_lossy(content);
        let text = text.strip_suffix('\n').unwrap_or(&text).to_owned();
        let file_name = || text.chars().take(LONGEST_NAME).collect::<String>();
        match name {
            "prompt" => metadata.prompt = text,
            "negative" => metadata.negative_prompt = Some(text),
            "sampler" => metadata.sampler = file_name(),
            "model" => metadata.model = file_name(),
            "lora" if metadata.loras.len() < MOST_LORAS => metadata.loras.push((file_name(), 0.5)),
            "a1111" => metadata.prompt_syntax = PromptSyntax::A1111,
            "numbers" => numbers(&mut metadata, &text),
            _ => {}
        }
    }
    metadata
}

fn numbers(metadata: &mut Metadata, text: &str) {
    let mut words = text.split_whitespace();
    let mut whole = || words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or_default();
    metadata.steps = whole() as usize;
    metadata.seed = whole();
    metadata.clip_skip = (whole() % 33) as usize;
    metadata.guidance_scale = f64::from((whole() % 200) as u32) / 10.0;
    metadata.guidance_rescale = f64::from((whole() % 11) as u32) / 10.0;
}

fn read_png(file: &[u8]) -> String {
    let mut reader = png::Decoder::new(Cursor::new(file)).read_info().expect("a PNG header");
    let mut rgb = vec![0; reader.output_buffer_size().expect("a size")];
    reader.next_frame(&mut rgb).expect("the pixels");
    reader.finish().expect("a whole file");
    let info = reader.info();
    let plain = info.uncompressed_latin1_text.iter().find(|c| c.keyword == "parameters");
    let international = info.utf8_text.iter().find(|c| c.keyword == "parameters");
    let international = international.map(|c| c.get_text().expect("text"));
    plain.map(|c| c.text.clone()).or(international).expect("the parameters")
}

fn read_exif(file: &[u8]) -> String {
    let exif = exif::Reader::new().read_from_container(&mut Cursor::new(file)).expect("an EXIF block");
    let field = exif.get_field(exif::Tag::UserComment, exif::In::PRIMARY).expect("a user comment");
    let exif::Value::Undefined(bytes, _) = &field.value else { panic!("not bytes: {field:?}") };
    let text = bytes.strip_prefix(b"UNICODE\0").expect("the mark of UTF-16");
    let units: Vec<u16> = text.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect();
    String::from_utf16(&units).expect("whole characters")
}

/// The last line by the tools' rule: `Name: value`, commas between them, a value in
/// quotes where it holds the punctuation itself.
fn settings_read_back(metadata: &Metadata, text: &str) {
    let last = text.lines().last().expect("a last line");
    let settings = settings(last);
    let value = |name: &str| settings.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
    assert_eq!(value("Steps"), Some(metadata.steps.to_string().as_str()), "{last}");
    assert_eq!(value("Seed"), Some(metadata.seed.to_string().as_str()), "{last}");
    assert_eq!(value("CFG scale"), Some(metadata.guidance_scale.to_string().as_str()), "{last}");
    let plain = |text: &str| text.replace(char::is_control, " ").trim().to_owned();
    assert_eq!(value("Sampler").map(plain), Some(plain(&metadata.sampler)), "{last}");
    assert_eq!(value("Model").map(plain), Some(plain(&metadata.model)), "{last}");
    assert_eq!(value("Clip skip").is_some(), metadata.clip_skip > 0, "{last}");
    assert_eq!(value("LoRA").is_some(), !metadata.loras.is_empty(), "{last}");
    assert!(value("Version").is_some_and(|version| version.starts_with("hypergen")), "{last}");
}

fn settings(line: &str) -> Vec<(String, String)> {
    let (mut settings, mut rest) = (vec![], line);
    while let Some((name, after)) = rest.split_once(':') {
        let after = after.strip_prefix(' ').unwrap_or(after);
        let (value, end) = match after.strip_prefix('"') {
            Some(inner) => quoted(inner),
            None => (
                after.split(',').next().unwrap_or_default().to_owned(),
                after.find(',').unwrap_or(after.len()),
            ),
        };
        settings.push((name.trim_start_matches([',', ' ']).to_owned(), value));
        rest = &after[end..];
    }
    settings
}

/// A value in quotes whose first one is behind us, and where it ends after the last one.
fn quoted(inner: &str) -> (String, usize) {
    let mut value = String::new();
    let mut chars = inner.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, at + 2),
            '\\' => value.extend(chars.next().map(|(_, c)| if c == 'n' { '\n' } else { c })),
            c => value.push(c),
        }
    }
    (value, inner.len() + 1)
}
