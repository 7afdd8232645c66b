use std::time::Duration;

use futures_util::poll;
use proptest::prelude::*;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::*;

const TOTAL: u64 = 192 << 20;

fn budget() -> MemoryBudget<u8> {
    MemoryBudget::new(MemoryPlan::new(TOTAL, 4))
}

fn silent(_: Option<MemoryWait>) {}

#[test]
fn the_parts_come_to_the_whole() {
    let MemoryPlan { total, fixed, kept, small, large } = MemoryPlan::new(TOTAL, 4);
    assert_eq!(total, fixed + kept + small + large);
    // A window of 128 MiB, the default limit, in place of one of 8 MiB.
    assert!(large >= 120 << 20, "{}", Bytes(large));
    assert_eq!(MemoryPlan::default_bytes(Some(512 << 20)), TOTAL);
    assert_eq!(MemoryPlan::default_bytes(None), TOTAL);
}

#[tokio::test]
async fn what_never_fits_is_refused_with_its_numbers() {
    let refused = budget().compute(1, 300 << 20, silent).await.expect_err("refused").to_string();
    assert!(
        refused.starts_with("it needs 300.0 MiB of memory, and the node has at most 125.0 MiB"),
        "{refused}"
    );
    budget().compute(1, budget().most(), silent).await.expect("all of it");
}

#[tokio::test]
async fn who_waits_says_so_and_a_small_need_does_not_wait_for_large_ones() {
    let budget = budget();
    let mut held = budget.compute(1, budget.most(), silent).await.expect("all of it");
    let said = Mutex::new(Vec::new());
    let tell = |wait: Option<MemoryWait>| {
        said.lock().expect("unpoisoned").push(wait.map(|wait| wait.to_string()));
    };
    let mut large = Box::pin(budget.compute(2, 64 << 20, tell));
    assert!(poll!(&mut large).is_pending());
    let small = budget.compute(3, 1 << 20, silent).await.expect("a small need");
    held.shrink(1 << 20);
    let large = large.await.expect("enough is free");
    assert_eq!((large.bytes(), small.bytes(), held.bytes()), (64 << 20, 1 << 20, 1 << 20));
    let first = "waits for memory: needs 64.0 MiB of 125.0 MiB, 0 B free (pull.memory)".to_owned();
    assert_eq!(*said.lock().expect("unpoisoned"), [Some(first), None]);
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_nothing_behind() {
    let budget = budget();
    let held = budget.compute(1, budget.most(), silent).await.expect("all of it");
    let mut first = Box::pin(budget.compute(2, 100 << 20, silent));
    let mut granted = Box::pin(budget.compute(3, 20 << 20, silent));
    assert!(poll!(&mut first).is_pending() && poll!(&mut granted).is_pending());
    drop(first);
    drop(held);
    // Granted, and never looked at.
    drop(granted);
    assert_eq!(budget.large.lock().ledger.free(), budget.most());
    assert!(budget.large.lock().waiting.is_empty());
}

/// What a pull does, one stage after the other.
#[derive(Clone, Debug)]
enum Stage {
    /// Parses a manifest, or plans a tree.
    Compute { bytes: u64 },
    /// Waits for a registry.
    Wire,
    /// Plans a tree with a permit to unpack, which layers of slow registries hold, too.
    ComputeWithPermit { bytes: u64 },
    /// Unpacks what a registry sends, with a permit.
    WireWithPermit,
}

fn stage() -> impl Strategy<Value = Stage> {
    let most = MemoryPlan::new(TOTAL, 4).large;
    prop_oneof![
        (1..8_u64 << 20).prop_map(|bytes| Stage::Compute { bytes }),
        (1..=most).prop_map(|bytes| Stage::Compute { bytes }),
        Just(Stage::Wire),
        (1..=most).prop_map(|bytes| Stage::ComputeWithPermit { bytes }),
        Just(Stage::WireWithPermit),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Pulls of several tenants, with any stages in any order, some of which are given up: all
    /// others end, and nothing stays reserved.
    #[test]
    fn no_order_of_stages_blocks(
        pulls in prop::collection::vec(
            (0..4_u8, 1..=MemoryPlan::new(TOTAL, 4).kept / 2, prop::collection::vec(stage(), 0..5),
             prop::option::of(0..50_u64)),
            1..24,
        ),
    ) {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_time().start_paused(true).build().expect("a runtime");
        runtime.block_on(async {
            let (budget, permits) = (budget(), Arc::new(Semaphore::new(2)));
            let mut running = JoinSet::new();
            for (tenant, kept, stages, gives_up) in pulls {
                let (budget, permits) = (budget.clone(), Arc::clone(&permits));
                let pull = async move {
                    let _kept = budget.keep(tenant, kept, silent).await.expect("it fits");
                    for stage in stages {
                        let step = || tokio::time::sleep(Duration::from_millis(7));
                        match stage {
                            Stage::Compute { bytes } => {
                                let _memory =
                                    budget.compute(tenant, bytes, silent).await.expect("it fits");
                                step().await;
                            }
                            Stage::Wire => step().await,
                            Stage::ComputeWithPermit { bytes } => {
                                let _memory =
                                    budget.compute(tenant, bytes, silent).await.expect("it fits");
                                let _permit = permits.acquire().await.expect("open");
                                step().await;
                            }
                            Stage::WireWithPermit => {
                                let _permit = permits.acquire().await.expect("open");
                                step().await;
                            }
                        }
                    }
                };
                running.spawn(async move {
                    match gives_up {
                        Some(after) => {
                            let _ = tokio::time::timeout(Duration::from_millis(after), pull).await;
                        }
                        None => pull.await,
                    }
                });
            }
            let all = async { while running.join_next().await.is_some() {} };
            tokio::time::timeout(Duration::from_hours(1), all).await.expect("nothing blocks");
            for pool in [&budget.kept, &budget.small, &budget.large] {
                let state = pool.lock();
                assert!(state.waiting.is_empty());
                assert!(state.ledger.is_untouched());
            }
        });
    }
}
