//! Our numbers against those of diffusers 0.42 and transformers 5 (see
//! `goldens/README.md`): token ids, single networks, whole pipelines, number
//! types. One test binary, because each one links the embedded model.

mod bfloat16;
mod blocks;
mod checkpoint;
mod families;
mod fixture;
mod formula;
mod lora;
mod lora_files;
mod lora_formats;
mod lora_malformed;
mod networks;
mod pipelines;
mod prompts;
mod single_file;
mod stages;
mod tokens;
