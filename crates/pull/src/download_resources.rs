//! The parts that all downloads of a node share: the registry client, slots, memory, a rate.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::connection_slots::Slots;
use super::download_throttle::Throttle;
use super::pull_options::PullOptions;
use oci::registry::Registry;
use sys::background::Background;

/// Bytes between network and disk, of all downloads that pods wait for.
const MEMORY: usize = 2 << 20;
/// The same of warming, which holds on to them while it gives way.
const MEMORY_BEHIND: usize = 1 << 20;

/// Blobs under way for each connection that downloads. The others wait, to be asked for again or for
/// their turn, and each has a thread that writes.
const UNDER_WAY: usize = 8;
/// Blobs under way at most. The runtime has 512 threads for all that blocks: most are left to
/// everything else.
const MOST_UNDER_WAY: usize = 256;

/// Told what happens on the wire.
pub trait Observer: Send + Sync + 'static {
    /// Bytes of a blob have come.
    fn downloaded(&self, _bytes: u64) {}
    /// So many more connections download now, or fewer.
    fn connections(&self, _change: i64) {}
    /// A pull has ended: how, by a name from a short list, and how long it took.
    fn pulled(&self, _result: &'static str, _reason: &'static str, _duration: Duration) {}
    /// Content without the demanded signature is mounted, as the policy only warns.
    fn signature_warning(&self) {}
}

/// An observer that ignores everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unobserved;

/// The parts that all downloads share.
pub struct Wire {
    pub(super) registry: Registry,
    pub(super) options: PullOptions,
    /// The slots for connections.
    pub(super) slots: Slots,
    /// Blobs that are under way, whether one of their connections brings bytes now or not. Taken
    /// before a thread and before a slot, so that none of those who hold one waits for another's.
    pub(super) places: Slots,
    pub(super) throttle: Throttle,
    pub(super) observer: Arc<dyn Observer>,
    memory: Arc<Semaphore>,
    memory_behind: Arc<Semaphore>,
}

impl Wire {
    pub(super) fn new(
        registry: Registry,
        options: PullOptions,
        observer: Arc<dyn Observer>,
        background: Background,
    ) -> Self {
        let places = options.downloads.saturating_mul(UNDER_WAY).min(MOST_UNDER_WAY);
        // A registry whose blobs all break is to leave room for the others'.
        let of_host = options.downloads_per_host.saturating_mul(UNDER_WAY).min(places / 4 * 3);
        Self {
            registry,
            options,
            places: Slots::new(places, of_host, background.clone()),
            slots: Slots::new(options.downloads, options.downloads_per_host, background),
            throttle: Throttle::new(Some(options.bytes_per_second).filter(|&limit| limit > 0)),
            observer,
            memory: Arc::new(Semaphore::new(MEMORY)),
            memory_behind: Arc::new(Semaphore::new(MEMORY_BEHIND)),
        }
    }

    /// Waits for room for so many bytes; none at the driver's end.
    pub(super) async fn memory(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let (memory, all) = if Background::is_here() {
            (&self.memory_behind, MEMORY_BEHIND)
        } else {
            (&self.memory, MEMORY)
        };
        let bytes = u32::try_from(bytes.min(all)).unwrap_or(u32::MAX);
        Arc::clone(memory).acquire_many_owned(bytes).await.ok()
    }
}

impl Observer for Unobserved {}
