//! A fleet in one process: the real controller against an API server that behaves, and nodes that do what they are told.
//!
//!     cargo bench --bench fleet                    three sizes, side by side
//!     cargo bench --bench fleet -- 5000 200        so many nodes and preloads
//!
//! What is counted is what a cluster pays: writes of the controller and of all nodes, their bytes, what watches are
//! sent, the largest object, the controller's memory, and the time until all preloads are Ready.
#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a bench has no readers of its interface"
)]
#![allow(
    clippy::cast_precision_loss,
    clippy::print_stdout,
    reason = "it prints figures for people"
)]
#![allow(
    clippy::new_without_default,
    clippy::missing_panics_doc,
    clippy::needless_pass_by_value,
    reason = "shared with the tests"
)]

#[path = "../tests/e2e/support/api_server/mod.rs"]
mod api_server;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use api_server::{ApiServer, Kind};
use csi_driver_oci::{
    fleet::{
        controller::{
            Fleet, FleetMetrics, Look, Pace,
            look::{Found, Question},
        },
        plan::facts::{Access, Known, Meaning},
    },
    oci::Digest,
};
use futures_util::{FutureExt as _, future::BoxFuture};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

/// What a node takes for one artifact.
const PULL: Duration = Duration::from_millis(300);
/// Sizes that are compared: nodes and preloads.
const SIZES: [(usize, usize); 4] = [(1250, 50), (2500, 50), (5000, 50), (5000, 200)];

/// A registry that knows everything.
struct Registry(AtomicU64);

impl Look for Registry {
    fn look(&self, question: Question) -> BoxFuture<'static, Found> {
        self.0.fetch_add(1, Ordering::Relaxed);
        let known = Known {
            digest: Digest::of(question.written.as_bytes()),
            reference: question.written,
            platforms: Vec::new(),
            bytes: None,
        };
        let found =
            Found { meaning: Some(Meaning::Known(known)), access: Access::Open, plain: None };
        async move { found }.boxed()
    }
}

fn main() {
    let mut numbers = std::env::args().skip(1).filter_map(|argument| argument.parse().ok());
    let chosen = numbers.next().zip(numbers.next());
    let sizes = chosen.map_or_else(|| SIZES.to_vec(), |size| vec![size]);
    println!(
        "| nodes | preloads | to Ready | writes | a pair | written | sent to watches | largest object | memory | restart |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for (nodes, preloads) in sizes {
        run(nodes, preloads);
    }
}

fn run(nodes: usize, preloads: usize) {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let before = resident();
    runtime.block_on(async {
        let api = ApiServer::new();
        for index in 0..nodes {
            api.apply(json!({
                "kind": "Node",
                "metadata": {
                    "name": format!("node-{index:05}"),
                    "labels": {
                        "kubernetes.io/arch": "amd64",
                        "kubernetes.io/hostname": format!("node-{index:05}"),
                        "topology.kubernetes.io/zone": format!("zone-{}", index % 3),
                    },
                },
            }));
        }
        let plugins = tokio::spawn(plugins(api.clone()));
        let registry = Arc::new(Registry(AtomicU64::new(0)));
        let fleet = start(&api, Arc::clone(&registry) as Arc<dyn Look>);
        wait(|| api.list(Kind::NodeArtifacts).iter().filter(|object| !object["status"].is_null()).count() == nodes).await;
        let counted = api.counts();
        let begun = Instant::now();
        for index in 0..preloads {
            api.apply(json!({
                "kind": "ArtifactPreload",
                "metadata": {"namespace": "team", "name": format!("preload-{index:03}")},
                "spec": {"reference": format!("registry.example.com/team/tool-{index:03}:v1"), "parallelism": "5%"},
            }));
        }
        wait(|| api.list(Kind::Preload).iter().all(is_ready)).await;
        let took = begun.elapsed();
        let counts = api.counts();
        let memory = resident().saturating_sub(before);
        // A new process reads everything, and decides nothing.
        fleet.cancel();
        let quiet = api.counts().writes;
        let restarted = Instant::now();
        let again = start(&api, registry);
        tokio::time::sleep(Duration::from_secs(3)).await;
        let extra = api.counts().writes - quiet;
        again.cancel();
        plugins.abort();
        let writes = counts.writes - counted.writes;
        let pairs = (nodes * preloads) as f64;
        println!(
            "| {nodes} | {preloads} | {:.0} s | {writes} | {:.3} | {} | {} | {} KiB | {} MiB | {extra} writes in {:.0} s |",
            took.as_secs_f64(),
            writes as f64 / pairs,
            mebibytes(counts.written_bytes - counted.written_bytes),
            mebibytes(counts.event_bytes - counted.event_bytes),
            counts.largest / 1024,
            memory >> 20,
            restarted.elapsed().as_secs_f64(),
        );
    });
    runtime.shutdown_background();
}

fn start(api: &ApiServer, look: Arc<dyn Look>) -> CancellationToken {
    let lost = CancellationToken::new();
    let pace = Pace { writes_per_second: 2000, writes_at_once: 32, ..Pace::default() };
    let fleet = Fleet::new(api.client(), look, pace, Arc::new(FleetMetrics::default()));
    tokio::spawn(fleet.run(lost.clone()));
    lost
}

/// All node plugins: each tells who it is, and that it has what it is to have.
async fn plugins(api: ApiServer) {
    let mut changes = api.changes(Kind::NodeArtifacts);
    while let Some(object) = changes.recv().await {
        let said = &object["status"];
        let held = |wanted: &Value| {
            let is = |held: &Value| held["preload"] == wanted["preload"];
            said["artifacts"].as_array().is_some_and(|held| held.iter().any(is))
        };
        let wanted = object["spec"]["artifacts"].as_array().cloned().unwrap_or_default();
        if !said.is_null() && wanted.iter().all(held) {
            continue;
        }
        let api = api.clone();
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        tokio::spawn(async move {
            if !wanted.is_empty() {
                tokio::time::sleep(PULL).await;
            }
            let artifacts: Vec<Value> = wanted
                .iter()
                .map(|wanted| {
                    let reference = wanted["reference"].as_str().unwrap_or_default();
                    let digest = reference.split('@').nth(1).unwrap_or_default();
                    json!({"preload": wanted["preload"], "digest": digest, "phase": "Ready"})
                })
                .collect();
            let status = json!({
                "platform": "linux/amd64", "version": "0.1.0", "publicKey": "none",
                "ready": artifacts.len(), "active": 0, "failed": 0, "artifacts": artifacts,
            });
            api.patch_status(Kind::NodeArtifacts, &name, &json!({"status": status})).await;
        });
    }
}

fn is_ready(object: &Value) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    conditions
        .is_some_and(|all| all.iter().any(|one| one["type"] == "Ready" && one["status"] == "True"))
}

async fn wait(mut reached: impl FnMut() -> bool) {
    while !reached() {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Of this process: the controller, and the API server with all objects.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes =
        line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}
