//! The smallest EXIF block that holds one comment: where users' tools look
//! for the generation parameters of a JPEG or WebP. It is not an EXIF library
//! (the tests read it with one).
//!
//! Layout (CIPA DC-008, TIFF 6.0): a big-endian TIFF header, a first directory
//! whose only entry points to the EXIF directory, and that one's only entry,
//! `UserComment`, which points to the text.

/// Tag of the pointer to the EXIF directory.
const EXIF_DIRECTORY: u16 = 0x8769;
/// Tag of the comment.
const USER_COMMENT: u16 = 0x9286;
/// TIFF type of a 32-bit number.
const LONG: u16 = 4;
/// TIFF type of plain bytes.
const UNDEFINED: u16 = 7;
/// Says that UTF-16 follows. Its byte order is the TIFF header's; the tools
/// assume a big-endian one, so that is what we write.
const UNICODE: &[u8; 8] = b"UNICODE\0";

/// Bytes of a directory with one entry: count, entry, offset of the next.
const DIRECTORY: u32 = 2 + 12 + 4;
/// Bytes of the TIFF header.
const HEADER: u32 = 8;

/// UTF-16 units of text that fit into a JPEG's EXIF segment: 65,535 bytes with
/// the segment's own length (2) and `Exif\0\0` (6), less what precedes the text.
pub(super) const JPEG_ROOM: usize = (65_535 - 2 - 6 - (HEADER + 2 * DIRECTORY) as usize - 8) / 2;

/// An EXIF block (without JPEG's `Exif\0\0`) whose user comment is `text`.
pub(super) fn user_comment(text: &str) -> Vec<u8> {
    let units: Vec<u8> = text.encode_utf16().flat_map(u16::to_be_bytes).collect();
    let comment_bytes = (UNICODE.len() + units.len()) as u32;

    let mut block = Vec::with_capacity(HEADER as usize + 2 * DIRECTORY as usize + comment_bytes as usize);
    block.extend_from_slice(b"MM\0\x2a"); // big-endian, and TIFF's number
    block.extend_from_slice(&HEADER.to_be_bytes());
    directory(&mut block, EXIF_DIRECTORY, LONG, 1, HEADER + DIRECTORY);
    directory(&mut block, USER_COMMENT, UNDEFINED, comment_bytes, HEADER + 2 * DIRECTORY);
    block.extend_from_slice(UNICODE);
    block.extend_from_slice(&units);
    block
}

/// Appends a directory of one entry, with no directory after it.
fn directory(block: &mut Vec<u8>, tag: u16, kind: u16, count: u32, value: u32) {
    block.extend_from_slice(&1u16.to_be_bytes());
    block.extend_from_slice(&tag.to_be_bytes());
    block.extend_from_slice(&kind.to_be_bytes());
    block.extend_from_slice(&count.to_be_bytes());
    block.extend_from_slice(&value.to_be_bytes());
    block.extend_from_slice(&0u32.to_be_bytes());
}
