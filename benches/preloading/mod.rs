//! The preload controller at scale on one machine: the real controller, in a process of its own, against a simulated
//! API server, a registry, and nodes that carry out their assignments.
//!
//! Sizes double. `BENCH_PRELOAD=5000,200` sets the numbers of nodes and preloads instead.
//!
//! The figures are the costs for a cluster: writes of the controller and of all nodes, their bytes, the bytes sent to
//! watches, the largest object, memory and processor time of the controller's process, and the time until all preloads
//! are Ready. Figures divided by nodes, or by pairs of node and preload, show whether they grow with them. The memory
//! is the growth after the controller knew all nodes.
//!
//! `api_server` has the same simulation on a real API server.

pub mod api_server;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use axum::{
    Router,
    http::{Uri, header::CONTENT_TYPE},
};
use serde_json::{Value, json};

use crate::common::support::Port;
use crate::common::support::api_server::{ApiServer, Kind};

/// The time that a node takes for one artifact.
const PULL: Duration = Duration::from_millis(300);
/// Faster than the default, so that the bench measures the work and not the rate limit.
const WRITES_PER_SECOND: u32 = 2000;
/// The numbers of nodes and preloads: first the nodes double, then the preloads.
const SIZES: [(usize, usize); 5] = [(1250, 50), (2500, 50), (5000, 50), (5000, 100), (5000, 200)];
/// Ticks of processor time in a second, the unit of `/proc` on Linux.
const TICKS: f64 = 100.0;
/// The capacity of a node in bytes.
const CAPACITY: u64 = 1 << 40;

pub fn preload() {
    let sizes = size().map_or_else(|| SIZES.to_vec(), |size| vec![size]);
    let columns = [
        "nodes",
        "preloads",
        "to Ready",
        "writes",
        "a node",
        "written",
        "a pair",
        "sent to watches",
        "largest object",
        "controller's memory",
        "a pair",
        "its processor time",
        "started anew",
    ];
    println!("| {} |", columns.join(" | "));
    println!("|{}", " --- |".repeat(columns.len()));
    for (nodes, preloads) in sizes {
        measure(nodes, preloads);
    }
}

/// Returns the numbers of nodes and preloads from `BENCH_PRELOAD`.
fn size() -> Option<(usize, usize)> {
    let size = std::env::var("BENCH_PRELOAD").ok()?;
    let (nodes, preloads) = size.split_once(',').expect("nodes,preloads");
    Some((
        nodes.parse().expect("a number of nodes"),
        preloads.parse().expect("a number of preloads"),
    ))
}

fn measure(nodes: usize, preloads: usize) {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let (api, registry) = (ApiServer::new(), runtime.block_on(registry()));
    let folder = tempfile::tempdir().expect("a folder");
    let kubeconfig = folder.path().join("kubeconfig");
    write_kubeconfig(&kubeconfig, api.listen());
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
    runtime.spawn(plugins(api.clone()));
    let pace = format!("--writes-per-second={WRITES_PER_SECOND}");
    let fast = [pace.as_str()];
    let mut controller = Controller::start(&kubeconfig, "first", &fast);
    wait(|| {
        let told = |object: &&Value| !object["status"].is_null();
        api.list(Kind::NodeArtifacts).iter().filter(told).count() == nodes
    });

    let (counted, idle) = (api.counts(), controller.memory());
    let begun = Instant::now();
    for index in 0..preloads {
        let name = format!("preload-{index:03}");
        let reference = format!("{registry}/team/tool-{index:03}:v1");
        api.apply(json!({
            "kind": "ArtifactPreload",
            "metadata": {"namespace": "team", "name": name},
            "spec": {"reference": reference, "parallelism": "5%"},
        }));
    }
    wait(|| api.list(Kind::Preload).iter().all(is_ready));
    let took = begun.elapsed().as_secs_f64();
    let counts = api.counts();
    let (memory, processor) = (controller.memory(), controller.processor());

    // A new process reads everything, and decides nothing.
    controller.end();
    let quiet = api.counts().writes;
    let restarted = Instant::now();
    let again = Controller::start(&kubeconfig, "second", &fast);
    let knows_all = format!("csi_oci_preloads{{state=\"ready\"}} {preloads}\n");
    wait(|| again.metrics().contains(&knows_all));
    let (restart, extra) = (restarted.elapsed().as_secs_f64(), api.counts().writes - quiet);

    let writes = counts.writes - counted.writes;
    let written = counts.written_bytes - counted.written_bytes;
    let sent = counts.event_bytes - counted.event_bytes;
    let pairs = (nodes * preloads) as f64;
    println!(
        "| {nodes} | {preloads} | {took:.0} s | {writes} | {:.1} | {} | {:.0} B | {} | {} KiB | {} | {:.0} B | {processor:.0} s | {restart:.1} s, {extra} writes |",
        writes as f64 / nodes as f64,
        mebibytes(written),
        written as f64 / pairs,
        mebibytes(sent),
        counts.largest / 1024,
        mebibytes(memory),
        (memory - idle) as f64 / pairs,
    );
    drop(again);
    runtime.shutdown_background();
}

/// The controller, with the arguments of the chart's Deployment.
struct Controller {
    process: Child,
    metrics: Port,
}

impl Controller {
    fn start(kubeconfig: &Path, identity: &str, arguments: &[&str]) -> Self {
        let metrics = Port::new();
        let process = Command::new(env!("CARGO_BIN_EXE_csi-driver-oci"))
            .args(["controller", "--namespace=csi-driver-oci", "--health-endpoint="])
            .arg(format!("--identity={identity}"))
            .arg(format!("--metrics-endpoint={}", metrics.address()))
            .arg("--log-level=error")
            .args(arguments)
            .env("KUBECONFIG", kubeconfig)
            .stdin(Stdio::null())
            .spawn();
        Self { process: process.expect("the controller"), metrics }
    }

    fn folder(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}", self.process.id()))
    }

    fn memory(&self) -> u64 {
        most_memory(&self.folder())
    }

    /// Returns the processor time of the process in seconds.
    fn processor(&self) -> f64 {
        let stat = fs::read_to_string(self.folder().join("stat")).expect("its times");
        // The name may contain blanks. Behind it are the state and ten numbers before these two.
        let (_, fields) = stat.rsplit_once(')').expect("a name");
        let times = fields.split_whitespace().skip(11).take(2);
        times.map(|ticks| ticks.parse::<f64>().expect("ticks")).sum::<f64>() / TICKS
    }

    /// Returns the metrics; empty while the controller does not respond.
    fn metrics(&self) -> String {
        let mut answer = String::new();
        let asked = TcpStream::connect(self.metrics.address()).and_then(|mut stream| {
            write!(stream, "GET /metrics HTTP/1.1\r\nHost: metrics\r\nConnection: close\r\n\r\n")?;
            stream.read_to_string(&mut answer)
        });
        asked.map_or_else(|_| String::new(), |_| answer)
    }

    /// Ends the process in good order, so that the next one leads at once.
    fn end(&mut self) {
        let process = i32::try_from(self.process.id()).expect("a process");
        let process = nix::unistd::Pid::from_raw(process);
        nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGTERM).expect("a signal");
        self.process.wait().expect("its end");
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Returns the peak memory in bytes of the process of a directory below `/proc`.
fn most_memory(process: &Path) -> u64 {
    let status = fs::read_to_string(process.join("status")).expect("what the kernel says of it");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
    number.and_then(|number| number.trim().parse::<u64>().ok()).expect("its memory") * 1024
}

fn write_kubeconfig(path: &Path, address: SocketAddr) {
    let text = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "bench",
        "clusters": [{"name": "bench", "cluster": {"server": format!("http://{address}")}}],
        "users": [{"name": "bench", "user": {"token": "none"}}],
        "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
    });
    fs::write(path, text.to_string()).expect("a kubeconfig");
}

/// Starts a registry that has every artifact, each with a digest of its own.
async fn registry() -> SocketAddr {
    let answer = async |asked: Uri| {
        let layer = json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": format!("sha256:{}", "ab".repeat(32)),
            "size": 10 << 20,
        });
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "artifactType": "application/vnd.example.tool",
            "config": {
                "mediaType": "application/vnd.oci.empty.v1+json",
                "digest": "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
                "size": 2,
            },
            "layers": [layer],
            "annotations": {"path": asked.path()},
        });
        ([(CONTENT_TYPE, "application/vnd.oci.image.manifest.v1+json")], manifest.to_string())
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("its address");
    let router = Router::new().fallback(answer);
    tokio::spawn(async move { axum::serve(listener, router).await });
    address
}

/// Simulates all node plugins: each reports its node, and all of its assignments as ready.
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
                "capacityBytes": CAPACITY, "ready": artifacts.len(), "active": 0, "failed": 0,
                "artifacts": artifacts,
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

fn wait(mut reached: impl FnMut() -> bool) {
    while !reached() {
        std::thread::sleep(Duration::from_millis(250));
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
