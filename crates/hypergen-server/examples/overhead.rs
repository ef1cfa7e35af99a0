//! What the server costs beside the model: a generator that takes no time
//! behind the real server, asked over a real socket, one request after the
//! other. It measures parsing, queueing, encoding and the reply together, from
//! the first byte sent to the last one received; it does not measure a model,
//! a network, or many clients at once.
//!
//! `bench/server-overhead/run` runs it and keeps the result.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hypergen_diffusion::{
    Check, Error, Generator, ModelInfo, Picture, Request, Session, Size, Stage, one_at_a_time,
};
use hypergen_server::{ServeConfig, Server};
use serde_json::{Value, json};

const SIZE: Size = Size { width: 512, height: 512 };
const WARM_UP: usize = 20;
const REQUESTS: usize = 200;

/// Draws one picture over and over.
struct Instantly(Picture);

impl Instantly {
    /// Soft shapes with a little grain, about as hard to compress as a
    /// photograph: flat colours would make PNG look better than it is.
    fn new() -> Self {
        let mut noise = 1_u32;
        let mut rgb = Vec::with_capacity(3 * SIZE.width * SIZE.height);
        for y in 0..SIZE.height {
            for x in 0..SIZE.width {
                for channel in 0..3 {
                    let (fx, fy, fc) = (x as f32 / 61.0, y as f32 / 43.0, channel as f32);
                    noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let grain = f32::from((noise >> 24) as u8) / 255.0 * 12.0 - 6.0;
                    let value = 128.0
                        + 70.0 * (fx + fc).sin() * (fy - fc).cos()
                        + 30.0 * (fx * fy * 0.3).sin()
                        + grain;
                    rgb.push(value.clamp(0.0, 255.0) as u8);
                }
            }
        }
        Self(Picture { size: SIZE, rgb, warnings: Vec::new() })
    }
}

/// Refuses nothing.
struct Anything;

impl Check for Anything {
    fn check(&self, _: &Request) -> Result<(), Error> {
        Ok(())
    }
}

impl Generator for Instantly {
    fn info(&self) -> ModelInfo {
        ModelInfo {
            name: "none".to_owned(),
            family: "no model".to_owned(),
            native_size: SIZE,
            sampler: "ddim".to_owned(),
            device: "cpu".to_owned(),
            isa: "none".to_owned(),
            dtype: "float32".to_owned(),
            threads: 1,
            weight_bytes: 0,
            default_steps: None,
            default_guidance: None,
            min_guidance: 1.0,
        }
    }

    fn checker(&self) -> Arc<dyn Check> {
        Arc::new(Anything)
    }

    fn draw(&mut self, session: &mut dyn Session) {
        one_at_a_time(session, |_, observer| {
            for step in 1..=50 {
                observer.cancelled(0);
                observer.stage(Stage::Step, step, 50, Duration::ZERO);
            }
            Ok(self.0.clone())
        });
    }
}

/// Sends a body and reads the whole answer; returns the time and the answer's size.
fn exchange(stream: &mut BufReader<TcpStream>, body: &str) -> std::io::Result<(Duration, usize)> {
    let request = format!(
        "POST /v1/images/generations HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n\
         authorization: Bearer sk-bench\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let start = Instant::now();
    stream.get_mut().write_all(request.as_bytes())?;
    let (mut length, mut line) = (0, String::new());
    loop {
        line.clear();
        stream.read_line(&mut line)?;
        let lower = line.to_ascii_lowercase();
        if lower.starts_with("http/") {
            assert!(lower.contains(" 200 "), "{line}");
        }
        if let Some(value) = lower.strip_prefix("content-length: ") {
            length = value.trim().parse().expect("a length");
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut answer = vec![0; length];
    stream.read_exact(&mut answer)?;
    Ok((start.elapsed(), length))
}

fn measure(address: SocketAddr, fields: &Value) -> std::io::Result<Value> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut stream = BufReader::with_capacity(1 << 20, stream);
    let mut body =
        json!({"prompt": "A cat holding a sign that says Hello World", "size": "512x512", "seed": 42});
    body.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
    let body = body.to_string();
    let (mut times, mut bytes) = (Vec::new(), 0);
    for i in 0..WARM_UP + REQUESTS {
        let (time, length) = exchange(&mut stream, &body)?;
        if i >= WARM_UP {
            times.push(time.as_secs_f64() * 1e3);
        }
        bytes = length;
    }
    times.sort_by(f64::total_cmp);
    let at = |share: f64| (times[(share * (times.len() - 1) as f64) as usize] * 1000.0).round() / 1000.0;
    Ok(json!({"requests": REQUESTS, "answer_bytes": bytes,
        "ms": {"min": at(0.0), "median": at(0.5), "p95": at(0.95), "max": at(1.0)}}))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let config = ServeConfig::parse_from([
        "--port",
        "0",
        "--api-key",
        "sk-bench",
        "--log-level",
        "error",
        "--log-format",
        "json",
    ])?;
    let server = Server::bind(config)?;
    let address = server.address();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (_stop, stopped) = tokio::sync::mpsc::unbounded_channel();
    let serving = runtime.spawn(server.run_until(Box::new(Instantly::new()), stopped));
    while TcpStream::connect(address).is_err() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut results = BTreeMap::new();
    for (name, fields) in [
        ("png, b64_json", json!({"response_format": "b64_json"})),
        ("png, url", json!({"response_format": "url"})),
        ("png, both", json!({})),
        (
            "jpeg 90, b64_json",
            json!({"response_format": "b64_json", "output_format": "jpeg", "output_compression": 90}),
        ),
        (
            "webp 80, b64_json",
            json!({"response_format": "b64_json", "output_format": "webp", "output_compression": 80}),
        ),
        ("webp 100, b64_json", json!({"response_format": "b64_json", "output_format": "webp"})),
    ] {
        results.insert(name, measure(address, &fields)?);
    }
    println!("{}", serde_json::to_string_pretty(&results)?);
    serving.abort();
    Ok(())
}
