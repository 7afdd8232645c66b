//! Tests volumes that follow a tag: what they show before, during and after a switch, whatever fails.

use std::{
    collections::BTreeSet,
    fs,
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use base64::Engine as _;
use serde_json::{Value, json};
use tonic::Code;

use crate::documents::{Step, fits, steps};
use crate::support::{
    Admin, Contents, Cosign, DriverOptions, Format, Image, Kubelet, Layer, Manifest, Node, Port,
    Proxy, Tar, Volume, metrics, mounts_at, mounts_under, node_architecture, private_registry,
    put_json, registry, run, unique, wait_at_most, wait_until,
};

/// An interval that only a test may set.
const OFTEN: &str = "20ms";
/// Maintenance, which removes old versions, takes at most a twentieth of a busy node's time.
const MAINTENANCE: Duration = Duration::from_mins(3);
/// The points at which a switch can be stopped.
const POINTS: [&str; 5] =
    ["follow.linked", "follow.named", "follow.added", "follow.switched", "follow.removed"];

/// An artifact whose tag moves.
struct Moving {
    repository: String,
}

impl Moving {
    fn new() -> Self {
        Self { repository: unique("moving") }
    }

    /// Returns the layers of a version: every file has its label as content, and one has it as name.
    fn manifest(label: &str, names: &[&str]) -> Manifest {
        let names = names.iter().chain([&label]);
        Manifest::artifact(names.map(|name| Layer::titled(name, label)).collect::<Vec<_>>())
    }

    /// Moves the tag. Returns the digest of the manifest.
    #[track_caller]
    fn push(&self, label: &str) -> String {
        self.push_to(registry(), label)
    }

    #[track_caller]
    fn push_to(&self, contents: &impl Contents, label: &str) -> String {
        Self::manifest(label, &["one", "folder/two", "folder/inner/three"]).push(
            contents,
            &self.repository,
            "v1",
        )
    }

    fn name(&self) -> String {
        format!("{}:v1", self.repository)
    }
}

/// Lets a driver accept short intervals and repeat failures soon, with other variables of a test.
fn options(options: DriverOptions, variables: &[(&str, &str)]) -> DriverOptions {
    let options = options
        .environment("CSI_OCI_FOLLOW_MINIMUM", "1")
        .environment("CSI_OCI_FOLLOW_PAUSE", "50");
    variables.iter().fold(options, |options, (name, value)| options.environment(name, value))
}

struct FollowNode {
    node: Node,
    admin: Admin,
}

impl FollowNode {
    #[track_caller]
    fn start(sections: &str, variables: &[(&str, &str)]) -> Self {
        let mut endpoint = String::new();
        let node = Node::start_with(|sandbox, defaults| {
            endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
            let defaults = options(defaults.configuration(sections), variables);
            defaults.argument(&format!("--admin-endpoint={endpoint}"))
        });
        Self { node, admin: Admin::at(&endpoint) }
    }

    /// Ends the driver, and starts it again with these variables.
    #[track_caller]
    fn restart_with(self, variables: &[(&str, &str)]) -> Self {
        let Self { node: Node { driver, kubelet, proxy, sandbox }, admin } = self;
        let mut restarted = driver.kill();
        restarted.environment.retain(|(name, _)| name != "CSI_OCI_FAULT");
        let driver = options(restarted, variables).start();
        Self { node: Node { driver, kubelet, proxy, sandbox }, admin }
    }

    fn volume(&self, reference: &str) -> Volume {
        followed(&self.node.kubelet, reference)
    }

    /// Publishes a volume that follows.
    #[track_caller]
    fn mount(&self, artifact: &Moving) -> Volume {
        let volume = self.volume(&self.node.proxy.reference(&artifact.name()));
        self.node.kubelet.publish_well(&volume);
        volume
    }

    /// Returns what `ls` says of the volume's following.
    #[track_caller]
    fn state(&self) -> Value {
        self.admin.json(&["ls"])["followed"][0].clone()
    }

    /// Waits until the volume says why it keeps its content.
    #[track_caller]
    fn wait_for_reason(&self, text: &str) -> Value {
        wait_until(&format!("the volume says {text:?}"), || {
            self.state()["reason"].as_str().is_some_and(|reason| reason.contains(text))
        });
        self.state()
    }

    /// Unpublishes, and asserts that nothing is left.
    #[track_caller]
    fn end(&self, volume: &Volume) {
        self.node.kubelet.unpublish(volume);
        let state = self.node.driver.state();
        wait_at_most(MAINTENANCE, "nothing of the volume is left", || {
            entries(&state.join("followed")).is_empty()
                && entries(&state.join("staging")).is_empty()
        });
        assert_eq!(mounts_under(self.node.kubelet.directory()), []);
    }
}

fn followed(kubelet: &Kubelet, reference: &str) -> Volume {
    let mut volume = kubelet.new_volume(reference).attribute("follow", OFTEN);
    volume.request.readonly = true;
    volume
}

fn entries(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Returns the label that the volume shows.
fn shown(volume: &Volume) -> String {
    fs::read_to_string(volume.target().join("..data/one")).unwrap_or_default()
}

#[track_caller]
fn wait_until_shown(volume: &Volume, label: &str) {
    wait_until(&format!("the volume shows {label}"), || shown(volume) == label);
}

/// Asserts that all of the volume is of one version, seen from its top and through `..data`.
#[track_caller]
fn assert_shows(volume: &Volume, label: &str) {
    let names: BTreeSet<_> = ["one", "folder", label].map(str::to_owned).into();
    let top = volume.target();
    let own = |name: &String| name.starts_with("..");
    wait_until("the names at the top are those of the version", || {
        entries(top).into_iter().filter(|name| !own(name)).collect::<BTreeSet<_>>() == names
    });
    assert_eq!(entries(&top.join("..data")), names);
    for name in ["one", "folder/two", "folder/inner/three", label] {
        for path in [top.join(name), top.join("..data").join(name)] {
            assert_eq!(fs::read_to_string(&path).expect("a file"), label, "{}", path.display());
        }
    }
    assert!(!entries(top).contains("..data_tmp"));
    volume.assert_mounted();
}

#[test]
fn a_running_pod_sees_what_its_tag_means_now() {
    let port = Port::new();
    let metrics_endpoint = format!("--metrics-endpoint={}", port.address());
    let mut endpoint = String::new();
    let node = Node::start_with(|sandbox, defaults| {
        endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
        options(defaults, &[])
            .argument(&format!("--admin-endpoint={endpoint}"))
            .argument(&metrics_endpoint)
    });
    let node = FollowNode { node, admin: Admin::at(&endpoint) };
    let artifact = Moving::new();
    let first = artifact.push("first");
    let volume = node.mount(&artifact);
    assert_shows(&volume, "first");
    wait_until("it is followed", || node.state()["digest"] == first.as_str());
    // Open files, and what a subPath shows, keep their version.
    let open = fs::File::open(volume.target().join("one")).expect("a file");
    let sub_path = node.node.sandbox.folder("subpath");
    let folder = fs::canonicalize(volume.target().join("folder")).expect("a folder");
    run(std::process::Command::new("mount").arg("--bind").arg(&folder).arg(&sub_path));
    let second = artifact.push("second");
    wait_until_shown(&volume, "second");
    assert_shows(&volume, "second");
    assert_eq!(std::io::read_to_string(&open).expect("the open file"), "first");
    assert_eq!(fs::read_to_string(sub_path.join("two")).expect("a file"), "first");
    assert_eq!(fs::read_to_string(folder.join("two")).expect("an old version"), "first");
    wait_until("the new one is listed", || node.state()["digest"] == second.as_str());
    let state = node.state();
    assert_eq!((&state["reason"], &state["versions"]), (&json!(null), &json!(2)), "{state}");
    let table = node.admin.text(&["ls"]);
    assert!(table.contains("FOLLOWED BY") && table.contains("current"), "{table}");
    let served = metrics(port.address());
    for line in [
        "csi_oci_followed_volumes{state=\"current\"} 1",
        "csi_oci_followed_volumes{state=\"failed\"} 0",
        "csi_oci_follow_switches_total 1",
    ] {
        assert!(served.contains(line), "{line}: {served}");
    }
    // A new pod with IfNotPresent does not begin with the earlier content.
    let (other, _) = node.node.mount(&node.node.proxy.reference(&artifact.name()));
    assert_eq!(other.text("one"), "second");
    node.node.kubelet.unpublish(&other);
    // The part of the old version keeps the volume's folder.
    node.node.kubelet.unpublish(&volume);
    assert_eq!(fs::read_to_string(sub_path.join("two")).expect("a file"), "first");
    run(std::process::Command::new("umount").arg(&sub_path));
}

#[test]
fn old_versions_go_after_their_time_unless_they_are_mounted() {
    let node = FollowNode::start("", &[("CSI_OCI_FOLLOW_KEPT", "1")]);
    let artifact = Moving::new();
    artifact.push("first");
    let volume = node.mount(&artifact);
    let part = node.node.sandbox.folder("subpath");
    let folder = fs::canonicalize(volume.target().join("folder")).expect("a folder");
    run(std::process::Command::new("mount").arg("--bind").arg(&folder).arg(&part));
    for label in ["second", "third"] {
        artifact.push(label);
        wait_until_shown(&volume, label);
    }
    wait_at_most(MAINTENANCE, "the version in between is gone", || node.state()["versions"] == 2);
    node.admin.text(&["gc", "--target", "0"]);
    assert_eq!(fs::read_to_string(part.join("two")).expect("a file"), "first");
    assert_shows(&volume, "third");
    run(std::process::Command::new("umount").arg(&part));
    artifact.push("fourth");
    wait_until_shown(&volume, "fourth");
    wait_at_most(MAINTENANCE, "the old versions are gone", || node.state()["versions"] == 1);
    node.end(&volume);
}

/// Each version has its label in every file and as a name. A reader resolves `..data` once a pass. `FOLLOW_SWITCHES=10000`
/// runs longer.
#[test]
fn switches_tear_nothing_under_readers() {
    /// A pass that takes longer than a version stays may find it gone.
    const KEPT: Duration = Duration::from_secs(1);
    let switches = std::env::var("FOLLOW_SWITCHES").ok().and_then(|text| text.parse().ok());
    let switches: usize = switches.unwrap_or(200);
    let kept = KEPT.as_millis().to_string();
    let node = FollowNode::start("", &[("CSI_OCI_FOLLOW_KEPT", &kept)]);
    let artifact = Moving::new();
    let labels = ["a", "b", "c"];
    let names = ["one", "folder/two", "folder/inner/three"];
    let manifests = labels.map(|label| {
        let manifest = Moving::manifest(label, &names);
        manifest.push_blobs(registry(), &artifact.repository);
        manifest.json()
    });
    let push = |number: usize| {
        put_json(registry(), &artifact.repository, "v1", &manifests[number % labels.len()]);
    };
    push(0);
    let reference = format!("{}/{}", registry().host(), artifact.name());
    let volume = node.volume(&reference).attribute("follow", "1ms");
    node.node.kubelet.publish_well(&volume);
    let (is_over, passes) = (AtomicBool::new(false), AtomicU64::new(0));
    let begun = Instant::now();
    let read_pass = || {
        let begun = Instant::now();
        let data = fs::File::open(volume.target().join("..data")).expect("..data");
        let data = PathBuf::from(format!("/proc/self/fd/{}", data.as_raw_fd()));
        // The descriptor stays open: `data` is a path through it.
        let read = |name: &str| fs::read_to_string(data.join(name));
        let all = (|| -> std::io::Result<()> {
            let label = read("one")?;
            let found = names.iter().map(|name| read(name)).collect::<Result<Vec<_>, _>>()?;
            assert!(found.iter().all(|found| *found == label), "torn: {found:?}");
            assert_eq!(read(&label)?, label, "the name of the version");
            let expected: BTreeSet<_> = ["one", "folder", &label].map(str::to_owned).into();
            assert_eq!(entries(&data), expected, "the names of the version");
            Ok(())
        })();
        match all {
            Ok(()) => passes.fetch_add(1, Ordering::Relaxed),
            Err(error) if begun.elapsed() < KEPT => panic!("a pass of {begun:?}: {error}"),
            Err(_) => 0,
        };
    };
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    read_pass();
                    // A name that all versions have is always there.
                    fs::read(volume.target().join("folder/two")).expect("a name at the top");
                    // The driver needs the processors, too.
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
        }
        let over = OnDrop(&is_over);
        for number in 1..=switches {
            push(number);
            wait_until_shown(&volume, labels[number % labels.len()]);
        }
        drop(over);
    });
    assert!(passes.load(Ordering::Relaxed) > switches as u64 / 10, "{passes:?} passes");
    println!("{switches} switches, {passes:?} passes, {:?}", begun.elapsed());
    assert!(node.state()["versions"].as_u64().expect("a number") <= 100);
    node.end(&volume);
}

/// Ends readers also when the test fails.
struct OnDrop<'a>(&'a AtomicBool);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_process_that_ends_at_any_point_of_a_switch_leaves_one_version_or_the_other() {
    for point in POINTS {
        for action in ["abort", "error:28"] {
            let node = FollowNode::start("", &[]);
            let artifact = Moving::new();
            artifact.push("first");
            let volume = node.mount(&artifact);
            let mut node = node.restart_with(&[("CSI_OCI_FAULT", &format!("{point}:{action}"))]);
            artifact.push("second");
            let is_after = matches!(point, "follow.switched" | "follow.removed");
            if action == "abort" {
                wait_until("the driver ends there", || !node.node.driver.is_running());
            } else if is_after {
                wait_until_shown(&volume, "second");
            } else {
                node.wait_for_reason("free space");
            }
            let label = if is_after { "second" } else { "first" };
            assert_eq!(shown(&volume), label, "{point}");
            for name in ["one", "folder/two", "folder/inner/three", label] {
                assert_eq!(volume.text(name), label, "{point}");
            }
            let node = node.restart_with(&[]);
            wait_until_shown(&volume, "second");
            assert_shows(&volume, "second");
            assert_eq!(node.admin.json(&["verify"])["findings"], json!([]));
            node.end(&volume);
        }
    }
}

#[test]
fn a_first_publish_that_ends_at_any_point_is_repeated() {
    for point in POINTS.into_iter().filter(|point| *point != "follow.removed") {
        for action in ["abort", "error:28"] {
            let fault = format!("{point}:{action}");
            let node = FollowNode::start("", &[("CSI_OCI_FAULT", &fault)]);
            let artifact = Moving::new();
            artifact.push("first");
            let volume = node.volume(&node.node.proxy.reference(&artifact.name()));
            node.node.kubelet.prepare(&volume);
            let _ = node.node.kubelet.publish_request(volume.request.clone());
            let node = node.restart_with(&[]);
            node.node.kubelet.publish_well(&volume);
            assert_shows(&volume, "first");
            node.end(&volume);
        }
    }
}

#[test]
fn a_public_tag_is_followed_after_a_restart_and_a_lost_mount_gets_the_same_content() {
    let node = FollowNode::start("", &[]);
    let artifact = Moving::new();
    artifact.push("first");
    let volume = node.mount(&artifact);
    artifact.push("second");
    wait_until_shown(&volume, "second");
    let node = node.restart_with(&[]);
    artifact.push("third");
    wait_until_shown(&volume, "third");
    assert_shows(&volume, "third");
    // As after a reboot: no mount, no registry, and the record of the publication.
    run(std::process::Command::new("umount").arg(volume.target()));
    node.node.proxy.go_down();
    node.node.kubelet.publish_well(&volume);
    assert_shows(&volume, "third");
    node.wait_for_reason("");
    node.node.proxy.come_back();
    node.end(&volume);
}

fn config(host: &str, user: &str, password: &str) -> String {
    let auth = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    json!({"auths": {host: {"auth": auth}}}).to_string()
}

#[test]
fn a_private_tag_is_followed_again_when_the_kubelet_repeats_its_call() {
    const USER: (&str, &str) = ("someone", "correct-horse-battery");
    let private = private_registry(USER.0, USER.1);
    let proxy = Proxy::new(&private);
    let artifact = Moving::new();
    let push = |label| artifact.push_to(&private.as_user(USER.0, USER.1), label);
    push("first");
    let node = FollowNode::start("", &[]);
    let secret = config(&proxy.host(), USER.0, USER.1);
    let volume = node.volume(&proxy.reference(&artifact.name()));
    let volume = volume.secret(".dockerconfigjson", &secret);
    node.node.kubelet.publish_well(&volume);
    push("second");
    wait_until_shown(&volume, "second");
    let node = node.restart_with(&[]);
    push("third");
    let state = node.wait_for_reason("credentials were lost");
    let reason = state["reason"].as_str().expect("text");
    assert!(reason.contains("follow.enabled") && !reason.contains(USER.1), "{reason}");
    assert_shows(&volume, "second");
    // The kubelet repeats its call, as with requiresRepublish. The call adds no mount and asks no registry.
    node.node.kubelet.publish_well(&volume);
    wait_until_shown(&volume, "third");
    wait_until("it is current", || node.state()["reason"].is_null());
    assert_shows(&volume, "third");
    assert!(!node.node.store_holds(USER.1.as_bytes()));
    node.end(&volume);
}

#[test]
fn a_repeated_call_for_a_mounted_volume_asks_no_registry() {
    let node = FollowNode::start("", &[]);
    let artifact = Moving::new();
    artifact.push("first");
    let volume = node.volume(&node.node.proxy.reference(&artifact.name()));
    let volume = volume.attribute("follow", "1h").attribute("pullPolicy", "Always");
    node.node.kubelet.publish_well(&volume);
    node.node.proxy.take_requests();
    for _ in 0..3 {
        node.node.kubelet.publish_well(&volume);
    }
    assert_eq!(node.node.proxy.take_requests().len(), 0);
    // Another volume at the same target is refused, and nothing changes.
    let other = volume.clone().attribute("follow", "2h");
    let refused = node.node.kubelet.publish_request(other.request).expect_err("another volume");
    assert_eq!(refused.code(), Code::AlreadyExists, "{refused}");
    assert_shows(&volume, "first");
    node.end(&volume);
}

#[test]
fn a_tag_that_moves_to_what_is_refused_leaves_the_volume_as_it_is() {
    let sections = "policy:\n  rules:\n  - maxArtifactBytes: 100k\n";
    let node = FollowNode::start(sections, &[]);
    let artifact = Moving::new();
    let repository = artifact.repository.as_str();
    artifact.push("first");
    let volume = node.mount(&artifact);
    let refused = |text: &str| {
        node.wait_for_reason(text);
        assert_shows(&volume, "first");
        assert_eq!(node.state()["versions"], 1);
    };
    Manifest::artifact([Layer::titled("one", vec![b'x'; 200_000])]).push(
        registry(),
        repository,
        "v1",
    );
    refused("maxArtifactBytes");
    let other = if node_architecture() == "amd64" { "arm64" } else { "amd64" };
    let archive = Tar::new().file("one", 0o644, b"other").finish();
    Image::new().platform("linux", other).layer(archive).push(registry(), repository, "v1");
    refused("platform");
    Manifest::artifact([Layer::titled("..data/one", "mine")]).push(registry(), repository, "v1");
    refused("two dots");
    let last = artifact.push("last");
    wait_until_shown(&volume, "last");
    registry().delete_manifest(repository, &last);
    node.wait_for_reason("has no manifest");
    assert_shows(&volume, "last");
    node.end(&volume);
}

#[test]
fn a_part_of_an_artifact_is_followed() {
    let node = FollowNode::start("", &[]);
    let artifact = Moving::new();
    artifact.push("first");
    let volume = node.volume(&node.node.proxy.reference(&artifact.name()));
    let volume = volume.attribute("subPath", "folder");
    node.node.kubelet.publish_well(&volume);
    let top = volume.target();
    for label in ["first", "second"] {
        artifact.push(label);
        wait_until(&format!("the part is of {label}"), || {
            fs::read_to_string(top.join("..data/two")).is_ok_and(|text| text == label)
        });
        assert_eq!(entries(&top.join("..data")), ["inner", "two"].map(str::to_owned).into());
        assert_eq!(volume.text("inner/three"), label);
    }
    Manifest::artifact([Layer::titled("one", "no part")]).push(
        registry(),
        &artifact.repository,
        "v1",
    );
    node.wait_for_reason("subPath");
    assert_eq!(volume.text("two"), "second");
    node.end(&volume);
}

#[test]
fn an_unsigned_artifact_is_not_switched_to() {
    let keys = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let signer = Cosign::new(keys.path(), "release");
    let lines = format!(
        "policy:\n  keys: [{{name: release, file: \"{}\"}}]\n",
        signer.public_key().display()
    );
    let node = FollowNode::start(&lines, &[]);
    let artifact = Moving::new();
    let sign = |digest: &str| {
        signer.sign(Format::Bundle, registry(), &artifact.repository, digest);
    };
    sign(&artifact.push("first"));
    let volume = node.volume(&node.node.proxy.reference(&artifact.name()));
    let volume = volume.attribute("requireSignature", "true");
    node.node.kubelet.publish_well(&volume);
    let second = artifact.push("second");
    node.wait_for_reason("not signed");
    assert_shows(&volume, "first");
    sign(&second);
    wait_until_shown(&volume, "second");
    assert_shows(&volume, "second");
    node.end(&volume);
}

#[test]
fn a_registry_that_is_down_is_left_alone_and_found_again() {
    // The driver's own pauses.
    let mut node = FollowNode::start("", &[]);
    node.node.driver.options.environment.retain(|(name, _)| name != "CSI_OCI_FOLLOW_PAUSE");
    let artifact = Moving::new();
    artifact.push("first");
    let volume = node.mount(&artifact);
    let Node { driver, kubelet, proxy, sandbox } = node.node;
    let driver = driver.kill().start();
    let node = FollowNode { node: Node { driver, kubelet, proxy, sandbox }, admin: node.admin };
    node.node.proxy.go_down();
    wait_until("it says so", || !node.state()["reason"].is_null());
    let next = node.state()["nextSeconds"].as_u64().expect("a time");
    assert!((2..=600).contains(&next), "it waits {next} s, and not its interval");
    assert_shows(&volume, "first");
    node.node.proxy.come_back();
    artifact.push("second");
    wait_at_most(Duration::from_mins(2), "it is followed again", || shown(&volume) == "second");
    node.end(&volume);
}

#[test]
fn an_unpublish_during_a_switch_ends_it() {
    for point in ["follow.linked", "follow.added"] {
        let node = FollowNode::start("", &[]);
        let artifact = Moving::new();
        artifact.push("first");
        let volume = node.mount(&artifact);
        let go = node.node.sandbox.path().join("go");
        let fault = format!("{point}:pause:{}", go.display());
        let node = node.restart_with(&[("CSI_OCI_FAULT", &fault)]);
        artifact.push("second");
        let told = format!("\"point\":\"{point}\"");
        wait_until("it is at the point", || node.node.driver.log().contains(&told));
        std::thread::scope(|scope| {
            let unpublish = scope.spawn(|| node.node.kubelet.unpublish(&volume));
            if point == "follow.linked" {
                // Linking holds no lock.
                unpublish.join().expect("unpublished meanwhile");
                fs::write(&go, "").expect("written");
            } else {
                fs::write(&go, "").expect("written");
                unpublish.join().expect("unpublished afterwards");
            }
        });
        let state = node.node.driver.state();
        wait_at_most(MAINTENANCE, "nothing is left", || {
            entries(&state.join("followed")).is_empty()
                && entries(&state.join("staging")).is_empty()
        });
        assert_eq!(mounts_at(volume.target()), []);
    }
}

#[test]
fn two_volumes_of_one_tag_share_its_content_and_gc_keeps_it() {
    let node = FollowNode::start(
        "cache: {minimumAge: 0s, minFreePercent: 0, minFreeInodesPercent: 0}\n",
        &[],
    );
    let artifact = Moving::new();
    artifact.push("first");
    let volumes = [node.mount(&artifact), node.mount(&artifact)];
    let before = node.node.proxy.fetches("/blobs/");
    let second = artifact.push("second");
    for volume in &volumes {
        wait_until_shown(volume, "second");
    }
    assert!(node.node.proxy.fetches("/blobs/") - before <= 4, "each blob is fetched once");
    let inode = |volume: &Volume| fs::metadata(volume.target().join("one")).expect("a file").ino();
    assert_eq!(inode(&volumes[0]), inode(&volumes[1]));
    node.admin.text(&["gc", "--target", "0"]);
    let listed = node.admin.json(&["ls"]);
    let digests: Vec<_> = listed["artifacts"].as_array().expect("a list").iter().collect();
    assert!(digests.iter().any(|artifact| artifact["digest"] == second.as_str()), "{listed}");
    for volume in &volumes {
        assert_shows(volume, "second");
    }
    assert_eq!(node.admin.json(&["verify"])["findings"], json!([]));
    for volume in &volumes {
        node.node.kubelet.unpublish(volume);
    }
    wait_at_most(MAINTENANCE, "all of it may go", || {
        node.admin.text(&["gc", "--target", "0"]);
        entries(&node.node.driver.state().join("trees")).is_empty()
    });
}

#[test]
fn what_cannot_be_followed_is_refused() {
    let node = Node::start();
    let artifact = node.small_artifact();
    let reference = node.proxy.reference(&artifact.name);
    let volume = |reference: &str, interval: &str| {
        let mut volume = node.kubelet.new_volume(reference).attribute("follow", interval);
        volume.request.readonly = true;
        volume
    };
    for interval in ["0", "0s", "1s", "9s", "1000h", "soon", "-1m"] {
        let told = node.kubelet.publish_badly(&volume(&reference, interval), Code::InvalidArgument);
        assert!(told.contains("\"follow\""), "{told}");
    }
    let mut writable = volume(&reference, "5m");
    writable.request.readonly = false;
    let told = node.kubelet.publish_badly(&writable, Code::InvalidArgument);
    assert!(told.contains("readOnly: true"), "{told}");
    let never = volume(&reference, "5m").attribute("pullPolicy", "Never");
    assert!(node.kubelet.publish_badly(&never, Code::InvalidArgument).contains("pullPolicy"));
    let digest = format!("{}@{}", artifact.repository, artifact.digest);
    let told = node
        .kubelet
        .publish_badly(&volume(&node.proxy.reference(&digest), "5m"), Code::InvalidArgument);
    assert!(told.contains("needs a tag"), "{told}");
    let mut list = volume(&reference, "5m");
    list.request.volume_context.remove("reference");
    let list = list.attribute("artifacts", &format!("[{{reference: \"{reference}\"}}]"));
    let told = node.kubelet.publish_badly(&list, Code::InvalidArgument);
    assert!(told.contains("\"artifacts\" is a list"), "{told}");
    assert_eq!(node.proxy.requests().len(), 0);
}

#[test]
fn statistics_and_a_lost_record_are_of_the_version_that_is_shown() {
    use csi_driver_oci::proto::csi::v1::NodeGetVolumeStatsRequest;
    let node = FollowNode::start("", &[]);
    let artifact = Moving::new();
    artifact.push("first");
    let volume = node.mount(&artifact);
    artifact.push("a-longer-label");
    wait_until_shown(&volume, "a-longer-label");
    let request = NodeGetVolumeStatsRequest {
        volume_id: volume.request.volume_id.clone(),
        volume_path: volume.request.target_path.clone(),
        ..Default::default()
    };
    let answer =
        node.node.kubelet.node(async |mut client| client.node_get_volume_stats(request).await);
    // Four names of one inode with the label as content.
    let used = answer.expect("statistics").usage[0].used;
    assert_eq!(used, i64::try_from("a-longer-label".len()).expect("small"));
    // Records are hints: the mount and its folder say it all.
    let state = node.node.driver.state().to_owned();
    for record in entries(&state.join("publications")) {
        fs::remove_file(state.join("publications").join(record)).expect("removed");
    }
    let node = node.restart_with(&[]);
    wait_until("the record is there again", || !entries(&state.join("publications")).is_empty());
    node.node.kubelet.publish_well(&volume);
    artifact.push("last");
    wait_until_shown(&volume, "last");
    node.end(&volume);
}

/// The page's example is what a user copies: only its reference is another, and its interval after the publish.
#[test]
fn the_example_of_the_page_is_followed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for page in ["docs/how-to/follow-a-tag.md", "examples/follow-a-tag.yaml"] {
        let text = fs::read_to_string(root.join(page)).expect("the page");
        let text =
            text.split("```").find(|block| block.contains("volumeAttributes:")).expect("yaml");
        let (_, csi) = text.split_once("      csi:\n").expect("a volume");
        let value = |key: &str| {
            let line = csi.lines().find_map(|line| line.trim().strip_prefix(&format!("{key}: ")));
            line.unwrap_or_else(|| panic!("{page}: {key}")).to_owned()
        };
        assert_eq!(value("readOnly"), "true");
        let node = FollowNode::start("", &[]);
        let artifact = Moving::new();
        artifact.push("first");
        let reference = node.node.proxy.reference(&artifact.name());
        let example = node.volume(&reference).attribute("follow", &value("follow"));
        node.node.kubelet.publish_well(&example);
        wait_until("it is followed", || node.state()["intervalSeconds"] == 300);
        node.node.kubelet.unpublish(&example);
        let volume = node.mount(&artifact);
        artifact.push("second");
        wait_until_shown(&volume, "second");
        // The loop of the example: one resolution a pass.
        let (_, command) = text.split_once("while cd -P /").expect("the loop");
        assert!(command.contains("/..data; do"), "{command}");
        let target = volume.target().display();
        let listed = run(std::process::Command::new("sh")
            .arg("-c")
            .arg(format!("cd -P {target}/..data && cat one")));
        assert_eq!(listed, "second");
        node.end(&volume);
    }
}

#[test]
fn the_page_shows_the_table_of_ls() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/how-to/follow-a-tag.md");
    let steps = steps(&fs::read_to_string(page).expect("the page"));
    let [Step { command, expected }] = steps.as_slice() else { panic!("one command") };
    assert_eq!(command, "csi-driver-oci ls");
    let [_, head, current, kept] = expected.as_slice() else { panic!("{expected:?}") };
    let node = FollowNode::start("", &[]);
    let artifact = Moving::new();
    let digest = artifact.push("first");
    let volume = node.mount(&artifact);
    let state = |row: &str| row.split("  ").last().expect("a cell").trim().to_owned();
    let is_listed = |row: &str| {
        let listed = node.admin.text(&["ls"]);
        let mut rows = listed.lines().skip_while(|line| !fits(line, head)).skip(1);
        rows.next().is_some_and(|listed| fits(&state(listed), &state(row)))
    };
    assert!(!is_listed(kept));
    wait_until("it is current", || is_listed(current));
    registry().delete_manifest(&artifact.repository, &digest);
    wait_until("it keeps earlier content", || is_listed(kept));
    node.end(&volume);
}
