//! A generator without weights: it draws a pattern from seed and prompt, and
//! a test can hold it before any step, look at what it was asked, and make it
//! fail by the prompt. It keeps the contract of `Generator` in all else.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use hypergen_diffusion::lora::Lora;
use hypergen_diffusion::samplers::SamplerKind;
use hypergen_diffusion::{
    Check, Error, ErrorKind, GUIDANCE_SCALE, Generator, ModelInfo, Picture, Progress, Request, RequestId,
    Session, Size, Stage,
};

/// A test that waits longer has failed; on a busy machine it may take a while.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What the test sees and does.
#[derive(Default)]
pub(crate) struct Control {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default, Clone)]
pub(crate) struct State {
    held: bool,
    permits: usize,
    /// Seeds of the requests that shared a step, once for steps that the same ones shared.
    pub(crate) batches: Vec<Vec<u64>>,
    /// LoRAs of each request, by name and scale.
    pub(crate) loras: Vec<Vec<(String, f64)>>,
    /// Steps that were computed.
    pub(crate) steps: usize,
    /// A step waits for the test.
    pub(crate) waiting: bool,
    /// Requests that were dropped because nobody wanted them any more.
    pub(crate) cancelled: usize,
    /// Requests that the fake said nothing more of.
    pub(crate) forgotten: usize,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// From now on each step waits for a permit.
    pub(crate) fn hold(&self) {
        self.lock().held = true;
    }

    /// Lets so many steps pass.
    pub(crate) fn permit(&self, steps: usize) {
        self.lock().permits += steps;
        self.wake.notify_all();
    }

    /// No step waits any more.
    pub(crate) fn release(&self) {
        self.lock().held = false;
        self.wake.notify_all();
    }

    /// A look at it all.
    pub(crate) fn state(&self) -> State {
        self.lock().clone()
    }

    /// Returns once `condition` holds.
    pub(crate) async fn until(&self, what: &str, condition: impl Fn(&State) -> bool) {
        crate::support::until(what, || condition(&self.lock())).await;
    }

    /// A step that requests with these seeds share.
    fn pass(&self, active: &[Active]) {
        let mut state = self.lock();
        let seeds = active.iter().map(|one| one.request.seed).collect();
        if state.batches.last() != Some(&seeds) || active.iter().any(|one| one.done == 0) {
            state.batches.push(seeds);
        }
        while state.held && state.permits == 0 {
            state.waiting = true;
            let (next, timeout) = self.wake.wait_timeout(state, PATIENCE).expect("not poisoned");
            assert!(!timeout.timed_out(), "the test forgot to let the fake go on");
            state = next;
        }
        state.waiting = false;
        if state.held {
            state.permits -= 1;
        }
        state.steps += 1;
    }
}

/// The generator.
pub(crate) struct Fake {
    pub(crate) control: Arc<Control>,
    pub(crate) info: ModelInfo,
    /// Samplers that it refuses.
    pub(crate) unable: Vec<SamplerKind>,
}

/// What it refuses.
struct Rules {
    unable: Vec<SamplerKind>,
}

impl Check for Rules {
    fn check(&self, request: &Request) -> Result<(), Error> {
        if request.sampler.is_some_and(|sampler| self.unable.contains(&sampler)) {
            return Err(Error::new(ErrorKind::Request, "the schedule does not suit the sampler"));
        }
        if request.sizes.original_size.is_some() {
            let error = Error::new(ErrorKind::Request, "original_size is for SDXL");
            return Err(Error { param: Some("original_size"), ..error });
        }
        match request.prompt.as_str() {
            "unfit" => {
                Err(Error { param: Some("size"), ..Error::new(ErrorKind::Request, "size does not fit") })
            }
            "never fits" => Err(Error::new(ErrorKind::OutOfMemory, "out of memory, always")),
            "panic in a check" => panic!("the fake was told to"),
            _ => Ok(()),
        }
    }
}

impl Fake {
    pub(crate) fn new() -> Self {
        let info = ModelInfo {
            name: "fake".to_owned(),
            family: "Fake Diffusion".to_owned(),
            native_size: Size { width: 64, height: 64 },
            sampler: "ddim".to_owned(),
            device: "cpu".to_owned(),
            isa: "portable".to_owned(),
            dtype: "float32".to_owned(),
            threads: 1,
            weight_bytes: 1 << 20,
            default_steps: None,
            default_guidance: None,
            min_guidance: 1.0,
        };
        Self { control: Arc::default(), info, unable: Vec::new() }
    }
}

/// The picture of a request, from nothing but it.
pub(crate) fn draw(request: &Request) -> Picture {
    let Size { width, height } = request.size;
    let salt =
        request.prompt.bytes().fold(request.seed, |sum, b| sum.wrapping_mul(31).wrapping_add(b.into()));
    let rgb = (0..3 * width * height).map(|i| (salt.wrapping_add((i / 7) as u64) % 251) as u8).collect();
    let warnings = match request.prompt.contains("warn me") {
        true => vec!["The prompt was cut after \"naïve café\"\nand more".to_owned()],
        false => Vec::new(),
    };
    Picture { size: request.size, rgb, warnings }
}

impl Generator for Fake {
    fn info(&self) -> ModelInfo {
        self.info.clone()
    }

    fn checker(&self) -> Arc<dyn Check> {
        Arc::new(Rules { unable: self.unable.clone() })
    }

    fn check_loras(&self, loras: &[Lora]) -> Result<(), Error> {
        match loras.iter().find(|lora| lora.name == "unfit") {
            Some(_) => Err(Error::new(ErrorKind::Model, "it fits another family")),
            None => Ok(()),
        }
    }

    fn draw(&mut self, session: &mut dyn Session) {
        let mut active: Vec<Active> = Vec::new();
        loop {
            self.join(session, &mut active);
            let before = active.len();
            active.retain(|one| !session.cancelled(one.id));
            self.control.lock().cancelled += before - active.len();
            if active.is_empty() {
                return;
            }
            self.control.pass(&active);
            active.iter_mut().for_each(|one| one.done += 1);
            let progress: Vec<_> = active.iter().map(Active::progress).collect();
            session.stage(Stage::Step, &progress, Duration::from_millis(100));
            for one in active.extract_if(.., |one| one.done == one.request.steps) {
                match outcome(&one.request) {
                    Some(outcome) => {
                        let decoded = Progress { id: one.id, done: 1, count: 1 };
                        session.stage(Stage::Decode, &[decoded], Duration::from_millis(1));
                        session.finish(one.id, outcome);
                    }
                    None => self.control.lock().forgotten += 1,
                }
            }
        }
    }
}

impl Fake {
    fn join(&self, session: &mut dyn Session, active: &mut Vec<Active>) {
        while let Some((id, request)) = session.next() {
            assert!(active.iter().all(|one| one.request.can_batch_with(&request)), "a batch can be one");
            let scale = request.guidance_scale;
            assert!(scale >= self.info.min_guidance && scale <= GUIDANCE_SCALE.max);
            let loras = request.loras.iter().map(|l| (l.name.clone(), l.scale)).collect();
            self.control.lock().loras.push(loras);
            session.stage(Stage::Text, &[Progress { id, done: 1, count: 1 }], Duration::from_millis(1));
            active.push(Active { id, request, done: 0 });
        }
    }
}

/// A request that is being drawn.
struct Active {
    id: RequestId,
    request: Request,
    done: usize,
}

impl Active {
    fn progress(&self) -> Progress {
        Progress { id: self.id, done: self.done, count: self.request.steps }
    }
}

/// What comes of a request, by its prompt; nothing, where the fake is to forget it.
fn outcome(request: &Request) -> Option<Result<Picture, Error>> {
    match request.prompt.as_str() {
        "panic" => panic!("the fake was told to"),
        "out of memory" => Some(Err(Error::new(ErrorKind::OutOfMemory, "CUDA out of memory"))),
        "bad numbers" => Some(Err(Error::new(ErrorKind::Internal, "the picture is not a number"))),
        "stop" => Some(Err(Error::new(ErrorKind::Cancelled, "for no reason"))),
        "too few" => None,
        _ => Some(Ok(draw(request))),
    }
}
