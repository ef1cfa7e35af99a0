//! A small deterministic mutator for compilers without libFuzzer: texts are
//! changed where readers look, at numbers, words, brackets and lines. It follows no
//! coverage and promises to find nothing; it is quick, and the same every time.

/// Numbers at which readers break.
const NUMBERS: [&str; 20] = [
    "0",
    "-1",
    "1",
    "2",
    "7",
    "255",
    "256",
    "65535",
    "65536",
    "30000",
    "1048577",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "1e999",
    "-0",
    "0.5",
    "NaN",
];
/// Pieces of the formats that are read here.
const PIECES: [&str; 28] = [
    "\"", "\\", "{", "}", "[", "]", "(", ")", "<", ">", ":", ",", ".", "=", "\n", "\r", "\t", "\0", " ",
    "null", "true", "{}", "[]", "\"\"", "\\ud800", "\u{feff}", "日本", "=== ",
];
/// Longest input that is made.
const LONGEST: usize = 64 << 10;

/// Random numbers (splitmix64).
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number below `end`; 0 where there is none.
    pub fn below(&mut self, end: usize) -> usize {
        (self.draw() % end.max(1) as u64) as usize
    }

    fn range(&mut self, len: usize) -> std::ops::Range<usize> {
        let (a, b) = (self.below(len + 1), self.below(len + 1));
        a.min(b)..a.max(b)
    }
}

/// Whole pieces of an input: words and numbers, each other character alone.
fn tokens(data: &[u8]) -> Vec<std::ops::Range<usize>> {
    let in_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'.' || b >= 0x80;
    let mut tokens: Vec<std::ops::Range<usize>> = vec![];
    for (at, &byte) in data.iter().enumerate() {
        match tokens.last_mut() {
            Some(last) if in_word(byte) && last.end == at && in_word(data[last.start]) => last.end += 1,
            _ => tokens.push(at..at + 1),
        }
    }
    tokens
}

/// Another input, from some of `seeds` (at least one).
pub fn mutated(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut data = seeds[random.below(seeds.len())].clone();
    // Most of what one change makes is still read far; several at once find other things.
    let changes = [1, 1, 2, 2, 3, 8][random.below(6)];
    for _ in 0..changes {
        change(&mut data, seeds, random);
        data.truncate(LONGEST);
    }
    data
}

fn change(data: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) {
    let other = &seeds[random.below(seeds.len())];
    match random.below(12) {
        0 => insert(data, PIECES[random.below(PIECES.len())].as_bytes(), random),
        1 | 2 => replace_token(data, NUMBERS[random.below(NUMBERS.len())].as_bytes(), random, true),
        3 | 4 => {
            let tokens = tokens(other);
            if let Some(token) = tokens.get(random.below(tokens.len())) {
                replace_token(data, &other[token.clone()], random, false);
            }
        }
        5 => replace_token(data, b"", random, false),
        6 => swap_lines(data, random),
        7 => {
            let part = other[random.range(other.len())].to_vec();
            insert(data, &part, random);
        }
        8 => {
            let range = random.range(data.len());
            data.drain(range);
        }
        9 => {
            let at = random.below(data.len());
            if let Some(byte) = data.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        10 => repeat(data, random),
        _ => repeat_line(data, random),
    }
}

fn insert(data: &mut Vec<u8>, piece: &[u8], random: &mut Random) {
    let at = random.below(data.len() + 1);
    data.splice(at..at, piece.iter().copied());
}

/// Puts `new` in the place of a token, or of a number where only those are wanted.
fn replace_token(data: &mut Vec<u8>, new: &[u8], random: &mut Random, numbers: bool) {
    let mut tokens = tokens(data);
    if numbers {
        tokens.retain(|token| data[token.start].is_ascii_digit());
    }
    if let Some(token) = tokens.get(random.below(tokens.len())) {
        data.splice(token.clone(), new.iter().copied());
    }
}

fn lines(data: &[u8]) -> Vec<Vec<u8>> {
    data.split_inclusive(|&b| b == b'\n').map(<[u8]>::to_vec).collect()
}

fn swap_lines(data: &mut Vec<u8>, random: &mut Random) {
    let mut lines = lines(data);
    if !lines.is_empty() {
        let (a, b) = (random.below(lines.len()), random.below(lines.len()));
        lines.swap(a, b);
        *data = lines.concat();
    }
}

fn repeat_line(data: &mut Vec<u8>, random: &mut Random) {
    let mut lines = lines(data);
    if !lines.is_empty() {
        let line = lines[random.below(lines.len())].clone();
        lines.insert(random.below(lines.len()), line);
        *data = lines.concat();
    }
}

/// Repeats a short piece many times: what takes more time than its length shows here.
fn repeat(data: &mut Vec<u8>, random: &mut Random) {
    let start = random.below(data.len());
    let piece = data.get(start..(start + 1 + random.below(8)).min(data.len())).unwrap_or_default().to_vec();
    let times = [2, 10, 300, 4000][random.below(4)];
    data.splice(start..start, piece.repeat(times));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mutations_are_many_and_the_same_every_time() {
        let seeds = [b"{\"a\": 12, \"b\": [1, 2]}\nline two\n".to_vec(), b"(red:1.2) fox".to_vec()];
        let make = |seed| {
            let mut random = Random(seed);
            (0..5000).map(|_| mutated(&seeds, &mut random)).collect::<Vec<_>>()
        };
        let inputs = make(1);
        assert_eq!(inputs, make(1));
        assert_ne!(inputs, make(2));
        let different: std::collections::HashSet<_> = inputs.iter().collect();
        assert!(different.len() > 3000, "{}", different.len());
        let replaced = inputs.iter().any(|data| data.starts_with(b"{\"a\": 65536,"));
        assert!(replaced, "no number was replaced");
        let mut random = Random(3);
        assert!(
            (0..200).all(|_| mutated(&[vec![]], &mut random).len() <= LONGEST),
            "an empty seed is a seed"
        );
    }

    #[test]
    fn tokens_are_words_numbers_and_single_signs() {
        let data = b"a.b(1.5):\n";
        let words: Vec<&[u8]> = tokens(data).into_iter().map(|t| &data[t]).collect();
        assert_eq!(words, [&b"a.b"[..], b"(", b"1.5", b")", b":", b"\n"]);
    }
}
