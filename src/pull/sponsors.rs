//! Whose credentials pay for a flight.
//!
//! Everybody who waits for a tree offers the repository and the credential that
//! have been proven for him. The flight uses one; when a registry refuses it,
//! only its owner fails, and the next one's is used.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;

use super::error::PullError;
use crate::oci::Repository;
use crate::oci::credentials::Credential;

/// Where to fetch from, and with what.
#[derive(Clone, Debug)]
pub struct Source {
    /// The repository.
    pub repository: Repository,
    /// Proven to open the manifest there.
    pub credential: Credential,
}

/// All who wait for one piece of work.
#[derive(Debug)]
pub struct Sponsors(Mutex<List>, u64);

#[derive(Debug, Default)]
struct List {
    next: u64,
    sponsors: Vec<Sponsor>,
}

#[derive(Debug)]
struct Sponsor {
    number: u64,
    source: Source,
    refused: oneshot::Sender<Arc<PullError>>,
}

/// One who waits. Dropping it withdraws the credential.
#[derive(Debug)]
pub struct Sponsorship {
    sponsors: Arc<Sponsors>,
    number: u64,
    refused: oneshot::Receiver<Arc<PullError>>,
}

impl Default for Sponsors {
    fn default() -> Self {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        Self(Mutex::default(), NUMBERS.fetch_add(1, Ordering::Relaxed))
    }
}

impl Sponsors {
    /// Tells this piece of work from all others of the process.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.1
    }

    /// Offers a source.
    pub fn offer(self: &Arc<Self>, source: Source) -> Sponsorship {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = list.next;
        list.next += 1;
        let (sender, refused) = oneshot::channel();
        list.sponsors.push(Sponsor { number, source, refused: sender });
        Sponsorship { sponsors: Arc::clone(self), number, refused }
    }

    /// The source to use now; none when all have left or were refused.
    pub fn current(&self) -> Option<(u64, Source)> {
        let list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.sponsors.first().map(|sponsor| (sponsor.number, sponsor.source.clone()))
    }

    /// This one's registry was of no use: its owner fails, the next is current.
    pub fn refuse(&self, number: u64, error: &Arc<PullError>) {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = list.sponsors.iter().position(|sponsor| sponsor.number == number) {
            let sponsor = list.sponsors.remove(place);
            // An owner who has left does not mind.
            let _ = sponsor.refused.send(Arc::clone(error));
        }
    }
}

impl Sponsorship {
    /// Returns when this one's registry was of no use.
    pub async fn refused(&mut self) -> Arc<PullError> {
        match (&mut self.refused).await {
            Ok(error) => error,
            // Withdrawn in no other way than by dropping self.
            Err(_) => std::future::pending().await,
        }
    }
}

impl Drop for Sponsorship {
    fn drop(&mut self) {
        let mut list = self.sponsors.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The last one stays: the flight lingers, and whoever comes back may find it far ahead.
        if list.sponsors.len() > 1 {
            list.sponsors.retain(|sponsor| sponsor.number != self.number);
        }
    }
}
