//! How a generator gets its requests while it draws, and where its pictures go.
//!
//! A [`Session`] belongs to whoever wants pictures; a generator asks it for more before
//! each step, so that a request joins those that are being drawn as soon as there
//! is room, and leaves when its own picture is done.

use std::time::Duration;

use crate::{Error, ErrorKind, Observer, Picture, Request, Stage};

/// Names a request within a [`Session`].
pub type RequestId = u64;

/// How far the drawing of a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The request.
    pub id: RequestId,
    /// Parts of the stage that are done.
    pub done: usize,
    /// Parts that the stage has: evaluations of the network for [`Stage::Step`], else 1.
    pub count: usize,
}

/// Whoever wants pictures, as a generator sees it while it draws.
pub trait Session {
    /// The next request, if one may join now: it can share a batch with all
    /// that are being drawn ([`Request::can_batch_with`]). Asked before each step
    /// until there is none.
    fn next(&mut self) -> Option<(RequestId, Request)>;

    /// Whether nobody wants this picture any more; asked before the text, before each
    /// step and before decoding. The generator then drops the request without a word.
    fn cancelled(&mut self, id: RequestId) -> bool;

    /// A stage has ended, in which these requests shared the work.
    fn stage(&mut self, stage: Stage, requests: &[Progress], elapsed: Duration);

    /// The last word on a request that was not cancelled.
    fn finish(&mut self, id: RequestId, outcome: Result<Picture, Error>);
}

/// Draws a session's requests one after the other, for generators that have
/// nothing to share between them.
pub fn one_at_a_time(
    session: &mut dyn Session,
    mut draw: impl FnMut(&Request, &mut dyn Observer) -> Result<Picture, Error>,
) {
    while let Some((id, request)) = session.next() {
        let mut single = Single { session, id, cancelled: false };
        let outcome = draw(&request, &mut single);
        if !single.cancelled {
            session.finish(id, outcome);
        }
    }
}

/// One request of a session, as an observer.
struct Single<'a> {
    session: &'a mut dyn Session,
    id: RequestId,
    cancelled: bool,
}

impl Observer for Single<'_> {
    fn stage(&mut self, stage: Stage, index: usize, count: usize, elapsed: Duration) {
        self.session.stage(stage, &[Progress { id: self.id, done: index, count }], elapsed);
    }

    fn cancelled(&mut self, _: usize) -> bool {
        self.cancelled = self.cancelled || self.session.cancelled(self.id);
        self.cancelled
    }
}

/// A session of requests that are all there from the start. The first error ends it.
pub(crate) struct Fixed<'a> {
    requests: &'a [Request],
    observer: &'a mut dyn Observer,
    begun: usize,
    pictures: Vec<Option<Picture>>,
    unwanted: Vec<bool>,
    error: Option<Error>,
}

impl<'a> Fixed<'a> {
    /// # Errors
    /// When the requests cannot share a batch.
    pub(crate) fn new(requests: &'a [Request], observer: &'a mut dyn Observer) -> Result<Self, Error> {
        let apart = requests.iter().find(|r| !r.can_batch_with(&requests[0]));
        if let Some(other) = apart {
            let message = format!("{:?} and {other:?} cannot share a batch", requests[0]);
            return Err(Error::new(ErrorKind::Internal, message));
        }
        let (pictures, unwanted) = (vec![None; requests.len()], vec![false; requests.len()]);
        Ok(Self { requests, observer, begun: 0, pictures, unwanted, error: None })
    }

    /// What ended it, if anything did.
    ///
    /// # Errors
    /// That.
    pub(crate) fn end(&mut self) -> Result<(), Error> {
        self.error.take().map_or(Ok(()), Err)
    }

    /// The pictures, in the order of the requests.
    ///
    /// # Errors
    /// What ended it before they were there.
    pub(crate) fn into_pictures(mut self) -> Result<Vec<Picture>, Error> {
        self.end()?;
        let (wanted, pictures) = (self.requests.len(), self.pictures.into_iter().flatten());
        let pictures: Vec<_> = pictures.collect();
        if pictures.len() < wanted {
            let message = format!("{} pictures came for {wanted} requests", pictures.len());
            return Err(Error::new(ErrorKind::Internal, message));
        }
        Ok(pictures)
    }
}

impl Session for Fixed<'_> {
    fn next(&mut self) -> Option<(RequestId, Request)> {
        let next = self.requests.get(self.begun).filter(|_| self.error.is_none())?;
        self.begun += 1;
        Some((self.begun as RequestId - 1, next.clone()))
    }

    fn cancelled(&mut self, id: RequestId) -> bool {
        self.unwanted[id as usize] = self.observer.cancelled(id as usize);
        let over = |(picture, &unwanted): (&Option<Picture>, &bool)| unwanted || picture.is_some();
        if self.error.is_none() && self.pictures.iter().zip(&self.unwanted).all(over) {
            self.error = Some(Error::new(ErrorKind::Cancelled, "the generation was cancelled"));
        }
        self.error.is_some()
    }

    fn stage(&mut self, stage: Stage, requests: &[Progress], elapsed: Duration) {
        let (index, count) = match stage {
            Stage::Text => (1, 1),
            // Whoever has the longest way is done last.
            Stage::Step => {
                let longest = requests.iter().max_by_key(|progress| progress.count);
                longest.map_or((1, 1), |progress| (progress.done, progress.count))
            }
            Stage::Decode => (self.pictures.iter().flatten().count() + 1, self.requests.len()),
        };
        self.observer.stage(stage, index, count, elapsed);
    }

    fn finish(&mut self, id: RequestId, outcome: Result<Picture, Error>) {
        match outcome {
            Ok(picture) => self.pictures[id as usize] = Some(picture),
            Err(error) => self.error = self.error.take().or(Some(error)),
        }
    }
}
