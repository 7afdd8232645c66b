//! The contenders of the transfers: the driver, other tools, and lower bounds for any tool.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::contents::{Artifact, Case};
use super::meter::{self, Measured};
use super::scratch::Scratch;
use crate::common::cgroup::Confinement;
use crate::common::support::{Containerd, DriverOptions, Sandbox, tool};

/// The memory limit of a confined driver.
const CONFINED_BYTES: u64 = 128 << 20;

/// The registry to fetch from.
pub struct Source<'a> {
    pub host: String,
    /// The certificate authority of the host; `None` without TLS.
    pub authority: Option<&'a Path>,
}

/// A program that fetches an artifact to the scratch filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contender {
    /// A publish by a driver with an empty state; its content is synced when it responds.
    Driver,
    /// `oras pull`, which leaves syncing to the kernel.
    OrasPull,
    /// `skopeo copy` to an OCI layout.
    SkopeoCopy,
    /// `ctr images pull` by a containerd with an empty root, unpacked, which leaves syncing to the kernel.
    Containerd,
    /// `curl` of all blobs at once, then `sync -f`.
    Curl,
    /// `openssl dgst -sha256` of all blobs, four at once.
    OpenSsl,
    /// `curl | DECOMPRESS | tar -x`, layers side by side, then `sync -f`.
    Tar(&'static str),
}

pub fn contenders(case: Case) -> Vec<Contender> {
    use Contender::{Containerd, Curl, Driver, OpenSsl, OrasPull, SkopeoCopy, Tar};
    match case {
        Case::File | Case::Files | Case::Original => {
            vec![Driver, OrasPull, SkopeoCopy, Curl, OpenSsl]
        }
        Case::Tls => vec![Driver, OrasPull, Curl],
        Case::Limited => vec![Driver, OrasPull],
        Case::Gzip => vec![Driver, Containerd, SkopeoCopy, Tar("gzip -dc"), Tar("igzip -dc")],
        Case::Zstd => vec![Driver, Containerd, SkopeoCopy, Tar("zstd -dc")],
        Case::Ten | Case::Confined => vec![Driver],
    }
}

impl Contender {
    pub fn label(self) -> String {
        match self {
            Self::Driver => "cold publish (content synced)".to_owned(),
            Self::OrasPull => "oras pull (not synced)".to_owned(),
            Self::SkopeoCopy => "skopeo copy to an OCI layout (not synced)".to_owned(),
            Self::Containerd => "containerd's pull, unpacked (not synced)".to_owned(),
            Self::Curl => "floor: curl --parallel, sync -f".to_owned(),
            Self::OpenSsl => "floor: openssl dgst -sha256".to_owned(),
            Self::Tar(decompress) => format!("floor: curl | {decompress} | tar -x, sync -f"),
        }
    }

    pub fn run(
        self,
        artifact: &Artifact,
        source: &Source<'_>,
        scratch: &Scratch,
        confined: bool,
    ) -> Measured {
        let at = scratch.path();
        let Source { host, authority } = source;
        let scheme = if authority.is_some() { "https" } else { "http" };
        let reference = |name: &str| format!("{host}/{name}");
        let blob = |digest: &String| {
            format!("{scheme}://{host}/v2/{}/blobs/{digest}", artifact.repository)
        };
        match self {
            Self::Driver => driver(artifact, source, scratch, confined),
            Self::OrasPull => meter::command(
                tool("oras")
                    .args(["pull", "--no-tty"])
                    .args(match authority {
                        Some(authority) => vec![OsStr::new("--ca-file"), authority.as_os_str()],
                        None => vec![OsStr::new("--plain-http")],
                    })
                    .arg(reference(&artifact.names[0]))
                    .env("HOME", at)
                    .current_dir(at),
            ),
            Self::SkopeoCopy => meter::command(
                tool("skopeo")
                    .args(["--insecure-policy", "--tmpdir"])
                    .arg(at)
                    .args(["copy", "-q", "--src-tls-verify=false"])
                    .arg(format!("docker://{}", reference(&artifact.names[0])))
                    .arg(format!("oci:{}:v1", at.join("layout").display()))
                    .env("HOME", at),
            ),
            Self::Containerd => containerd(&reference(&artifact.names[0]), scratch),
            Self::Curl => {
                let outputs = artifact.blobs.iter().enumerate();
                let outputs =
                    outputs.map(|(number, digest)| format!("-o {number} {}", blob(digest)));
                let outputs = outputs.collect::<Vec<_>>().join(" ");
                let trust = authority.map(|path| format!("--cacert {}", path.display()));
                let trust = trust.unwrap_or_default();
                meter::command(&mut shell(
                    &format!(
                        "curl -sSf --no-progress-meter --parallel --parallel-max 4 {trust} {outputs}; sync -f ."
                    ),
                    scratch,
                ))
            }
            Self::OpenSsl => {
                for (number, digest) in artifact.blobs.iter().enumerate() {
                    meter::command(&mut shell(
                        &format!("curl -sSf -o {number} {}", blob(digest)),
                        scratch,
                    ));
                }
                meter::command(&mut shell(
                    "ls [0-9]* | xargs -P 4 -n 1 openssl dgst -sha256",
                    scratch,
                ))
            }
            Self::Tar(decompress) => {
                let layers = artifact.blobs.iter().enumerate().map(|(number, digest)| {
                    format!(
                        "mkdir {number}; (curl -sSf {} | {decompress} | tar -x -C {number}) &",
                        blob(digest)
                    )
                });
                let script = layers.collect::<Vec<_>>().join("\n");
                meter::command(&mut shell(&format!("{script}\nwait; sync -f ."), scratch))
            }
        }
    }
}

fn shell(script: &str, scratch: &Scratch) -> Command {
    let mut command = tool("bash");
    command.args(["-euc", script]).current_dir(scratch.path());
    command
}

/// Publishes all artifacts at once. Measures from the calls to their responses.
fn driver(artifact: &Artifact, source: &Source<'_>, scratch: &Scratch, confined: bool) -> Measured {
    let sandbox = Sandbox::new();
    let state = scratch.path().join("state");
    std::fs::create_dir(&state).expect("the state's folder");
    let options = DriverOptions::new(&sandbox).state(&state).argument("--log-level=info");
    let host = &source.host;
    let options = match source.authority {
        Some(authority) => {
            let hosts = sandbox.folder("certs.d");
            let own = sandbox.folder(&format!("certs.d/{}_", host.replace(':', "_")));
            let text = format!("server = \"https://{host}\"\nca = \"{}\"\n", authority.display());
            std::fs::write(own.join("hosts.toml"), text).expect("hosts.toml");
            options.configuration(&format!("registries:\n  hostsDir: {}\n", hosts.display()))
        }
        None => options,
    };
    // Declared first, so that it is dropped last: a cgroup with a process cannot be removed.
    let _confinement;
    let driver = options.start();
    _confinement = confined.then(|| Confinement::of(driver.id(), CONFINED_BYTES));
    let kubelet = driver.kubelet();
    let volumes: Vec<_> = artifact
        .names
        .iter()
        .map(|name| {
            let volume = kubelet.new_volume(&format!("{host}/{name}"));
            kubelet.prepare(&volume);
            volume
        })
        .collect();
    let before = meter::cpu(driver.id());
    let started = Instant::now();
    std::thread::scope(|scope| {
        for volume in &volumes {
            scope.spawn(|| {
                // A call may reach the kubelet's deadline. The kubelet repeats it.
                while let Err(status) = kubelet.publish_request(volume.request.clone()) {
                    assert_eq!(status.code(), tonic::Code::Aborted, "{status}");
                }
            });
        }
    });
    let wall = started.elapsed();
    let cpu = meter::cpu(driver.id()).checked_sub(before).unwrap_or(Duration::ZERO);
    let peak_bytes = meter::peak_bytes(driver.id());
    for volume in &volumes {
        kubelet.unpublish(volume);
    }
    Measured { wall, cpu, peak_bytes }
}

/// Runs one pull. The server's costs count as the command's.
fn containerd(reference: &str, scratch: &Scratch) -> Measured {
    let sandbox = Sandbox::new();
    let server = Containerd::start(&scratch.path().join("root"), sandbox.path());
    let process = server.process.id();
    let before = meter::cpu(process);
    let pulled = meter::command(server.ctr().args(["images", "pull", "--plain-http", reference]));
    let cpu = pulled.cpu + meter::cpu(process).saturating_sub(before);
    let peak_bytes = meter::peak_bytes(process).max(pulled.peak_bytes);
    Measured { wall: pulled.wall, cpu, peak_bytes }
}
