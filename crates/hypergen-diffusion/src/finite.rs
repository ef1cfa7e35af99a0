//! Refuses values that are not finite, and names the stage that made them. A
//! black picture explains nothing; this does. It repairs nothing.

use crate::{Error, ErrorKind};

/// Checks what a stage (`text encoder`, `unet at step 7`, `vae`) has made.
///
/// # Errors
/// With [`ErrorKind::Internal`] when a value is infinite or not a number.
pub(crate) fn finite(values: &[f32], stage: &str) -> Result<(), Error> {
    match values.iter().filter(|v| !v.is_finite()).count() {
        0 => Ok(()),
        bad => Err(Error::new(
            ErrorKind::Internal,
            format!(
                "{stage}: {bad} of {} values are not finite, so there is no picture; \
                 try --dtype float32, and check the model's files if that does not help",
                values.len()
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_is_counted_under_its_stage() {
        assert_eq!(finite(&[0.0, -1e38], "vae"), Ok(()));
        let error = finite(&[f32::NAN, 1.0, f32::NEG_INFINITY], "unet at step 7").expect_err("two of three");
        assert_eq!(error.kind, ErrorKind::Internal);
        assert!(error.message.starts_with("unet at step 7: 2 of 3 values"), "{error}");
    }
}
