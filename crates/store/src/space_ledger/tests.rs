use std::fs;

use proptest::prelude::*;

use super::*;

fn digest(number: u8) -> Digest {
    Digest::of(&[number])
}

/// A ledger over two empty folders.
fn ledger() -> (tempfile::TempDir, Arc<Ledger>) {
    let root = tempfile::tempdir().expect("a folder");
    let (partial, staging) = (root.path().join("partial"), root.path().join("staging"));
    for folder in [&partial, &staging] {
        fs::create_dir(folder).expect("a folder");
    }
    let ledger = Ledger::load(partial, staging).expect("a ledger");
    (root, Arc::new(ledger))
}

fn put(ledger: &Ledger, blob: Digest, host: &str, content: &[u8]) -> PathBuf {
    let path = ledger.path(blob, RegistryId::of(host));
    fs::write(&path, content).expect("a download");
    path
}

#[derive(Clone, Debug)]
enum Step {
    Claim(Vec<(u8, u64)>),
    Release(usize),
    Open(u8, u8),
    Write(usize, u64),
    Close(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        prop::collection::vec((0..6u8, 0..1000u64), 1..5).prop_map(Step::Claim),
        any::<usize>().prop_map(Step::Release),
        (0..6u8, 0..2u8).prop_map(|(blob, host)| Step::Open(blob, host)),
        (any::<usize>(), 0..1000u64).prop_map(|(handle, bytes)| Step::Write(handle, bytes)),
        any::<usize>().prop_map(Step::Close),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    /// The running totals are what adding everything up anew gives.
    #[test]
    fn running_totals_are_the_sums_of_all_claims_and_downloads(steps in steps()) {
        let (_root, ledger) = ledger();
        let (mut claimed, mut handles) = (Vec::new(), Vec::new());
        for step in steps {
            match step {
                Step::Claim(claims) => {
                    let claim = |&(blob, bytes): &(u8, u64)| Claim { blob: digest(blob), bytes, inodes: bytes / 7 };
                    let claims: Vec<_> = claims.iter().map(claim).collect();
                    ledger.lock().claim(&claims);
                    claimed.extend(claims.iter().map(|claim| claim.blob));
                }
                Step::Release(which) if !claimed.is_empty() => {
                    let blob = claimed.swap_remove(which % claimed.len());
                    ledger.release(blob);
                }
                Step::Open(blob, host) => {
                    handles.push(ledger.open(digest(blob), RegistryId(host.into())));
                }
                Step::Write(which, bytes) if !handles.is_empty() => {
                    handles[which % handles.len()].set_bytes(bytes);
                }
                Step::Close(which) if !handles.is_empty() => {
                    handles.swap_remove(which % handles.len());
                }
                Step::Release(_) | Step::Write(..) | Step::Close(_) => {}
            }
            let state = ledger.lock();
            let sum = state.blobs.values().fold(SpaceTotals::default(), |sum, blob| sum.plus(blob.totals()));
            prop_assert_eq!(state.totals, sum);
            let idle: usize = state.idle.values().map(BTreeSet::len).sum();
            prop_assert_eq!(state.idle_count, idle);
        }
        drop(handles);
        for blob in claimed {
            ledger.release(blob);
        }
        let state = ledger.lock();
        prop_assert!(state.blobs.is_empty(), "nothing was written, and nothing is left");
        prop_assert_eq!(state.totals, SpaceTotals::default());
    }
}

#[test]
fn what_is_downloaded_of_a_claim_is_outstanding_no_more() {
    let (_root, ledger) = ledger();
    let [mine, other] = [1, 2].map(digest);
    let claim = |blob| Claim { blob, bytes: 1000, inodes: 3 };
    ledger.lock().claim(&[claim(other)]);
    let open = ledger.open(other, RegistryId::of("r.io"));
    open.set_bytes(400);
    let nothing = HashSet::new();
    let sums = ledger.lock().demand(&[claim(mine), claim(mine)], &nothing);
    assert_eq!(sums.needed, SpaceAmount { bytes: 1000, inodes: 3 }, "a blob counts once");
    assert_eq!(sums.others, SpaceAmount { bytes: 600, inodes: 3 });
    assert_eq!(sums.quota, 2000);
    // Joining what is claimed needs nothing more.
    let sums = ledger.lock().demand(&[claim(other)], &nothing);
    assert!(sums.needed.is_nothing());
    // What is written in full was part of the quota before.
    let sums = ledger.lock().demand(&[claim(mine)], &HashSet::from([other]));
    assert!(sums.others.is_nothing());
    assert_eq!(sums.quota, 1000);
}

#[test]
fn the_oldest_idle_downloads_of_a_registry_go_beyond_its_bound() {
    let (root, ledger) = ledger();
    let blobs: Vec<_> =
        (0..=IDLE_PER_REGISTRY).map(|number| Digest::of(&number.to_le_bytes())).collect();
    let in_use = put(&ledger, digest(0), "r.io", b"in use");
    let open = ledger.open(digest(0), RegistryId::of("r.io"));
    let other = put(&ledger, digest(1), "other.io", b"of another registry");
    ledger.refresh(digest(1), RegistryId::of("other.io"));
    let mut paths = Vec::new();
    for (number, blob) in blobs.iter().enumerate() {
        let path = put(&ledger, *blob, "r.io", b"broken off");
        let age = std::time::Duration::from_secs(10_000 - number as u64);
        let file = fs::File::options().write(true).open(&path).expect("the download");
        file.set_modified(std::time::SystemTime::now() - age).expect("a time");
        fs::write(record_of(&path), "[]").expect("a record");
        drop(ledger.open(*blob, RegistryId::of("r.io")));
        paths.push(path);
    }
    assert!(!paths[0].exists() && !record_of(&paths[0]).exists(), "the oldest one goes");
    assert!(paths[1..].iter().all(|path| path.exists()), "the others stay");
    assert!(in_use.exists() && other.exists());
    drop(open);
    assert!(!paths[1].exists(), "one more is idle now");
    // A later process knows the same.
    let again =
        Ledger::load(root.path().join("partial"), root.path().join("staging")).expect("a ledger");
    assert_eq!(again.idle().len(), IDLE_PER_REGISTRY + 1);
    assert_eq!(again.unclaimed().inodes, IDLE_PER_REGISTRY as u64 + 1);
}

#[test]
fn what_is_claimed_or_open_is_not_removed() {
    let (_root, ledger) = ledger();
    let (blob, registry) = (digest(1), RegistryId::of("r.io"));
    let path = put(&ledger, blob, "r.io", b"content");
    let open = ledger.open(blob, registry);
    assert!(!ledger.remove(blob, registry).expect("looked at"));
    ledger.lock().claim(&[Claim { blob, bytes: 7, inodes: 1 }]);
    drop(open);
    assert!(!ledger.remove(blob, registry).expect("looked at"));
    ledger.release(blob);
    assert!(ledger.remove(blob, registry).expect("removed"));
    assert!(!path.exists());
    assert_eq!(ledger.unclaimed(), SpaceAmount::default());
}

#[test]
fn a_removal_leaves_the_record_of_the_next_download() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let (_root, ledger) = ledger();
    let (blob, registry) = (digest(1), RegistryId::of("r.io"));
    let path = ledger.path(blob, registry);
    let (ended, mut lost) = (AtomicBool::new(false), 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                let _ = ledger.remove(blob, registry);
            }
        });
        for _ in 0..500 {
            let open = ledger.open(blob, registry);
            fs::write(&path, "content").expect("a download");
            fs::write(record_of(&path), "[]").expect("a record");
            for _ in 0..20 {
                std::thread::yield_now();
            }
            lost += u32::from(!record_of(&path).exists());
            drop(open);
            while path.exists() {
                std::hint::spin_loop();
            }
        }
        ended.store(true, Ordering::Relaxed);
    });
    assert_eq!(lost, 0, "an open download has its record");
}
