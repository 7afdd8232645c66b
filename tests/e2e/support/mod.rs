//! The parts of the tests: a registry, a driver and a kubelet, each the real program or a simulation of its behaviour.
//!
//! Every test has a mount namespace of its own, see [`Sandbox`], so tests run in parallel and leave no mount behind,
//! however they end.

mod admin;
pub mod api_server;
mod archive;
mod authority;
mod containerd;
mod cosign;
mod driver;
mod fake_registry;
mod forward_proxy;
pub mod hostile;
mod kubelet;
mod leases;
mod nginx;
mod node;
mod port;
pub mod preload_cluster;
mod process_memory;
mod proxy;
mod push;
mod registry;
mod sandbox;
mod tree;
mod tuf;

use std::{
    future::Future,
    time::{Duration, Instant},
};

pub use admin::Admin;
pub use archive::{Tar, gzip, zstandard};
pub use authority::Authority;
pub use containerd::Containerd;
pub use cosign::{Cosign, Format, KINDS as COSIGN_KEY_KINDS};
pub use driver::{Driver, DriverOptions, accepts, clean_environment};
pub use fake_registry::{Answer, AnswerBody, FakeRegistry, Request};
pub use forward_proxy::ForwardProxy;
pub use kubelet::{Kubelet, Pod, Volume, capability};
pub use leases::HostileLeases;
pub use nginx::Nginx;
pub use node::{Node, SmallArtifact, configuration_head, small_artifact};
pub use port::{Port, stop_listening};
pub use process_memory::{PeakMemory, anonymous_bytes};
pub use proxy::{ForwardedRequest, Gate, Proxy};
pub use push::{
    Contents, Image, Layer, Manifest, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, OCI_TAR, OCI_TAR_GZIP,
    OCI_TAR_ZSTD, Oras, copy_layout, descriptor, empty_config, node_architecture, push_index,
    put_json, umoci_unpack,
};
pub use registry::{
    Registry, RegistryKind, ending_with_this_thread, own_registry, private_registry, registry,
};
pub use sandbox::{
    Sandbox, enter_network_namespace, mount_with_shifted_owners, mounts_at, mounts_under,
};
pub use tree::{Kind, Tree};
pub use tuf::{PAST, Release, TufKey, TufRepository};

/// Longer than any step takes on a busy machine: a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_mins(1);

/// Waits for a state, never for a time.
#[track_caller]
pub fn wait_until(what: &str, reached: impl FnMut() -> bool) {
    wait_at_most(PATIENCE, what, reached);
}

/// Waits for a state that takes longer by its nature.
#[track_caller]
pub fn wait_at_most(patience: Duration, what: &str, mut reached: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !reached() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs one asynchronous call to its end on a runtime of its own, as a client that keeps nothing between calls.
pub fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(future)
}

/// Returns status and body of a GET; `None` without a response.
pub fn get(address: std::net::SocketAddr, path: &str) -> Option<(u16, String)> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(address).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let status = answer.split(' ').nth(1)?.parse().ok()?;
    let (_, body) = answer.split_once("\r\n\r\n")?;
    Some((status, body.to_owned()))
}

/// Returns the names of all commands in the order of the help.
#[track_caller]
pub fn commands() -> Vec<String> {
    let help = run(tool(env!("CARGO_BIN_EXE_csi-driver-oci")).arg("--help"));
    let (_, list) = help.split_once("Commands:\n").expect("a list of commands");
    let lines = list.lines().take_while(|line| !line.is_empty());
    let names = lines.filter_map(|line| line.split_whitespace().next()).map(str::to_owned);
    let names: Vec<_> = names.filter(|name| name != "help").collect();
    assert!(names.len() > 10, "only {names:?}");
    names
}

/// Returns the metrics of a driver.
#[track_caller]
pub fn metrics(address: std::net::SocketAddr) -> String {
    let (status, text) = get(address, "/metrics").expect("the metrics");
    assert_eq!(status, 200);
    text
}

/// Returns a name that no other test uses.
pub fn unique(prefix: &str) -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    format!("{prefix}-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed))
}

/// Returns `sha256:` and the hexadecimal digest.
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hexadecimal_sha256(bytes))
}

/// Returns the hexadecimal digest alone.
pub fn hexadecimal_sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    hexadecimal(&sha2::Sha256::digest(bytes))
}

pub fn hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Returns bytes that do not compress and are the same in every run.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Returns a program of the test tools, with their directory in front of PATH.
pub fn tool(name: &str) -> std::process::Command {
    let mut command = std::process::Command::new(name);
    command.env("PATH", tool_path());
    command
}

/// Runs a program of the test tools. Returns its output.
#[track_caller]
pub fn run(command: &mut std::process::Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; `make test` installs the tools"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn tool_path() -> String {
    // CARGO_TARGET_TMPDIR is `target/tmp`; scripts/install-test-tools fills `target/tools`.
    let tools =
        std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("tools").join("bin");
    let inherited = std::env::var("PATH").unwrap_or_default();
    format!("{}:{inherited}:/usr/local/sbin:/usr/sbin:/sbin", tools.display())
}
