//! What holds for the queue whatever happens to it: order, nobody lost and
//! nobody twice, whoever is gone costs nothing, and its books are right.

use std::collections::HashSet;

use hypergen_diffusion::Size;
use proptest::prelude::*;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::*;

/// Something that happens.
#[derive(Debug, Clone)]
enum Step {
    /// A job comes; jobs of one `kind` can share a batch.
    Push { pictures: usize, kind: usize },
    /// Up to `max` pictures are taken, and drawn.
    Draw { max: usize },
    /// The same, and the drawing fails.
    Fail { max: usize },
    /// A client leaves, and tells nobody.
    Leave { which: usize },
    /// A client leaves while it waits.
    Remove { which: usize },
    /// The server goes down: what waits is answered.
    Clear,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1..=4_usize, 0..2_usize).prop_map(|(pictures, kind)| Step::Push { pictures, kind }),
        6 => (1..=4_usize).prop_map(|max| Step::Draw { max }),
        1 => (1..=4_usize).prop_map(|max| Step::Fail { max }),
        2 => any::<usize>().prop_map(|which| Step::Leave { which }),
        1 => any::<usize>().prop_map(|which| Step::Remove { which }),
        1 => Just(Step::Clear),
    ]
}

/// A client and what it has got.
struct Client {
    job: Arc<Job>,
    /// `None` once it has left.
    events: Option<UnboundedReceiver<Event>>,
    removed: bool,
}

#[derive(Default)]
struct World {
    queue: Queue,
    clients: Vec<Client>,
    /// Pictures in the order in which they were taken.
    taken: Vec<(u64, usize)>,
    /// Jobs in the order in which they began.
    begun: Vec<u64>,
}

impl World {
    fn happen(&mut self, step: &Step) {
        match *step {
            Step::Push { pictures, kind } => {
                let size = Size { width: 8 + 8 * kind, height: 8 };
                let request = Request { size, ..Request::new("x") };
                let (sender, receiver) = unbounded_channel();
                let job = Arc::new(Job::new(self.clients.len() as u64, vec![request; pictures], sender));
                self.queue.push(Arc::clone(&job));
                self.clients.push(Client { job, events: Some(receiver), removed: false });
            }
            Step::Draw { max } => {
                for item in self.take(max) {
                    let picture = Picture { size: item.request().size, rgb: vec![], warnings: vec![] };
                    if item.job.deliver(item.index, picture) {
                        self.queue.end(&item.job);
                    }
                }
            }
            Step::Fail { max } => {
                for item in self.take(max) {
                    item.job.fail(Failure::Panicked);
                    self.queue.end(&item.job);
                }
            }
            Step::Leave { which } => {
                let len = self.clients.len();
                if let Some(client) = self.clients.get_mut(which % len.max(1)) {
                    client.events = None;
                }
            }
            Step::Remove { which } => {
                let len = self.clients.len();
                if let Some(client) = self.clients.get_mut(which % len.max(1)) {
                    let waits = self.queue.waiting().any(|job| job.id == client.job.id);
                    assert_eq!(self.queue.remove(client.job.id), waits);
                    client.removed |= waits;
                }
            }
            Step::Clear => {
                for job in self.queue.clear_waiting() {
                    job.fail(Failure::ShuttingDown);
                }
                assert_eq!(self.queue.waiting().len(), 0);
            }
        }
        self.check_books();
    }

    fn take(&mut self, max: usize) -> Vec<BatchItem> {
        let mut begun = vec![];
        let mut items: Vec<BatchItem> = vec![];
        while items.len() < max
            && let Some(item) =
                self.queue.next(items.first().map(BatchItem::request), |job| begun.push(job.id))
        {
            items.push(item);
        }
        if let Some(first) = items.first() {
            assert!(
                items.iter().all(|item| item.request().can_batch_with(first.request())),
                "a batch can be one"
            );
        }
        assert!(items.iter().all(|item| item.job.wanted()), "nobody is drawn for who has left");
        let first = |item: &&BatchItem| item.index == 0;
        let with_first: Vec<u64> = items.iter().filter(first).map(|item| item.job.id).collect();
        assert_eq!(begun, with_first, "a job begins with its first picture");
        self.begun.extend(begun);
        self.taken.extend(items.iter().map(|item| (item.job.id, item.index)));
        // Jobs have their numbers in the order of their coming: who came first is drawn first.
        assert!(self.taken.is_sorted_by(|a, b| a < b), "somebody was overtaken: {:?}", self.taken);
        assert!(self.begun.is_sorted_by(|a, b| a < b), "somebody began twice: {:?}", self.begun);
        self.batch_is_full(&items, max);
        items
    }

    /// A batch has room left only where nothing waits, or what is next cannot share it.
    fn batch_is_full(&self, items: &[BatchItem], max: usize) {
        let next = self.queue.untaken().first();
        let next = next.or_else(|| self.queue.waiting().find(|job| job.wanted()).map(|job| &job.requests[0]));
        match (items.first(), next) {
            (Some(first), Some(next)) if items.len() < max => {
                assert!(!first.request().can_batch_with(next), "there was room for one more");
            }
            (None, Some(_)) => panic!("something waits, and nothing was taken"),
            _ => {}
        }
    }

    fn check_books(&self) {
        let waiting: Vec<u64> = self.queue.waiting().map(|job| job.id).collect();
        assert!(waiting.is_sorted_by(|a, b| a < b), "the order of coming: {waiting:?}");
        let begun: Vec<u64> = self.queue.begun().iter().map(|job| job.id).collect();
        let all: HashSet<u64> = waiting.iter().chain(&begun).copied().collect();
        assert_eq!(
            all.len(),
            waiting.len() + begun.len(),
            "a job stands in one place: {waiting:?} and {begun:?}"
        );
    }

    /// Each client that stayed has all its pictures, once, or one failure after some of them.
    fn check_answers(&mut self) {
        for client in &mut self.clients {
            let Some(events) = client.events.as_mut().filter(|_| !client.removed) else { continue };
            let (mut pictures, mut failures) = (vec![], 0);
            while let Ok(event) = events.try_recv() {
                match event {
                    Event::Picture { index, .. } => {
                        assert_eq!(failures, 0, "a picture after the end");
                        pictures.push(index);
                    }
                    Event::Failed(_) => failures += 1,
                }
            }
            let expected: Vec<usize> = (0..pictures.len()).collect();
            assert_eq!(pictures, expected, "each picture once, in order");
            let all = pictures.len() == client.job.requests.len();
            assert_eq!((all, failures), if all { (true, 0) } else { (false, 1) }, "job {}", client.job.id);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nobody_is_lost_overtaken_or_drawn_twice(steps in prop::collection::vec(step(), 0..60)) {
        let mut world = World::default();
        for step in &steps {
            world.happen(step);
        }
        // Whatever is left is drawn in the end.
        while !world.take_is_over() {
            world.happen(&Step::Draw { max: 3 });
        }
        world.check_answers();
        assert_eq!((world.queue.waiting().len(), world.queue.untaken().len()), (0, 0));
        let gone = world.queue.begun().iter().all(|job| !job.wanted());
        assert!(gone, "who is still on the books has left in the middle of a drawing");
    }
}

impl World {
    fn take_is_over(&self) -> bool {
        self.queue.waiting().len() == 0 && self.queue.untaken().is_empty()
    }
}
