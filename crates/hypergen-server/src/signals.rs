//! The process's signals as messages: one for each SIGTERM or SIGINT (or
//! Ctrl-C where there are no signals).

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// Starts listening. The signals no longer end the process by themselves.
///
/// # Errors
/// When the system refuses.
#[cfg(unix)]
pub(crate) fn listen() -> std::io::Result<UnboundedReceiver<()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (sender, receiver) = unbounded_channel();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if sender.send(()).is_err() {
                break;
            }
        }
    });
    Ok(receiver)
}

/// Starts listening.
///
/// # Errors
/// When the system refuses.
#[cfg(not(unix))]
pub(crate) fn listen() -> std::io::Result<UnboundedReceiver<()>> {
    let (sender, receiver) = unbounded_channel();
    tokio::spawn(async move {
        while tokio::signal::ctrl_c().await.is_ok() {
            if sender.send(()).is_err() {
                break;
            }
        }
    });
    Ok(receiver)
}
