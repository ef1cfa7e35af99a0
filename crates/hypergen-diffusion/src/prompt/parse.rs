//! The A1111 syntax: text to pieces with weights, breaks and LoRA tags.
//!
//! The rules are those that AUTOMATIC1111's stable-diffusion-webui documents
//! for attention (<https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features>).
//! There is no network in here and no tokenizer. What that program reads and
//! we cannot draw (`AND`, prompt editing, alternation, hypernetworks) is an
//! error that says so, never text that happens to be drawn.

use super::LoraTag;
use crate::ParameterError;
use crate::request::check_prompt;

/// What one pair of brackets does to a weight.
const STEP: f64 = 1.1;
/// Brackets that may be open at once. People nest three or four; a bound keeps
/// the time that a hostile prompt takes proportional to its length.
const MAX_DEPTH: usize = 256;
/// Longest piece of a prompt that an error repeats, in characters.
const ECHO: usize = 48;
/// Kinds of tags that are no text.
const KINDS: [&str; 3] = ["lora", "lyco", "hypernet"];

/// A piece of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    /// Text to be tokenized by itself, with the weight of its embeddings.
    Text {
        /// Without brackets and escapes.
        text: String,
        /// Finite, 1 for plain text.
        weight: f64,
    },
    /// `BREAK`: what follows begins a new chunk.
    Break,
}

/// A prompt, read.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Parsed {
    /// Neighbouring texts of one weight are one part.
    pub parts: Vec<Part>,
    /// In the order in which they are written.
    pub loras: Vec<LoraTag>,
}

/// Reads a prompt in the A1111 syntax; `param` is the parameter that errors
/// name.
///
/// # Errors
/// For a text that is too long, for a weight that is no number, for a LoRA tag
/// that cannot be understood, and for what is not supported: `AND`, prompt
/// editing, alternation, other tags.
pub fn parse(param: &'static str, text: &str) -> Result<Parsed, ParameterError> {
    check_prompt(param, text)?;
    parse_any(param, text)
}

/// [`parse`] for a text of any length: its time is proportional to that.
pub(super) fn parse_any(param: &'static str, text: &str) -> Result<Parsed, ParameterError> {
    let (text, loras) = take_tags(param, text)?;
    if let Some(at) = find_word(&text, "AND") {
        return Err(wrong(
            param,
            format!("AND between prompts is not supported ('{}'); write 'and'", echo(&text[at..])),
        ));
    }
    let mut parser = Parser { param, text: &text, parts: vec![], open: vec![] };
    parser.run()?;
    Ok(Parsed { parts: merge(param, parser.parts)?, loras })
}

fn wrong(param: &'static str, message: String) -> ParameterError {
    ParameterError { param, message: format!("{param}: {message}") }
}

/// The beginning of a piece of a prompt.
fn echo(text: &str) -> String {
    match text.char_indices().nth(ECHO) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Cuts `<lora:...>` out of a text. Whatever else stands in angle brackets is
/// text, but for the tags of networks that we do not have.
fn take_tags(param: &'static str, text: &str) -> Result<(String, Vec<LoraTag>), ParameterError> {
    let (mut kept, mut loras, mut rest) = (String::with_capacity(text.len()), vec![], text);
    while let Some(start) = rest.find('<') {
        let (before, tag) = rest.split_at(start);
        let kind =
            KINDS.iter().find(|kind| tag[1..].strip_prefix(**kind).is_some_and(|t| t.starts_with(':')));
        let Some(kind) = kind else {
            kept.push_str(&rest[..=start]);
            rest = &rest[start + 1..];
            continue;
        };
        // Without an end here, no later tag has one either.
        let Some(end) = tag.find('>') else { break };
        if *kind != "lora" {
            return Err(wrong(
                param,
                format!("<{kind}:...> is not supported, only <lora:NAME:SCALE> is ('{}')", echo(tag)),
            ));
        }
        loras.push(lora(param, &tag["<lora:".len()..end])?);
        kept.push_str(before);
        rest = &tag[end + 1..];
    }
    kept.push_str(rest);
    Ok((kept, loras))
}

/// `NAME` or `NAME:SCALE`. A name may hold colons, so what stands after the
/// last one is a scale only where it is a number.
fn lora(param: &'static str, value: &str) -> Result<LoraTag, ParameterError> {
    let number = value.rsplit_once(':').and_then(|(name, last)| Some((name, last.trim().parse().ok()?)));
    let (name, scale): (&str, f64) = number.unwrap_or((value, 1.0));
    let name = name.trim();
    if name.is_empty() || number.is_none() && name.ends_with(':') || !scale.is_finite() {
        return Err(wrong(
            param,
            format!("'<lora:{}>' must be <lora:NAME:SCALE> with one number as its scale", echo(value)),
        ));
    }
    Ok(LoraTag { name: name.to_owned(), scale })
}

/// Where `word` stands by itself.
fn find_word(text: &str, word: &str) -> Option<usize> {
    let in_word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    text.match_indices(word).map(|(at, _)| at).find(|&at| {
        !in_word(text[..at].chars().next_back()) && !in_word(text[at + word.len()..].chars().next())
    })
}

/// A bracket that is not closed yet.
struct Open {
    round: bool,
    /// The first part inside.
    first: usize,
    /// Byte of the bracket.
    at: usize,
    /// Byte after the last colon that stands directly inside.
    colon: Option<usize>,
    /// Whether a `|` stands directly inside.
    bar: bool,
}

struct Parser<'a> {
    param: &'static str,
    text: &'a str,
    parts: Vec<Part>,
    open: Vec<Open>,
}

impl Parser<'_> {
    fn run(&mut self) -> Result<(), ParameterError> {
        let mut at = 0;
        while let Some(c) = self.text[at..].chars().next() {
            at = match c {
                '\\' => self.escape(at),
                '(' | '[' => self.bracket(at, c == '(')?,
                ':' => self.colon(at)?,
                ')' => self.close(at, true, STEP),
                ']' => {
                    self.refuse_scheduling(at)?;
                    self.close(at, false, 1.0 / STEP)
                }
                _ => self.plain(at),
            };
        }
        // What is never closed reaches to the end.
        while let Some(open) = self.open.pop() {
            self.weigh(open.first, if open.round { STEP } else { 1.0 / STEP });
        }
        Ok(())
    }

    fn push(&mut self, text: &str) {
        self.parts.push(Part::Text { text: text.to_owned(), weight: 1.0 });
    }

    /// A backslash makes the bracket or backslash after it text, and is itself
    /// no text, whatever follows.
    fn escape(&mut self, at: usize) -> usize {
        match self.text[at + 1..].chars().next() {
            Some(c @ ('(' | ')' | '[' | ']' | '\\')) => {
                self.push(&c.to_string());
                at + 2
            }
            _ => at + 1,
        }
    }

    fn bracket(&mut self, at: usize, round: bool) -> Result<usize, ParameterError> {
        if self.open.len() == MAX_DEPTH {
            return Err(wrong(self.param, format!("more than {MAX_DEPTH} brackets are open at once")));
        }
        // What stands before a bracket is no number of a schedule any more.
        if let Some(outer) = self.open.last_mut() {
            outer.colon = None;
        }
        self.open.push(Open { round, first: self.parts.len(), at, colon: None, bar: false });
        Ok(at + 1)
    }

    /// A colon is text, unless a number and a closing bracket follow it and a
    /// bracket is open.
    fn colon(&mut self, at: usize) -> Result<usize, ParameterError> {
        if let Some((number, end)) = weight_at(&self.text[at..])
            && let Some(open) = self.take_open(true)
        {
            let Ok(weight) = number.parse::<f64>() else {
                let found = echo(&self.text[open.at..at + end]);
                return Err(wrong(
                    self.param,
                    format!("'{number}' in '{found}' is no number, so no weight; write it as in (word:1.2)"),
                ));
            };
            self.weigh(open.first, weight);
            return Ok(at + end);
        }
        self.push(":");
        if let Some(open) = self.open.last_mut() {
            open.colon = Some(at + 1);
        }
        Ok(at + 1)
    }

    /// A closing bracket that closes nothing is text.
    fn close(&mut self, at: usize, round: bool, factor: f64) -> usize {
        match self.take_open(round) {
            Some(open) => self.weigh(open.first, factor),
            None => self.push(if round { ")" } else { "]" }),
        }
        at + 1
    }

    /// The two kinds of brackets need not be nested in each other.
    fn take_open(&mut self, round: bool) -> Option<Open> {
        let at = self.open.iter().rposition(|open| open.round == round)?;
        Some(self.open.remove(at))
    }

    fn weigh(&mut self, first: usize, factor: f64) {
        for part in &mut self.parts[first..] {
            if let Part::Text { weight, .. } = part {
                *weight *= factor;
            }
        }
    }

    /// `[from:to:when]` and `[one|other]` change a prompt from step to step.
    fn refuse_scheduling(&self, at: usize) -> Result<(), ParameterError> {
        let Some(open) = self.open.iter().rfind(|open| !open.round) else { return Ok(()) };
        let found = echo(&self.text[open.at..=at]);
        let number = |start: usize| {
            let when = self.text[start..at].trim();
            when.bytes().all(|b| b.is_ascii_digit() || b"+-.".contains(&b)) && when.parse::<f64>().is_ok()
        };
        let what = match open.colon {
            _ if open.bar => "alternation, [one|other],",
            Some(start) if number(start) => "prompt editing, [from:to:when],",
            _ => return Ok(()),
        };
        Err(wrong(
            self.param,
            format!(
                "{what} is not supported ('{found}'); weights stand in round brackets, (word:1.2), and \\[ is a bracket"
            ),
        ))
    }

    /// Text up to the next character that means something, cut at each `BREAK`.
    fn plain(&mut self, at: usize) -> usize {
        let run = &self.text[at..];
        let mut run = &run[..run.find(['\\', '(', ')', '[', ']', ':']).unwrap_or(run.len())];
        let end = at + run.len();
        if let Some(open) = self.open.last_mut() {
            open.bar |= run.contains('|');
        }
        while let Some(at) = find_word(run, "BREAK") {
            self.push(run[..at].trim_end());
            self.parts.push(Part::Break);
            run = run[at + "BREAK".len()..].trim_start();
        }
        self.push(run);
        end
    }
}

/// The number of `: NUMBER )` at the beginning of a text, and where the whole
/// ends.
fn weight_at(text: &str) -> Option<(&str, usize)> {
    let rest = text.strip_prefix(':')?.trim_start();
    let start = text.len() - rest.len();
    let sign = usize::from(rest.starts_with(['+', '-']));
    let digits = rest[sign..].bytes().take_while(|b| b.is_ascii_digit() || *b == b'.').count();
    let after = rest[sign + digits..].trim_start();
    (digits > 0 && after.starts_with(')'))
        .then(|| (&text[start..start + sign + digits], text.len() - after.len() + 1))
}

/// Joins neighbouring texts of one weight: they are tokenized as one.
fn merge(param: &'static str, parts: Vec<Part>) -> Result<Vec<Part>, ParameterError> {
    let mut merged: Vec<Part> = vec![];
    for part in parts {
        match (merged.last_mut(), part) {
            (Some(Part::Text { text, weight }), Part::Text { text: more, weight: same })
                if *weight == same =>
            {
                text.push_str(&more);
            }
            (_, Part::Text { text, weight }) if !(weight as f32).is_finite() => {
                return Err(wrong(
                    param,
                    format!(
                        "the weight of '{}' is too large: give smaller numbers, as in (word:1.2)",
                        echo(&text)
                    ),
                ));
            }
            (_, part) => merged.push(part),
        }
    }
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Vec<Part> {
        parse("prompt", text).expect(text).parts
    }

    fn text(text: &str, weight: f64) -> Part {
        Part::Text { text: text.to_owned(), weight }
    }

    fn refused(text: &str) -> String {
        let error = parse("negative_prompt", text).expect_err(text);
        assert_eq!(error.param, "negative_prompt");
        error.message
    }

    fn assert_weights(prompt: &str, expected: &[(&str, f64)]) {
        let parts = read(prompt);
        assert_eq!(parts.len(), expected.len(), "{prompt}: {parts:?}");
        for (part, (words, weight)) in parts.iter().zip(expected) {
            let Part::Text { text, weight: found } = part else { panic!("{prompt}: {parts:?}") };
            assert_eq!(text, words, "{prompt}");
            assert!((found - weight).abs() < 1e-12, "{prompt}: {found} for {weight}");
        }
    }

    #[test]
    fn brackets_weigh() {
        assert_weights("a red fox", &[("a red fox", 1.0)]);
        assert_weights("a (red) fox", &[("a ", 1.0), ("red", 1.1), (" fox", 1.0)]);
        assert_weights("((red))", &[("red", 1.21)]);
        assert_weights("(red:1.3)", &[("red", 1.3)]);
        assert_weights("(red: -.5 )", &[("red", -0.5)]);
        assert_weights("[red]", &[("red", 1.0 / 1.1)]);
        assert_weights("[[red]]", &[("red", 1.0 / 1.21)]);
        assert_weights(
            "(a (house:1.5) on [a hill)]",
            &[("a ", 1.1), ("house", 1.65), (" on ", 1.1), ("a hill", 1.0)],
        );
        assert_weights("(a [b:1.2) c]", &[("a ", 1.2), ("b", 1.2 / 1.1), (" c", 1.0 / 1.1)]);
        assert_weights("(red:1.3) (fox:1.3)", &[("red", 1.3), (" ", 1.0), ("fox", 1.3)]);
    }

    #[test]
    fn what_is_never_closed_reaches_to_the_end() {
        assert_weights("a (red fox", &[("a ", 1.0), ("red fox", 1.1)]);
        assert_weights("[a (red", &[("a ", 1.0 / 1.1), ("red", 1.0)]);
        assert_weights("red) fox]", &[("red) fox]", 1.0)]);
    }

    #[test]
    fn escapes_and_lone_signs_are_text() {
        assert_weights(r"\(red\) \[fox\] \\", &[(r"(red) [fox] \", 1.0)]);
        assert_weights(r"(\(red\):1.2)", &[("(red)", 1.2)]);
        assert_weights(r"a\b\", &[("ab", 1.0)]);
        assert_weights("ratio 16:9, mood: calm", &[("ratio 16:9, mood: calm", 1.0)]);
        assert_weights("red:1.3)", &[("red:1.3)", 1.0)]);
        assert_weights("(red:big)", &[("red:big", 1.1)]);
        assert_weights("a|b (c|d)", &[("a|b ", 1.0), ("c|d", 1.1)]);
        assert_weights("[to be: or not]", &[("to be: or not", 1.0 / 1.1)]);
    }

    #[test]
    fn break_stands_by_itself() {
        assert_eq!(read("a BREAK b"), [text("a", 1.0), Part::Break, text("b", 1.0)]);
        assert_eq!(read("BREAKFAST a_BREAK"), [text("BREAKFAST a_BREAK", 1.0)]);
        assert_eq!(read("(a BREAK b)"), [text("a", 1.1), Part::Break, text("b", 1.1)]);
        assert_eq!(
            read("BREAK\nBREAK"),
            [text("", 1.0), Part::Break, text("", 1.0), Part::Break, text("", 1.0)]
        );
    }

    #[test]
    fn loras_are_taken_out() {
        let parsed = parse("prompt", "a fox <lora:oil paint:0.8>, <lora:x> <b> 1<2").expect("fine");
        let tag = |name: &str, scale| LoraTag { name: name.to_owned(), scale };
        assert_eq!(parsed.loras, [tag("oil paint", 0.8), tag("x", 1.0)]);
        assert_eq!(parsed.parts, [text("a fox ,  <b> 1<2", 1.0)]);
        for (written, name, scale) in [
            ("a, b: c:1", "a, b: c", 1.0),
            ("a: b", "a: b", 1.0),
            ("x:1:0.5", "x:1", 0.5),
            ("x::1", "x:", 1.0),
            ("x: -.5 ", "x", -0.5),
            (" x :+1e-1", "x", 0.1),
            ("日本/é (2) [v1.0]\\:2", "日本/é (2) [v1.0]\\", 2.0),
            ("a<b:1", "a<b", 1.0),
            ("x.SAFETENSORS:1", "x.SAFETENSORS", 1.0),
            ("/loras/x.safetensors:0.7", "/loras/x.safetensors", 0.7),
            ("x:0,8", "x:0,8", 1.0),
        ] {
            let parsed = parse("prompt", &format!("a<lora:{written}>b")).expect(written);
            assert_eq!(parsed.loras, [tag(name, scale)], "{written}");
            assert_eq!(parsed.parts, [text("ab", 1.0)], "{written}");
        }
        for bad in [
            "<lora::1>",
            "<lora: :1>",
            "<lora:x:>",
            "<lora:x:inf>",
            "<lora:x:nan>",
            "<lora:>",
            "<lyco:x:1>",
            "<hypernet:x:1>",
        ] {
            assert!(refused(bad).contains("<lora:NAME:SCALE>"), "{bad}");
        }
    }

    #[test]
    fn what_is_not_supported_says_so() {
        assert!(refused("a cat AND a dog").contains("AND between prompts"));
        assert_eq!(read("SAND and BRAND"), [text("SAND and BRAND", 1.0)]);
        for editing in ["[cat:dog:0.5]", "[cat:10]", "[cat::0.5]", "a [(cat):dog: 0.5 ]", "[:dog:.5]"] {
            assert!(refused(editing).contains("prompt editing"), "{editing}");
        }
        for alternation in ["[cat|dog]", "[cat|dog:1]", "a [|cat] b"] {
            assert!(refused(alternation).contains("alternation"), "{alternation}");
        }
        assert!(refused("(red:1.2.3)").contains("'1.2.3' in '(red:1.2.3)'"));
        assert!(refused(&format!("(red:{})", "9".repeat(60))).contains("too large"));
        assert!(refused(&"(".repeat(1000)).contains("256 brackets"));
    }

    /// Arbitrary text of what the syntax is made of gives parts or an error,
    /// and nothing but brackets, escapes and weights goes missing.
    #[test]
    fn no_text_is_a_panic() {
        const PIECES: [&str; 24] = [
            "(", ")", "[", "]", ":", "\\", "|", "<", ">", "1.3", "-", ".", " ", "BREAK", "AND", "lora", "é",
            "日", "\n", "<lora:", "a", "red fox", "(:1)", "\u{0}",
        ];
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize
        };
        let mut read = 0;
        for _ in 0..20_000 {
            let prompt: String = (0..next() % 14).map(|_| PIECES[next() % PIECES.len()]).collect();
            let Ok(parsed) = parse("prompt", &prompt) else { continue };
            read += 1;
            for part in &parsed.parts {
                if let Part::Text { text, weight } = part {
                    assert!(weight.is_finite(), "{prompt}");
                    assert!(text.chars().all(|c| prompt.contains(c)), "{prompt}");
                }
            }
        }
        assert!(read > 5_000, "too few of the texts were prompts: {read}");
    }

    #[test]
    fn text_without_special_characters_is_one_part() {
        for plain in ["", "a red fox, oil painting", "naïve 日本 {x} 50% <3 a|b!", "one\ntwo"] {
            let expected: &[Part] = if plain.is_empty() { &[] } else { &[text(plain, 1.0)] };
            assert_eq!(read(plain), expected);
        }
    }
}
