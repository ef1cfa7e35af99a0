//! The engine: one thread of its own that owns the model, and the handle by
//! which everybody else reaches it. Requests come in through
//! [`Engine::submit`], bounded; pictures go out through the [`Ticket`]. It
//! knows nothing of HTTP, and encodes nothing.
//!
//! A dropped ticket is how a client leaves: its request is out of the queue
//! at once, and what is being drawn for it stops at the next step.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hypergen_diffusion::{Error, ErrorKind, Generator, Observer, Picture, Request, Stage};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::watch;

use crate::metrics::{LeftWhile, Metrics};
use crate::pace::{Pace, work};
use crate::queue::{Event, Failure, Job, Queue, Rider};

/// Why a request was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The queue holds all it may; the time after which it should be empty.
    Full { capacity: usize, retry_after: Duration },
    /// The server goes down.
    ShuttingDown,
}

/// How the queue is at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Snapshot {
    /// Requests that wait.
    pub(crate) waiting: usize,
    /// Requests that may wait.
    pub(crate) capacity: usize,
    /// Requests that are being drawn.
    pub(crate) in_progress: usize,
    /// Whether new requests are refused.
    pub(crate) shutting_down: bool,
}

/// A handle on the engine; clones are the same engine.
#[derive(Clone)]
pub(crate) struct Engine {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    /// Requests in the queue or begun, for whoever waits for the end.
    unfinished: watch::Sender<usize>,
    /// Set to make what runs stop at its next step.
    stop: AtomicBool,
    next_id: AtomicU64,
    capacity: usize,
    max_batch: usize,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct State {
    queue: Queue,
    pace: Pace,
    batch: Batch,
    draining: bool,
}

/// How far the model is with what it draws.
#[derive(Default)]
struct Batch {
    started: Option<Instant>,
    work_left: f64,
}

impl Engine {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub(crate) fn start(
        generator: Box<dyn Generator>,
        capacity: usize,
        max_batch: usize,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            wake: Condvar::new(),
            unfinished: watch::Sender::new(0),
            stop: AtomicBool::new(false),
            next_id: AtomicU64::new(0),
            capacity: capacity.max(1),
            max_batch: max_batch.max(1),
            metrics,
        });
        let runner = Runner { shared: Arc::clone(&shared), generator };
        std::thread::Builder::new().name("engine".to_owned()).spawn(move || runner.run())?;
        Ok(Self { shared })
    }

    /// Puts a request for these pictures into the queue.
    pub(crate) fn submit(&self, requests: Vec<Request>) -> Result<Ticket, Refusal> {
        let mut state = self.shared.lock();
        if state.draining {
            return Err(Refusal::ShuttingDown);
        }
        if state.queue.waiting().len() >= self.shared.capacity {
            let retry_after = state.until_empty();
            return Err(Refusal::Full { capacity: self.shared.capacity, retry_after });
        }
        let (sender, events) = unbounded_channel();
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let left = requests.len();
        state.queue.push(Arc::new(Job::new(id, requests, sender)));
        self.shared.changed(&state);
        self.shared.wake.notify_one();
        Ok(Ticket { id, left, events, shared: Arc::clone(&self.shared) })
    }

    /// How the queue is now.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let state = self.shared.lock();
        Snapshot {
            waiting: state.queue.waiting().len(),
            capacity: self.shared.capacity,
            in_progress: state.queue.begun().len(),
            shutting_down: state.draining,
        }
    }

    /// Refuses what comes and answers what waits; what has begun goes on.
    pub(crate) fn drain(&self) {
        let mut state = self.shared.lock();
        state.draining = true;
        for job in state.queue.clear_waiting() {
            job.fail(Failure::ShuttingDown);
        }
        self.shared.changed(&state);
        self.shared.wake.notify_one();
    }

    /// Answers what has begun, and makes it stop at its next step.
    pub(crate) fn stop(&self) {
        self.drain();
        self.shared.stop.store(true, Ordering::Release);
        for job in self.shared.lock().queue.begun() {
            job.fail(Failure::ShuttingDown);
        }
    }

    /// Returns once nothing waits and nothing runs.
    pub(crate) async fn idle(&self) {
        let mut unfinished = self.shared.unfinished.subscribe();
        // The sender lives in `shared`, which this handle keeps alive.
        let _ = unfinished.wait_for(|count| *count == 0).await;
    }
}

impl Shared {
    /// The state, also after a panic elsewhere: it is changed in whole steps.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self, state: &State) {
        self.unfinished.send_replace(state.queue.waiting().len() + state.queue.begun().len());
    }
}

impl State {
    /// Time until all that is here now should be drawn: at least a second,
    /// and before anything was measured what the first batch has taken so far.
    fn until_empty(&self) -> Duration {
        let waiting = self.queue.waiting().flat_map(|job| &job.requests);
        let left: f64 = waiting.chain(self.queue.untaken()).map(work).sum();
        let running = self.batch.started.map(|started| started.elapsed()).unwrap_or_default();
        let estimate = self.pace.estimate(left + self.batch.work_left).unwrap_or(running);
        estimate.max(Duration::from_secs(1))
    }
}

/// A place in the queue. Dropping it leaves the queue, or stops the drawing.
pub(crate) struct Ticket {
    id: u64,
    left: usize,
    events: UnboundedReceiver<Event>,
    shared: Arc<Shared>,
}

impl Ticket {
    /// Waits for the next of its pictures: `None` when all are drawn.
    pub(crate) async fn next(&mut self) -> Option<Result<(usize, Picture), Failure>> {
        if self.left == 0 {
            return None;
        }
        match self.events.recv().await {
            Some(Event::Picture { index, picture }) => {
                self.left -= 1;
                Some(Ok((index, picture)))
            }
            Some(Event::Failed(failure)) => {
                self.left = 0;
                Some(Err(failure))
            }
            // The engine forgets no job without a word, so its thread is no more.
            None => {
                self.left = 0;
                Some(Err(Failure::Panicked))
            }
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.left == 0 {
            return;
        }
        self.events.close();
        let mut state = self.shared.lock();
        let waited = state.queue.remove(self.id);
        self.shared.metrics.left(if waited { LeftWhile::Waiting } else { LeftWhile::Running });
        self.shared.changed(&state);
    }
}

/// The engine's thread.
struct Runner {
    shared: Arc<Shared>,
    generator: Box<dyn Generator>,
}

impl Runner {
    fn run(mut self) {
        while let Some(riders) = self.next_batch() {
            self.draw(riders);
            let mut state = self.shared.lock();
            state.batch = Batch::default();
            self.shared.changed(&state);
        }
    }

    /// Waits for work: `None` when there will be none any more.
    fn next_batch(&self) -> Option<Vec<Rider>> {
        let shared = &*self.shared;
        let mut state = shared.lock();
        loop {
            let riders =
                state.queue.take(shared.max_batch, |job| shared.metrics.waited(job.queued.elapsed()));
            shared.changed(&state);
            if !riders.is_empty() {
                let work_left = riders.iter().map(|rider| work(rider.request())).sum();
                state.batch = Batch { started: Some(Instant::now()), work_left };
                return Some(riders);
            }
            if state.draining {
                return None;
            }
            state = shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Draws a batch and tells everybody in it. Where a shared one fails, each
    /// job is drawn by itself, so that nobody fails for another's request.
    fn draw(&mut self, riders: Vec<Rider>) {
        let riders = self.wanted(riders);
        if riders.is_empty() {
            return;
        }
        self.shared.metrics.batch(riders.len());
        match self.generate(&riders) {
            Ok(pictures) => {
                for (rider, picture) in riders.iter().zip(pictures) {
                    self.settle(&rider.job, |job| job.deliver(rider.index, picture));
                }
            }
            Err(Failure::Generation(e)) if e.kind == ErrorKind::Cancelled => self.cancelled(&riders),
            Err(failure) => {
                let (first, rest): (Vec<_>, Vec<_>) =
                    riders.iter().cloned().partition(|rider| rider.job.id == riders[0].job.id);
                if rest.is_empty() {
                    self.fail(&riders[0].job, failure);
                } else {
                    tracing::warn!(
                        pictures = riders.len(),
                        ?failure,
                        "a shared batch failed: its requests are drawn apart"
                    );
                    self.draw(first);
                    self.draw(rest);
                }
            }
        }
    }

    /// Leaves out what nobody wants any more.
    fn wanted(&self, riders: Vec<Rider>) -> Vec<Rider> {
        let (wanted, unwanted): (Vec<_>, Vec<_>) = riders.into_iter().partition(|rider| rider.job.wanted());
        unwanted.iter().for_each(|rider| self.end(&rider.job));
        wanted
    }

    fn generate(&mut self, riders: &[Rider]) -> Result<Vec<Picture>, Failure> {
        let requests: Vec<Request> = riders.iter().map(|rider| rider.request().clone()).collect();
        let mut watch = Watch { shared: &self.shared, riders };
        let generator = &mut self.generator;
        // A panic may leave the generator half changed; that its next call
        // starts from its inputs alone is part of its contract.
        match catch_unwind(AssertUnwindSafe(|| generator.generate(&requests, &mut watch))) {
            Ok(Ok(pictures)) if pictures.len() == riders.len() => Ok(pictures),
            Ok(Ok(pictures)) => {
                let message = format!("{} pictures came for {} requests", pictures.len(), riders.len());
                Err(Failure::Generation(Error::new(ErrorKind::Internal, message)))
            }
            Ok(Err(e)) => Err(Failure::Generation(e)),
            Err(panic) => {
                let text = panic.downcast_ref::<&str>().copied();
                let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
                tracing::error!(
                    panic = text.unwrap_or("(no text)"),
                    "the generation panicked; the server goes on"
                );
                Err(Failure::Panicked)
            }
        }
    }

    /// The model stopped, as it was told to: because all have left, or
    /// because the server goes down, which everybody was told already.
    fn cancelled(&self, riders: &[Rider]) {
        for rider in riders {
            let message = "the generation stopped though nobody asked it to";
            self.fail(&rider.job, Failure::Generation(Error::new(ErrorKind::Internal, message)));
        }
    }

    fn fail(&self, job: &Job, failure: Failure) {
        self.settle(job, |job| {
            job.fail(failure);
            true
        });
    }

    fn end(&self, job: &Job) {
        self.settle(job, |_| true);
    }

    /// Tells a job something and, where that was the last word, takes it off
    /// the books. Both under the lock: whoever has an answer finds that
    /// `/health` knows of it.
    fn settle(&self, job: &Job, tell: impl FnOnce(&Job) -> bool) {
        let mut state = self.shared.lock();
        if tell(job) {
            state.queue.end(job);
            self.shared.changed(&state);
        }
    }
}

/// Looks on while the model draws.
struct Watch<'a> {
    shared: &'a Shared,
    riders: &'a [Rider],
}

impl Observer for Watch<'_> {
    fn stage(&mut self, stage: Stage, _index: usize, count: usize, elapsed: Duration) {
        self.shared.metrics.stage(stage, elapsed);
        let done = match stage {
            Stage::Step => {
                self.riders.iter().map(|rider| work(rider.request())).sum::<f64>() / count.max(1) as f64
            }
            Stage::Text | Stage::Decode => 0.0,
        };
        let mut state = self.shared.lock();
        state.pace.record(done, elapsed);
        state.batch.work_left = (state.batch.work_left - done).max(0.0);
    }

    fn cancelled(&mut self, index: usize) -> bool {
        self.shared.stop.load(Ordering::Acquire)
            || self.riders.get(index).is_none_or(|rider| !rider.job.wanted())
    }
}

#[cfg(test)]
mod properties;
