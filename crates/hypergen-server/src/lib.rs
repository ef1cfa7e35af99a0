//! The HTTP server.

pub mod encode;
