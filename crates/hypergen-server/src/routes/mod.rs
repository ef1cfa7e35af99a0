//! The routes, one file each. A handler turns a request into calls of the
//! parts and their answer into a response; nothing else happens here.

pub(crate) mod docs;
pub(crate) mod generations;
pub(crate) mod health;
pub(crate) mod images;
pub(crate) mod loras;
pub(crate) mod metrics;
pub(crate) mod models;
