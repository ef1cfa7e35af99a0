//! What Prometheus sees, in its usual names and units: seconds, bytes,
//! counters that end in `_total`. Labels are few and fixed, so that no client
//! can make the list grow. It measures nothing itself but the process; the
//! others report what they did.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hypergen_diffusion::{ModelInfo, Stage};
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::engine::Snapshot;

/// Media type of [`Metrics::render`].
pub(crate) const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper bounds in seconds, from a step of a small model to a large queue's wait.
const SECONDS: [f64; 17] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0];
/// Upper bounds in pictures.
const PICTURES: [f64; 7] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: &'static str,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabels {
    route: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageLabels {
    stage: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LeftLabels {
    r#while: LeftWhile,
}

/// When a client left before it had its pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum LeftWhile {
    /// Its request waited: it cost nothing.
    Waiting,
    /// Its pictures were being drawn.
    Running,
}

impl EncodeLabelValue for LeftWhile {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        encoder.write_str(match self {
            Self::Waiting => "waiting",
            Self::Running => "running",
        })
    }
}

/// What is only looked at when somebody asks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now {
    /// The queue.
    pub(crate) queue: Snapshot,
    /// Files in the picture store.
    pub(crate) store_files: usize,
    /// Bytes in the picture store.
    pub(crate) store_bytes: u64,
    /// Open connections.
    pub(crate) connections: usize,
}

/// All the metrics of one server.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    request_seconds: Family<RouteLabels, Histogram>,
    left: Family<LeftLabels, Counter>,
    queue_wait: Histogram,
    stage: Family<StageLabels, Histogram>,
    pictures: Counter,
    batch: Histogram,
    queue_length: Gauge,
    queue_capacity: Gauge,
    in_progress: Gauge,
    store_files: Gauge,
    store_bytes: Gauge,
    connections: Gauge,
    process: Process,
}

/// The process, under the names that every Prometheus client uses.
#[derive(Debug, Default)]
struct Process {
    resident: Gauge,
    open_fds: Gauge,
    cpu_seconds: Counter<f64, std::sync::atomic::AtomicU64>,
}

fn seconds() -> Histogram {
    Histogram::new(SECONDS)
}

impl Metrics {
    /// Metrics of a server that starts now with this model.
    pub(crate) fn new(model: &ModelInfo) -> Self {
        let new = Self {
            registry: Registry::default(),
            requests: Family::default(),
            request_seconds: Family::new_with_constructor(seconds),
            left: Family::default(),
            queue_wait: seconds(),
            stage: Family::new_with_constructor(seconds),
            pictures: Counter::default(),
            batch: Histogram::new(PICTURES),
            queue_length: Gauge::default(),
            queue_capacity: Gauge::default(),
            in_progress: Gauge::default(),
            store_files: Gauge::default(),
            store_bytes: Gauge::default(),
            connections: Gauge::default(),
            process: Process::default(),
        };
        new.register(model)
    }

    fn register(mut self, model: &ModelInfo) -> Self {
        let mut registry = Registry::default();
        let build = Info::new(vec![
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            ("model", model.name.clone()),
            ("device", model.device.clone()),
            ("isa", model.isa.clone()),
            ("dtype", model.dtype.clone()),
        ]);
        let weights = Gauge::<i64>::default();
        weights.set(clamp(model.weight_bytes as u64));

        let r = registry.sub_registry_with_prefix("hypergen");
        r.register("build", "Version, model and machine", build);
        r.register_with_unit("model_weight", "Memory that the weights take", Unit::Bytes, weights);
        r.register(
            "requests",
            "Answers by route and status; 499: the client left before",
            self.requests.clone(),
        );
        let request_seconds = self.request_seconds.clone();
        r.register_with_unit(
            "request_duration",
            "Time from a request's head to its answer",
            Unit::Seconds,
            request_seconds,
        );
        r.register("clients_left", "Clients that left before they had their pictures", self.left.clone());
        r.register("queue_length", "Requests that wait", self.queue_length.clone());
        r.register("queue_capacity", "Requests that may wait", self.queue_capacity.clone());
        r.register("requests_in_progress", "Requests that are being drawn", self.in_progress.clone());
        r.register_with_unit(
            "queue_wait",
            "Time that requests waited before they began",
            Unit::Seconds,
            self.queue_wait.clone(),
        );
        let stage_about = "Time per stage: text, each denoising step, decode, encode (to a file)";
        r.register_with_unit("stage_duration", stage_about, Unit::Seconds, self.stage.clone());
        r.register("pictures", "Pictures drawn", self.pictures.clone());
        r.register("batch_size", "Pictures in each forward pass", self.batch.clone());
        r.register(
            "image_store_files",
            "Pictures that can be fetched by their URL",
            self.store_files.clone(),
        );
        r.register_with_unit("image_store", "Their size", Unit::Bytes, self.store_bytes.clone());
        r.register("connections", "Open connections", self.connections.clone());

        let started = Gauge::<f64, std::sync::atomic::AtomicU64>::default();
        started.set(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
        let p = registry.sub_registry_with_prefix("process");
        p.register_with_unit("start_time", "Start of the process since 1970", Unit::Seconds, started);
        if cfg!(target_os = "linux") {
            p.register_with_unit(
                "resident_memory",
                "Memory in use",
                Unit::Bytes,
                self.process.resident.clone(),
            );
            p.register("open_fds", "Open file descriptors", self.process.open_fds.clone());
            p.register_with_unit(
                "cpu",
                "Processor time used",
                Unit::Seconds,
                self.process.cpu_seconds.clone(),
            );
        }
        self.registry = registry;
        self
    }

    /// A request was answered, or (499) its client left before.
    pub(crate) fn request(&self, route: &'static str, status: u16, elapsed: Duration) {
        self.requests.get_or_create(&RequestLabels { route, status }).inc();
        self.request_seconds.get_or_create(&RouteLabels { route }).observe(elapsed.as_secs_f64());
    }

    /// A client left.
    pub(crate) fn left(&self, when: LeftWhile) {
        self.left.get_or_create(&LeftLabels { r#while: when }).inc();
    }

    /// A request begins after this wait.
    pub(crate) fn waited(&self, wait: Duration) {
        self.queue_wait.observe(wait.as_secs_f64());
    }

    /// A stage of the generation has ended.
    pub(crate) fn stage(&self, stage: Stage, elapsed: Duration) {
        let stage = match stage {
            Stage::Text => "text",
            Stage::Step => "step",
            Stage::Decode => "decode",
        };
        self.stage.get_or_create(&StageLabels { stage }).observe(elapsed.as_secs_f64());
    }

    /// A picture was drawn and made into a file.
    pub(crate) fn encoded(&self, elapsed: Duration) {
        self.pictures.inc();
        self.stage.get_or_create(&StageLabels { stage: "encode" }).observe(elapsed.as_secs_f64());
    }

    /// So many pictures shared a forward pass.
    pub(crate) fn batch(&self, pictures: usize) {
        self.batch.observe(pictures as f64);
    }

    /// The page for Prometheus.
    pub(crate) fn render(&self, now: Now) -> String {
        self.queue_length.set(clamp(now.queue.waiting as u64));
        self.queue_capacity.set(clamp(now.queue.capacity as u64));
        self.in_progress.set(clamp(now.queue.in_progress as u64));
        self.store_files.set(clamp(now.store_files as u64));
        self.store_bytes.set(clamp(now.store_bytes));
        self.connections.set(clamp(now.connections as u64));
        self.process.look();
        let mut page = String::new();
        if encode(&mut page, &self.registry).is_err() {
            // Writing to a string cannot fail; a comment is better than a panic.
            let _ = writeln!(page, "# EOF");
        }
        page
    }
}

/// Gauges are signed.
fn clamp(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

impl Process {
    /// Reads what the kernel says; where it says nothing, the last value stays.
    fn look(&self) {
        if let Some(bytes) = resident_bytes() {
            self.resident.set(clamp(bytes));
        }
        if let Ok(fds) = std::fs::read_dir("/proc/self/fd") {
            self.open_fds.set(clamp(fds.count() as u64));
        }
        if let Some(seconds) = cpu_seconds() {
            let more = seconds - self.cpu_seconds.get();
            if more > 0.0 {
                self.cpu_seconds.inc_by(more);
            }
        }
    }
}

/// Resident memory of this process.
pub(crate) fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

fn cpu_seconds() -> Option<f64> {
    /// The kernel's unit towards programs, the same on every architecture of Linux.
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The program's name, in brackets, may hold spaces: the fields count from behind it.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / TICKS_PER_SECOND)
}
