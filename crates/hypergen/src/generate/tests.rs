//! Tests of `hypergen generate` on a fake model: which requests are made,
//! what is written, and how it stops.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use clap::FromArgMatches;
use hypergen_diffusion::{Check, Error, Observer, Picture, Session, Stage, one_at_a_time};

use super::*;
use crate::arguments;
use crate::cli::{Cli, Command};

/// Draws pictures of one colour, which the seed chooses, and remembers what it was asked.
struct Fake {
    info: ModelInfo,
    asked: Vec<Request>,
    /// Pretends that Ctrl-C comes in this step of this picture.
    interrupt_at: Option<(usize, usize, Interrupt)>,
}

impl Fake {
    fn new() -> Self {
        let info = ModelInfo {
            name: "fake".to_owned(),
            family: "Fake".to_owned(),
            native_size: Size { width: 64, height: 64 },
            sampler: "ddim".to_owned(),
            device: "cpu".to_owned(),
            isa: "portable".to_owned(),
            dtype: "float32".to_owned(),
            threads: 1,
            weight_bytes: 0,
            default_steps: None,
            default_guidance: None,
            min_guidance: 1.0,
        };
        Self { info, asked: Vec::new(), interrupt_at: None }
    }
}

/// What the fake refuses.
struct Rules;

impl Check for Rules {
    fn check(&self, request: &Request) -> Result<(), Error> {
        if request.prompt == "refuse" {
            return Err(Error::new(ErrorKind::Request, "this model does not draw that"));
        }
        Ok(())
    }
}

impl Generator for Fake {
    fn info(&self) -> ModelInfo {
        self.info.clone()
    }

    fn checker(&self) -> Arc<dyn Check> {
        Arc::new(Rules)
    }

    fn draw(&mut self, session: &mut dyn Session) {
        one_at_a_time(session, |request, observer| self.picture(request, observer));
    }
}

impl Fake {
    fn picture(&mut self, request: &Request, observer: &mut dyn Observer) -> Result<Picture, Error> {
        for step in 1..=request.steps {
            if let Some((picture, at, interrupt)) = &self.interrupt_at
                && (self.asked.len(), step) == (*picture, *at)
            {
                interrupt.pretend(130);
            }
            if observer.cancelled(0) {
                return Err(Error::new(ErrorKind::Cancelled, "cancelled"));
            }
            observer.stage(Stage::Step, step, request.steps, Duration::from_millis(1));
        }
        self.asked.push(request.clone());
        let pixels = request.size.width * request.size.height;
        let rgb = (request.seed as u32).to_le_bytes()[..3].repeat(pixels);
        Ok(Picture { size: request.size, rgb, warnings: vec!["truncated".to_owned()] })
    }
}

fn args(flags: &[&str]) -> GenerateArgs {
    let arguments: Vec<_> =
        ["hypergen", "generate", "red apple"].iter().chain(flags).map(Into::into).collect();
    let matches = arguments::matches(&arguments::command(), &arguments).expect("flags");
    let cli = Cli::from_arg_matches(&matches).expect("flags");
    let Command::Generate(args) = cli.command else { panic!("generate") };
    *args
}

/// Draws into a new folder, and returns it.
fn drawn(fake: &mut Fake, flags: &[&str]) -> (tempfile::TempDir, anyhow::Result<()>) {
    let (folder, result, _, _) = heard(fake, flags);
    (folder, result)
}

/// Draws into a new folder, and returns it with what was said on both streams.
fn heard(fake: &mut Fake, flags: &[&str]) -> (tempfile::TempDir, anyhow::Result<()>, String, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let args = args(flags);
    let name = args.output.as_ref().map_or(folder.path().to_owned(), |name| folder.path().join(name));
    let output = Output::plan(Some(&name), args.count).expect("a plan");
    let interrupt = fake.interrupt_at.as_ref().map(|(_, _, i)| i.clone()).unwrap_or_default();
    let (result, out, err) =
        Console::piped(|console| check(&args).and_then(|()| draw(fake, &args, &output, &interrupt, console)));
    (folder, result, out, err)
}

fn names(folder: &tempfile::TempDir) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder.path())
        .expect("the folder")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn defaults_come_from_the_declaration_or_the_model() {
    let mut fake = Fake::new();
    drawn(&mut fake, &[]).1.expect("drawn");
    let request = &fake.asked[0];
    assert_eq!((request.steps, request.guidance_scale), (STEPS.default, GUIDANCE_SCALE.default));
    assert_eq!((request.negative_prompt.as_deref(), request.sampler), (None, None));
    assert!(request.seed <= u32::MAX.into());

    let mut fake = Fake::new();
    fake.info.default_steps = Some(4);
    fake.info.default_guidance = Some(0.0);
    fake.info.min_guidance = 0.0;
    drawn(&mut fake, &[]).1.expect("drawn");
    assert_eq!((fake.asked[0].steps, fake.asked[0].guidance_scale), (4, 0.0));
    drawn(&mut fake, &["--steps", "9", "--guidance-scale", "2.5"]).1.expect("drawn");
    assert_eq!((fake.asked[1].steps, fake.asked[1].guidance_scale), (9, 2.5));
}

#[test]
fn sizes_follow_the_model_unless_it_draws_very_small() {
    for (native, flags, expected) in [
        (64, vec![], "512x512"),
        (64, vec!["--size", "auto"], "64x64"),
        (64, vec!["--size", "72x40"], "72x40"),
        (256, vec![], "256x256"),
        (768, vec![], "768x768"),
        (768, vec!["--size", "auto"], "768x768"),
    ] {
        let mut fake = Fake::new();
        fake.info.native_size = Size { width: native, height: native };
        drawn(&mut fake, &flags).1.expect("drawn");
        assert_eq!(fake.asked[0].size.to_string(), expected, "{native} {flags:?}");
    }
}

#[test]
fn several_pictures_count_up_from_the_seed() {
    let mut fake = Fake::new();
    let (folder, result) = drawn(&mut fake, &["-n", "3", "--seed", "18446744073709551615", "--size", "8x8"]);
    result.expect("drawn");
    let seeds: Vec<u64> = fake.asked.iter().map(|r| r.seed).collect();
    assert_eq!(seeds, [u64::MAX, 0, 1]);
    assert_eq!(names(&folder), ["red-apple-0.png", "red-apple-1.png", "red-apple-18446744073709551615.png"]);

    let (folder, result) = drawn(&mut fake, &["-n", "4", "-o", "apple.jpg", "--size", "8x8"]);
    result.expect("drawn");
    assert_eq!(names(&folder), ["apple-1.jpg", "apple-2.jpg", "apple-3.jpg", "apple-4.jpg"]);
}

#[test]
fn a_pipe_hears_the_names_and_everyone_the_seed_and_each_warning_once() {
    let (folder, result, out, err) = heard(&mut Fake::new(), &["-n", "2", "-o", "a.png", "--size", "8x8"]);
    result.expect("drawn");
    let expected: Vec<_> = ["a-1.png", "a-2.png"].map(|name| folder.path().join(name)).into();
    assert_eq!(out.lines().map(std::path::PathBuf::from).collect::<Vec<_>>(), expected);
    let lines: Vec<&str> = err.lines().collect();
    assert!(lines.len() == 2 && lines[0].starts_with("seed ") && lines[1] == "warning: truncated", "{err}");

    let (_folder, result, _, err) = heard(&mut Fake::new(), &["--seed", "5", "--size", "8x8"]);
    result.expect("drawn");
    assert_eq!(err, "warning: truncated\n", "a seed that was given is not repeated");
}

#[test]
fn the_file_holds_the_picture_and_its_parameters() {
    for (flags, expected) in [
        (vec!["-o", "a.png", "--seed", "197121", "--size", "16x8", "--negative-prompt", "worm"], true),
        (vec!["-o", "a.png", "--seed", "197121", "--size", "16x8", "--no-metadata"], false),
    ] {
        let (folder, result) = drawn(&mut Fake::new(), &flags);
        result.expect("drawn");
        let file = fs::File::open(folder.path().join("a.png")).expect("a file");
        let mut reader = png::Decoder::new(std::io::BufReader::new(file)).read_info().expect("a PNG");
        let mut rgb = vec![0; reader.output_buffer_size().expect("a size")];
        reader.next_frame(&mut rgb).expect("pixels");
        assert_eq!(rgb, [1, 2, 3].repeat(16 * 8));
        let texts = &reader.info().uncompressed_latin1_text;
        assert_eq!(texts.len(), usize::from(expected));
        if expected {
            assert!(texts[0].text.starts_with("red apple\nNegative prompt: worm\nSteps: 50, Sampler: ddim,"));
            assert!(texts[0].text.contains("Seed: 197121, Size: 16x8, Model: fake"), "{}", texts[0].text);
        }
    }
}

#[test]
fn stopping_keeps_what_is_done_and_leaves_no_half_file() {
    for (picture, step, kept, words) in [
        (0, 1, 0, "stopped: nothing was written"),
        (0, 7, 0, "stopped: nothing was written"),
        (2, 3, 2, "stopped: 2 of 3 pictures were written"),
    ] {
        let mut fake = Fake::new();
        fake.interrupt_at = Some((picture, step, Interrupt::default()));
        let (folder, result) = drawn(&mut fake, &["-n", "3", "-o", "a.png", "--size", "8x8"]);
        let error = result.expect_err("it was stopped");
        let stopped = error.downcast_ref::<Stopped>().expect("no failure, but stopped");
        assert_eq!((stopped.exit_code, stopped.to_string().as_str()), (130, words));
        assert_eq!(names(&folder).len(), kept);
        assert!(names(&folder).iter().all(|name| name.ends_with(".png")));
    }
}

#[test]
fn settings_out_of_range_name_the_flag_and_the_range() {
    for (flags, words) in [
        (vec!["-n", "0"], "-n must be between 1 and 10, but is 0"),
        (vec!["-n", "11"], "-n must be between 1 and 10, but is 11"),
        (vec!["--steps", "151"], "--steps must be between 1 and 150, but is 151"),
        (vec!["--guidance-scale", "20.5"], "--guidance-scale must be between 1 and 20, but is 20.5"),
        (vec!["--guidance-scale", "0.5"], "--guidance-scale must be between 1 and 20, but is 0.5"),
        (vec!["--guidance-scale", "-1"], "--guidance-scale must be between 0 and 20, but is -1"),
        (vec!["--guidance-scale", "NaN"], "--guidance-scale must be between 1 and 20, but is NaN"),
        (vec!["--size", "100x100"], "Invalid size: 100x100. Width and height must be divisible by 8"),
        (vec!["--size", "big"], "Invalid size format: big"),
    ] {
        let (folder, result) = drawn(&mut Fake::new(), &flags);
        let error = result.expect_err("out of range").to_string();
        assert!(error.contains(words), "{flags:?}: {error}");
        assert!(names(&folder).is_empty());
    }
}

#[test]
fn what_the_model_refuses_is_not_drawn() {
    let mut fake = Fake::new();
    let mut args = args(&[]);
    args.prompt = "refuse".to_owned();
    let folder = tempfile::tempdir().expect("a folder");
    let output = Output::plan(Some(folder.path()), 1).expect("a plan");
    let (result, ..) =
        Console::piped(|console| draw(&mut fake, &args, &output, &Interrupt::default(), console));
    let error = result.expect_err("refused");
    assert_eq!(error.to_string(), "this model does not draw that");
    args.prompt = String::new();
    assert!(check(&args).expect_err("an empty prompt").to_string().starts_with("the prompt is empty"));
}
