//! Our numbers against those of diffusers 0.42 and transformers 5 (see
//! `goldens/README.md`): token ids, single networks, whole pipelines, number
//! types. One test binary, because each one links the embedded model.

mod batches;
mod bfloat16;
mod blocks;
mod checkpoint;
mod families;
mod fields;
mod fixture;
mod formula;
mod lora;
mod lora_files;
mod lora_formats;
mod lora_malformed;
mod lora_settings;
mod mistaken;
mod networks;
mod own_sampler;
mod pipelines;
mod prompts;
mod single_file;
mod stages;
mod tokens;
