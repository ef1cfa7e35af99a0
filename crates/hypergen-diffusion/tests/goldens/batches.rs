//! A batch is nothing but its requests, through the product's own pipeline:
//! whatever the sampler and the scheduler's file, a picture keeps every bit
//! when others are drawn beside it.

use std::collections::VecDeque;
use std::time::Duration;

use hypergen_diffusion::prompt::PromptSyntax;
use hypergen_diffusion::samplers::SamplerKind;
use hypergen_diffusion::{
    DTypeChoice, Error, Generator, Latents, Picture, Progress, Request, RequestId, Session, Silent, Size,
    Stage,
};
use serde_json::{Value, json};

use crate::checkpoint::{Checkpoint, Layout, write_json};
use crate::pipelines::Loaded;

/// The tiny SD 1.x checkpoint with some fields of its scheduler's file replaced.
fn with_scheduler(fields: &Value) -> Loaded {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let checkpoint = Checkpoint::named("sd1");
    checkpoint.write(folder.path(), &Layout::plain());
    let file = "scheduler/scheduler_config.json";
    let mut scheduler = checkpoint.files[file].clone();
    for (field, value) in fields.as_object().expect("fields") {
        scheduler[field] = value.clone();
    }
    write_json(&folder.path().join(file), &scheduler);
    let path = folder.path().to_owned();
    Loaded::new(&path, folder, DTypeChoice::Float32, 2)
}

/// Two requests that share a batch and little else.
fn pair(sampler: SamplerKind) -> [Request; 2] {
    let request = |prompt: &str, seed| Request {
        size: Size { width: 32, height: 24 },
        steps: 3,
        seed,
        guidance_scale: 5.0,
        sampler: Some(sampler),
        ..Request::new(prompt)
    };
    [request("a red fox", 3), Request { negative_prompt: Some("fog".into()), ..request("cat face", 8) }]
}

fn latents(model: &mut Loaded, requests: &[Request]) -> Vec<Latents> {
    model.pipeline.latents(requests, &mut Silent).expect("latents")
}

/// With thresholding a sampler looks at a quantile of the whole picture, and so
/// could look at its neighbours' too.
#[test]
fn every_sampler_draws_a_batch_as_single_requests() {
    let mut plain = with_scheduler(&json!({}));
    let mut bounded = with_scheduler(
        &json!({ "thresholding": true, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 100.0 }),
    );
    let mut wrong = vec![];
    for &kind in SamplerKind::ALL {
        let requests = pair(kind);
        let both = latents(&mut bounded, &requests);
        for (request, batched) in requests.iter().zip(&both) {
            let alone = latents(&mut bounded, std::slice::from_ref(request)).remove(0);
            let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
            if !alone.values.iter().zip(&batched.values).all(same) {
                wrong.push(format!("{kind}: {}", request.prompt));
            }
        }
        assert_ne!(both[0], both[1], "{kind}: two requests, one picture");
        // Else the thresholds bound nothing, and prove nothing.
        if ["ddim", "ddpm", "dpmpp_2m", "dpmpp_2s", "deis", "unipc", "lcm"].contains(&kind.name()) {
            assert_ne!(latents(&mut plain, &requests[..1])[0], both[0], "{kind} looks at no threshold");
        }
    }
    assert!(wrong.is_empty(), "a batch changes\n{}", wrong.join("\n"));
}

/// The pictures too, as the server asks for them.
#[test]
fn thresholded_pictures_of_a_batch_are_those_of_single_requests() {
    let mut model = with_scheduler(&json!({ "thresholding": true, "sample_max_value": 50.0 }));
    let requests = pair("ddim".parse().expect("a sampler"));
    let batch = model.pipeline.generate(&requests, &mut Silent).expect("a batch");
    for (request, picture) in requests.iter().zip(&batch) {
        assert_eq!(model.draw(request).1, picture.rgb, "{}", request.prompt);
    }
}

/// Requests that come while others are being drawn.
struct Arrivals {
    /// Each with the pass before which it comes.
    waiting: VecDeque<(usize, Request)>,
    begun: RequestId,
    /// Requests in each pass.
    passes: Vec<Vec<RequestId>>,
    /// Who leaves before this pass.
    leaves: Option<(RequestId, usize)>,
    pictures: Vec<(RequestId, Picture)>,
}

impl Arrivals {
    fn new(arrivals: impl IntoIterator<Item = (usize, Request)>) -> Self {
        let waiting = arrivals.into_iter().collect();
        Self { waiting, begun: 0, passes: vec![], leaves: None, pictures: vec![] }
    }

    fn picture(&self, id: RequestId) -> Option<&Picture> {
        self.pictures.iter().find(|(found, _)| *found == id).map(|(_, picture)| picture)
    }
}

impl Session for Arrivals {
    fn next(&mut self) -> Option<(RequestId, Request)> {
        let (_, request) = self.waiting.pop_front_if(|(pass, _)| *pass <= self.passes.len())?;
        self.begun += 1;
        Some((self.begun - 1, request))
    }

    fn cancelled(&mut self, id: RequestId) -> bool {
        self.leaves.is_some_and(|(who, pass)| who == id && self.passes.len() >= pass)
    }

    fn stage(&mut self, stage: Stage, requests: &[Progress], _: Duration) {
        if stage == Stage::Step {
            self.passes.push(requests.iter().map(|progress| progress.id).collect());
        }
    }

    fn finish(&mut self, id: RequestId, outcome: Result<Picture, Error>) {
        self.pictures.push((id, outcome.expect("a picture")));
    }
}

/// Three requests with nothing in common but their size.
fn strangers(sampler: SamplerKind) -> [Request; 3] {
    let [first, second] = pair(sampler);
    let long = "a (red:1.3) fox, ".repeat(30);
    [
        Request { steps: 4, ..first.clone() },
        Request {
            prompt: long,
            prompt_syntax: PromptSyntax::A1111,
            guidance_scale: 1.0,
            sampler: "euler_a".parse().ok(),
            steps: 2,
            ..second
        },
        Request { seed: 21, guidance_scale: 7.5, guidance_rescale: 0.7, ..first },
    ]
}

/// The promise of `--max-batch-size`, through the product's own pipeline: whoever joins
/// whenever, whoever leaves, each picture is that of a single run, bit for bit.
#[test]
fn requests_that_join_and_leave_draw_the_pictures_of_single_runs() {
    let thresholds =
        json!({ "thresholding": true, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 100.0 });
    let mut wrong = vec![];
    for fields in [json!({}), thresholds] {
        let mut model = with_scheduler(&fields);
        for &kind in SamplerKind::ALL {
            let requests = strangers(kind);
            let mut arrivals = Arrivals::new((0..).zip(requests.clone()));
            model.pipeline.draw(&mut arrivals);
            assert_eq!(arrivals.passes[0], [0], "{kind}");
            assert!(arrivals.passes.iter().any(|pass| pass == &[0, 1, 2]), "{kind}: {:?}", arrivals.passes);
            for (id, request) in (0..).zip(&requests) {
                let alone = model.draw(request).1;
                if arrivals.picture(id).expect("a picture").rgb != alone {
                    wrong.push(format!("{kind}, request {id}, {fields}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "company changes\n{}", wrong.join("\n"));
}

/// The same for a model that is told sizes and pooled text, and when one leaves half-way.
#[test]
fn who_leaves_changes_nobody_elses_picture() {
    for checkpoint in ["sd1", "sdxl"] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Checkpoint::named(checkpoint).write(folder.path(), &Layout::plain());
        let path = folder.path().to_owned();
        let mut model = Loaded::new(&path, folder, DTypeChoice::Bfloat16, 2);
        let requests = strangers("dpmpp_2m".parse().expect("a sampler"));
        let mut arrivals = Arrivals::new(requests.iter().cloned().map(|request| (0, request)));
        arrivals.leaves = Some((0, 2));
        model.pipeline.draw(&mut arrivals);
        assert_eq!(arrivals.passes, [vec![0, 1, 2], vec![0, 1, 2], vec![2]], "{checkpoint}");
        assert_eq!(arrivals.picture(0), None);
        for id in [1, 2] {
            let alone = model.draw(&requests[id as usize]).1;
            assert!(arrivals.picture(id).expect("a picture").rgb == alone, "{checkpoint}, request {id}");
        }
    }
}
