//! The HTTP API on a generator without weights: every rule of the
//! specification and of the server around it. Most tests call the routes
//! without a socket; `sockets` and `shutdown` use real ones, where closing
//! them is the point. Real clients with a real model: `tests/clients/`.

mod auth;
mod errors;
mod fake;
mod generations;
mod inside;
mod loras;
mod pictures;
mod queue;
mod shutdown;
mod sockets;
mod support;
