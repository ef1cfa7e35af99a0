//! The networks: text encoder, UNet and VAE, driven by the checkpoint's own
//! JSON and named as its tensors are. No sampler, no prompt, no file name.

mod config;
#[cfg(test)]
pub(crate) mod goldens;
mod resnet;
pub mod text_encoder;
mod transformer;
pub mod unet;
mod unet_blocks;
pub mod unet_config;
pub mod vae;
