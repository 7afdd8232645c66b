//! The callers whose credentials a flight uses.
//!
//! Each caller that waits for a tree of a repository offers the credential that is proven for it there. The flight uses
//! one. If the registry refuses it, only its owner fails, and the next one's is used. Callers for another repository
//! wait for a flight of their own: neither failures nor progress are shared with them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::error::PullError;
use oci::Repository;
use oci::credentials::Credential;

/// The source of a fetch: a repository and a credential.
#[derive(Clone, Debug)]
pub(super) struct Source {
    /// The repository to fetch from.
    pub(super) repository: Repository,
    /// Proven to open the manifest there.
    pub(super) credential: Credential,
}

/// All who wait for one piece of work of a repository.
pub(super) struct Sponsors {
    /// The repository that all of them fetch from.
    pub(super) repository: Repository,
    list: Mutex<List>,
    /// Tells this piece of work from all others of the process.
    pub(super) number: u64,
}

#[derive(Default)]
struct List {
    next: u64,
    sponsors: Vec<Sponsor>,
}

struct Sponsor {
    number: u64,
    source: Source,
    refused: oneshot::Sender<Arc<PullError>>,
}

/// One who waits. Dropping it withdraws the credential.
pub(super) struct Sponsorship {
    sponsors: Arc<Sponsors>,
    number: u64,
    refused: oneshot::Receiver<Arc<PullError>>,
}

impl Sponsors {
    /// Creates a list without callers.
    pub(super) fn new(repository: Repository) -> Self {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        Self { repository, list: Mutex::default(), number }
    }

    /// Offers a source.
    pub(super) fn offer(self: &Arc<Self>, source: Source) -> Sponsorship {
        let mut list = self.list.lock();
        let number = list.next;
        list.next += 1;
        let (sender, refused) = oneshot::channel();
        list.sponsors.push(Sponsor { number, source, refused: sender });
        Sponsorship { sponsors: Arc::clone(self), number, refused }
    }

    /// The source to use now; none when all have left or were refused.
    pub(super) fn current(&self) -> Option<(u64, Source)> {
        let list = self.list.lock();
        list.sponsors.first().map(|sponsor| (sponsor.number, sponsor.source.clone()))
    }

    /// This one's registry was of no use: its owner fails, the next is current. Returns the error for the work that
    /// ends with the last of them.
    pub(super) fn refused(&self, number: u64, error: PullError) -> PullError {
        let error = Arc::new(error);
        let mut list = self.list.lock();
        if let Some(place) = list.sponsors.iter().position(|sponsor| sponsor.number == number) {
            let sponsor = list.sponsors.remove(place);
            // An owner who has left does not mind.
            let _ = sponsor.refused.send(Arc::clone(&error));
        }
        PullError::Shared(error)
    }
}

impl Sponsorship {
    /// Returns when this one's registry was of no use.
    pub(super) async fn refused(&mut self) -> Arc<PullError> {
        match (&mut self.refused).await {
            Ok(error) => error,
            // Withdrawn in no other way than by dropping self.
            Err(_) => std::future::pending().await,
        }
    }
}

impl Drop for Sponsorship {
    fn drop(&mut self) {
        let mut list = self.sponsors.list.lock();
        // The last one stays: the flight lingers, and a caller that comes back may find it far ahead.
        if list.sponsors.len() > 1 {
            list.sponsors.retain(|sponsor| sponsor.number != self.number);
        }
    }
}
