//! What holds for the engine with its thread, whatever its clients do: bounds,
//! order, an answer for everybody who waits for one, and an end.

use std::sync::Mutex as StdMutex;
use std::sync::mpsc::{Receiver, Sender, channel};

use hypergen_diffusion::{Check, ModelInfo, Size};
use proptest::prelude::*;

use super::*;

/// A model whose pictures take `seed % 3 + 1` steps, each when it is let, and that notes the
/// order in which they began. Its requests' seeds are their numbers; a `guidance_scale`
/// says what becomes of them.
struct Gate {
    open: Receiver<()>,
    begun: Arc<StdMutex<Vec<u64>>>,
}

const FINE: f64 = 2.0;
const FAILS: f64 = 3.0;
const PANICS: f64 = 4.0;

fn info() -> ModelInfo {
    ModelInfo {
        name: "gate".to_owned(),
        family: String::new(),
        native_size: Size { width: 8, height: 8 },
        sampler: "ddim".to_owned(),
        device: "cpu".to_owned(),
        isa: "portable".to_owned(),
        dtype: "float32".to_owned(),
        threads: 1,
        weight_bytes: 0,
        default_steps: None,
        default_guidance: None,
        min_guidance: 1.0,
    }
}

impl Generator for Gate {
    fn info(&self) -> ModelInfo {
        info()
    }

    fn checker(&self) -> Arc<dyn Check> {
        // Requests are checked before they come to the engine.
        unreachable!("the engine checks nothing")
    }

    fn draw(&mut self, session: &mut dyn Session) {
        let mut active: Vec<(RequestId, Request, u64)> = vec![];
        loop {
            while let Some((id, request)) = session.next() {
                let mut begun = self.begun.lock().expect("no panic within");
                // After a panic some begin once more.
                if begun.last().is_none_or(|&last| last < request.seed) {
                    begun.push(request.seed);
                } else {
                    assert!(begun.contains(&request.seed), "overtaken: {} after {begun:?}", request.seed);
                }
                let steps = request.seed % 3 + 1;
                active.push((id, request, steps));
            }
            if active.is_empty() {
                return;
            }
            // A gate that is gone lets everybody through.
            let _ = self.open.recv();
            active.retain(|(id, ..)| !session.cancelled(*id));
            let panics = active.iter().any(|(_, request, _)| request.guidance_scale == PANICS);
            assert!(!panics, "the gate was told to panic");
            active.retain_mut(|(id, request, left)| {
                *left -= 1;
                if *left == 0 || request.guidance_scale == FAILS {
                    session.finish(*id, Self::outcome(request));
                    return false;
                }
                true
            });
        }
    }
}

impl Gate {
    fn outcome(request: &Request) -> Result<Picture, Error> {
        if request.guidance_scale == FAILS {
            return Err(Error::new(ErrorKind::Internal, "the gate was told to fail"));
        }
        Ok(Picture { size: request.size, rgb: request.seed.to_le_bytes().to_vec(), warnings: vec![] })
    }
}

#[derive(Debug, Clone)]
enum Step {
    Submit {
        pictures: u64,
        scale: f64,
    },
    Leave {
        which: usize,
    },
    /// Lets one step be computed.
    Open,
    /// The server is told to stop.
    Drain,
}

fn step() -> impl Strategy<Value = Step> {
    let scale = prop_oneof![8 => Just(FINE), 1 => Just(FAILS), 1 => Just(PANICS)];
    prop_oneof![
        8 => (1..=3_u64, scale).prop_map(|(pictures, scale)| Step::Submit { pictures, scale }),
        2 => any::<usize>().prop_map(|which| Step::Leave { which }),
        6 => Just(Step::Open),
        1 => Just(Step::Drain),
    ]
}

/// Somebody who waits for pictures with these seeds.
struct Client {
    ticket: Ticket,
    seeds: Vec<u64>,
    scale: f64,
}

/// Starts an engine, lets it all happen, and checks everybody's answer.
fn happen(steps: &[Step], capacity: usize, max_batch: usize) {
    let (gate, open): (Sender<()>, _) = channel();
    let generator = Gate { open, begun: Arc::default() };
    let metrics = Arc::new(Metrics::new(&info()));
    let engine = Engine::start(Box::new(generator), capacity, max_batch, metrics).expect("a thread");
    let (mut clients, mut next, mut draining) = (vec![], 0, false);
    for step in steps {
        match *step {
            Step::Submit { pictures, scale } => {
                let seeds: Vec<u64> = (next..next + pictures).collect();
                next += pictures;
                let request =
                    Request { size: info().native_size, guidance_scale: scale, ..Request::new("x") };
                let requests = seeds.iter().map(|&seed| Request { seed, ..request.clone() }).collect();
                match engine.submit(requests) {
                    Ok(ticket) => {
                        assert!(!draining, "nobody is taken any more");
                        clients.push(Client { ticket, seeds, scale });
                    }
                    Err(Refusal::ShuttingDown) => assert!(draining, "refused for no reason"),
                    Err(Refusal::Full { capacity: bound, retry_after }) => {
                        assert!(!draining && bound == capacity && retry_after >= Duration::from_secs(1));
                    }
                }
            }
            Step::Leave { which } if !clients.is_empty() => drop(clients.swap_remove(which % clients.len())),
            Step::Leave { .. } => {}
            // An engine that is told to stop ends, and its model with it.
            Step::Open => assert!(gate.send(()).is_ok() || draining, "the engine has ended"),
            Step::Drain => {
                draining = true;
                engine.drain();
            }
        }
        let now = engine.snapshot();
        assert!(now.waiting <= capacity && now.shutting_down == draining, "{now:?}");
        // A batch holds so many jobs at most, and the one before it may just be ending.
        assert!(now.in_progress <= 2 * max_batch, "{now:?}");
    }
    drop(gate);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    runtime.block_on(async {
        for client in clients {
            answered(client, draining).await;
        }
        let patience = Duration::from_secs(60);
        tokio::time::timeout(patience, engine.idle()).await.expect("an end, once everybody is answered");
    });
    let now = engine.snapshot();
    assert_eq!((now.waiting, now.in_progress), (0, 0));
}

/// All pictures, each once and its own, or the failure that its request asked for.
async fn answered(mut client: Client, draining: bool) {
    let mut pictures = vec![];
    let mut failure = None;
    while let Some(next) = client.ticket.next().await {
        match next {
            Ok((index, picture)) => {
                let seed = client.seeds[index];
                assert_eq!(picture.rgb, seed.to_le_bytes(), "somebody else's picture");
                pictures.push(index);
            }
            Err(found) => failure = Some(found),
        }
    }
    // Pictures of one request may take differently long.
    pictures.sort_unstable();
    let all: Vec<usize> = (0..client.seeds.len()).collect();
    match failure {
        None => assert!(pictures == all && client.scale == FINE, "{pictures:?} of {all:?}"),
        Some(Failure::ShuttingDown) => assert!(draining, "nobody said that it goes down"),
        Some(Failure::Panicked) => assert_eq!(client.scale, PANICS),
        Some(Failure::Generation(e)) => {
            assert_eq!(client.scale, FAILS, "it failed for another's request: {e}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn everybody_who_stays_is_answered_in_order_and_within_bounds(
        steps in prop::collection::vec(step(), 0..40),
        capacity in 1..6_usize,
        max_batch in 1..4_usize,
    ) {
        happen(&steps, capacity, max_batch);
    }
}
