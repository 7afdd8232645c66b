//! Calls each fuzz target with its seeds and with random changes of them: the same ones each time, within seconds.
//!
//! `make fuzz` looks for inputs that reach new code. A failing input that it finds becomes a seed.

#[path = "../fuzz/targets/mod.rs"]
mod targets;

use std::path::Path;

use proptest::collection::vec;
use proptest::prelude::{Strategy, any, prop_oneof};
use proptest::sample::Index;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// The number of changed inputs for each target.
const CHANGED_INPUTS: u32 = 4096;

/// A change of one input.
#[derive(Clone, Debug)]
enum Change {
    Overwrite(Index, u8),
    Insert(Index, Vec<u8>),
    Remove(Index, Index),
    Truncate(Index),
    /// Copies a part of a seed, from one position to another, to a position of the input.
    Splice(Index, Index, Index, Index),
}

fn change() -> impl Strategy<Value = Change> {
    let index = any::<Index>;
    prop_oneof![
        4 => (index(), any::<u8>()).prop_map(|(at, byte)| Change::Overwrite(at, byte)),
        2 => (index(), vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        2 => (index(), index()).prop_map(|(from, to)| Change::Remove(from, to)),
        1 => index().prop_map(Change::Truncate),
        2 => (index(), index(), index(), index())
            .prop_map(|(seed, from, to, at)| Change::Splice(seed, from, to, at)),
    ]
}

/// Returns a range of `bytes` between two positions, in either order.
fn range(bytes: &[u8], one: Index, other: Index) -> std::ops::Range<usize> {
    let (one, other) = (one.index(bytes.len() + 1), other.index(bytes.len() + 1));
    one.min(other)..one.max(other)
}

fn apply(input: &mut Vec<u8>, change: &Change, seeds: &[Vec<u8>]) {
    let position = |at: Index| at.index(input.len() + 1);
    match change {
        Change::Overwrite(at, byte) => {
            let at = position(*at);
            if let Some(found) = input.get_mut(at) {
                *found = *byte;
            }
        }
        Change::Insert(at, bytes) => {
            let at = position(*at);
            input.splice(at..at, bytes.iter().copied());
        }
        Change::Remove(from, to) => drop(input.drain(range(input, *from, *to))),
        Change::Truncate(at) => input.truncate(position(*at)),
        Change::Splice(seed, from, to, at) => {
            let (seed, at) = (seed.get(seeds), position(*at));
            input.splice(at..at, seed[range(seed, *from, *to)].iter().copied());
        }
    }
}

fn seeds_of(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{target} has no seeds");
    files.into_iter().map(|file| std::fs::read(file).expect("a seed")).collect()
}

#[test]
fn each_fuzz_target_passes_its_seeds_and_changes_of_them() {
    let inputs = || (any::<Index>(), vec(change(), 0..8));
    for (name, run) in targets::TARGETS {
        let seeds = seeds_of(name);
        for seed in &seeds {
            run(seed);
        }
        let config =
            Config { cases: CHANGED_INPUTS, failure_persistence: None, ..Config::default() };
        let random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let outcome = TestRunner::new_with_rng(config, random).run(&inputs(), |(seed, changes)| {
            let mut input = seed.get(&seeds).clone();
            for change in &changes {
                apply(&mut input, change, &seeds);
            }
            run(&input);
            Ok(())
        });
        if let Err(error) = outcome {
            panic!("fuzz target {name}: {error}");
        }
    }
}
