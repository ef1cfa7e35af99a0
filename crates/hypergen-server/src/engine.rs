//! The engine: one thread of its own that owns the model, and the handle by
//! which everybody else reaches it. Requests come in through
//! [`Engine::submit`], bounded; pictures go out through the [`Ticket`]. It
//! knows nothing of HTTP, and encodes nothing.
//!
//! A dropped ticket is how a client leaves: its request is out of the queue
//! at once, and what is being drawn for it stops at the next step.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hypergen_diffusion::{
    Error, ErrorKind, Generator, Picture, Progress, Request, RequestId, Session, Stage,
};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::watch;

use crate::metrics::{LeftWhile, Metrics};
use crate::pace::{Pace, work};
use crate::queue::{BatchItem, Event, Failure, Job, Queue};

/// Why a request was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The queue holds all it may; the time after which it should be empty.
    Full { capacity: usize, retry_after: Duration },
    /// The server goes down.
    ShuttingDown,
}

/// How the queue is at one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Snapshot {
    /// Requests that wait.
    pub(crate) waiting: usize,
    /// Requests that may wait.
    pub(crate) capacity: usize,
    /// Requests that are being drawn.
    pub(crate) in_progress: usize,
    /// Time until all of them should be drawn, once anything has been measured.
    pub(crate) time_left: Option<Duration>,
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
    now: Running,
    draining: bool,
}

/// How far the model is with what it draws.
#[derive(Default)]
struct Running {
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
        let runner = Runner { shared: Arc::clone(&shared), generator, apart: VecDeque::new() };
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
        let ahead = state.queue.waiting().len() + state.queue.begun().len();
        let (sender, events) = unbounded_channel();
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let left = requests.len();
        state.queue.push(Arc::new(Job::new(id, requests, sender)));
        self.shared.changed(&state);
        self.shared.wake.notify_one();
        Ok(Ticket { id, ahead, left, events, shared: Arc::clone(&self.shared) })
    }

    /// How the queue is now.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let state = self.shared.lock();
        Snapshot {
            waiting: state.queue.waiting().len(),
            capacity: self.shared.capacity,
            in_progress: state.queue.begun().len(),
            time_left: state.time_left(),
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
    /// and before anything was measured what the first pictures have taken so far.
    fn until_empty(&self) -> Duration {
        let running = self.now.started.map(|started| started.elapsed()).unwrap_or_default();
        self.time_left().unwrap_or(running).max(Duration::from_secs(1))
    }

    /// Time until all that is here now should be drawn, once anything has been measured.
    fn time_left(&self) -> Option<Duration> {
        let waiting = self.queue.waiting().flat_map(|job| &job.requests);
        let left: f64 = waiting.chain(self.queue.untaken()).map(work).sum();
        self.pace.estimate(left + self.now.work_left)
    }
}

/// A place in the queue. Dropping it leaves the queue, or stops the drawing.
pub(crate) struct Ticket {
    id: u64,
    ahead: usize,
    left: usize,
    events: UnboundedReceiver<Event>,
    shared: Arc<Shared>,
}

impl Ticket {
    /// Requests that waited or were being drawn when this one came.
    pub(crate) fn ahead(&self) -> usize {
        self.ahead
    }

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
    /// Pictures that get another try, each by itself, before anything else: they were being
    /// drawn when the model panicked, or did not fit into memory beside others.
    apart: VecDeque<BatchItem>,
}

impl Runner {
    fn run(mut self) {
        while self.wait() {
            self.draw();
        }
    }

    /// Waits for work: false when there will be none any more.
    fn wait(&self) -> bool {
        let mut state = self.shared.lock();
        loop {
            if !self.apart.is_empty() || state.queue.has_work() {
                return true;
            }
            if state.draining {
                return false;
            }
            state = self.shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Draws until the queue has nothing that could join.
    fn draw(&mut self) {
        let alone = self.apart.pop_front();
        let max = if alone.is_some() { 1 } else { self.shared.max_batch };
        let joins = alone.is_none();
        let mut drawing =
            Drawing { shared: &self.shared, alone, joins, max, active: vec![], again: vec![], next_id: 0 };
        let generator = &mut self.generator;
        // A panic may leave the generator half changed; that its next call
        // starts from its session alone is part of its contract.
        let panicked = catch_unwind(AssertUnwindSafe(|| generator.draw(&mut drawing))).err();
        let (left, again) = (drawing.active, drawing.again);
        self.apart.extend(again);
        match panicked {
            Some(panic) => self.pick_up(left, panic.as_ref()),
            None => left.iter().for_each(|forgotten| {
                let message = "the model forgot a picture that it began";
                let failure = Failure::Generation(Error::new(ErrorKind::Internal, message));
                self.shared.fail(&forgotten.item.job, failure);
            }),
        }
        let mut state = self.shared.lock();
        state.now = Running::default();
        self.shared.changed(&state);
    }

    /// Fails what panicked by itself. Where several requests were being drawn, each
    /// gets another try alone, so that nobody fails for another's request.
    fn pick_up(&mut self, left: Vec<Active>, panic: &(dyn std::any::Any + Send)) {
        let text = panic.downcast_ref::<&str>().copied();
        let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        tracing::error!(
            panic = text.unwrap_or("(no text)"),
            pictures = left.len(),
            "the generation panicked; the server goes on"
        );
        let first = left.first().map(|item| item.item.job.id);
        if left.iter().all(|item| Some(item.item.job.id) == first) {
            left.iter().for_each(|item| self.shared.fail(&item.item.job, Failure::Panicked));
        } else {
            tracing::warn!("what was drawn together is drawn again, one by one");
            self.apart.extend(left.into_iter().map(|item| item.item));
        }
    }
}

impl Shared {
    fn fail(&self, job: &Job, failure: Failure) {
        self.settle(job, |job| {
            job.fail(failure);
            true
        });
    }

    /// Tells a job something and, where that was the last word, takes it off
    /// the books. Both under the lock: whoever has an answer finds that
    /// `/health` knows of it.
    fn settle(&self, job: &Job, tell: impl FnOnce(&Job) -> bool) {
        let mut state = self.lock();
        if tell(job) {
            state.queue.end(job);
            self.changed(&state);
        }
    }
}

/// One run of the model, from the first picture that joins until none is left.
struct Drawing<'a> {
    shared: &'a Shared,
    /// The picture that is to be drawn by itself, until it begins.
    alone: Option<BatchItem>,
    /// Whether pictures of the queue may join.
    joins: bool,
    max: usize,
    active: Vec<Active>,
    /// What did not fit into memory beside the others. Until it had its turn alone,
    /// nothing joins: the others must come to an end.
    again: Vec<BatchItem>,
    next_id: RequestId,
}

/// A picture that is being drawn.
struct Active {
    id: RequestId,
    item: BatchItem,
    work_left: f64,
}

impl Drawing<'_> {
    /// The next picture, if one may join.
    fn join(&mut self, state: &mut State) -> Option<BatchItem> {
        if let Some(item) = self.alone.take() {
            return Some(item);
        }
        if !self.joins || !self.again.is_empty() || self.active.len() >= self.max {
            return None;
        }
        let beside = self.active.first().map(|one| one.item.request());
        let metrics = &self.shared.metrics;
        let item = state.queue.next(beside, |job| metrics.waited(job.queued.elapsed()));
        // It passes over what nobody wants, which then is neither waiting nor begun.
        self.shared.changed(state);
        item
    }

    /// Takes a picture off the list of those that are being drawn.
    fn remove(&mut self, id: RequestId) -> Option<BatchItem> {
        let at = self.active.iter().position(|one| one.id == id)?;
        let Active { item, work_left, .. } = self.active.remove(at);
        let mut state = self.shared.lock();
        state.now.work_left = (state.now.work_left - work_left).max(0.0);
        Some(item)
    }
}

impl Session for Drawing<'_> {
    fn next(&mut self) -> Option<(RequestId, Request)> {
        let shared = self.shared;
        let mut state = shared.lock();
        let item = self.join(&mut state)?;
        let request = item.request().clone();
        let work_left = work(&request);
        state.now.started.get_or_insert_with(Instant::now);
        state.now.work_left += work_left;
        let id = self.next_id;
        self.next_id += 1;
        self.active.push(Active { id, item, work_left });
        Some((id, request))
    }

    fn cancelled(&mut self, id: RequestId) -> bool {
        let wanted = self.active.iter().any(|one| one.id == id && one.item.job.wanted());
        if wanted && !self.shared.stop.load(Ordering::Acquire) {
            return false;
        }
        if let Some(item) = self.remove(id) {
            // Whoever is still there was told that the server goes down.
            self.shared.settle(&item.job, |_| true);
        }
        true
    }

    fn stage(&mut self, stage: Stage, requests: &[Progress], elapsed: Duration) {
        self.shared.metrics.stage(stage, elapsed);
        let mut done = 0.0;
        if stage == Stage::Step {
            self.shared.metrics.batch(requests.len());
            for progress in requests {
                let Some(one) = self.active.iter_mut().find(|one| one.id == progress.id) else { continue };
                let part = work(one.item.request()) / progress.count.max(1) as f64;
                one.work_left = (one.work_left - part).max(0.0);
                done += part;
            }
        }
        let mut state = self.shared.lock();
        state.pace.record(done, elapsed);
        state.now.work_left = (state.now.work_left - done).max(0.0);
    }

    fn finish(&mut self, id: RequestId, outcome: Result<Picture, Error>) {
        let beside_others = self.active.len() > 1;
        let Some(item) = self.remove(id) else { return };
        match outcome {
            Ok(picture) => self.shared.settle(&item.job, |job| job.deliver(item.index, picture)),
            Err(error) if error.kind == ErrorKind::OutOfMemory && beside_others => self.again.push(item),
            Err(error) => {
                let error = match error.kind {
                    ErrorKind::Cancelled => {
                        let message = "the generation stopped though nobody asked it to";
                        Error::new(ErrorKind::Internal, message)
                    }
                    _ => error,
                };
                self.shared.fail(&item.job, Failure::Generation(error));
            }
        }
    }
}

#[cfg(test)]
mod properties;
