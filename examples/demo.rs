//! The way of one artifact, step by step: pushed with oras, mounted by the driver, run from the volume, and mounted
//! again without a registry. This program plays the kubelet; `make demo` starts it.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a demonstration is there to print")]

use std::{
    collections::HashMap,
    error::Error,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener as StdTcpListener},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use csi_driver_oci::proto::csi::v1::{
    NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability,
    node_client::NodeClient,
    volume_capability::{AccessMode, AccessType, MountVolume, access_mode::Mode},
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UnixStream},
    process::{Child, Command},
};
use tonic::transport::{Channel, Endpoint};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// How long anything may take before the demonstration has failed.
const PATIENCE: Duration = Duration::from_mins(2);

const CONFIGURATION: &str = "global:
  scrape_interval: 15s
  evaluation_interval: 15s
scrape_configs: []
";

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [driver, prometheus, room] = arguments.as_slice() else {
        return Err("usage: demo DRIVER PROMETHEUS EMPTY-FOLDER; `make demo` knows them".into());
    };
    let outcome = demonstrate(driver, prometheus, room).await;
    if outcome.is_err() {
        for log in ["driver.log", "registry.log", "prometheus.log"] {
            let text = fs::read_to_string(room.join(log)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            eprintln!(
                "\n{log}, its last lines:\n{}",
                lines[lines.len().saturating_sub(20)..].join("\n")
            );
        }
    }
    outcome
}

async fn demonstrate(driver: &Path, prometheus: &Path, room: &Path) -> Result<()> {
    println!("\nThe registry: docker-registry on the loopback, behind a proxy that counts bytes.");
    let (mut registry, registry_address) = start_registry(room).await?;
    let wire = Wire::to(registry_address).await?;
    let reference = format!("{}/prometheus-custom:v2.45.0-custom", wire.address);

    println!(
        "\nThe artifact: Prometheus and a configuration, pushed with oras under media types of their own."
    );
    push(prometheus, room, &registry_address.to_string()).await?;

    println!("\nThe driver, and pods whose volume names {reference}:\n");
    let kubelet = Kubelet { directory: room.join("kubelet") };
    let _driver = start_driver(driver, room, &kubelet).await?;
    println!("{:<58} {:>12} {:>24}", "step", "time", "from the registry");

    let first = Volume::new("first", &reference);
    measure("first pod: publish", &wire, kubelet.publish(&first)).await?;
    let mut running = run_from(&kubelet.target(&first), room, &wire).await?;

    stop(&mut running).await?;
    measure("pod restarted: unpublish", &wire, kubelet.unpublish(&first)).await?;
    let second = Volume::new("second", &reference);
    measure("               publish", &wire, kubelet.publish(&second)).await?;
    let mut running = run_from(&kubelet.target(&second), room, &wire).await?;

    stop(&mut registry).await?;
    if TcpStream::connect(registry_address).await.is_ok() {
        return Err("the registry still answers".into());
    }
    println!("the registry is stopped");
    stop(&mut running).await?;
    measure("pod restarted again: unpublish", &wire, kubelet.unpublish(&second)).await?;
    let third = Volume::new("third", &reference);
    measure("                     publish", &wire, kubelet.publish(&third)).await?;
    let mut running = run_from(&kubelet.target(&third), room, &wire).await?;
    stop(&mut running).await?;
    measure("pod deleted: unpublish", &wire, kubelet.unpublish(&third)).await?;
    println!("\nDone: one download for three pods, the last of them without a registry.");
    Ok(())
}

/// Runs one step and prints its time and what came from the registry meanwhile.
async fn measure<T>(step: &str, wire: &Wire, work: impl Future<Output = Result<T>>) -> Result<T> {
    let before = wire.bytes();
    let start = Instant::now();
    let result = work.await.map_err(|error| format!("{}: {error}", step.trim()))?;
    let time = format!("{:.1} ms", start.elapsed().as_secs_f64() * 1e3);
    println!("{step:<58} {time:>12} {:>24}", format!("{} bytes", grouped(wire.bytes() - before)));
    Ok(result)
}

/// `1234567` as `1,234,567`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

async fn start_registry(room: &Path) -> Result<(Child, SocketAddr)> {
    let address = free_address()?;
    let configuration = format!(
        "version: 0.1\n\
         log: {{level: error, accesslog: {{disabled: true}}}}\n\
         storage: {{filesystem: {{rootdirectory: {}}}}}\n\
         http: {{addr: \"{address}\", secret: demo}}\n",
        room.join("registry").display()
    );
    fs::write(room.join("registry.yml"), configuration)?;
    let mut command = ending_with_us("docker-registry");
    command.arg("serve").arg(room.join("registry.yml"));
    let child = spawn(command, &room.join("registry.log"))?;
    until("the registry listens", async || TcpStream::connect(address).await.is_ok()).await?;
    Ok((child, address))
}

async fn push(prometheus: &Path, room: &Path, registry: &str) -> Result<()> {
    let folder = room.join("artifact");
    fs::create_dir_all(folder.join("bin"))?;
    fs::create_dir_all(folder.join("config"))?;
    fs::copy(prometheus, folder.join("bin/prometheus"))?;
    fs::write(folder.join("config/prometheus.yml"), CONFIGURATION)?;
    let reference = format!("{registry}/prometheus-custom:v2.45.0-custom");
    let arguments = [
        "push",
        "--plain-http",
        &reference,
        "--config",
        "/dev/null:application/vnd.custom.config.v1+json",
        "bin/prometheus:application/vnd.custom.binary.v1",
        "config/prometheus.yml:application/vnd.custom.prometheus.config.v1+yaml",
    ];
    println!("  oras {}", arguments.join(" "));
    let output = Command::new("oras")
        .args(arguments)
        .current_dir(&folder)
        .env("HOME", room)
        .output()
        .await
        .map_err(|error| format!("oras: {error}; `make tools` installs it"))?;
    if !output.status.success() {
        return Err(format!("oras push: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    for line in
        String::from_utf8_lossy(&output.stdout).lines().filter(|line| line.starts_with("Digest"))
    {
        println!("  {line}");
    }
    Ok(())
}

const DRIVER_CONFIGURATION: &str = "\
apiVersion: oci.custom.io/v1alpha1
kind: NodeConfiguration
cache: {minFreePercent: 1, minFreeInodesPercent: 1}
";

async fn start_driver(driver: &Path, room: &Path, kubelet: &Kubelet) -> Result<Child> {
    fs::create_dir_all(kubelet.directory.join("plugins_registry"))?;
    fs::create_dir_all(kubelet.directory.join("pods"))?;
    fs::create_dir_all(kubelet.socket().parent().ok_or("no folder for the socket")?)?;
    // A developer's disk may be fuller than a node's is allowed to be.
    let configuration = room.join("node.yaml");
    fs::write(&configuration, DRIVER_CONFIGURATION)?;
    let mut command = ending_with_us(driver);
    command
        .args([
            "node",
            "--node-id=demo",
            "--admin-endpoint=",
            "--health-endpoint=",
            "--metrics-endpoint=",
        ])
        .arg(format!("--endpoint=unix://{}", kubelet.socket().display()))
        .arg(format!("--config={}", configuration.display()))
        .arg(format!("--state-dir={}", room.join("state").display()))
        .arg(format!("--kubelet-dir={}", kubelet.directory.display()));
    let mut child = spawn(command, &room.join("driver.log"))?;
    // This socket comes last: who sees it can call the driver.
    let registration = kubelet.directory.join("plugins_registry/oci.custom.io@reg.sock");
    let mut ended = None;
    until("the driver offers itself for registration", async || {
        ended = child.try_wait().ok().flatten();
        ended.is_some() || UnixStream::connect(&registration).await.is_ok()
    })
    .await?;
    if let Some(status) = ended {
        return Err(format!("the driver ended at its start: {status}").into());
    }
    Ok(child)
}

/// Starts Prometheus from the volume and waits until it says that it is ready.
async fn run_from(volume: &Path, room: &Path, wire: &Wire) -> Result<Child> {
    let address = free_address()?;
    let data = tempfile_in(room)?;
    let mut command = ending_with_us(volume.join("bin/prometheus"));
    command
        .arg(format!("--config.file={}", volume.join("config/prometheus.yml").display()))
        .arg(format!("--storage.tsdb.path={}", data.display()))
        .arg(format!("--web.listen-address={address}"));
    measure("  bin/prometheus of the volume answers /-/ready", wire, async {
        let child = spawn(command, &room.join("prometheus.log"))?;
        until("Prometheus is ready", async || is_ready(address).await.unwrap_or(false)).await?;
        Ok(child)
    })
    .await
}

async fn is_ready(address: SocketAddr) -> Result<bool> {
    let mut stream = TcpStream::connect(address).await?;
    stream
        .write_all(format!("GET /-/ready HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes())
        .await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer.split(' ').nth(1) == Some("200"))
}

/// A new folder for Prometheus' data.
fn tempfile_in(room: &Path) -> Result<PathBuf> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let folder = room.join(format!("data-{}", COUNTER.fetch_add(1, Ordering::Relaxed)));
    fs::create_dir(&folder)?;
    Ok(folder)
}

/// Ends a process as a pod's end does.
async fn stop(child: &mut Child) -> Result<()> {
    if let Some(process) = child.id() {
        let process = nix::unistd::Pid::from_raw(i32::try_from(process)?);
        nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGTERM)?;
    }
    tokio::time::timeout(PATIENCE, child.wait()).await.map_err(|_| "a process does not end")??;
    Ok(())
}

/// A command that is killed when this program ends, however it ends.
fn ending_with_us(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(program);
    command
}

fn spawn(mut command: Command, log: &Path) -> Result<Child> {
    let log = fs::File::options().create(true).append(true).open(log)?;
    Ok(command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .kill_on_drop(true)
        .spawn()?)
}

async fn until(what: &str, mut reached: impl AsyncFnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !reached().await {
        if Instant::now() > deadline {
            return Err(format!("waited in vain until {what}").into());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

fn free_address() -> Result<SocketAddr> {
    Ok(StdTcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// A TCP proxy that counts what comes back from the registry.
struct Wire {
    address: SocketAddr,
    from_registry: Arc<AtomicU64>,
}

impl Wire {
    async fn to(registry: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let wire = Self { address: listener.local_addr()?, from_registry: Arc::default() };
        let counter = Arc::clone(&wire.from_registry);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, registry, Arc::clone(&counter)));
            }
        });
        Ok(wire)
    }

    fn bytes(&self) -> u64 {
        self.from_registry.load(Ordering::Relaxed)
    }
}

async fn carry(
    client: TcpStream,
    registry: SocketAddr,
    counter: Arc<AtomicU64>,
) -> std::io::Result<()> {
    // A registry that is down closes the client's connection here.
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_registry, mut to_registry) = TcpStream::connect(registry).await?.into_split();
    let requests = tokio::spawn(async move {
        let result = tokio::io::copy(&mut from_client, &mut to_registry).await;
        drop(to_registry);
        result
    });
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = from_registry.read(&mut buffer).await?;
        if length == 0 {
            break;
        }
        counter.fetch_add(length as u64, Ordering::Relaxed);
        to_client.write_all(&buffer[..length]).await?;
    }
    requests.abort();
    Ok(())
}

/// An inline volume of a pod.
struct Volume {
    pod: String,
    reference: String,
}

impl Volume {
    fn new(pod: &str, reference: &str) -> Self {
        Self { pod: pod.to_owned(), reference: reference.to_owned() }
    }

    /// The kubelet makes a hash; the driver sees only a name.
    fn id(&self) -> String {
        format!("csi-{}", self.pod)
    }
}

/// The calls of the kubelet, each on a connection of its own.
struct Kubelet {
    directory: PathBuf,
}

impl Kubelet {
    fn socket(&self) -> PathBuf {
        self.directory.join("plugins/oci.custom.io/csi.sock")
    }

    fn target(&self, volume: &Volume) -> PathBuf {
        self.directory
            .join("pods")
            .join(&volume.pod)
            .join("volumes/kubernetes.io~csi/artifact/mount")
    }

    async fn publish(&self, volume: &Volume) -> Result<()> {
        let target = self.target(volume);
        fs::create_dir_all(target.parent().ok_or("a target without a parent")?)?;
        let volume_context = HashMap::from([
            ("reference".to_owned(), volume.reference.clone()),
            ("csi.storage.k8s.io/pod.name".to_owned(), volume.pod.clone()),
            ("csi.storage.k8s.io/pod.namespace".to_owned(), "default".to_owned()),
            ("csi.storage.k8s.io/pod.uid".to_owned(), volume.pod.clone()),
            ("csi.storage.k8s.io/serviceAccount.name".to_owned(), "default".to_owned()),
            ("csi.storage.k8s.io/ephemeral".to_owned(), "true".to_owned()),
        ]);
        let mut request = tonic::Request::new(NodePublishVolumeRequest {
            volume_id: volume.id(),
            target_path: target.to_string_lossy().into_owned(),
            volume_capability: Some(VolumeCapability {
                access_type: Some(AccessType::Mount(MountVolume::default())),
                access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
            }),
            readonly: true,
            volume_context,
            ..Default::default()
        });
        request.set_timeout(PATIENCE);
        self.client()
            .await?
            .node_publish_volume(request)
            .await
            .map_err(|status| readable(&status))?;
        Ok(())
    }

    async fn unpublish(&self, volume: &Volume) -> Result<()> {
        let target = self.target(volume);
        let request = NodeUnpublishVolumeRequest {
            volume_id: volume.id(),
            target_path: target.to_string_lossy().into_owned(),
        };
        self.client()
            .await?
            .node_unpublish_volume(request)
            .await
            .map_err(|status| readable(&status))?;
        if target.exists() {
            return Err("unpublish left the target".into());
        }
        Ok(())
    }

    async fn client(&self) -> Result<NodeClient<Channel>> {
        let socket = self.socket();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        Ok(NodeClient::new(
            Endpoint::from_static("http://localhost").connect_with_connector(connector).await?,
        ))
    }
}

fn readable(status: &tonic::Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}
