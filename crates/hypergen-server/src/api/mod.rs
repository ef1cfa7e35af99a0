//! The API's data: what a request may hold, what an answer holds, and how
//! errors look. Nothing here knows about sockets, queues or threads.

mod error;
mod extensions;
mod fields;
mod loras;
mod parameters;
mod response;

pub use error::{ApiError, ErrorBody, ErrorDetail};
pub(crate) use error::{Reason, SHOULD_RETRY};
pub use extensions::Defaults;
pub use fields::{Fields, Whole};
pub use loras::LoraChoice;
pub use parameters::{ImageRequest, Parameters, ResponseForm, Takes};
pub use response::{Health, ImageData, ImageResponse, LoraInfo, LoraList, Model, ModelList};
