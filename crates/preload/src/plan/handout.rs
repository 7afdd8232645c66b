//! One preload: which of its nodes hold it, which may begin, which have failed.

use std::sync::Arc;

use super::facts::{
    Access, Held, Known, Meaning, Node, Object, Origin, Parsed, Preload, PreloadId, Refusal,
    Report, Sealed, Seconds, Wanted, mix,
};
use super::{Wishes, earlier};
use crate::api::preload::MAXIMUM_FAILED_NODES;
use crate::api::{Phase, QUOTA_EXCEEDED};
use oci::{Platform, Reference};
use text::units::Bytes;

/// A node plugin says what it is, and takes a wish up, within seconds; one that has not after so long is not there.
pub(super) const PATIENCE: Seconds = 120;
/// Reasons of a node that does not answer.
const SILENCE: [&str; 2] = ["NoAnswer", "Overdue"];
/// What a node waits between two tries, at most.
const LONGEST_PAUSE: Seconds = 300;

/// A node, when its turn comes.
#[derive(Clone, Copy)]
pub(super) struct Turn<'a> {
    pub(super) name: &'a Arc<str>,
    pub(super) node: &'a Node,
    pub(super) object: &'a Object,
}

/// A node that may have the driver: its object is so young that the plugin may not have said yet what it is.
pub(super) type Awaited<'a> = (&'a Arc<str>, &'a Node);

/// What became of one preload.
#[derive(Debug, Default)]
pub(super) struct HandedOut {
    /// What it means, where that is known.
    pub(super) current: Option<Current>,
    /// Why no further node begins, where there is a reason.
    pub(super) problem: Option<Problem>,
    /// How many nodes are how far.
    pub(super) counts: Counts,
    /// The first failed ones, by name.
    pub(super) failed: Vec<Failed>,
    /// Whether all selected nodes held it at once in this generation, now or before.
    pub(super) reached: bool,
    /// The number of nodes that may stay away.
    pub(super) tolerated: usize,
    /// Nodes without the artifact whose condition Ready has to be read.
    pub(super) doubtful: Vec<Arc<str>>,
    /// Whether the registry or the secrets have to be asked.
    pub(super) look: bool,
    /// When to look again.
    pub(super) wake: Option<Seconds>,
}

/// The artifact, with its digest.
#[derive(Clone, Debug)]
pub(super) struct Current {
    pub(super) known: Known,
    /// `repository:tag@digest`.
    pub(super) reference: Arc<str>,
    /// The same, as nodes are asked for it.
    asked: Arc<str>,
    /// Whether it is of the repository that the secrets were read for: what they have is for no other one.
    own: bool,
}

impl Current {
    /// Returns when the registry said what the tag means; none of an earlier answer, and where no tag was asked for.
    fn tag_resolved_at(&self) -> Option<Seconds> {
        let Origin { resolved_at, unavailable, .. } = &self.known.origin;
        resolved_at.filter(|_| unavailable.is_none() && !self.known.reference.contains('@'))
    }
}

/// Why nothing is handed out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) reason: &'static str,
    pub(super) message: String,
    /// Whether waiting may help.
    pub(super) transient: bool,
}

/// How many nodes are how far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) desired: usize,
    pub(super) ready: usize,
    pub(super) active: usize,
    pub(super) failed: usize,
    /// Nodes without the artifact that are not Ready, or whose plugin does not answer.
    pub(super) away: usize,
}

impl Counts {
    /// Returns whether every node holds the artifact, except for those that may stay away. At least one node must hold it.
    pub(super) fn is_everywhere(self, tolerated: usize) -> bool {
        self.ready > 0 && self.ready + self.away.min(tolerated) >= self.desired
    }

    /// Those whose turn has not come.
    pub(super) fn waiting(self) -> usize {
        self.desired.saturating_sub(self.ready + self.active + self.failed)
    }
}

/// A node that has failed.
#[derive(Clone, Debug)]
pub(super) struct Failed {
    pub(super) node: Arc<str>,
    pub(super) reason: Arc<str>,
    pub(super) message: Arc<str>,
}

/// How far a node is with one artifact.
enum State {
    Unasked,
    Active,
    Ready,
    Failed(Arc<str>, Arc<str>),
}

/// Says what every selected node is to hold, and adds it to its wishes.
pub(super) fn hand_out(
    preload: &Preload,
    turns: &[Turn<'_>],
    awaited: &[Awaited<'_>],
    wishes: &mut [Wishes],
    now: Seconds,
) -> HandedOut {
    let mut handed = HandedOut::default();
    let parsed = match &preload.parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            handed.problem = Some(Problem::new("InvalidSpec", error));
            keep_all(preload.id, wishes);
            return handed;
        }
    };
    let needs_secrets = look(preload, parsed, now, &mut handed);
    if preload.meaning == Meaning::Unknown {
        // What the nodes were told before may well be what it means: nothing changes before that is known.
        keep_all(preload.id, wishes);
        handed.counts.desired =
            turns.iter().filter(|turn| is_selected(preload, parsed, turn)).count()
                + count_awaited(preload, awaited);
        return handed;
    }
    let selected: Vec<usize> =
        (0..turns.len()).filter(|&at| is_selected(preload, parsed, &turns[at])).collect();
    handed.counts.desired = selected.len();
    // A gate that waits for all nodes does not open after the first ones; one that is open stays so.
    let was_reached = handed.current.as_ref().is_some_and(|current| was_reached(preload, current));
    if !was_reached {
        handed.counts.desired += count_awaited(preload, awaited);
    }
    // Nobody begins with half of what he needs; where there is nobody, they are not read.
    if preload.access == Access::Unknown && handed.counts.desired > 0 {
        let message = "the secrets are being read";
        handed.problem.get_or_insert_with(|| Problem::waiting("Resolving", message));
    }
    let missing =
        handed.current.as_ref().and_then(|current| missing_platform(parsed, &current.known));
    let is_short = missing.is_some();
    handed.problem = missing.or(handed.problem.take());
    handed.tolerated = parsed.tolerated.at_most(selected.len());
    let mut slots = parsed.parallelism.of(selected.len());
    if preload.spec.paused || handed.problem.is_some() {
        slots = 0;
    }
    let begin = preload.status.start_time.as_ref().map(|time| time.0.as_second());
    let begin = begin.filter(|_| is_of_this_generation(preload)).unwrap_or(now);
    let mut work = Work { preload, parsed, turns, wishes, now, begin, slots: 0 };
    if let Some(current) = handed.current.clone() {
        let (busy, candidates) = work.keep(&selected, &current, &mut handed, true);
        // An artifact that is not what the spec asks for is not ready, wherever it is.
        handed.reached =
            was_reached || (!is_short && handed.counts.is_everywhere(handed.tolerated));
        let missing = handed.counts.desired - handed.counts.ready;
        if handed.reached || missing > handed.tolerated {
            // Their condition Ready would change nothing.
            handed.doubtful.clear();
        }
        work.slots = slots.saturating_sub(busy);
        work.begin_some(candidates, &current, &mut handed, true);
    } else {
        work.slots = slots;
    }
    let (ready, previous) = versions_before(preload, parsed, &handed);
    // Pods still use the one before: nodes keep it until the new one is everywhere, and those that join get it.
    if let Some(previous) = ready {
        let mut ignored = HandedOut::default();
        let (busy, candidates) = work.keep(&selected, &previous, &mut ignored, false);
        work.slots = work.slots.saturating_sub(busy);
        // Until the status says so it is what whoever reads that rolls to, but nobody begins with it any more.
        if !handed.reached {
            work.begin_some(candidates, &previous, &mut ignored, false);
        }
        handed.wake = earlier(handed.wake, ignored.wake);
    }
    // Under its own name nodes hold what they are asked for under another one: the same content.
    let own_name = handed.current.clone().filter(|current| current.asked != current.reference);
    for version in previous.into_iter().chain(own_name).filter(|_| preload.spec.pin) {
        work.retain(&selected, &version);
    }
    handed.look |= needs_secrets && handed.counts.ready < handed.counts.desired;
    handed.failed.sort_by(|one, two| one.node.cmp(&two.node));
    handed.failed.truncate(MAXIMUM_FAILED_NODES);
    handed
}

/// Hands nothing out, and takes back what was handed out, with the problem as the reason.
pub(super) fn withhold(
    preload: &Preload,
    turns: &[Turn<'_>],
    awaited: &[Awaited<'_>],
    problem: Problem,
) -> HandedOut {
    let mut handed = HandedOut { problem: Some(problem), ..HandedOut::default() };
    let Ok(parsed) = &preload.parsed else { return handed };
    if let Meaning::Known(known) = &preload.meaning
        && let Ok(reference) = pinned(&parsed.reference, known)
    {
        let asked = Arc::clone(&reference);
        handed.current = Some(Current { known: known.clone(), reference, asked, own: true });
    }
    let selected = turns.iter().filter(|turn| is_selected(preload, parsed, turn)).count();
    handed.counts.desired = selected + count_awaited(preload, awaited);
    handed
}

/// A preload that is not understood changes nothing on any node.
fn keep_all(preload: PreloadId, wishes: &mut [Wishes]) {
    for wishes in wishes {
        wishes.undecided.push(preload);
    }
}

/// What the reference means, and with what it may be fetched; whether the secrets have to be read for that.
fn look(preload: &Preload, parsed: &Parsed, now: Seconds, handed: &mut HandedOut) -> bool {
    let mut needs_secrets = false;
    let refused = |refusal: &Refusal, handed: &mut HandedOut| {
        if refusal.retry_at <= now {
            handed.look = true;
        } else {
            handed.wake = earlier(handed.wake, Some(refusal.retry_at));
        }
        handed.problem = Some(Problem {
            reason: refusal.reason,
            message: refusal.message.clone(),
            transient: refusal.transient,
        });
    };
    match &preload.meaning {
        // Without the secrets the registry is not asked.
        Meaning::Unknown => handed.look = !matches!(preload.access, Access::Refused(_)),
        Meaning::Refused(refusal) => refused(refusal, handed),
        Meaning::Known(known) => match pinned(&parsed.reference, known) {
            Ok(reference) => {
                if let Some(unavailable) = known.origin.unavailable {
                    handed.look |= unavailable.retry_at <= now;
                    handed.wake = earlier(handed.wake, Some(unavailable.retry_at.max(now + 1)));
                }
                let asked = asked_reference(preload, &parsed.reference, known, &reference);
                handed.current =
                    Some(Current { known: known.clone(), reference, asked, own: true });
            }
            Err(error) => handed.problem = Some(Problem::new("InvalidSpec", &error)),
        },
    }
    match &preload.access {
        Access::Unknown => {
            needs_secrets = true;
        }
        Access::Open => {}
        Access::Sealed { until, .. } => {
            needs_secrets = *until <= now;
            if !needs_secrets {
                handed.wake = earlier(handed.wake, Some(*until));
            }
        }
        Access::Refused(refusal) => refused(refusal, handed),
    }
    needs_secrets
}

/// What the index has not, though the spec asks for it.
fn missing_platform(parsed: &Parsed, known: &Known) -> Option<Problem> {
    let platforms = &known.platforms;
    let lacks = |wanted: &&Platform| !platforms.iter().any(|offered| wanted.may_run(offered));
    let missing = parsed.platforms.iter().filter(|_| !platforms.is_empty()).find(lacks)?;
    let offered: Vec<_> = platforms.iter().map(ToString::to_string).collect();
    let message = format!(
        "the index {} is not for {missing}, but for {}: push one that is, or change spec.platforms",
        known.digest,
        offered.join(", ")
    );
    Some(Problem::new("PlatformMissing", &message))
}

/// The artifact with its digest, as nodes are told it.
fn pinned(reference: &Reference, known: &Known) -> Result<Arc<str>, String> {
    if reference.digest().is_some() {
        return Ok(Arc::from(reference.to_string()));
    }
    let repository = reference.repository().to_string();
    let digest = known.digest.to_string();
    let pinned = Reference::from_parts(&repository, Some(reference.tag_or_latest()), Some(&digest));
    pinned.map(|pinned| Arc::from(pinned.to_string())).map_err(|error| error.to_string())
}

/// Returns the reference that nodes are asked for. They hold content under its own name by the secrets of the time when
/// they fetched it, which an earlier answer says nothing about: under another name, each node looks for its proof that
/// the secrets of now open it.
fn asked_reference(
    preload: &Preload,
    wanted: &Reference,
    known: &Known,
    reference: &Arc<str>,
) -> Arc<str> {
    if known.origin.unavailable.is_none() || preload.spec.pull_secrets.is_empty() {
        return Arc::clone(reference);
    }
    let (repository, digest) = (wanted.repository(), &known.digest);
    let without_tag = format!("{repository}@{digest}");
    if without_tag == **reference {
        return Arc::from(format!("{repository}:{}@{digest}", wanted.tag_or_latest()));
    }
    Arc::from(without_tag)
}

/// Returns the artifact that was last everywhere, where it is another one than the current one, and the one before that.
/// With the current one they are two at most, so that a preload never takes more of a node than during a roll.
fn versions_before(
    preload: &Preload,
    parsed: &Parsed,
    handed: &HandedOut,
) -> (Option<Current>, Option<Current>) {
    let current = handed.current.as_ref();
    let version = |text: &Option<String>| {
        let text = text.as_deref()?;
        if current.is_some_and(|current| &*current.reference == text) {
            return None;
        }
        let reference: Reference = text.parse().ok()?;
        let own = reference.repository() == parsed.reference.repository();
        let known = Known {
            reference: String::new(),
            digest: reference.digest()?,
            platforms: Vec::new(),
            bytes: None,
            origin: Origin::default(),
        };
        let reference: Arc<str> = Arc::from(text);
        Some(Current { known, asked: Arc::clone(&reference), reference, own })
    };
    let ready = version(&preload.status.ready_reference);
    let has_room = current.is_none() || ready.is_none();
    (ready, version(&preload.status.previous_reference).filter(|_| has_room))
}

fn is_of_this_generation(preload: &Preload) -> bool {
    preload.status.observed_generation == Some(preload.generation)
}

/// Whether all nodes held it at once before, in this generation.
fn was_reached(preload: &Preload, current: &Current) -> bool {
    is_of_this_generation(preload)
        && preload.status.ready_reference.as_deref() == Some(&current.reference)
        && super::status::is_ready(&preload.status)
}

fn count_awaited(preload: &Preload, awaited: &[Awaited<'_>]) -> usize {
    awaited.iter().filter(|(name, node)| selects(preload, name, node)).count()
}

fn selects(preload: &Preload, name: &str, node: &Node) -> bool {
    let selector = &preload.spec.selector;
    let named = selector.names.is_empty() || selector.names.iter().any(|other| other == name);
    let has = |(key, value): (&String, &String)| node.labels.get(key) == Some(value);
    named && selector.match_labels.iter().all(has)
}

fn is_selected(preload: &Preload, parsed: &Parsed, turn: &Turn<'_>) -> bool {
    let Some(report) = &turn.object.report else { return false };
    let fits = |platform: &Platform| {
        parsed.platforms.is_empty()
            || parsed.platforms.iter().any(|wanted| wanted.accepts(platform))
    };
    selects(preload, turn.name, turn.node) && report.platform.as_ref().is_none_or(fits)
}

struct Work<'a, 'w> {
    preload: &'a Preload,
    parsed: &'a Parsed,
    turns: &'a [Turn<'a>],
    wishes: &'w mut [Wishes],
    now: Seconds,
    begin: Seconds,
    slots: usize,
}

impl Work<'_, '_> {
    /// Nodes that have been asked stay asked. Says how many of them are busy, and who was not asked yet.
    fn keep(
        &mut self,
        selected: &[usize],
        current: &Current,
        handed: &mut HandedOut,
        counted: bool,
    ) -> (usize, Vec<usize>) {
        let digest = current.known.digest.to_string();
        let (mut busy, mut candidates) = (0, Vec::new());
        for &at in selected {
            let turn = self.turns[at];
            let wanted = find_wanted(turn.object, self.preload.id, &current.asked);
            let held = find_held(turn.object, self.preload.id, &current.asked, &digest);
            let state = self.state(turn, wanted, held, current, handed);
            if let Some(wanted) = wanted {
                let ready = matches!(state, State::Ready);
                self.wish(at, current, wanted.since, Some(wanted), ready);
            }
            if counted && !matches!(state, State::Ready) {
                self.count_away(turn, &state, handed);
            }
            match state {
                State::Unasked => candidates.push(at),
                State::Active => {
                    busy += 1;
                    handed.counts.active += 1;
                }
                State::Ready => handed.counts.ready += 1,
                State::Failed(reason, message) if counted => {
                    handed.counts.failed += 1;
                    handed.failed.push(Failed { node: Arc::clone(turn.name), reason, message });
                }
                State::Failed(..) => {}
            }
        }
        // A node that is known to be away would take a place for two minutes.
        candidates.sort_by_key(|&at| self.readiness(self.turns[at]) == Some(false));
        (busy, candidates)
    }

    /// Counts a node that does not hold it, if it is away, or notes that this has to be found out.
    fn count_away(&self, turn: Turn<'_>, state: &State, handed: &mut HandedOut) {
        let is_silent = matches!(state, State::Failed(reason, _) if SILENCE.contains(&&**reason));
        let readiness = self.readiness(turn);
        if is_silent || readiness == Some(false) {
            handed.counts.away += 1;
        }
        match (turn.node.readiness, readiness) {
            (Some(known), Some(_)) => handed.wake = earlier(handed.wake, Some(known.until + 1)),
            _ if is_silent => {}
            _ => handed.doubtful.push(Arc::clone(turn.name)),
        }
    }

    /// Returns a node's condition Ready, if it was read lately.
    fn readiness(&self, turn: Turn<'_>) -> Option<bool> {
        let readiness = turn.node.readiness.filter(|readiness| readiness.until >= self.now);
        readiness.map(|readiness| readiness.is_ready)
    }

    /// Lets nodes keep what they hold, for the way back. No node fetches it, and it yields where a node is told much.
    fn retain(&mut self, selected: &[usize], version: &Current) {
        let digest = version.known.digest.to_string();
        for &at in selected {
            let object = self.turns[at].object;
            let wanted = find_wanted(object, self.preload.id, &version.reference);
            let held = find_held(object, self.preload.id, &version.reference, &digest);
            if let (Some(wanted), Some(Held { phase: Phase::Ready, .. })) = (wanted, held)
                && self.wishes[at].is_half_empty()
            {
                self.wish(at, version, wanted.since, Some(wanted), true);
            }
        }
    }

    /// Asks as many as may begin, in turn.
    fn begin_some(
        &mut self,
        candidates: Vec<usize>,
        current: &Current,
        handed: &mut HandedOut,
        counted: bool,
    ) {
        let sealed = current.own && matches!(self.preload.access, Access::Sealed { .. });
        for at in candidates {
            if self.slots == 0 {
                break;
            }
            let turn = self.turns[at];
            let due = self.due(turn);
            if due > self.now {
                handed.wake = earlier(handed.wake, Some(due));
                continue;
            }
            if !self.wishes[at].fits(&current.asked, sealed) {
                if counted {
                    let message = "other preloads want more of this node than fits one object: use fewer preloads for it";
                    handed.counts.failed += 1;
                    handed.failed.push(Failed {
                        node: Arc::clone(turn.name),
                        reason: Arc::from("TooManyPreloads"),
                        message: Arc::from(message),
                    });
                }
                continue;
            }
            self.wish(at, current, self.now, None, false);
            handed.counts.active += 1;
            handed.wake = earlier(handed.wake, Some(self.now + PATIENCE + 1));
            self.slots -= 1;
        }
    }

    /// When a node may begin.
    fn due(&self, turn: Turn<'_>) -> Seconds {
        let spread = self.parsed.spread.as_secs();
        if spread == 0 {
            return self.now;
        }
        let delay = mix(turn.name, &self.preload.uid) % spread;
        self.begin.max(turn.node.created) + Seconds::try_from(delay).unwrap_or_default()
    }

    fn state(
        &self,
        turn: Turn<'_>,
        wanted: Option<&Wanted>,
        held: Option<&Held>,
        current: &Current,
        handed: &mut HandedOut,
    ) -> State {
        let platforms = &current.known.platforms;
        if let Some(Report { platform: Some(platform), .. }) = &turn.object.report
            && !platforms.is_empty()
            && !platforms.iter().any(|offered| platform.may_run(offered))
        {
            let message = format!(
                "the index is not for {platform}: push one that is, or leave such nodes out with spec.platforms or spec.selector"
            );
            return State::Failed(Arc::from("PlatformMissing"), Arc::from(message));
        }
        if let (Some(_), Some(Held { phase: Phase::Ready, .. })) = (wanted, held) {
            return State::Ready;
        }
        if let Some(message) = too_large(turn, current) {
            return State::Failed(Arc::from("NoRoom"), Arc::from(message));
        }
        let Some(wanted) = wanted else { return State::Unasked };
        match held {
            Some(held) if held.phase == Phase::Failed => {
                State::Failed(Arc::clone(&held.reason), Arc::clone(&held.message))
            }
            other => {
                let tries = Seconds::from(wanted.backoff) + 1;
                let patience = if other.is_none() {
                    PATIENCE
                } else {
                    (Seconds::from(wanted.timeout) + LONGEST_PAUSE) * tries + PATIENCE
                };
                // What was lost, or is fetched by another process, is begun anew; clocks of nodes may be ahead.
                let begun = other.and_then(|held| held.since).map(|since| since.min(self.now));
                let deadline = begun.unwrap_or(wanted.since).max(wanted.since) + patience;
                if deadline < self.now {
                    let (reason, message) = overdue(other);
                    return State::Failed(reason, message);
                }
                handed.wake = earlier(handed.wake, Some(deadline + 1));
                State::Active
            }
        }
    }

    /// Adds it to the node's wishes.
    fn wish(
        &mut self,
        at: usize,
        current: &Current,
        since: Seconds,
        before: Option<&Wanted>,
        ready: bool,
    ) {
        let report = self.turns[at].object.report.as_ref();
        let needed = !ready && current.own;
        let sealed = match &self.preload.access {
            Access::Sealed { version, .. } if needed => report.map(|report| Sealed {
                key: Arc::clone(&report.public_key),
                version: Arc::clone(version),
            }),
            // What is there stays, and can be sealed anew once the secrets are read.
            Access::Unknown if needed => before.and_then(|before| before.sealed.clone()),
            Access::Unknown | Access::Sealed { .. } | Access::Open | Access::Refused(_) => None,
        };
        self.wishes[at].waits |= sealed.is_some() && self.preload.access == Access::Unknown;
        if let Some(before) = before {
            self.wishes[at].release(before);
        }
        let spec = &self.preload.spec;
        let reference =
            before.map_or_else(|| Arc::clone(&current.asked), |b| Arc::clone(&b.reference));
        self.wishes[at].add(Wanted {
            preload: self.preload.id,
            reference,
            pin: spec.pin,
            timeout: spec.timeout_seconds,
            backoff: spec.backoff_limit,
            since,
            resolved_at: current.tag_resolved_at(),
            sealed,
        });
    }
}

/// Why a node need not be asked: it could not hold the artifact if it held nothing else.
fn too_large(turn: Turn<'_>, current: &Current) -> Option<String> {
    let capacity = turn.object.report.as_ref()?.capacity?;
    let bytes = current.known.bytes.filter(|bytes| *bytes > capacity)?;
    Some(format!(
        "the artifact has {}, and the node has room for {} of artifacts at most: enlarge its disk, see cache.maxBytes and cache.minFreePercent, or leave it out with spec.selector",
        Bytes(bytes),
        Bytes(capacity)
    ))
}

fn overdue(held: Option<&Held>) -> (Arc<str>, Arc<str>) {
    match held {
        None => (
            Arc::from("NoAnswer"),
            Arc::from(
                "the node plugin has not taken it up in two minutes: look at the node and at the driver's pod there",
            ),
        ),
        Some(held) if held.message.is_empty() => (
            Arc::from("Overdue"),
            Arc::from(
                "the node plugin has not said for long how far it is: look at the driver's pod there",
            ),
        ),
        Some(held) => (Arc::from("Overdue"), Arc::clone(&held.message)),
    }
}

fn find_wanted<'a>(object: &'a Object, preload: PreloadId, reference: &str) -> Option<&'a Wanted> {
    let from = object.wanted.partition_point(|wanted| wanted.preload < preload);
    let of_preload = object.wanted[from..].iter().take_while(|wanted| wanted.preload == preload);
    of_preload.into_iter().find(|wanted| &*wanted.reference == reference)
}

/// The same content under another name is another artifact: it is fetched with other rights, and pinned for itself.
fn find_held<'a>(
    object: &'a Object,
    preload: PreloadId,
    reference: &str,
    digest: &str,
) -> Option<&'a Held> {
    let held = &object.report.as_ref()?.held;
    let from = held.partition_point(|held| held.preload < preload);
    let of_preload = held[from..].iter().take_while(|held| held.preload == preload);
    of_preload.into_iter().find(|held| match &*held.reference {
        "" => &*held.digest == digest,
        said => said == reference,
    })
}

impl Problem {
    fn new(reason: &'static str, message: &str) -> Self {
        Self { reason, message: message.to_owned(), transient: false }
    }

    /// The namespace has no room for it.
    pub(super) fn exceeded(message: &str) -> Self {
        Self::new(QUOTA_EXCEEDED, message)
    }

    fn waiting(reason: &'static str, message: &str) -> Self {
        Self { reason, message: message.to_owned(), transient: true }
    }
}
