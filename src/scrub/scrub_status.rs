//! The progress of the scrub.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::scrub_schedule::ScrubSchedule;
use pull::content_repair::Item;
use store::content_verification::Verified;

/// The progress, shared by the scrub, `status` and metrics. Cheap to clone.
#[derive(Clone, Default)]
pub struct ScrubState(Arc<Mutex<SharedProgress>>);

#[derive(Default)]
struct SharedProgress {
    interval: Option<Duration>,
    clock: Option<fn() -> i64>,
    through: Option<i64>,
    reading: Option<Item>,
    counts: ScrubCounts,
}

/// The counts since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubCounts {
    /// Objects and bytes read back.
    pub verified: Verified,
    /// The number of damages that the scrub found.
    pub findings: u64,
    /// The number of artifacts that it fetched again.
    pub repaired: u64,
    /// The number of artifacts that no registry served again when it asked.
    pub unrepaired: u64,
}

/// A snapshot of the progress.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubSnapshot {
    /// The time within which everything is read; `None` if the scrub is off.
    pub interval: Option<Duration>,
    /// The delay behind the schedule; `None` before the first turn.
    pub lag: Option<Duration>,
    /// The counts of what was read, found and repaired.
    pub counts: ScrubCounts,
    /// The item that is being read, as a path below the state directory.
    pub reading: Option<String>,
}

impl ScrubState {
    /// Returns a snapshot.
    pub fn snapshot(&self) -> ScrubSnapshot {
        let inner = self.0.lock();
        let lag = inner.through.zip(inner.clock);
        ScrubSnapshot {
            interval: inner.interval,
            lag: lag.map(|(through, clock)| ScrubSchedule::lag(through, clock())),
            counts: inner.counts,
            reading: inner.reading.as_ref().map(|item| match item {
                Item::Blobs => "blobs".to_owned(),
                Item::Object(name) => name.to_string(),
            }),
        }
    }

    pub(super) fn begin(&self, interval: Option<Duration>, clock: fn() -> i64) {
        let mut inner = self.0.lock();
        (inner.interval, inner.clock) = (interval, Some(clock));
    }

    /// Sets the moment up to which everything has been read.
    pub(super) fn came_to(&self, through: i64) {
        self.0.lock().through = Some(through);
    }

    pub(super) fn reads(&self, item: Option<&Item>) {
        self.0.lock().reading = item.cloned();
    }

    pub(super) fn has_read(&self, verified: Verified, findings: u64) {
        let counts = &mut self.0.lock().counts;
        counts.verified.objects += verified.objects;
        counts.verified.bytes += verified.bytes;
        counts.findings += findings;
    }

    pub(super) fn repaired(&self, is_repaired: bool) {
        let counts = &mut self.0.lock().counts;
        let count = if is_repaired { &mut counts.repaired } else { &mut counts.unrepaired };
        *count += 1;
    }
}
