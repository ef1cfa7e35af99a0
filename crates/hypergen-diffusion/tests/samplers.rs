//! Every sampler against full loops of diffusers' own schedulers
//! (`goldens/samplers.py`), and its errors.
//!
//! The stand-in for a network is the twin of `network` in that script.

use std::sync::Arc;

use hypergen_diffusion::samplers::{Sampler, SamplerKind, Trajectory};
use hypergen_tensor::TorchGenerator;
use serde_json::{Value, json};

/// Numbers in the latents of the goldens.
const LENGTH: usize = 64;

struct Network {
    prediction: String,
    seen: Vec<f32>,
}

impl Network {
    fn predict(&mut self, x: &[f32], timestep: f32) -> Vec<f32> {
        self.seen.push(timestep);
        let u = f64::from(timestep) / 1000.0;
        let of = |i: usize, x: f32| {
            let phase = (i * 5 % 13) as f32 * 0.3 - 1.8;
            let bump = |x: f32| x / (1.0 + x * x);
            match self.prediction.as_str() {
                "epsilon" => (0.1 + 0.85 * u) as f32 * x + 0.3 * bump(2.0 * x + phase),
                "v_prediction" => 0.8 * bump(1.5 * x + phase) - (0.3 - 0.3 * u) as f32 * x,
                _ => (1.0 - 0.9 * u) as f32 * x + 0.4 * bump(x + phase),
            }
        };
        x.iter().enumerate().map(|(i, &v)| of(i, v)).collect()
    }
}

fn network(config: &Value) -> Network {
    let prediction = config["prediction_type"].as_str().unwrap_or("epsilon").to_owned();
    Network { prediction, seen: Vec::new() }
}

/// A golden, taken apart.
struct Case<'a> {
    name: Option<&'a str>,
    config: &'a Value,
    steps: usize,
    seed: u64,
    /// Missing where diffusers fails.
    result: Option<Golden>,
}

struct Golden {
    timesteps: Vec<f64>,
    scale: f64,
    /// Root mean square, weighted mean and four numbers of the final latents.
    rms: f64,
    weighted: f64,
    slice: Vec<f64>,
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn cases(goldens: &Value) -> Vec<Case<'_>> {
    let at = |v: &Value| v.as_u64().unwrap() as usize;
    let case = |row: &'_ Value| {
        let result = row[4].is_u64().then(|| Golden {
            timesteps: floats(&goldens["timesteps"][at(&row[4])]),
            scale: row[5].as_f64().unwrap(),
            rms: row[6].as_f64().unwrap(),
            weighted: row[7].as_f64().unwrap(),
            slice: floats(&row[8]),
        });
        (at(&row[1]), at(&row[2]), row[3].as_u64().unwrap(), result)
    };
    let rows = goldens["cases"].as_array().unwrap();
    rows.iter()
        .map(|row| {
            let (config, steps, seed, result) = case(row);
            Case { name: row[0].as_str(), config: &goldens["configs"][config], steps, seed, result }
        })
        .collect()
}

/// Runs a case: the final latents, the initial scale and the timesteps seen.
fn run(case: &Case<'_>) -> Result<(Vec<f64>, f64, Vec<f32>), String> {
    let kind = case.name.map(|n| n.parse::<SamplerKind>().unwrap());
    let sampler = Sampler::new(kind, case.config, case.steps).map_err(|e| e.to_string())?;
    let mut generator = TorchGenerator::new(case.seed);
    let mut noise = vec![0.0; LENGTH];
    generator.fill_normal(&mut noise);
    let sampler = Arc::new(sampler);
    let mut trajectory = Trajectory::new(Arc::clone(&sampler), noise);
    let mut network = network(case.config);
    while let Some(query) = trajectory.query() {
        let answer = network.predict(query.input, query.timestep);
        trajectory.advance(answer, &mut |noise| generator.fill_normal(noise));
    }
    let x = trajectory.into_latents();
    if network.seen.len() != sampler.evaluations() {
        return Err(format!("{} calls, {} foretold", network.seen.len(), sampler.evaluations()));
    }
    Ok((x.into_iter().map(f64::from).collect(), sampler.initial_scale().into(), network.seen))
}

/// How far a case's final latents are from the golden's, in units of their scale.
fn distance(case: &Case<'_>, golden: &Golden) -> Result<f64, String> {
    let (x, scale, seen) = run(case)?;
    if (scale - golden.scale).abs() > 1e-5 * golden.scale {
        return Err(format!("initial scale {scale} for {}", golden.scale));
    }
    if seen.len() != golden.timesteps.len() {
        return Err(format!("{} calls, {} in the golden", seen.len(), golden.timesteps.len()));
    }
    for (&ours, &theirs) in seen.iter().zip(&golden.timesteps) {
        // Whole timesteps must be equal. Fractional ones come from float32
        // logarithms, which differ in the last place between platforms.
        let slack = if theirs.fract() == 0.0 && ours.fract() == 0.0 { 0.0 } else { 2e-3 };
        if (f64::from(ours) - theirs).abs() > slack {
            return Err(format!("timestep {ours} for {theirs}: {seen:?}"));
        }
    }
    let rms = (x.iter().map(|v| v * v).sum::<f64>() / LENGTH as f64).sqrt();
    let weighted = x.iter().enumerate().map(|(i, v)| v * ((i % 7) as f64 - 3.0)).sum::<f64>();
    let mut ours = vec![rms, weighted / LENGTH as f64];
    ours.extend([0, 21, 42, 63].map(|i| x[i]));
    let mut theirs = vec![golden.rms, golden.weighted];
    theirs.extend(&golden.slice);
    let worst = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    if worst.is_nan() || !rms.is_finite() { Err("NaN".to_owned()) } else { Ok(worst / golden.rms) }
}

/// What is asked for, in units of the latents' scale; what is found is mostly 3e-7.
fn tolerance(case: &Case<'_>) -> f64 {
    let named = || SamplerKind::named_by(case.config).map_or("", SamplerKind::name);
    let name = case.name.unwrap_or_else(named);
    let rescaled = case.config["rescale_betas_zero_snr"].as_bool().unwrap_or(false);
    let cosine = case.config["beta_schedule"] == "squaredcos_cap_v2";
    match name.split('_').next() {
        // From a sigma of thousands in few steps: the way down is the root of a
        // difference of one float32 unit, and one unit is also what torch's square
        // roots and logarithms differ by between processors.
        Some("euler" | "dpm2") if name.contains("_a") && (rescaled || cosine) => 5e-4,
        // Elsewhere the same root costs a digit at most.
        Some("dpm2") if name.contains("_a") => 5e-5,
        // The reference computes their factors in float32, as differences of
        // nearly equal numbers.
        Some("deis" | "lms") => 1e-4,
        _ if name.starts_with("dpmpp_3m") || name.starts_with("dpmpp_sde") => 1e-4,
        _ => 1e-5,
    }
}

#[test]
fn full_loops_equal_those_of_diffusers() {
    let goldens: Value = serde_json::from_str(include_str!("fixtures/samplers.json")).unwrap();
    let mut failures = Vec::new();
    let mut distances = Vec::new();
    for case in cases(&goldens) {
        let Some(golden) = &case.result else { continue };
        let described = format!("{:?} at {} steps from {}", case.name, case.steps, case.config);
        match distance(&case, golden) {
            Ok(far) if far <= tolerance(&case) => distances.push((far, described)),
            Ok(far) => failures.push(format!("{described}: off by {far:.2e}")),
            Err(problem) => failures.push(format!("{described}: {problem}")),
        }
    }
    distances.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (far, what) in distances.iter().take(20) {
        println!("{far:.2e} {what}");
    }
    println!("median {:.2e} of {}", distances[distances.len() / 2].0, distances.len());
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    assert!(distances.len() > 1000, "only {} goldens", distances.len());
}

#[test]
fn what_diffusers_cannot_do_is_an_error() {
    let goldens: Value = serde_json::from_str(include_str!("fixtures/samplers.json")).unwrap();
    let mut wrong = Vec::new();
    for case in cases(&goldens).iter().filter(|c| c.result.is_none()) {
        let described = format!("{:?} at {} steps from {}", case.name, case.steps, case.config);
        match run(case) {
            Err(error) => println!("{error}"),
            // The reference ends in NaN where rounding makes a difference negative of which
            // it takes the root, or where it multiplies the infinite last step of
            // UniPC's first kind by nothing. Neither has to be.
            Ok((x, ..))
                if matches!(case.name, Some("euler_a" | "dpm2_a" | "unipc"))
                    && x.iter().all(|v| v.is_finite()) => {}
            Ok(_) => wrong.push(described),
        }
    }
    assert!(wrong.is_empty(), "{} accepted:\n{}", wrong.len(), wrong.join("\n"));
}

/// Every field of every class at another value than its default
/// (`goldens/fields.py`): the loop is diffusers', or an error names the field.
#[test]
fn every_field_of_every_class_is_honoured_or_refused() {
    // What only flow matching, learned variances and other libraries' noise have.
    const REFUSED: [&str; 5] =
        ["use_flow_sigmas", "use_dynamic_shifting", "shift_terminal", "solver_p", "noise_sampler_seed"];
    let mut goldens: Value = serde_json::from_str(include_str!("fixtures/fields_samplers.json")).unwrap();
    let base = goldens["base"].take();
    for config in goldens["configs"].as_array_mut().unwrap() {
        for (field, value) in base.as_object().unwrap() {
            config.as_object_mut().unwrap().entry(field).or_insert(value.clone());
        }
    }
    let (mut wrong, mut drawn) = (Vec::new(), 0);
    for case in cases(&goldens) {
        let fields = case.config.as_object().unwrap();
        let refused = REFUSED.iter().find(|f| fields.contains_key(**f));
        let problem = match (refused, &case.result, run(&case)) {
            (Some(field), _, Err(error)) if error.contains(*field) => continue,
            (Some(field), _, result) => format!("not refused by {field}: {:?}", result.err()),
            (None, None, Err(_)) => continue,
            (None, None, Ok(_)) => "accepted, and diffusers fails".to_owned(),
            (None, Some(golden), _) => match distance(&case, golden) {
                Ok(far) if far <= tolerance(&case) => {
                    drawn += 1;
                    continue;
                }
                Ok(far) => format!("off by {far:.2e}"),
                Err(problem) => problem,
            },
        };
        wrong.push(format!("{}: {problem}", case.config));
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    assert!(drawn > 300, "only {drawn}");
}

/// Values that the classes trip over, though what they mean is plain.
#[test]
fn other_ways_to_write_a_value_are_read() {
    let plain = json!({"beta_schedule": "scaled_linear", "steps_offset": 1, "timestep_spacing": "leading"});
    for (name, fields) in [
        ("ddim", json!({"num_train_timesteps": 1000.0, "steps_offset": 1.0, "clip_sample": null})),
        ("euler", json!({"use_karras_sigmas": null, "use_beta_sigmas": null, "timestep_type": null})),
        ("dpmpp_2m", json!({"solver_order": 2.0, "thresholding": null, "variance_type": "fixed_small"})),
        ("unipc", json!({"disable_corrector": null, "solver_p": null, "sigma_min": null})),
        ("lcm", json!({"original_inference_steps": 50.0, "rescale_betas_zero_snr": null})),
    ] {
        let mut config = plain.clone();
        if name == "ddim" {
            config["clip_sample"] = json!(false);
        }
        let drawn = |config: &Value| {
            run(&Case { name: Some(name), config, steps: 6, seed: 3, result: None }).map(|(x, ..)| x)
        };
        let expected = drawn(&config).unwrap();
        config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        assert_eq!(drawn(&config).unwrap_or_else(|e| panic!("{fields}: {e}")), expected, "{fields}");
    }
}

fn error(name: Option<&str>, config: Value, steps: usize) -> String {
    let kind = name.map(|n| n.parse().unwrap());
    match Sampler::new(kind, &config, steps) {
        Ok(_) => panic!("{name:?} takes {config} at {steps} steps"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn bad_fields_are_errors_by_name() {
    let table = [
        ("ddim", "num_train_timesteps", json!(0)),
        ("ddim", "num_train_timesteps", json!(1_000_000_000_000u64)),
        ("ddim", "num_train_timesteps", json!("1000")),
        ("ddim", "num_train_timesteps", json!(1000.5)),
        ("ddim", "num_train_timesteps", json!(null)),
        ("ddim", "num_train_timesteps", json!(-1)),
        ("ddim", "beta_start", json!("0.1")),
        ("ddim", "beta_start", json!(-0.1)),
        ("ddim", "beta_end", json!(1e300)),
        ("ddim", "beta_end", json!("NaN")),
        ("ddim", "beta_schedule", json!("sigmoid")),
        ("ddim", "beta_schedule", json!(3)),
        ("ddim", "trained_betas", json!([])),
        ("ddim", "trained_betas", json!([0.1, 0.2])),
        ("ddim", "trained_betas", json!([0.1, "x"])),
        ("ddim", "trained_betas", json!({})),
        ("ddim", "prediction_type", json!("flow_prediction")),
        ("ddim", "timestep_spacing", json!("karras")),
        ("ddim", "timestep_spacing", json!(null)),
        ("ddim", "steps_offset", json!(-1)),
        ("ddim", "steps_offset", json!(1.5)),
        ("ddim", "steps_offset", json!(i64::MAX)),
        ("ddim", "clip_sample", json!("true")),
        ("ddim", "clip_sample_range", json!([1.0])),
        ("ddim", "set_alpha_to_one", json!(1)),
        ("ddim", "rescale_betas_zero_snr", json!("yes")),
        ("pndm", "prediction_type", json!("sample")),
        ("pndm", "skip_prk_steps", json!(0)),
        ("euler", "timestep_type", json!("odd")),
        ("euler", "interpolation_type", json!("cubic")),
        ("euler", "final_sigmas_type", json!("one")),
        ("euler_karras", "sigma_max", json!("large")),
        ("euler_karras", "sigma_min", json!(-1.0)),
        ("euler_a", "prediction_type", json!("sample")),
        ("dpmpp_2m", "solver_order", json!(4)),
        ("dpmpp_2m", "solver_order", json!(0)),
        ("dpmpp_2m", "solver_type", json!("rk4")),
        ("dpmpp_2m", "algorithm_type", json!("magic")),
        ("dpmpp_2m", "use_flow_sigmas", json!(true)),
        ("dpmpp_2m", "use_dynamic_shifting", json!(true)),
        ("dpmpp_2m", "variance_type", json!("learned")),
        ("dpmpp_2s", "variance_type", json!("learned_range")),
        ("lcm", "original_inference_steps", json!(1001)),
        ("dpmpp_2m", "lambda_min_clipped", json!("low")),
        ("dpmpp_2m", "lambda_min_clipped", json!(1000.0)),
        ("dpmpp_2m", "lower_order_final", json!("no")),
        ("dpmpp_2m", "euler_at_final", json!(2)),
        ("dpmpp_2m", "thresholding", json!([])),
    ];
    for (name, field, value) in table {
        let message = error(Some(name), json!({ "clip_sample": true, field: value }), 20);
        assert!(message.contains(&format!("\"{field}\"")), "{name} with {field} {value}: {message}");
    }
    let two = json!({"use_karras_sigmas": true, "use_beta_sigmas": true});
    assert!(error(Some("euler"), two, 20).contains("use_beta_sigmas"));
}

#[test]
fn bad_files_and_steps_are_errors() {
    assert!(error(None, json!(null), 20).contains("not a JSON object"));
    assert!(error(None, json!({}), 20).contains("_class_name"));
    assert!(error(None, json!({"_class_name": ["DDIMScheduler"]}), 20).contains("DDIMScheduler"));
    let flow = json!({"_class_name": "FlowMatchEulerDiscreteScheduler"});
    assert!(error(None, flow, 20).contains("FlowMatchEulerDiscreteScheduler"));
    for kind in SamplerKind::ALL {
        let small = json!({"num_train_timesteps": 10, "skip_prk_steps": true});
        assert!(error(Some(kind.name()), small.clone(), 11).contains("11 steps"), "{kind}");
        assert!(error(Some(kind.name()), small, 0).contains("at least 1"), "{kind}");
    }
    // The default of a field that is absent may not fit either.
    let few = json!({"num_train_timesteps": 20});
    assert!(error(Some("lcm"), few.clone(), 4).contains("original_inference_steps"));
    assert!(error(Some("tcd"), few, 4).contains("original_inference_steps"));
    // Leading spacing with an offset leaves the table at its noisy end.
    assert!(error(Some("ddim"), json!({"steps_offset": 1}), 1000).contains("fewer steps"));
    let trained = json!({"trained_betas": vec![1.0; 10], "num_train_timesteps": 10});
    assert!(error(Some("euler"), trained, 4).contains("infinite noise"));
}

#[test]
fn every_number_of_steps_runs() {
    let config = json!({
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
        "clip_sample": false, "skip_prk_steps": true, "original_inference_steps": 150,
    });
    for kind in SamplerKind::ALL {
        for spacing in ["leading", "linspace", "trailing"] {
            let mut config = config.clone();
            config["timestep_spacing"] = json!(spacing);
            for steps in 1..=150 {
                let case = Case { name: Some(kind.name()), config: &config, steps, seed: 1, result: None };
                let (x, ..) = run(&case).unwrap_or_else(|e| panic!("{kind}, {steps} {spacing}: {e}"));
                assert!(x.iter().all(|v| v.abs() < 100.0), "{kind}, {steps} steps, {spacing}: {x:?}");
            }
        }
    }
}

#[test]
fn a_file_for_deis_serves_dpmpp() {
    // diffusers translates these two values as well, but then trips over the old one.
    let deis = json!({"algorithm_type": "deis", "solver_type": "logrho"});
    let case = |config| Case { name: Some("dpmpp_2m"), config, steps: 20, seed: 3, result: None };
    assert_eq!(run(&case(&deis)).unwrap().0, run(&case(&json!({}))).unwrap().0);
}
