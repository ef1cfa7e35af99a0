//! The families of checkpoints, one row each: what a model is called, the size
//! that it was trained for, and what a request gets that names nothing.
//!
//! A family is recognised from the checkpoint: from the width of its text, its
//! conditioning and its scheduler's file. Where those say too little (a distilled
//! model in a single file under a name of its own), users name it. How its
//! networks compute is not written here; their own configuration says that.

use std::fmt;
use std::str::FromStr;

use serde_json::{Value, json};

use crate::{Error, ErrorKind};

/// What a checkpoint says of itself, as far as it tells families apart.
#[derive(Debug, Clone, Copy)]
pub struct Traits<'a> {
    /// The model inside the program.
    pub embedded: bool,
    /// Two text encoders, pooled text, sizes and crops.
    pub xl: bool,
    /// Width of the text embeddings (`cross_attention_dim`).
    pub context: usize,
    /// The UNet is told the guidance scale (`time_cond_proj_dim`).
    pub guidance_embedding: bool,
    /// `scheduler_config.json`.
    pub scheduler: &'a Value,
}

impl Traits<'_> {
    fn text(&self, field: &str) -> &str {
        self.scheduler.get(field).and_then(Value::as_str).unwrap_or_default()
    }

    fn class(&self) -> &str {
        self.text("_class_name")
    }

    fn predicts(&self, what: &str) -> bool {
        // A file that does not say predicts epsilon.
        match self.text("prediction_type") {
            "" => what == "epsilon",
            found => found == what,
        }
    }

    /// The mark of models distilled by an adversary: few steps that begin at
    /// pure noise. Models of zero terminal SNR begin there too, with
    /// another prediction or rescaled betas.
    fn adversarial(&self, class: &str) -> bool {
        let rescaled = self.scheduler.get("rescale_betas_zero_snr").and_then(Value::as_bool).unwrap_or(false);
        self.class() == class
            && self.text("timestep_spacing") == "trailing"
            && !rescaled
            && !self.predicts("v_prediction")
    }
}

/// The networks that a family has, as far as they tell that it cannot be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Networks {
    /// One text encoder.
    Plain,
    /// One text encoder, and not that of Stable Diffusion 2.x.
    Sd1,
    /// One text encoder, and not that of Stable Diffusion 1.x.
    Sd2,
    /// Those of SDXL.
    Xl,
    /// The UNet is told the guidance scale.
    Guided,
    /// Of Stable Diffusion or SDXL.
    Any,
}

impl Networks {
    fn fit(self, t: &Traits<'_>) -> bool {
        match self {
            Self::Guided => t.guidance_embedding,
            _ if t.guidance_embedding => false,
            Self::Plain => !t.xl,
            Self::Sd1 => !t.xl && t.context != 1024,
            Self::Sd2 => !t.xl && t.context != 768,
            Self::Xl => t.xl,
            Self::Any => true,
        }
    }
}

/// A family as users name it where its files do not say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FamilyName(&'static str);

impl FamilyName {
    /// All names, from the most general family to the most particular.
    pub fn all() -> Vec<FamilyName> {
        let mut all: Vec<FamilyName> = vec![];
        for (slug, _) in TABLE.iter().rev().filter_map(|f| f.named) {
            if !all.iter().any(|known| known.0 == slug) {
                all.push(FamilyName(slug));
            }
        }
        all
    }

    /// The name that users type.
    pub fn name(self) -> &'static str {
        self.0
    }
}

impl fmt::Display for FamilyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl FromStr for FamilyName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let all = Self::all();
        all.iter().copied().find(|family| family.0 == text).ok_or_else(|| {
            let names: Vec<_> = all.iter().map(|family| family.0).collect();
            Error::new(ErrorKind::Request, format!("unknown family '{text}': use {}", names.join(", ")))
        })
    }
}

/// One family.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// In words, for people.
    pub name: &'static str,
    /// How users name it, and the networks that it has. Some have no name: nothing else is like them.
    named: Option<(&'static str, Networks)>,
    /// Side in pixels that it was trained for, where its UNet does not say.
    pub native_side: usize,
    /// Steps where a request gives none, if the family has its own.
    pub steps: Option<usize>,
    /// Guidance where a request gives none, if the family has its own.
    pub guidance: Option<f64>,
    /// Smallest guidance scale that makes sense.
    pub min_guidance: f64,
    /// The scheduler's file of the family's published checkpoint, which a
    /// single file lacks. Its sampler is the family's default.
    pub scheduler: fn() -> Value,
    fits: fn(&Traits<'_>) -> bool,
}

/// No guidance at all, which is how adversarial distillations draw.
const UNGUIDED: f64 = 0.0;

const EULER: &str = "EulerDiscreteScheduler";
const EULER_ANCESTRAL: &str = "EulerAncestralDiscreteScheduler";

/// From the most particular family to the most general: the first that fits.
#[rustfmt::skip]
const TABLE: &[Family] = &[
    Family { name: "emoji (embedded)", named: None, native_side: 64, steps: None, guidance: None, min_guidance: 1.0,
        scheduler: sd2_v, fits: |t| t.embedded },
    // Luo et al. 2023, arXiv 2310.04378. With guidance distilled into the UNet, and with LoRA merges that
    // have none. The reference's own pipeline has 4 steps and 8.5.
    Family { name: "LCM (guidance embedded)", named: Some(("lcm", Networks::Guided)), native_side: 768, steps: Some(4), guidance: Some(8.5), min_guidance: 1.0,
        scheduler: lcm, fits: |t| t.guidance_embedding },
    Family { name: "SDXL LCM", named: Some(("lcm", Networks::Xl)), native_side: 1024, steps: Some(4), guidance: Some(1.0), min_guidance: UNGUIDED,
        scheduler: lcm, fits: |t| t.xl && t.class() == "LCMScheduler" },
    Family { name: "LCM", named: Some(("lcm", Networks::Plain)), native_side: 512, steps: Some(4), guidance: Some(1.0), min_guidance: UNGUIDED,
        scheduler: lcm, fits: |t| t.class() == "LCMScheduler" },
    // Zheng et al. 2024, arXiv 2402.19159.
    Family { name: "TCD", named: Some(("tcd", Networks::Any)), native_side: 1024, steps: Some(4), guidance: Some(UNGUIDED), min_guidance: UNGUIDED,
        scheduler: tcd, fits: |t| t.class() == "TCDScheduler" },
    // Sauer et al. 2023, arXiv 2311.17042.
    Family { name: "SDXL Turbo", named: Some(("sdxl-turbo", Networks::Xl)), native_side: 512, steps: Some(1), guidance: Some(UNGUIDED), min_guidance: UNGUIDED,
        scheduler: sdxl_turbo, fits: |t| t.xl && t.adversarial(EULER_ANCESTRAL) },
    Family { name: "SD Turbo", named: Some(("sd-turbo", Networks::Sd2)), native_side: 512, steps: Some(1), guidance: Some(UNGUIDED), min_guidance: UNGUIDED,
        scheduler: sd_turbo, fits: |t| t.context == 1024 && (t.adversarial(EULER) || t.adversarial(EULER_ANCESTRAL)) },
    // Lin et al. 2024, arXiv 2402.13929: the one-step model predicts the picture itself.
    Family { name: "SDXL Lightning (one step)", named: Some(("sdxl-lightning-1step", Networks::Xl)), native_side: 1024, steps: Some(1), guidance: Some(UNGUIDED), min_guidance: UNGUIDED,
        scheduler: lightning_one, fits: |t| t.xl && t.adversarial(EULER) && t.predicts("sample") },
    Family { name: "SDXL Lightning", named: Some(("sdxl-lightning", Networks::Xl)), native_side: 1024, steps: Some(4), guidance: Some(UNGUIDED), min_guidance: UNGUIDED,
        scheduler: lightning, fits: |t| t.xl && t.adversarial(EULER) },
    Family { name: "Stable Diffusion XL", named: Some(("sdxl", Networks::Xl)), native_side: 1024, steps: None, guidance: None, min_guidance: 1.0,
        scheduler: sdxl, fits: |t| t.xl },
    Family { name: "Stable Diffusion 2.x (v prediction)", named: Some(("sd2-v", Networks::Sd2)), native_side: 768, steps: None, guidance: None, min_guidance: 1.0,
        scheduler: sd2_v, fits: |t| t.context == 1024 && t.predicts("v_prediction") },
    Family { name: "Stable Diffusion 2.x base", named: Some(("sd2", Networks::Sd2)), native_side: 512, steps: None, guidance: None, min_guidance: 1.0,
        scheduler: sd2_base, fits: |t| t.context == 1024 },
    Family { name: "Stable Diffusion 1.x", named: Some(("sd1", Networks::Sd1)), native_side: 512, steps: None, guidance: None, min_guidance: 1.0,
        scheduler: sd1, fits: |t| t.context == 768 },
    Family { name: "Stable Diffusion", named: None, native_side: 512, steps: None, guidance: None, min_guidance: 1.0,
        scheduler: sd1, fits: |_| true },
];

impl Family {
    /// All families.
    pub const ALL: &[Family] = TABLE;

    /// The family of a checkpoint.
    pub fn of(traits: &Traits<'_>) -> &'static Family {
        // The last row fits everything.
        TABLE.iter().find(|f| (f.fits)(traits)).unwrap_or(&TABLE[TABLE.len() - 1])
    }

    /// The family of this name, for a checkpoint with these networks.
    ///
    /// # Errors
    /// When the networks are of another family.
    pub fn named(name: FamilyName, traits: &Traits<'_>) -> Result<&'static Family, Error> {
        let fits =
            |f: &&Family| f.named.is_some_and(|(slug, networks)| slug == name.0 && networks.fit(traits));
        TABLE.iter().filter(|_| !traits.embedded).find(fits).ok_or_else(|| {
            let found = match traits {
                t if t.embedded => "is the one inside the program".to_owned(),
                t if t.guidance_embedding => {
                    "has a UNet that is told the guidance scale, as only lcm has".to_owned()
                }
                t if t.xl => "has the two text encoders of SDXL".to_owned(),
                t => format!("has one text encoder, of width {}", t.context),
            };
            Error::new(ErrorKind::Model, format!("this model cannot be of the family {name}: it {found}"))
        })
    }
}

/// What all Stable Diffusion models were trained with, and `own` fields.
fn scheduler(class: &str, own: Value) -> Value {
    let mut all = json!({
        "_class_name": class, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000, "clip_sample": false, "set_alpha_to_one": false, "skip_prk_steps": true,
        "steps_offset": 1, "trained_betas": null,
    });
    if let (Some(all), Value::Object(own)) = (all.as_object_mut(), own) {
        all.extend(own);
    }
    all
}

// Each has exactly the fields of the published file, beside whose repository on
// the hub it stands: a sampler chosen by name takes its own default for a field
// that the file lacks.

/// `stable-diffusion-v1-5/stable-diffusion-v1-5`.
pub(crate) fn sd1() -> Value {
    scheduler("PNDMScheduler", json!({}))
}

/// `stabilityai/stable-diffusion-2-1`.
pub(crate) fn sd2_v() -> Value {
    scheduler("DDIMScheduler", json!({"prediction_type": "v_prediction"}))
}

/// `stabilityai/stable-diffusion-2-1-base`.
pub(crate) fn sd2_base() -> Value {
    scheduler("PNDMScheduler", json!({"prediction_type": "epsilon"}))
}

/// What newer files hold beside the older fields.
fn newer(spacing: &str, prediction: &str) -> Value {
    json!({
        "prediction_type": prediction, "timestep_spacing": spacing, "interpolation_type": "linear",
        "sample_max_value": 1.0, "use_karras_sigmas": false,
    })
}

/// `stabilityai/stable-diffusion-xl-base-1.0`.
pub(crate) fn sdxl() -> Value {
    scheduler(EULER, newer("leading", "epsilon"))
}

/// `stabilityai/sdxl-turbo`.
pub(crate) fn sdxl_turbo() -> Value {
    scheduler(EULER_ANCESTRAL, newer("trailing", "epsilon"))
}

/// `stabilityai/sd-turbo`.
pub(crate) fn sd_turbo() -> Value {
    scheduler(EULER, newer("trailing", "epsilon"))
}

/// The base model's file as the card of `ByteDance/SDXL-Lightning` changes it.
pub(crate) fn lightning() -> Value {
    scheduler(EULER, newer("trailing", "epsilon"))
}

/// The same for its model of one step.
pub(crate) fn lightning_one() -> Value {
    scheduler(EULER, newer("trailing", "sample"))
}

/// `SimianLuo/LCM_Dreamshaper_v7`.
fn lcm() -> Value {
    scheduler("LCMScheduler", json!({"original_inference_steps": 50, "prediction_type": "epsilon"}))
}

/// The base model's file under the class that the card of `h1t/TCD-SDXL-LoRA` names.
fn tcd() -> Value {
    scheduler("TCDScheduler", json!({"prediction_type": "epsilon"}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samplers::Sampler;

    /// Each family's own scheduler, with its networks' traits, leads back to it.
    #[test]
    fn every_family_is_recognised_by_its_own_files() {
        for family in Family::ALL {
            let scheduler = (family.scheduler)();
            let xl = family.native_side == 1024 || family.name.starts_with("SDXL");
            let context = match family.name {
                name if xl || name.starts_with("LCM") => 2048,
                name if name.contains("2.x") || name == "SD Turbo" => 1024,
                "Stable Diffusion" => 80,
                _ => 768,
            };
            let traits = Traits {
                embedded: family.name.contains("embedded)") && family.native_side == 64,
                xl,
                context,
                guidance_embedding: family.name == "LCM (guidance embedded)",
                scheduler: &scheduler,
            };
            assert_eq!(Family::of(&traits).name, family.name);
        }
    }

    #[test]
    fn a_name_means_the_family_that_the_networks_allow() {
        let scheduler = sd1();
        let traits = |xl, context, guidance_embedding| Traits {
            embedded: false,
            xl,
            context,
            guidance_embedding,
            scheduler: &scheduler,
        };
        let named = |name: &str, traits: &Traits<'_>| {
            Family::named(name.parse().expect("a known name"), traits).map(|f| f.name)
        };
        let (sd1, sd2, xl) =
            (traits(false, 768, false), traits(false, 1024, false), traits(true, 2048, false));
        assert_eq!(named("lcm", &sd1), Ok("LCM"));
        assert_eq!(named("lcm", &xl), Ok("SDXL LCM"));
        assert_eq!(named("lcm", &traits(false, 768, true)), Ok("LCM (guidance embedded)"));
        assert_eq!(named("sdxl-turbo", &xl), Ok("SDXL Turbo"));
        assert_eq!(named("sd-turbo", &sd2), Ok("SD Turbo"));
        for (name, wrong) in [("sdxl-turbo", &sd1), ("sd-turbo", &sd1), ("sd1", &sd2), ("sd2", &xl)] {
            let error = named(name, wrong).expect_err("other networks").message;
            assert!(error.contains(name) && error.contains("text encoder"), "{error}");
        }
        assert!(named("sd1", &Traits { embedded: true, ..sd1 }).is_err());
        let error = "flux".parse::<FamilyName>().expect_err("unknown").message;
        assert!(FamilyName::all().iter().all(|family| error.contains(family.name())), "{error}");
    }

    #[test]
    fn every_familys_scheduler_can_be_sampled_with() {
        for family in Family::ALL {
            let steps = family.steps.unwrap_or(20);
            let sampler = Sampler::new(None, &(family.scheduler)(), steps).expect(family.name);
            let named = match family.name {
                name if name.contains("LCM") => "lcm",
                "TCD" => "tcd",
                "SDXL Turbo" => "euler_a",
                "SD Turbo" | "SDXL Lightning" | "SDXL Lightning (one step)" | "Stable Diffusion XL" => {
                    "euler"
                }
                "Stable Diffusion 2.x (v prediction)" | "emoji (embedded)" => "ddim",
                _ => "pndm",
            };
            assert_eq!(sampler.kind().name(), named, "{}", family.name);
        }
    }

    /// Fine-tunes of zero terminal SNR have trailing steps too, and want guidance.
    #[test]
    fn trailing_steps_alone_make_no_turbo() {
        for own in [
            json!({"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
            json!({"timestep_spacing": "trailing", "rescale_betas_zero_snr": true}),
        ] {
            for (class, xl, context) in
                [(EULER, true, 2048), (EULER_ANCESTRAL, true, 2048), (EULER, false, 1024)]
            {
                let scheduler = scheduler(class, own.clone());
                let traits =
                    Traits { embedded: false, xl, context, guidance_embedding: false, scheduler: &scheduler };
                assert_eq!(Family::of(&traits).guidance, None, "{scheduler}");
            }
        }
    }
}
