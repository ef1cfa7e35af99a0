//! Flags of `hypergen generate` that say more than a prompt: how it is read,
//! skipped layers, rescaled guidance, SDXL's sizes. Ranges and defaults are
//! those of `hypergen_diffusion`.

use clap::Args;
use hypergen_diffusion::prompt::PromptSyntax;
use hypergen_diffusion::{CLIP_SKIP, Corner, Extent, GUIDANCE_RESCALE, Range, Request, SizeConditioning};

use crate::cli::{number, whole};

/// The flags.
#[derive(Debug, Args)]
pub(crate) struct PromptingArgs {
    /// How prompts are read: plain, every character as text; or a1111, with weights like (word:1.2) and [word], BREAK, and
    /// prompts of any length.
    #[arg(
        long,
        env = "HYPERGEN_PROMPT_SYNTAX",
        hide_env_values = true,
        value_name = "SYNTAX",
        default_value_t = PromptSyntax::Plain
    )]
    prompt_syntax: PromptSyntax,

    /// Layers of the text encoder to leave out at its end, as diffusers counts them: 1 is the penultimate layer, which others
    /// call 2.
    #[arg(long, value_name = "LAYERS", default_value_t = CLIP_SKIP.default, value_parser = whole::<usize>)]
    clip_skip: usize,

    /// How far to take back the contrast that guidance adds, 0 to 1.
    #[arg(long, value_name = "AMOUNT", default_value_t = GUIDANCE_RESCALE.default, value_parser = number)]
    guidance_rescale: f64,

    /// Size that SDXL is told the picture had before scaling [default: as drawn].
    #[arg(long, value_name = "SIZE", hide_short_help = true)]
    original_size: Option<Extent>,

    /// Corner where SDXL is told the picture was cut [default: 0,0].
    #[arg(long, value_name = "TOP,LEFT", hide_short_help = true)]
    crop: Option<Corner>,

    /// Size that SDXL is told to aim at [default: as drawn].
    #[arg(long, value_name = "SIZE", hide_short_help = true)]
    target_size: Option<Extent>,

    /// The same for the negative prompt [default: as for the prompt].
    #[arg(long, value_name = "SIZE", hide_short_help = true, requires = "negative_target_size")]
    negative_original_size: Option<Extent>,

    /// The same for the negative prompt [default: 0,0].
    #[arg(long, value_name = "TOP,LEFT", hide_short_help = true, requires = "negative_target_size")]
    negative_crop: Option<Corner>,

    /// The same for the negative prompt [default: as for the prompt].
    #[arg(long, value_name = "SIZE", hide_short_help = true, requires = "negative_original_size")]
    negative_target_size: Option<Extent>,
}

impl PromptingArgs {
    /// Checks what does not depend on the model.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        Range { name: "--clip-skip", ..CLIP_SKIP }.check(self.clip_skip)?;
        Range { name: "--guidance-rescale", ..GUIDANCE_RESCALE }.check(self.guidance_rescale)?;
        Ok(())
    }

    /// The request with these settings.
    pub(crate) fn apply(&self, request: Request) -> Request {
        let sizes = |original_size, crop: Option<Corner>, target_size| SizeConditioning {
            original_size,
            crop: crop.unwrap_or_default(),
            target_size,
        };
        Request {
            prompt_syntax: self.prompt_syntax,
            clip_skip: self.clip_skip,
            guidance_rescale: self.guidance_rescale,
            sizes: sizes(self.original_size, self.crop, self.target_size),
            negative_sizes: self
                .negative_original_size
                .map(|size| sizes(Some(size), self.negative_crop, self.negative_target_size)),
            ..request
        }
    }
}
