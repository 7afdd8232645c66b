//! The order in which objects are removed: a pure decision over a snapshot.
//!
//! ```text
//! first     what no publish asks for: damaged generations, forgotten artifacts, old leftovers
//! then      files, layers and documents that no tree needs, such as those of a broken pull
//! then      trees, least recently used first, each with what only it linked, and among them
//!           the indexes that their manifests were chosen from
//! never     what is shown, pinned, worked with, or younger than the minimum age
//! ```
//!
//! What is doomed goes always; the rest only until the goal is reached.

use std::collections::{HashMap, HashSet};

use super::object_catalog::Snapshot;
use super::object_name::{ObjectKind, ObjectName};
use super::space_amount::SpaceAmount;

/// The last use of a tree that an administrator has removed while it was shown.
/// Publishing it again sets a real one.
pub const FORGOTTEN: i64 = 0;

/// Why an object goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// It was found damaged, and no volume shows it any more.
    Damaged,
    /// An administrator has removed it, and no volume shows it any more.
    Forgotten,
    /// No tree links it.
    Unlinked,
    /// Room was wanted, and it was used longest ago.
    LeastRecentlyUsed,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 4] =
        [Self::Damaged, Self::Forgotten, Self::Unlinked, Self::LeastRecentlyUsed];

    /// Returns its name in logs, metrics and output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Damaged => "damaged",
            Self::Forgotten => "forgotten",
            Self::Unlinked => "unlinked",
            Self::LeastRecentlyUsed => "least recently used",
        }
    }
}

/// Facts beside those of the catalog.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The catalog at one moment.
    pub store: Snapshot,
    /// Indexes that the manifest of a tree was chosen from.
    pub indexes: HashSet<ObjectName>,
    /// Trees that the kernel says are mounted, whatever the records say.
    pub mounted: HashSet<ObjectName>,
    /// Seconds since 1970.
    pub now: i64,
    /// Seconds for which a tree stays after its last publish or unpublish.
    pub minimum_age: i64,
    /// Seconds for which files and layers that no tree links wait for a pull to go on.
    pub unlinked_age: i64,
}

/// The objects to remove, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The objects with the reasons. A tree stands before the objects that it links.
    pub victims: Vec<(ObjectName, Reason)>,
    /// The space that their removal frees.
    pub frees: SpaceAmount,
}

impl Facts {
    /// Decides which objects go to reach a goal.
    pub fn plan(&self, goal: SpaceAmount) -> Plan {
        let mut planner = Planner {
            facts: self,
            links: self.link_counts(),
            gone: HashSet::new(),
            plan: Plan::default(),
        };
        let mut trees = self.free_trees();
        trees.retain(|&(name, _)| match self.doom(name) {
            Some(reason) => {
                planner.take(name, reason);
                false
            }
            None => true,
        });
        let mut unlinked = Vec::new();
        for (name, entry) in &self.store.objects {
            if name.kind() == ObjectKind::Tree || !planner.is_free(name) {
                continue;
            }
            // A lost index costs one request to the registry, so it is evicted by its last use.
            if self.indexes.contains(name) {
                trees.push((name, entry.last_used));
            } else {
                unlinked.push((entry.last_used, name));
            }
        }
        unlinked.sort_unstable();
        for (last_used, name) in unlinked {
            let entry = &self.store.objects[name];
            // A clock that was set back must not make leftovers immortal.
            let age = self.now.saturating_sub(last_used);
            let old = age >= self.unlinked_age || age < 0;
            if entry.damaged {
                planner.take(name, Reason::Damaged);
            } else if old || !goal.is_met_by(planner.plan.frees) {
                planner.take(name, Reason::Unlinked);
            }
        }
        trees.sort_unstable_by(|one, two| one.1.cmp(&two.1).then_with(|| one.0.cmp(two.0)));
        for (name, _) in trees {
            if goal.is_met_by(planner.plan.frees) {
                break;
            }
            planner.take(name, Reason::LeastRecentlyUsed);
        }
        planner.plan
    }

    /// Trees that may go, with their last use.
    fn free_trees(&self) -> Vec<(&ObjectName, i64)> {
        let entries = self.store.objects.iter();
        entries
            .filter(|(name, entry)| {
                let pinned =
                    entry.manifest.is_some_and(|manifest| self.store.pinned.contains(&manifest));
                let needed = self.store.leased.contains(*name)
                    || self.store.published.contains(*name)
                    || self.mounted.contains(*name)
                    || (pinned && !entry.damaged);
                name.kind() == ObjectKind::Tree && !needed && !self.is_young(name)
            })
            .map(|(name, entry)| (name, entry.last_used))
            .collect()
    }

    /// Returns why a removable tree goes even where its space is not needed.
    fn doom(&self, name: &ObjectName) -> Option<Reason> {
        let entry = self.store.objects.get(name)?;
        if entry.damaged {
            return Some(Reason::Damaged);
        }
        (entry.last_used == FORGOTTEN).then_some(Reason::Forgotten)
    }

    /// A use in the future is of a clock that was set back since: it says nothing.
    fn is_young(&self, name: &ObjectName) -> bool {
        let Some(entry) = self.store.objects.get(name) else { return false };
        let age = self.now.saturating_sub(entry.last_used);
        self.doom(name).is_none() && (0..self.minimum_age).contains(&age)
    }

    fn link_counts(&self) -> HashMap<&ObjectName, usize> {
        let mut counts = HashMap::new();
        for link in self.store.objects.values().flat_map(|entry| &entry.links) {
            *counts.entry(link).or_default() += 1;
        }
        counts
    }
}

struct Planner<'a> {
    facts: &'a Facts,
    links: HashMap<&'a ObjectName, usize>,
    gone: HashSet<&'a ObjectName>,
    plan: Plan,
}

impl<'a> Planner<'a> {
    /// Returns whether a file, layer or document is neither linked by a tree, nor leased, nor pinned.
    fn is_free(&self, name: &ObjectName) -> bool {
        let is_pinned = |digest| self.facts.store.pinned.contains(&digest);
        self.links.get(name).is_none_or(|&count| count == 0)
            && !name.document_digest().is_some_and(is_pinned)
            && !self.facts.store.leased.contains(name)
            && !self.gone.contains(name)
    }

    fn take(&mut self, name: &'a ObjectName, reason: Reason) {
        let Some(entry) = self.facts.store.objects.get(name) else { return };
        self.gone.insert(name);
        self.plan.frees = self.plan.frees.plus(entry.space());
        self.plan.victims.push((name.clone(), reason));
        for link in &entry.links {
            if let Some(count) = self.links.get_mut(link) {
                *count -= 1;
            }
            if self.is_free(link) {
                self.take(link, reason);
            }
        }
    }
}

#[cfg(test)]
mod tests;
