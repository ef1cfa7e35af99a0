//! Small texts that stand for something: sizes, samplers, models on the hub,
//! times. What is read and printed reads back as itself.

use std::fmt::{Debug, Display};
use std::str::FromStr;

use hypergen_diffusion::hub::ModelId;
use hypergen_diffusion::presets::Preset;
use hypergen_diffusion::prompt::PromptSyntax;
use hypergen_diffusion::samplers::SamplerKind;
use hypergen_diffusion::{Corner, DTypeChoice, Extent, Size};
use hypergen_server::encode::ImageFormat;
use hypergen_server::{ApiKey, Bytes, Seconds};

use crate::check_message;
use crate::targets::itself;

/// The input is the text.
pub(crate) fn read(data: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(data);
    let text = text.trim_end_matches('\n');
    prints_back::<Size>(text);
    prints_back::<SamplerKind>(text);
    prints_back::<PromptSyntax>(text);
    prints_back::<DTypeChoice>(text);
    prints_back::<ImageFormat>(text);
    prints_back::<Preset>(text);
    for error in [
        text.parse::<Extent>().err(),
        text.parse::<Corner>().err(),
        text.parse::<Bytes>().err(),
        text.parse::<Seconds>().err(),
    ] {
        check(error, text);
    }
    let secret = text.parse::<ApiKey>().ok().and_then(|key| key.check().err());
    if let Some(message) = secret.filter(|_| text.len() >= 8) {
        assert!(!message.contains(text), "a key in a message");
    }
    match text.parse::<ModelId>() {
        Ok(id) => {
            let printed = format!("{}@{}", id.name(), id.revision);
            assert_eq!(printed.parse::<ModelId>().as_ref(), Ok(&id), "{printed}");
            let climbs = |part: &str| part == ".." || part.starts_with('/');
            assert!(!id.name().split('/').any(climbs) && !id.revision.split('/').any(climbs), "{id:?}");
        }
        Err(error) => check(Some(error.message), text),
    }
    itself(data)
}

/// A message may repeat the text, line ends and all: they are arguments of a
/// command line, so that a long one is its author's own.
fn check(error: Option<String>, text: &str) {
    let Some(message) = error.filter(|_| text.len() < 500) else { return };
    check_message(&message, &[]);
}

fn prints_back<T>(text: &str)
where
    T: FromStr<Err: Display> + Display + Debug + PartialEq,
{
    match text.parse::<T>() {
        Ok(value) => match value.to_string().parse::<T>() {
            Ok(again) => assert_eq!(again, value, "{text}"),
            Err(e) => panic!("'{text}' is read as {value:?}, which does not read back: {e}"),
        },
        Err(e) => check(Some(e.to_string()), text),
    }
}
