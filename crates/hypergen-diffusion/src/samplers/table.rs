//! The table of samplers: one line each, by the names that users know.
//!
//! A line gives the diffusers class whose fields and defaults apply, the
//! function that builds the sampler, and what its name sets over the file's
//! fields. Samplers with a choice of noise levels come in four forms: as
//! the file says, and with Karras, exponential or beta sigmas.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;

use serde_json::Value;

use super::config::{Fields, Preset, object};
use super::{Built, SamplerError, consistency, ddim, ddpm, deis, dpm_multistep, dpm_sde, dpm2};
use super::{dpm_singlestep, euler, heun, lms, pndm, unipc};

/// A sampler that users may name.
#[derive(Clone, Copy)]
pub struct SamplerKind {
    name: &'static str,
    about: &'static str,
    class: &'static str,
    presets: &'static [(&'static str, Preset)],
    ramp: &'static [(&'static str, Preset)],
    build: fn(&Fields, usize) -> Result<Built, SamplerError>,
}

const KARRAS: &[(&str, Preset)] = &[
    ("use_karras_sigmas", Preset::Flag(true)),
    ("use_exponential_sigmas", Preset::Flag(false)),
    ("use_beta_sigmas", Preset::Flag(false)),
];
const EXPONENTIAL: &[(&str, Preset)] = &[
    ("use_karras_sigmas", Preset::Flag(false)),
    ("use_exponential_sigmas", Preset::Flag(true)),
    ("use_beta_sigmas", Preset::Flag(false)),
];
const BETA: &[(&str, Preset)] = &[
    ("use_karras_sigmas", Preset::Flag(false)),
    ("use_exponential_sigmas", Preset::Flag(false)),
    ("use_beta_sigmas", Preset::Flag(true)),
];

/// Turns lines into a slice of kinds: `one` for a sampler of one form, `four`
/// for one of four.
macro_rules! table {
    (@kind $name:expr, $about:expr, $class:expr, $build:expr, $presets:expr, $ramp:expr) => {
        SamplerKind { name: $name, about: $about, class: $class, build: $build, presets: &$presets, ramp: $ramp }
    };
    (@next [$($done:expr,)*]) => { &[$($done),*] };
    (@next [$($done:expr,)*]
        one $name:literal, $class:expr, $build:expr, $presets:expr, $about:literal; $($rest:tt)*) => {
        table!(@next [$($done,)* table!(@kind $name, $about, $class, $build, $presets, &[]),] $($rest)*)
    };
    (@next [$($done:expr,)*]
        four $name:literal, $class:expr, $build:expr, $presets:expr, $about:literal; $($rest:tt)*) => {
        table!(@next [$($done,)*
            table!(@kind $name, $about, $class, $build, $presets, &[]),
            table!(@kind concat!($name, "_karras"), concat!($about, "; Karras noise levels"),
                $class, $build, $presets, KARRAS),
            table!(@kind concat!($name, "_exponential"), concat!($about, "; exponential noise levels"),
                $class, $build, $presets, EXPONENTIAL),
            table!(@kind concat!($name, "_beta"), concat!($about, "; beta-distributed noise levels"),
                $class, $build, $presets, BETA),
        ] $($rest)*)
    };
    ($($rows:tt)*) => { table!(@next [] $($rows)*) };
}

/// In the order in which they are listed to users. The first line of a class is
/// the one that a file naming this class means, unless its fields match a later one.
#[rustfmt::skip]
const TABLE: &[SamplerKind] = table![
    one "ddim", ddim::CLASS, ddim::build, [],
        "Denoising diffusion implicit models: deterministic, good from 20 steps";
    one "pndm", pndm::CLASS, pndm::build, [],
        "Pseudo numerical method: deterministic multistep, the first default of Stable Diffusion";
    four "euler", euler::CLASS, euler::build, [],
        "Euler's method: deterministic, simple and robust";
    one "euler_a", euler::ANCESTRAL_CLASS, euler::build_ancestral, [],
        "Euler's method with fresh noise at each step: varied, never settles";
    four "heun", heun::CLASS, heun::build, [],
        "Heun's method: as Euler's with twice the work, more exact";
    four "dpm2", dpm2::CLASS, dpm2::build, [],
        "DPM-Solver-2: twice the work per step, more exact";
    four "dpm2_a", dpm2::ANCESTRAL_CLASS, dpm2::build_ancestral, [],
        "DPM-Solver-2 with fresh noise at each step";
    four "lms", lms::CLASS, lms::build, [],
        "Linear multistep method over the last four slopes";
    four "dpmpp_2m", dpm_multistep::CLASS, dpm_multistep::build, [],
        "DPM-Solver++ of second order over past steps: good from 15 steps";
    four "dpmpp_2m_sde", dpm_multistep::CLASS, dpm_multistep::build,
        [("algorithm_type", Preset::Text("sde-dpmsolver++"))],
        "DPM-Solver++ over past steps with fresh noise: fine detail from 25 steps";
    four "dpmpp_3m_sde", dpm_multistep::CLASS, dpm_multistep::build,
        [("algorithm_type", Preset::Text("sde-dpmsolver++")), ("solver_order", Preset::Integer(3))],
        "DPM-Solver++ of third order with fresh noise: for many steps";
    four "dpmpp_2s", dpm_singlestep::CLASS, dpm_singlestep::build, [],
        "DPM-Solver++ of second order in pairs of steps";
    four "dpmpp_2s_a", dpm_singlestep::CLASS, dpm_singlestep::build,
        [("algorithm_type", Preset::Text("sde-dpmsolver++"))],
        "DPM-Solver++ in pairs of steps with fresh noise";
    four "dpmpp_sde", dpm_sde::CLASS, dpm_sde::build, [],
        "DPM-Solver++ along a Brownian path: twice the work, good from 10 steps";
    four "unipc", unipc::CLASS, unipc::build, [],
        "Unified predictor-corrector: good from 10 steps";
    four "deis", deis::CLASS, deis::build, [],
        "Exponential integrator over past steps: good from 15 steps";
    one "ddpm", ddpm::CLASS, ddpm::build, [],
        "The chain of the first diffusion models: fresh noise, wants many steps";
    one "lcm", consistency::LCM_CLASS, consistency::build_lcm, [],
        "For latent consistency models: 1 to 8 steps";
    one "tcd", consistency::TCD_CLASS, consistency::build_tcd, [],
        "For models of trajectory consistency distillation: 1 to 8 steps";
];

impl SamplerKind {
    /// All samplers, in the order in which they are listed to users.
    pub const ALL: &[SamplerKind] = TABLE;

    /// The name that users type.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// What it is good for, in one line for people who choose.
    pub fn about(self) -> &'static str {
        self.about
    }

    /// The sampler that a scheduler's file names: the line of its class, or
    /// that form of it which the fields describe (`use_karras_sigmas`, say).
    /// Built from the same file it is what the file asks for.
    ///
    /// # Errors
    /// When the file names no class, or one that has no line here.
    pub fn named_by(config: &Value) -> Result<Self, SamplerError> {
        let map = object(config)?;
        let class = match map.get("_class_name") {
            Some(Value::String(class)) => class.as_str(),
            Some(other) => return Err(SamplerError::Class(other.to_string())),
            None => return Err(SamplerError::NoClass),
        };
        let described = |kind: &&SamplerKind| {
            kind.presets.iter().chain(kind.ramp).all(|(field, preset)| match *preset {
                Preset::Flag(value) => map.get(*field).and_then(Value::as_bool).unwrap_or(false) == value,
                Preset::Integer(value) => map.get(*field).and_then(Value::as_i64) == Some(value),
                Preset::Text(value) => map.get(*field).and_then(Value::as_str) == Some(value),
            })
        };
        // The more a line sets, the more it says about the file.
        let lines = TABLE.iter().filter(|kind| kind.class == class && described(kind));
        let closest = lines.rev().max_by_key(|kind| kind.presets.len() + kind.ramp.len());
        let first = || TABLE.iter().find(|kind| kind.class == class);
        closest.or_else(first).copied().ok_or_else(|| SamplerError::Class(class.to_owned()))
    }

    /// Builds the sampler from a file's fields. With `from_name` the name's own
    /// settings go over the file's.
    pub(super) fn build(self, config: &Value, steps: usize, from_name: bool) -> Result<Built, SamplerError> {
        let mut presets = Vec::new();
        if from_name {
            presets.extend_from_slice(self.presets);
            presets.extend_from_slice(self.ramp);
        }
        (self.build)(&Fields::new(self.class, config, &presets)?, steps)
    }
}

impl fmt::Debug for SamplerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SamplerKind({})", self.name)
    }
}

impl PartialEq for SamplerKind {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for SamplerKind {}

impl Hash for SamplerKind {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}

impl fmt::Display for SamplerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name)
    }
}

impl FromStr for SamplerKind {
    type Err = SamplerError;

    fn from_str(text: &str) -> Result<Self, SamplerError> {
        Self::ALL
            .iter()
            .copied()
            .find(|s| s.name == text)
            .ok_or_else(|| SamplerError::Unknown(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use serde_json::json;

    use super::*;

    #[test]
    fn names_are_unique_and_read_back() {
        let names: HashSet<_> = SamplerKind::ALL.iter().map(|k| k.name()).collect();
        assert_eq!(names.len(), SamplerKind::ALL.len());
        for kind in SamplerKind::ALL {
            assert_eq!(kind.name().parse::<SamplerKind>().as_ref(), Ok(kind));
            assert!(!kind.about().is_empty() && kind.about().len() < 120, "{kind}: {}", kind.about());
        }
        assert!(matches!("Euler".parse::<SamplerKind>(), Err(SamplerError::Unknown(_))));
    }

    #[test]
    fn a_file_names_its_sampler() {
        let name = |config: Value| SamplerKind::named_by(&config).map(SamplerKind::name);
        assert_eq!(name(json!({"_class_name": "PNDMScheduler"})), Ok("pndm"));
        let karras = json!({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": true});
        assert_eq!(name(karras), Ok("dpmpp_2m_karras"));
        let plain = json!({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": null});
        assert_eq!(name(plain), Ok("dpmpp_2m"));
        assert_eq!(name(json!({})), Err(SamplerError::NoClass));
        assert_eq!(name(json!([])), Err(SamplerError::NotAnObject));
        let flow = json!({"_class_name": "FlowMatchEulerDiscreteScheduler"});
        assert_eq!(name(flow), Err(SamplerError::Class("FlowMatchEulerDiscreteScheduler".to_owned())));
    }
}
