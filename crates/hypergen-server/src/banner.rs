//! What the server says of itself once it is ready: one block for people, or
//! one event for programs. It only words things.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;

use crate::app::Shared;
use crate::config::{LogFormat, ServeConfig};
use crate::metrics::resident_bytes;

/// Says it on standard error, or as an event of a JSON log.
pub(crate) fn announce(app: &Shared, config: &ServeConfig) {
    match config.log_format {
        LogFormat::Human => {
            // Nobody is left to tell when standard error is closed.
            let _ = std::io::stderr().write_all(block(app, config).as_bytes());
        }
        LogFormat::Json => {
            let m = &app.model;
            tracing::info!(
                model = m.name, family = m.family, device = m.device, isa = m.isa, dtype = m.dtype, threads = m.threads,
                weight_bytes = m.weight_bytes as u64, address = %app.address, keys = app.keys.len(),
                version = env!("CARGO_PKG_VERSION"), "ready"
            );
        }
    }
    if let Some(caveat) = config.dtype.caveat() {
        tracing::warn!("{caveat}");
    }
    if app.keys.is_empty() && !app.address.ip().is_loopback() {
        tracing::warn!(
            "ANYBODY who reaches {} can use this server: it listens beyond this machine and has no key. \
             Start it with --api-key (or HYPERGEN_API_KEY), or with --host 127.0.0.1",
            app.address
        );
    }
}

fn block(app: &Shared, config: &ServeConfig) -> String {
    let m = &app.model;
    let url = app.public_url.clone().unwrap_or_else(|| format!("http://{}", reachable(app.address)));
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {name:<9} {value}");
    };
    line("model", m.name.clone());
    line("family", format!("{}, {} pixels", m.family, m.native_size));
    line(
        "device",
        format!("{} with {}, {} thread{}", m.device, m.isa, m.threads, if m.threads == 1 { "" } else { "s" }),
    );
    line("dtype", m.dtype.clone());
    let resident = resident_bytes().map(|bytes| format!(", {} in use", size(bytes))).unwrap_or_default();
    line("memory", format!("{} of weights{resident}", size(m.weight_bytes as u64)));
    line("sampler", m.sampler.clone());
    line("defaults", defaults(app, config));
    line("queue", format!("{} requests, {} pictures a batch", config.max_queue_size, config.max_batch_size));
    line(
        "pictures",
        format!("{} for {}", app.store.folder().display(), humantime::format_duration(config.image_ttl.0)),
    );
    line(
        "key",
        match app.keys.len() {
            0 => "none needed".to_owned(),
            1 => "needed".to_owned(),
            n => format!("one of {n} needed"),
        },
    );
    line("address", format!("{url}/v1 (try {url}/docs)"));
    let key = if app.keys.is_empty() { "" } else { " -H \"Authorization: Bearer $HYPERGEN_API_KEY\"" };
    format!(
        "\nHyperGen {} is ready.\n{text}\n  curl {url}/v1/images/generations{key} -H 'Content-Type: application/json' \
         -d '{{\"prompt\": \"a red apple\", \"size\": \"auto\", \"response_format\": \"url\"}}'\n\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// Steps and guidance of requests that name none, and whose word that is.
fn defaults(app: &Shared, config: &ServeConfig) -> String {
    let whose = |operator: bool, model: bool| match (operator, model) {
        (true, _) => " (set)",
        (false, true) => " (this model's own)",
        (false, false) => "",
    };
    format!(
        "{} steps{}, guidance {}{}",
        app.parameters.default_steps(),
        whose(config.default_steps.is_some(), app.model.default_steps.is_some()),
        app.parameters.default_guidance(),
        whose(config.default_guidance.is_some(), app.model.default_guidance.is_some()),
    )
}

/// An address to connect to, for one to listen on.
fn reachable(address: SocketAddr) -> SocketAddr {
    match (address.ip().is_unspecified(), address.is_ipv4()) {
        (false, _) => address,
        (true, true) => SocketAddr::from(([127, 0, 0, 1], address.port())),
        (true, false) => SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], address.port())),
    }
}

/// A number of bytes for people.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        assert_eq!(size(0), "0.0 KiB");
        assert_eq!(size(36_700_160), "35.0 MiB");
        assert_eq!(size(u64::MAX), "16777216.0 TiB");
    }

    #[test]
    fn addresses_to_listen_on_become_ones_to_connect_to() {
        let shown = |text: &str| reachable(text.parse().expect("an address")).to_string();
        assert_eq!(shown("0.0.0.0:8000"), "127.0.0.1:8000");
        assert_eq!(shown("[::]:8000"), "[::1]:8000");
        assert_eq!(shown("10.0.0.1:80"), "10.0.0.1:80");
    }
}
