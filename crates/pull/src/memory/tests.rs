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
fn the_parts_add_up_to_the_budget() {
    let MemoryPlan { total, fixed, kept, small, large } = MemoryPlan::new(TOTAL, 4);
    assert_eq!(total, fixed + kept + small + large);
    // A window of 128 MiB, the default limit, takes 120 MiB more than one of 8 MiB.
    assert!(large >= 120 << 20, "{}", Bytes(large));
    assert_eq!(MemoryPlan::default_bytes(Some(512 << 20)), TOTAL);
    assert_eq!(MemoryPlan::default_bytes(None), TOTAL);
}

#[tokio::test]
async fn a_request_that_never_fits_is_refused_with_its_numbers() {
    let refused = budget().compute(1, 300 << 20, silent).await.err().expect("refused").to_string();
    assert!(
        refused.starts_with("it needs 300.0 MiB of memory, and the node has at most 125.0 MiB"),
        "{refused}"
    );
    budget().compute(1, budget().most(), silent).await.expect("all of it");
}

#[tokio::test]
async fn a_request_says_that_it_waits_and_a_small_one_waits_for_no_large_one() {
    let budget = budget();
    let mut held = budget.compute(1, budget.most(), silent).await.expect("all of it");
    let said = Mutex::new(Vec::new());
    let tell = |wait: Option<MemoryWait>| {
        said.lock().push(wait.map(|wait| wait.to_string()));
    };
    let mut large = Box::pin(budget.compute(2, 64 << 20, tell));
    assert!(poll!(&mut large).is_pending());
    let small = budget.compute(3, 1 << 20, silent).await.expect("a small need");
    held.shrink(1 << 20);
    let large = large.await.expect("enough is free");
    assert_eq!((large.bytes(), small.bytes(), held.bytes()), (64 << 20, 1 << 20, 1 << 20));
    let first = "waits for memory (pull.memory): needs 64.0 MiB, 0 B of 125.0 MiB are free, and its namespace holds 0 B of at most 125.0 MiB".to_owned();
    assert_eq!(*said.lock(), [Some(first), None]);
}

#[tokio::test(start_paused = true)]
async fn a_request_names_the_share_that_it_waits_for_and_repeats_its_numbers() {
    let budget = budget();
    let said = Mutex::new(Vec::new());
    let tell = |wait: Option<MemoryWait>| said.lock().extend(wait);
    let own = budget.keep(1, 10 << 20, silent).await.expect("it fits");
    assert!(budget.try_keep(1, 10 << 20).is_none(), "it has its share");
    let mut second = Box::pin(budget.keep(1, 10 << 20, tell));
    assert!(poll!(&mut second).is_pending());
    let other = budget.try_keep(2, 2 << 20).expect("half of the rest");
    // Paused time advances while the request waits, which reports its numbers again.
    assert!(tokio::time::timeout(REPORT_INTERVAL * 2, &mut second).await.is_err());
    drop(own);
    drop((second.await.expect("it is its turn"), other));
    let said = said.into_inner();
    let state = |free: u64, share: u64| MemoryWait {
        needs: 10 << 20,
        free: free << 20,
        capacity: 24 << 20,
        held: 10 << 20,
        share: share << 20,
    };
    assert_eq!((said[0], said[1]), (state(14, 12), state(12, 11)));
    let text = said[0].to_string();
    assert!(text.ends_with("and its namespace holds 10.0 MiB of at most 12.0 MiB"), "{text}");
    assert_eq!(budget.kept.state.lock().ledger.free(), 24 << 20);
    assert!(budget.kept.state.lock().ledger.is_idle());
}

#[test]
fn each_try_of_a_computation_has_more_memory_until_it_never_fits() {
    let budget = budget();
    let (mut bytes, mut tries) = (0, 0);
    while bytes <= budget.most() {
        bytes = budget.bytes_of_next_try(bytes, 0);
        tries += 1;
        assert!(tries < 32, "{bytes} bytes are tried again and again");
    }
    assert_eq!(budget.bytes_of_next_try(1, 10 << 20), 10 << 20);
    assert_eq!(budget.bytes_of_next_try(budget.most() - 1, u64::MAX), budget.most());
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
    // The grant is dropped with the channel.
    drop(granted);
    assert_eq!(budget.large.state.lock().ledger.free(), budget.most());
    assert!(budget.large.state.lock().waiting.is_empty());
}

/// A stage of a pull.
#[derive(Clone, Debug)]
enum Stage {
    /// Parses a manifest, or plans a tree.
    Compute { bytes: u64 },
    /// Waits for a registry.
    Wire,
    /// Plans a tree with a permit to compute.
    ComputeWithPermit { bytes: u64 },
    /// Unpacks a layer with a permit to unpack while a registry sends it.
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

    /// Checks that all pulls of several tenants end, with stages in any order, while some are
    /// cancelled. No memory stays reserved.
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
            let budget = budget();
            let [compute_permits, unpack_permits] = [(); 2].map(|()| Arc::new(Semaphore::new(2)));
            let mut running = JoinSet::new();
            for (tenant, kept, stages, gives_up) in pulls {
                let budget = budget.clone();
                let compute_permits = Arc::clone(&compute_permits);
                let unpack_permits = Arc::clone(&unpack_permits);
                let pull = async move {
                    let _kept = budget.keep(tenant, kept, silent).await.expect("it fits");
                    for stage in stages {
                        // The clock is paused: it advances to the end of the next sleep as soon as
                        // every task waits. So a step takes no real time, and steps of several
                        // pulls overlap with each other and with cancellations in a fixed order.
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
                                let _permit = compute_permits.acquire().await.expect("open");
                                step().await;
                            }
                            Stage::WireWithPermit => {
                                let _permit = unpack_permits.acquire().await.expect("open");
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
            // An hour of the paused clock. Tasks that block each other let it pass at once.
            tokio::time::timeout(Duration::from_hours(1), all).await.expect("nothing blocks");
            for pool in [&budget.kept, &budget.small, &budget.large] {
                let state = pool.state.lock();
                assert!(state.waiting.is_empty());
                assert!(state.ledger.is_idle());
            }
        });
    }
}
