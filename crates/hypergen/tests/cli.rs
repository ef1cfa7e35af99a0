//! The real binary where it draws nothing: help, lists, and everything that it
//! refuses before it loads a model.

mod common;

use common::{Sandbox, one_error, text};

#[test]
fn help_teaches() {
    let sandbox = Sandbox::new();
    let help = sandbox.succeed(&["--help"]);
    assert!(help.contains("Examples:") && help.contains("hypergen generate \"red apple\""), "{help}");
    let help = sandbox.succeed(&["generate", "--help"]);
    for word in [
        "--model",
        "--output",
        "-n <COUNT>",
        "--size",
        "--steps",
        "1 to 150",
        "default: 50",
        "--guidance-scale",
        "default: 7.5",
        "--seed",
        "--negative-prompt",
        "--sampler",
        "--dtype",
        "bfloat16",
        "--threads",
        "--no-metadata",
        "HYPERGEN_MODEL",
        "Exit codes",
        "Examples:",
    ] {
        assert!(help.contains(word), "{word} is not in\n{help}");
    }
    for line in help.lines().filter(|line| line.contains("HYPERGEN_")) {
        assert!(!line.contains('='), "the user's own settings are not for the screen: {line}");
    }
}

#[test]
fn version_is_the_packages() {
    assert_eq!(Sandbox::new().succeed(&["--version"]), format!("hypergen {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn samplers_are_listed_with_a_line_each() {
    let list = Sandbox::new().succeed(&["samplers"]);
    let expected = hypergen_diffusion::samplers::SamplerKind::ALL;
    assert_eq!(list.lines().count(), expected.len());
    for (line, sampler) in list.lines().zip(expected) {
        let (name, about) = line.split_once(' ').expect("a name and a line");
        assert_eq!((name, about.trim()), (sampler.name(), sampler.about()));
    }
}

#[test]
fn completions_are_scripts() {
    let sandbox = Sandbox::new();
    for (shell, word) in
        [("bash", "complete -F"), ("zsh", "#compdef hypergen"), ("fish", "complete -c hypergen")]
    {
        let script = sandbox.succeed(&["completions", shell]);
        assert!(script.contains(word) && script.contains("guidance-scale"), "{shell}");
    }
}

#[test]
fn wrong_usage_is_exit_code_2() {
    let sandbox = Sandbox::new();
    for args in [
        &[] as &[&str],
        &["paint"],
        &["generate"],
        &["generate", "red", "apple"],
        &["generate", "x", "--steps"],
        &["generate", "x", "--steps", "many"],
        &["generate", "x", "--sampler", "magic"],
        &["generate", "x", "--dtype", "int8"],
        &["generate", "x", "--threads", "0"],
        &["generate", "x", "--seed", "18446744073709551616"],
        &["completions", "cmd"],
    ] {
        let output = sandbox.run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(
            text(&output.stderr).contains("Usage:") || text(&output.stderr).contains("--help"),
            "{args:?}"
        );
    }
    assert!(sandbox.names().is_empty());
}

/// A number below 0 is a value like others, and never a flag that is not known.
#[test]
fn negative_numbers_are_told_what_is_allowed() {
    let sandbox = Sandbox::new();
    for (args, words) in [
        (
            &["generate", "x", "--seed", "-1"] as &[&str],
            "between 0 and 18446744073709551615; leave --seed out",
        ),
        (&["generate", "x", "-n", "-1"], "whole number"),
        (&["generate", "x", "--steps", "-5"], "whole number"),
        (&["generate", "x", "--threads", "-1"], "between 1 and 65535"),
        (&["generate", "x", "--clip-skip", "-1"], "whole number"),
        (&["generate", "x", "--size", "-8"], "Use format like"),
        (&["generate", "x", "--size", "-8x-8"], "Use format like"),
        (&["generate", "x", "--crop", "-1"], "TOP,LEFT"),
        (&["generate", "x", "--crop", "-1,-1"], "TOP,LEFT"),
        (&["generate", "x", "--sampler", "-1"], "invalid value '-1'"),
        (&["serve", "--image-ttl", "-5s"], "a time is"),
        (&["serve", "--max-body-size", "-1GiB"], "a size is"),
        (&["serve", "--default-guidance", "-.5"], "between 0 and 20"),
        (&["bench", "--steps", "-1"], "whole number"),
        (&["bench", "--rounds", "-1"], "1..=1000"),
        (&["serve", "--port", "-1"], "between 0 and 65535"),
        (&["serve", "--threads", "-1"], "at least 1"),
        (&["serve", "--max-queue-size", "-1"], "at least 1"),
        (&["serve", "--image-ttl", "-1"], "a time is"),
        (&["serve", "--max-body-size", "-1"], "a size is"),
        (&["serve", "--default-steps", "-1"], "whole number"),
        (&["serve", "--default-guidance", "-1"], "between 0 and 20"),
        (&["serve", "--lora-scale", "-0.5"], "between 0 and 2"),
        (&["serve", "--clip-skip", "-1"], "whole number"),
        (&["serve", "--guidance-rescale", "-1"], "between 0 and 1"),
    ] {
        let output = sandbox.run(args);
        let said = text(&output.stderr);
        assert!(matches!(output.status.code(), Some(1 | 2)), "{args:?}: {said}");
        assert!(said.contains(words) && !said.contains("unexpected argument"), "{args:?}: {said}");
    }
    for args in [&["--guidance-scale", "-1"], &["--guidance-rescale", "-1"]] {
        let line = sandbox.fail(&[&["generate", "x"], args as &[&str]].concat());
        assert!(line.contains(&format!("{} must be between", args[0])), "{line}");
    }
}

#[test]
fn what_cannot_work_is_one_line_before_any_work() {
    let sandbox = Sandbox::new();
    std::fs::write(sandbox.file("file"), "x").expect("written");
    for (args, words) in [
        (&["--size", "100x100"] as &[&str], "divisible by 8"),
        (&["--size", "1024"], "Use format like '1024x1024'"),
        (&["--size", "8192x8192"], "at most 4096"),
        (&["-n", "11"], "-n must be between 1 and 10, but is 11"),
        (&["--steps", "0"], "--steps must be between 1 and 150, but is 0"),
        (&["--guidance-scale", "21"], "--guidance-scale must be between 1 and 20, but is 21"),
        (&["-o", "apple.gif"], "use .png, .jpg, .jpeg or .webp"),
        (&["-o", "apple"], "add .png, .jpg or .webp"),
        (&["-o", "missing/apple.png"], "the folder 'missing' does not exist: create it"),
        (&["-o", "file/apple.png"], "'file' is not a folder"),
        (&["-o", "-", "-n", "2"], "-n asks for 2"),
    ] {
        // A model that does not exist shows that none was looked for.
        let all = [&["generate", "red apple", "--model", "no/such/model"], args].concat();
        let line = sandbox.fail(&all);
        assert!(line.contains(words), "{args:?}: {line}");
    }
    assert!(sandbox.fail(&["generate", ""]).contains("the prompt is empty"));
    assert_eq!(sandbox.names(), ["file"]);
}

#[test]
#[cfg(target_os = "linux")]
fn a_folder_that_cannot_be_written_to_is_found_before_any_work() {
    // Not even root may make a file there.
    let line = Sandbox::new().fail(&["generate", "x", "--model", "no/such/model", "-o", "/proc/x.png"]);
    assert!(line.contains("cannot write to the folder '/proc'"), "{line}");
}

#[test]
fn settings_come_from_the_environment_and_flags_overrule_them() {
    let sandbox = Sandbox::new();
    let output =
        sandbox.command(&["generate", "x"]).env("HYPERGEN_THREADS", "none").output().expect("it runs");
    assert_eq!(output.status.code(), Some(2));
    let said = text(&output.stderr);
    assert!(said.contains("'HYPERGEN_THREADS'") && !said.contains("'--threads"), "{said}");
    let output = sandbox.command(&["generate", "x"]).env("HYPERGEN_MODEL", "from/environment").output();
    let output = output.expect("it runs");
    assert_eq!(output.status.code(), Some(1));
    let from_environment = one_error(&text(&output.stderr));
    let output = sandbox
        .command(&["generate", "x", "--model", "from/flag"])
        .env("HYPERGEN_MODEL", "from/environment")
        .output()
        .expect("it runs");
    let from_flag = one_error(&text(&output.stderr));
    assert!(!from_flag.contains("from/environment"), "{from_flag}");
    assert!(!from_environment.contains("from/flag"), "{from_environment}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_under_standard_output_is_one_line() {
    let sandbox = Sandbox::new();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let output = sandbox.command(&["samplers"]).stdout(full).output().expect("it runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(one_error(&text(&output.stderr)).contains("the disk is full"));
}

/// A pipe whose reader has gone, as after `| head`.
#[cfg(unix)]
fn nobody() -> std::io::PipeWriter {
    std::io::pipe().expect("a pipe").1
}

#[test]
#[cfg(unix)]
fn readers_that_have_gone_are_no_failure() {
    let sandbox = Sandbox::new();
    for args in [
        &["samplers"] as &[&str],
        &["completions", "bash"],
        &["--help"],
        &["generate", "--help"],
        &["--version"],
    ] {
        let output = sandbox.command(args).stdout(nobody()).output().expect("it runs");
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()), "{args:?}");
    }
    for (args, code) in
        [(&["paint"] as &[&str], 2), (&["generate", ""], 1), (&["serve", "--port", "many"], 2)]
    {
        let status = sandbox.command(args).stderr(nobody()).status().expect("it runs");
        assert_eq!(status.code(), Some(code), "{args:?}");
    }
}
