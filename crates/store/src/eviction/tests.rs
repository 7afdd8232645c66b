use std::sync::Arc;

use proptest::prelude::*;

use super::super::object_catalog::Entry;
use super::*;
use oci_types::Digest;

const NOW: i64 = 1_000_000;

fn name(folder: &str, number: usize) -> ObjectName {
    // In the order of the numbers.
    ObjectName::parse(&format!("{folder}/{number:064x}/1")).expect("a name")
}

fn tree(number: usize) -> ObjectName {
    name("trees", number)
}

fn layer(number: usize) -> ObjectName {
    name("layers", number)
}

fn manifest(number: usize) -> Digest {
    Digest::of(&number.to_le_bytes())
}

fn entry(bytes: u64, last_used: i64) -> Arc<Entry> {
    let links = Vec::new();
    Arc::new(Entry { bytes, inodes: 1, last_used, damaged: false, manifest: None, links })
}

/// Trees of 10 bytes with the given last uses; tree n links layer n, of 100 bytes, and layer "99".
fn facts(last_uses: &[i64]) -> Facts {
    let mut facts = Facts { now: NOW, minimum_age: 100, unlinked_age: 1000, ..Facts::default() };
    let objects = &mut facts.store.objects;
    objects.insert(layer(99), entry(1000, 0));
    for (number, &last_used) in last_uses.iter().enumerate() {
        objects.insert(layer(number), entry(100, last_used));
        let mut tree_entry = Entry::clone(&entry(10, last_used));
        tree_entry.manifest = Some(manifest(number));
        tree_entry.links = vec![layer(number), layer(99)];
        objects.insert(tree(number), Arc::new(tree_entry));
    }
    facts
}

fn victims(plan: &Plan) -> Vec<&ObjectName> {
    plan.victims.iter().map(|(name, _)| name).collect()
}

fn bytes(bytes: u64) -> SpaceAmount {
    SpaceAmount { bytes, inodes: 0 }
}

#[test]
fn the_least_recently_used_goes_first_and_only_as_many_as_needed() {
    let facts = facts(&[300, 100, 200]);
    let plan = facts.plan(bytes(110));
    assert_eq!(victims(&plan), [&tree(1), &layer(1)]);
    assert_eq!(plan.frees, SpaceAmount { bytes: 110, inodes: 2 });
    assert_eq!(victims(&facts.plan(bytes(111)))[2..], [&tree(2), &layer(2)]);
    assert!(victims(&facts.plan(SpaceAmount::default())).is_empty());
}

#[test]
fn shared_content_goes_with_the_last_that_needs_it() {
    let facts = facts(&[1, 2]);
    let plan = facts.plan(SpaceAmount::EVERYTHING);
    assert_eq!(victims(&plan), [&tree(0), &layer(0), &tree(1), &layer(1), &layer(99)]);
    assert_eq!(plan.frees.bytes, 10 + 100 + 10 + 100 + 1000);
}

#[test]
fn what_is_needed_stays() {
    let mut facts = facts(&[1, 2, 3, 4, NOW - 99]);
    facts.store.published.insert(tree(0));
    facts.mounted.insert(tree(1));
    facts.store.leased.insert(tree(2));
    facts.store.pinned.insert(manifest(3));
    assert!(victims(&facts.plan(SpaceAmount::EVERYTHING)).is_empty());
    facts.now += 1;
    assert_eq!(victims(&facts.plan(SpaceAmount::EVERYTHING)), [&tree(4), &layer(4)]);
}

#[test]
fn what_is_doomed_goes_without_need() {
    let mut facts = facts(&[NOW, FORGOTTEN, NOW]);
    Arc::make_mut(facts.store.objects.get_mut(&tree(0)).expect("a tree")).damaged = true;
    // A pin is for content that can be shown.
    facts.store.pinned.insert(manifest(0));
    let old = layer(50);
    facts.store.objects.insert(old.clone(), entry(1, NOW - 1000));
    facts.store.objects.insert(layer(51), entry(1, NOW - 999));
    let plan = facts.plan(SpaceAmount::default());
    let mut gone = plan.victims.clone();
    gone.sort();
    let mut expected = [
        (tree(0), Reason::Damaged),
        (layer(0), Reason::Damaged),
        (tree(1), Reason::Forgotten),
        (layer(1), Reason::Forgotten),
        (old, Reason::Unlinked),
    ];
    expected.sort();
    assert_eq!(gone, expected);
}

#[test]
fn a_clock_that_was_set_back_makes_nothing_immortal() {
    let facts = facts(&[NOW + 5000]);
    assert_eq!(victims(&facts.plan(bytes(1))).first(), Some(&&tree(0)));
}

/// Three documents of 5 bytes: a manifest that a tree links, the index that it was chosen from, and
/// one that nothing refers to.
fn with_documents() -> (Facts, [ObjectName; 3]) {
    let mut facts = facts(&[100]);
    let documents = [1, 2, 3].map(|number| ObjectName::document(manifest(number)));
    for document in &documents {
        facts.store.objects.insert(document.clone(), entry(5, NOW - 1));
    }
    let tree = facts.store.objects.get_mut(&tree(0)).expect("a tree");
    Arc::make_mut(tree).links.push(documents[0].clone());
    facts.indexes.insert(documents[1].clone());
    (facts, documents)
}

#[test]
fn documents_go_with_what_needs_them_and_at_once_when_nothing_does() {
    let (mut facts, [linked, index, stray]) = with_documents();
    assert!(
        victims(&facts.plan(SpaceAmount::default())).is_empty(),
        "what is young may still be needed"
    );
    assert_eq!(victims(&facts.plan(bytes(5))), [&stray], "space is needed");
    let plan = facts.plan(bytes(6));
    let gone: HashSet<_> = victims(&plan).into_iter().collect();
    assert!(gone.contains(&linked), "a manifest goes with its tree");
    assert!(!gone.contains(&index), "an index has its turn by its age");
    assert!(victims(&facts.plan(SpaceAmount::EVERYTHING)).contains(&&index));
    facts.now += 1000;
    assert_eq!(victims(&facts.plan(SpaceAmount::default())), [&stray], "it is old");
    facts.store.pinned.insert(manifest(3));
    assert!(victims(&facts.plan(SpaceAmount::default())).is_empty(), "a pin keeps its manifest");
}

proptest! {
    #[test]
    fn a_plan_never_takes_what_is_needed_and_counts_right(
        trees in prop::collection::vec(
            (prop::collection::vec(0usize..12, 0..4), -50i64..250, 0u8..64, 1u64..1000), 0..24),
        layers in prop::collection::vec((1u64..1000, any::<bool>()), 12),
        goal in (0u64..20_000, 0u64..40),
    ) {
        let mut facts = Facts { now: 200, minimum_age: 50, unlinked_age: 100, ..Facts::default() };
        for (number, (bytes, leased)) in layers.iter().enumerate() {
            facts.store.objects.insert(layer(number), entry(*bytes, 150));
            if *leased {
                facts.store.leased.insert(layer(number));
            }
        }
        for (number, (links, last_used, needs, bytes)) in trees.iter().enumerate() {
            let links: std::collections::BTreeSet<_> = links.iter().map(|&link| layer(link)).collect();
            let mut made = Entry::clone(&entry(*bytes, *last_used));
            made.manifest = Some(manifest(number));
            made.links = links.into_iter().collect();
            made.damaged = needs & 16 != 0;
            facts.store.objects.insert(tree(number), Arc::new(made));
            if needs & 1 != 0 { facts.store.published.insert(tree(number)); }
            if needs & 2 != 0 { facts.mounted.insert(tree(number)); }
            if needs & 4 != 0 { facts.store.leased.insert(tree(number)); }
            if needs & 8 != 0 { facts.store.pinned.insert(manifest(number)); }
        }
        let goal = SpaceAmount { bytes: goal.0, inodes: goal.1 };
        let plan = facts.plan(goal);
        let gone: HashSet<_> = plan.victims.iter().map(|(name, _)| name.clone()).collect();
        prop_assert_eq!(gone.len(), plan.victims.len(), "nothing goes twice");
        for name in &gone {
            let entry = &facts.store.objects[name];
            let pinned = entry.manifest.is_some_and(|manifest| facts.store.pinned.contains(&manifest));
            prop_assert!(!facts.store.published.contains(name));
            prop_assert!(!facts.mounted.contains(name));
            prop_assert!(!facts.store.leased.contains(name));
            prop_assert!(!pinned || entry.damaged);
        }
        // What stays has all that it links.
        for (name, entry) in &facts.store.objects {
            if !gone.contains(name) {
                prop_assert!(entry.links.iter().all(|link| !gone.contains(link)));
            }
        }
        let sum: u64 = gone.iter().map(|name| facts.store.objects[name].bytes).sum();
        prop_assert_eq!(sum, plan.frees.bytes);
        // Falling short of the goal means that nothing else may go.
        if plan.frees.bytes < goal.bytes {
            prop_assert_eq!(facts.plan(SpaceAmount::EVERYTHING).frees, plan.frees);
        }
        // A larger goal takes at least as much.
        let larger = SpaceAmount { bytes: goal.bytes * 2, inodes: goal.inodes * 2 };
        prop_assert!(facts.plan(larger).victims.len() >= plan.victims.len());
    }
}
