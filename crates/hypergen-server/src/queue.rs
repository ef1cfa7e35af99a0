//! The queue: what waits, what is being drawn, and which pictures go next.
//! Plain data without a lock, a thread or a clock; the engine adds those.
//!
//! First in, first out, strictly: a request never overtakes another, so pictures join
//! a batch only from the front, as long as they can share it. (Looking further
//! back would fill batches better under mixed load, at the expense of whoever is
//! passed by.)

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use hypergen_diffusion::{Picture, Request};
use tokio::sync::mpsc::UnboundedSender;

/// What the engine tells whoever waits for a job.
#[derive(Debug)]
pub(crate) enum Event {
    /// One of its pictures is drawn.
    Picture {
        /// Which of the request's pictures it is.
        index: usize,
        /// The pixels.
        picture: Picture,
    },
    /// There will be no (more) pictures.
    Failed(Failure),
}

/// Why a job has failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The model's own words.
    Generation(hypergen_diffusion::Error),
    /// The model panicked.
    Panicked,
    /// The server goes down.
    ShuttingDown,
}

/// One HTTP request's pictures.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) id: u64,
    /// One for each picture.
    pub(crate) requests: Vec<Request>,
    pub(crate) queued: Instant,
    events: UnboundedSender<Event>,
    drawn: AtomicUsize,
    over: AtomicBool,
}

impl Job {
    pub(crate) fn new(id: u64, requests: Vec<Request>, events: UnboundedSender<Event>) -> Self {
        let (drawn, over) = (AtomicUsize::new(0), AtomicBool::new(false));
        Self { id, requests, queued: Instant::now(), events, drawn, over }
    }

    /// Whether its client has left.
    pub(crate) fn gone(&self) -> bool {
        self.events.is_closed()
    }

    /// Whether anybody still wants its pictures.
    pub(crate) fn wanted(&self) -> bool {
        !self.gone() && !self.over.load(Ordering::Acquire)
    }

    /// Hands over a picture; says whether it was the last one.
    pub(crate) fn deliver(&self, index: usize, picture: Picture) -> bool {
        // Nobody is left to hear of a failed send: the job is gone then.
        let _ = self.events.send(Event::Picture { index, picture });
        let drawn = self.drawn.fetch_add(1, Ordering::AcqRel) + 1;
        let last = drawn == self.requests.len();
        if last {
            self.over.store(true, Ordering::Release);
        }
        last
    }

    /// Ends it without (more) pictures; only the first end counts.
    pub(crate) fn fail(&self, failure: Failure) {
        if !self.over.swap(true, Ordering::AcqRel) {
            let _ = self.events.send(Event::Failed(failure));
        }
    }
}

/// One picture of a job, on its way through the model.
#[derive(Debug, Clone)]
pub(crate) struct BatchItem {
    pub(crate) job: Arc<Job>,
    pub(crate) index: usize,
}

impl BatchItem {
    pub(crate) fn request(&self) -> &Request {
        &self.job.requests[self.index]
    }
}

/// See the module's description.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    waiting: VecDeque<Arc<Job>>,
    /// The job whose pictures are being taken, and the next one of them.
    current: Option<(Arc<Job>, usize)>,
    /// Jobs that have begun and have not ended, the current one included.
    begun: Vec<Arc<Job>>,
}

impl Queue {
    pub(crate) fn push(&mut self, job: Arc<Job>) {
        self.waiting.push_back(job);
    }

    /// Requests that have not begun.
    pub(crate) fn waiting(&self) -> impl ExactSizeIterator<Item = &Arc<Job>> {
        self.waiting.iter()
    }

    /// Requests that have begun and have not ended.
    pub(crate) fn begun(&self) -> &[Arc<Job>] {
        &self.begun
    }

    /// Pictures of begun requests that have not been taken yet.
    pub(crate) fn untaken(&self) -> &[Request] {
        self.current.as_ref().map_or(&[], |(job, next)| &job.requests[*next..])
    }

    /// Whether [`Queue::next`] may find something.
    pub(crate) fn has_work(&self) -> bool {
        self.current.is_some() || !self.waiting.is_empty()
    }

    /// Takes the picture at the front that is still wanted, if it can be drawn `beside`
    /// another; `begin` sees each job whose first picture is taken.
    pub(crate) fn next(
        &mut self,
        beside: Option<&Request>,
        mut begin: impl FnMut(&Job),
    ) -> Option<BatchItem> {
        loop {
            let Some((job, next)) = self.current.clone() else {
                let job = self.waiting.pop_front()?;
                if job.wanted() {
                    self.current = Some((job, 0));
                }
                continue;
            };
            if !job.wanted() {
                self.end(&job);
                self.current = None;
                continue;
            }
            if beside.is_some_and(|other| !other.can_batch_with(&job.requests[next])) {
                // A job that has not begun goes back to its place at the front.
                if next == 0 {
                    self.waiting.push_front(job);
                    self.current = None;
                }
                return None;
            }
            if next == 0 {
                begin(&job);
                self.begun.push(Arc::clone(&job));
            }
            self.current = (next + 1 < job.requests.len()).then(|| (Arc::clone(&job), next + 1));
            return Some(BatchItem { job, index: next });
        }
    }

    /// Forgets a job that has ended.
    pub(crate) fn end(&mut self, job: &Job) {
        self.begun.retain(|other| other.id != job.id);
    }

    /// Forgets a job that waits; says whether it did.
    pub(crate) fn remove(&mut self, id: u64) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|job| job.id != id);
        self.waiting.len() < before
    }

    /// Takes out everything that waits.
    pub(crate) fn clear_waiting(&mut self) -> VecDeque<Arc<Job>> {
        std::mem::take(&mut self.waiting)
    }
}

#[cfg(test)]
mod properties;

#[cfg(test)]
mod tests {
    use hypergen_diffusion::Size;
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;

    fn request(width: usize) -> Request {
        Request { size: Size { width, height: 64 }, ..Request::new("x") }
    }

    /// A queue with jobs of (pictures, width), and what keeps them wanted.
    fn queue(jobs: &[(usize, usize)]) -> (Queue, Vec<UnboundedReceiver<Event>>) {
        let mut queue = Queue::default();
        let mut clients = Vec::new();
        for (id, (pictures, width)) in jobs.iter().enumerate() {
            let (sender, receiver) = unbounded_channel();
            clients.push(receiver);
            queue.push(Arc::new(Job::new(id as u64, vec![request(*width); *pictures], sender)));
        }
        (queue, clients)
    }

    fn take(queue: &mut Queue, max: usize) -> Vec<(u64, usize)> {
        let mut items: Vec<BatchItem> = Vec::new();
        while items.len() < max
            && let Some(item) = queue.next(items.first().map(BatchItem::request), |_| ())
        {
            items.push(item);
        }
        items.iter().map(|item| (item.job.id, item.index)).collect()
    }

    #[test]
    fn one_at_a_time_in_the_order_of_arrival() {
        let (mut queue, _clients) = queue(&[(2, 20), (1, 20)]);
        assert_eq!(take(&mut queue, 1), [(0, 0)]);
        assert_eq!((queue.waiting().len(), queue.begun().len(), queue.untaken().len()), (1, 1, 1));
        assert_eq!(take(&mut queue, 1), [(0, 1)]);
        assert_eq!(take(&mut queue, 1), [(1, 0)]);
        assert_eq!(take(&mut queue, 1), []);
    }

    #[test]
    fn a_batch_takes_what_agrees_and_never_overtakes() {
        let (mut queue, _clients) = queue(&[(3, 20), (1, 20), (1, 30), (1, 20)]);
        assert_eq!(take(&mut queue, 2), [(0, 0), (0, 1)]);
        assert_eq!(take(&mut queue, 4), [(0, 2), (1, 0)]);
        assert_eq!((queue.waiting().len(), queue.begun().len()), (2, 2));
        assert_eq!(take(&mut queue, 4), [(2, 0)]);
        assert_eq!(take(&mut queue, 4), [(3, 0)]);
    }

    #[test]
    fn who_is_gone_is_passed_over_before_and_after_the_start() {
        let (mut queue, mut clients) = queue(&[(3, 20), (1, 20), (1, 20)]);
        assert_eq!(take(&mut queue, 1), [(0, 0)]);
        clients.drain(..2);
        let mut begun = Vec::new();
        assert!(queue.next(None, |job| begun.push(job.id)).is_some());
        assert_eq!(begun, [2]);
        assert_eq!(queue.begun().len(), 1, "the gone job has ended");
    }

    #[test]
    fn a_job_ends_once() {
        let (mut queue, mut clients) = queue(&[(1, 20)]);
        let item = queue.next(None, |_| ()).expect("the picture");
        item.job.fail(Failure::ShuttingDown);
        item.job.fail(Failure::Panicked);
        assert!(matches!(clients[0].try_recv(), Ok(Event::Failed(Failure::ShuttingDown))));
        assert!(clients[0].try_recv().is_err());
        assert!(!item.job.wanted());
        queue.end(&item.job);
        assert!(queue.begun().is_empty());
    }

    #[test]
    fn what_waits_can_leave() {
        let (mut queue, _clients) = queue(&[(1, 20), (1, 20), (1, 20)]);
        assert!(queue.remove(1));
        assert!(!queue.remove(1));
        assert_eq!(queue.clear_waiting().len(), 2);
        assert_eq!(queue.waiting().len(), 0);
    }
}
