//! The controller against a real API server, which `make bench-preload` starts, and simulated nodes that report every wanted
//! artifact as ready, each with a watch of its own.
//!
//! 1,000 nodes and 50 preloads, or `BENCH_PRELOAD=nodes,preloads`, at the rate of writes that the chart sets. The figures
//! come from the API server's own metrics, from the first preload until all are Ready.

use std::{fs, path::PathBuf, time::Instant};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::{Namespace, Node};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::watcher::watch_object;
use kube::{Api, Client};
use preload::api::custom_resource_definitions::definitions;
use preload::api::{ArtifactPreload, ArtifactPreloadSpec, NodeArtifacts};
use serde_json::json;

use super::{CAPACITY, Controller, PULL, is_ready, mebibytes, registry, size, wait};

/// The number of nodes for each connection: the API server limits requests on one connection, and watches are requests.
const NODES_PER_CLIENT: usize = 100;

pub fn preload() {
    if std::env::var_os("CLUSTER_RUN").is_none() {
        println!("needs an API server: make bench-preload");
        return;
    }
    let (nodes, preloads) = size().unwrap_or((1000, 50));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let client = runtime.block_on(Client::try_default()).expect("a client");
    let registry = runtime.block_on(registry());
    runtime.block_on(prepare(&client, nodes));

    let kubeconfig = PathBuf::from(std::env::var_os("KUBECONFIG").expect("a kubeconfig"));
    let controller = Controller::start(&kubeconfig, "first", &[]);
    runtime.block_on(start_nodes(nodes));
    let knows = |wanted: &str| controller.metrics().lines().any(|line| line == wanted);
    let objects = Api::<NodeArtifacts>::all(client.clone());
    wait(|| {
        let listed = runtime.block_on(objects.list(&Default::default())).expect("all nodes");
        listed.items.iter().filter(|object| object.status.is_some()).count() == nodes
    });

    let before = runtime.block_on(Metrics::read(&client));
    let idle = [memory("kube-apiserver"), memory("etcd"), controller.memory()];
    let begun = Instant::now();
    runtime.block_on(create_preloads(&client, preloads, &registry.to_string()));
    let all_ready = format!("csi_oci_preloads{{state=\"ready\"}} {preloads}");
    wait(|| knows(&all_ready));
    let took = begun.elapsed().as_secs_f64();
    let after = runtime.block_on(Metrics::read(&client));
    let busy = [memory("kube-apiserver"), memory("etcd"), controller.memory()];
    let listed = runtime
        .block_on(Api::<ArtifactPreload>::all(client).list(&Default::default()))
        .expect("all preloads");
    assert!(listed.items.iter().all(|one| is_ready(&serde_json::to_value(one).expect("JSON"))));

    let requests = after.requests - before.requests;
    let received = after.received - before.received;
    let sent = after.sent - before.sent;
    println!("{nodes} nodes, {preloads} preloads: all Ready after {took:.0} s");
    println!("| | all | a node |\n| --- | --- | --- |");
    println!("| requests | {requests:.0} | {:.1} |", requests / nodes as f64);
    println!(
        "| sent to the API server | {} | {:.0} B |",
        mebibytes(received as u64),
        received / nodes as f64
    );
    println!("| sent to watches | {} | {:.0} B |", mebibytes(sent as u64), sent / nodes as f64);
    println!("\n| most memory of | before the preloads | after |\n| --- | --- | --- |");
    for (index, name) in ["API server", "etcd", "controller"].into_iter().enumerate() {
        println!("| {name} | {} | {} |", mebibytes(idle[index]), mebibytes(busy[index]));
    }
    drop(controller);
    runtime.shutdown_background();
}

/// Creates the definitions, the namespaces, and nodes without a kubelet.
async fn prepare(client: &Client, nodes: usize) {
    let apply = PatchParams::apply("bench").force();
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for definition in definitions() {
        let name = definition.metadata.name.clone().expect("a name");
        api.patch(&name, &apply, &Patch::Apply(&definition)).await.expect("a definition");
        kube::runtime::wait::await_condition(
            api.clone(),
            &name,
            kube::runtime::conditions::is_crd_established(),
        )
        .await
        .expect("an established definition");
    }
    let namespaces: Api<Namespace> = Api::all(client.clone());
    for name in ["team", "csi-driver-oci"] {
        let namespace = serde_json::from_value(json!({"metadata": {"name": name}}));
        let namespace: Namespace = namespace.expect("a namespace");
        namespaces.create(&PostParams::default(), &namespace).await.expect("a namespace");
    }
    let api: Api<Node> = Api::all(client.clone());
    stream::iter(0..nodes)
        .map(|index| {
            let (api, name) = (api.clone(), node_name(index));
            async move {
                let labels = json!({
                    "kubernetes.io/arch": "amd64",
                    "kubernetes.io/hostname": name,
                    "topology.kubernetes.io/zone": format!("zone-{}", index % 3),
                });
                let node = json!({"metadata": {"name": name, "labels": labels}});
                let node: Node = serde_json::from_value(node).expect("a node");
                api.create(&PostParams::default(), &node).await.map(drop)
            }
        })
        .buffer_unordered(16)
        .try_collect::<()>()
        .await
        .expect("all nodes");
}

fn node_name(index: usize) -> String {
    format!("node-{index:05}")
}

async fn create_preloads(client: &Client, preloads: usize, registry: &str) {
    let api: Api<ArtifactPreload> = Api::namespaced(client.clone(), "team");
    for index in 0..preloads {
        let spec = json!({"reference": format!("{registry}/team/tool-{index:03}:v1"), "parallelism": "5%"});
        let spec: ArtifactPreloadSpec = serde_json::from_value(spec).expect("a spec");
        let preload = ArtifactPreload::new(&format!("preload-{index:03}"), spec);
        api.create(&PostParams::default(), &preload).await.expect("a preload");
    }
}

/// Starts the simulated node plugins.
async fn start_nodes(nodes: usize) {
    let mut client = None;
    for index in 0..nodes {
        if index % NODES_PER_CLIENT == 0 {
            client = Some(Client::try_default().await.expect("a client"));
        }
        let api: Api<NodeArtifacts> = Api::all(client.clone().expect("a client"));
        tokio::spawn(run_node(api, node_name(index)));
    }
}

async fn run_node(api: Api<NodeArtifacts>, name: String) {
    let mut objects = std::pin::pin!(watch_object(api.clone(), &name));
    while let Some(object) = objects.next().await {
        let Ok(Some(object)) = object else { continue };
        let held = object.status.as_ref().map(|status| &status.artifacts);
        let wanted = &object.spec.artifacts;
        let has = |name: &str| held.is_some_and(|held| held.iter().any(|one| one.preload == name));
        if held.is_some() && wanted.iter().all(|one| has(&one.preload)) {
            continue;
        }
        if !wanted.is_empty() {
            tokio::time::sleep(PULL).await;
        }
        let artifacts: Vec<_> = wanted
            .iter()
            .map(|wanted| {
                let digest = wanted.reference.split('@').nth(1).unwrap_or_default();
                json!({"preload": wanted.preload, "digest": digest, "phase": "Ready"})
            })
            .collect();
        let status = json!({"status": {
            "platform": "linux/amd64", "version": "0.1.0", "publicKey": "none",
            "capacityBytes": CAPACITY, "ready": artifacts.len(), "active": 0, "failed": 0,
            "artifacts": artifacts,
        }});
        if let Err(error) =
            api.patch_status(&name, &PatchParams::default(), &Patch::Merge(&status)).await
        {
            eprintln!("{name}: {error}");
        }
    }
}

/// Counters of the API server for `ArtifactPreload` and `NodeArtifacts` objects.
struct Metrics {
    requests: f64,
    /// Bytes of the requests' bodies.
    received: f64,
    /// Bytes of events to watches.
    sent: f64,
}

impl Metrics {
    async fn read(client: &Client) -> Self {
        let request = http::Request::get("/metrics").body(Vec::new()).expect("a request");
        let text = client.request_text(request).await.expect("metrics");
        let sum = |name: &str| -> f64 {
            text.lines()
                .filter(|line| line.starts_with(name))
                .filter(|line| {
                    ["nodeartifacts", "artifactpreloads"]
                        .iter()
                        .any(|kind| line.contains(&format!("resource=\"{kind}\"")))
                })
                .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
                .sum()
        };
        Self {
            requests: sum("apiserver_request_total{"),
            received: sum("apiserver_request_body_size_bytes_sum{"),
            sent: sum("apiserver_watch_events_sizes_sum{"),
        }
    }
}

/// Returns the peak memory of the program of this name in bytes.
fn memory(program: &str) -> u64 {
    for entry in fs::read_dir("/proc").expect("processes").flatten() {
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if name.trim() == program {
            return super::most_memory(&entry.path());
        }
    }
    panic!("{program} does not run");
}
