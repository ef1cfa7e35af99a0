//! The HTTP server: OpenAI's image API over one loaded model.
//!
//! [`Server`] takes an address, [`App`] makes a
//! [`Generator`](hypergen_diffusion::Generator) into routes, and an engine
//! thread between them draws one batch after the other. The crate knows a
//! model only by that trait: tests run it on a fake without weights.
//! `docs/server.md` tells how to operate it.

#![forbid(unsafe_code)]

pub mod api;
mod app;
mod auth;
mod banner;
mod body;
mod config;
mod config_file;
pub mod encode;
mod engine;
mod error;
mod logging;
mod loras;
mod message;
mod metrics;
mod nothing;
mod openapi;
mod pace;
mod queue;
mod routes;
mod server;
mod signals;
mod store;
mod trace;

pub use app::App;
pub use auth::ApiKey;
pub use config::{Bytes, Device, LogFormat, Seconds, ServeConfig};
pub use config_file::{ConfigFileError, with_file};
pub use error::ServeError;
pub use logging::{LogLevel, init_logging};
pub use server::{Exit, Server};
