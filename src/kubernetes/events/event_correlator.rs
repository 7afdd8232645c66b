//! Decides whether to create an Event, to change an existing one, or to write nothing. Pure.
//!
//! There is one Event for each pod, reference and reason: a repetition raises its count and changes its text. The
//! progress of a pull, and a repeated failure, are written every half minute at most.

use std::collections::HashMap;
use std::time::Duration;
use text::printable::truncated;

use jiff::Timestamp;
use tokio::time::Instant;

use super::{EventReason, PodOccurrence};

/// The shortest time between two writes of an Event with no news.
const INTERVAL: Duration = Duration::from_secs(30);
/// The time after which an Event counts as expired. API servers delete Events after an hour.
const LIFE: Duration = Duration::from_mins(50);
/// The most Events to remember. Only the latest matter.
const KNOWN: usize = 1024;

/// The written Events.
#[derive(Debug, Default)]
pub(super) struct EventCorrelator(HashMap<EventKey, KnownEvent>);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct EventKey {
    uid: String,
    reference: String,
    reason: EventReason,
}

#[derive(Clone, Debug)]
struct KnownEvent {
    name: String,
    message: String,
    count: i32,
    first: Timestamp,
    began: Instant,
    written: Instant,
}

/// A write of an Event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct EventWrite {
    /// The Event's name.
    pub(super) name: String,
    /// Set if the Event is to be created.
    pub(super) is_new: bool,
    pub(super) message: String,
    pub(super) count: i32,
    pub(super) first: Timestamp,
    pub(super) last: Timestamp,
}

impl EventCorrelator {
    /// Records an occurrence. Returns the write that it needs.
    pub(super) fn note(
        &mut self,
        occurrence: &PodOccurrence,
        now: Instant,
        clock: Timestamp,
    ) -> Option<EventWrite> {
        self.forget_old(now);
        let message = self.message(occurrence, now);
        let pulling = EventKey::of(occurrence, EventReason::Pulling);
        if occurrence.only_after_pulling && !self.0.contains_key(&pulling) {
            return None;
        }
        if matches!(occurrence.reason, EventReason::Pulled | EventReason::Failed) {
            // The next pull gets an Event of its own.
            self.0.remove(&pulling);
        }
        let key = EventKey::of(occurrence, occurrence.reason);
        let Some(entry) = self.0.get_mut(&key) else {
            let name = name(&occurrence.pod.name, clock);
            let entry =
                KnownEvent { name, message, count: 1, first: clock, began: now, written: now };
            let write = entry.write(true, clock);
            self.0.insert(key, entry);
            return Some(write);
        };
        let is_news = occurrence.reason != EventReason::Pulling && entry.message != message;
        let is_due = now.duration_since(entry.written) >= INTERVAL;
        if occurrence.reason != EventReason::Pulling || is_due {
            entry.count = entry.count.saturating_add(1);
        }
        if !is_news && !is_due {
            return None;
        }
        entry.message = message;
        entry.written = now;
        Some(entry.write(false, clock))
    }

    /// Forgets an Event that the API server no longer has.
    pub(super) fn forget(&mut self, name: &str) {
        self.0.retain(|_, entry| entry.name != name);
    }

    fn message(&self, occurrence: &PodOccurrence, now: Instant) -> String {
        let PodOccurrence { reference, detail, took, .. } = occurrence;
        match occurrence.reason {
            EventReason::Pulling => format!("Pulling artifact \"{reference}\": {detail}"),
            EventReason::Failed => format!("Failed to mount artifact \"{reference}\": {detail}"),
            EventReason::Damaged => {
                format!("Mounted artifact \"{reference}\" is damaged: {detail}")
            }
            EventReason::Switched => {
                format!(
                    "The volume of artifact \"{reference}\" shows what its tag means now: {detail}"
                )
            }
            EventReason::NotFollowed => format!(
                "The volume of artifact \"{reference}\" keeps its content, since the tag cannot be followed: {detail}"
            ),
            EventReason::Pulled => {
                // The kubelet repeats its call while a pull runs. The pull began with the first call.
                let pulling = self.0.get(&EventKey::of(occurrence, EventReason::Pulling));
                let since = pulling.map(|entry| now.duration_since(entry.began));
                let seconds = since.unwrap_or_default().max(*took).as_secs_f64();
                format!("Pulled artifact \"{reference}\" in {seconds:.1}s: {detail}")
            }
        }
    }

    fn forget_old(&mut self, now: Instant) {
        self.0.retain(|_, entry| now.duration_since(entry.written) < LIFE);
        if self.0.len() >= KNOWN
            && let Some(oldest) = self.0.iter().min_by_key(|(_, entry)| entry.written)
        {
            let oldest = oldest.0.clone();
            self.0.remove(&oldest);
        }
    }
}

impl EventKey {
    fn of(occurrence: &PodOccurrence, reason: EventReason) -> Self {
        let (uid, reference) = (occurrence.pod.uid.clone(), occurrence.reference.clone());
        Self { uid, reference, reason }
    }
}

impl KnownEvent {
    fn write(&self, is_new: bool, last: Timestamp) -> EventWrite {
        let (name, message) = (self.name.clone(), self.message.clone());
        EventWrite { name, is_new, message, count: self.count, first: self.first, last }
    }
}

/// Names an Event as the kubelet does: the pod's name and a time, within the 253 characters of a name.
fn name(pod: &str, clock: Timestamp) -> String {
    let time = format!("{:x}", clock.as_nanosecond());
    let pod = truncated(pod, 252 - time.len());
    format!("{}.{time}", pod.trim_end_matches(['.', '-']))
}

#[cfg(test)]
mod tests {
    use super::super::PodReference;
    use super::*;

    fn occurrence(uid: &str, reason: EventReason, detail: &str) -> PodOccurrence {
        let (namespace, name) = ("team".to_owned(), "web-0".to_owned());
        PodOccurrence {
            pod: PodReference { namespace, name, uid: uid.to_owned() },
            reference: "r.io/app:v1".to_owned(),
            reason,
            detail: detail.to_owned(),
            took: Duration::from_secs(2),
            only_after_pulling: false,
        }
    }

    /// A correlator with a clock.
    struct Noted {
        correlator: EventCorrelator,
        start: Instant,
    }

    impl Noted {
        fn at(&mut self, seconds: u64, occurrence: &PodOccurrence) -> Option<EventWrite> {
            let now = self.start + Duration::from_secs(seconds);
            let clock = i64::try_from(seconds).expect("small") + 1_700_000_000;
            let clock = Timestamp::from_second(clock).expect("a time");
            self.correlator.note(occurrence, now, clock)
        }
    }

    fn noted() -> Noted {
        Noted { correlator: EventCorrelator::default(), start: Instant::now() }
    }

    #[tokio::test]
    async fn a_pull_is_one_event_that_changes_each_half_minute_and_another_at_its_end() {
        let mut noted = noted();
        let pulling = |detail: &str| occurrence("1", EventReason::Pulling, detail);
        let first = noted.at(0, &pulling("10%")).expect("a new one");
        assert!(first.is_new && first.message.ends_with("\"r.io/app:v1\": 10%"), "{first:?}");
        assert_eq!(noted.at(20, &pulling("20%")), None);
        let next = noted.at(31, &pulling("30%")).expect("a change");
        assert_eq!((next.is_new, &next.name, next.count), (false, &first.name, 2));
        assert!(next.message.ends_with("30%"));
        let pulled = noted.at(125, &occurrence("1", EventReason::Pulled, "sha256:1, 2 GiB"));
        let pulled = pulled.expect("the end");
        assert!(pulled.is_new && pulled.message.contains("in 125.0s: sha256:1"), "{pulled:?}");
        // Another pull of the same pod is another event.
        assert!(noted.at(130, &pulling("1%")).expect("a new one").is_new);
        // A pull that ended between two calls of the kubelet is reported at the second; content that was never pulled
        // is not.
        let found = |uid| PodOccurrence {
            only_after_pulling: true,
            ..occurrence(uid, EventReason::Pulled, "x")
        };
        assert!(noted.at(140, &found("1")).expect("the end").message.contains("in 10.0s"));
        assert_eq!(noted.at(141, &found("1")), None);
        assert_eq!(noted.at(141, &found("3")), None);
        // A pull that ended at once is reported with the call's own time.
        let quick = noted.at(142, &occurrence("2", EventReason::Pulled, "x")).expect("the end");
        assert!(quick.message.contains("in 2.0s"), "{quick:?}");
    }

    #[tokio::test]
    async fn the_same_failure_is_counted_and_another_is_said_at_once() {
        let mut noted = noted();
        let failed = |detail: &str| occurrence("1", EventReason::Failed, detail);
        assert!(noted.at(0, &failed("no such tag")).expect("a new one").is_new);
        for second in [1, 3, 7, 15] {
            assert_eq!(noted.at(second, &failed("no such tag")), None);
        }
        let again = noted.at(31, &failed("no such tag")).expect("a change");
        assert_eq!((again.is_new, again.count), (false, 6));
        let other = noted.at(32, &failed("forbidden")).expect("news");
        assert_eq!((other.is_new, other.count), (false, 7));
        // An event that the API server has forgotten is created again.
        noted.correlator.forget(&other.name);
        assert!(noted.at(33, &failed("forbidden")).expect("a new one").is_new);
        assert!(noted.at(33 + 3600, &failed("forbidden")).expect("a new one").is_new);
    }

    #[tokio::test]
    async fn what_is_known_is_bounded() {
        let mut noted = noted();
        for number in 0..5000_u64 {
            let uid = number.to_string();
            assert!(noted.at(number / 100, &occurrence(&uid, EventReason::Failed, "x")).is_some());
        }
        assert!(noted.correlator.0.len() <= KNOWN);
        assert!(name(&"a".repeat(300), Timestamp::UNIX_EPOCH).len() <= 253);
    }
}
