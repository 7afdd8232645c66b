//! Tests an administrator's operations on a node's content: pin, remove, inspect, import, verify, repair, warm.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
};

use nix::sys::signal::Signal;
use serde_json::json;
use tonic::Code;

use crate::support::{
    Admin, Image, Layer, Manifest, Node, OCI_TAR_GZIP, Proxy, Tar, gzip, noise, private_registry,
    registry, run, tool, unique, wait_until,
};

const ROOMY: &str = "cache: {minFreePercent: 0, minFreeInodesPercent: 0, highThresholdPercent: 100, \
                     lowThresholdPercent: 100, minimumAge: 0s}\n";

fn image(node: &Node) -> String {
    let repository = unique("image");
    let archive = Tar::new()
        .folder("etc", 0o755)
        .file("etc/one", 0o644, "one")
        .file("etc/two", 0o600, noise(5000, 1))
        .symbolic_link("etc/link", "one")
        .finish();
    Image::new().packed_layer(OCI_TAR_GZIP, gzip(&archive), &archive).push(
        registry(),
        &repository,
        "v1",
    );
    node.proxy.reference(&format!("{repository}:v1"))
}

fn unpublish(node: &Node, admin: &Admin, volume: &crate::support::Volume) {
    node.kubelet.unpublish(volume);
    wait_until("the record is gone", || admin.json(&["status"])["published"] == 0);
}

#[test]
fn a_removed_reference_goes_at_once_and_mounted_content_with_its_last_unpublish() {
    let (node, admin) = Admin::start(ROOMY);
    let reference = node.proxy.reference(&node.small_artifact().name);
    let (volume, _) = node.mount(&reference);
    let told = admin.text(&["rm", &reference]);
    assert!(told.contains("it goes with the last unpublish"), "{told}");
    let content = fs::read(volume.target().join("file.txt")).expect("still shown");
    assert!(!content.is_empty());
    assert_eq!(admin.json(&["gc"])["victims"], json!([]));
    unpublish(&node, &admin, &volume);
    wait_until("it is gone", || admin.json(&["status"])["cacheObjects"] == 0);
    let told = admin.refused(&["rm", &reference]);
    assert!(told.contains("not on this node"), "{told}");
}

#[test]
fn publishing_again_what_was_removed_while_shown_keeps_it() {
    let (node, admin) = Admin::start(ROOMY);
    let reference = node.proxy.reference(&node.small_artifact().name);
    let (first, _) = node.mount(&reference);
    admin.text(&["rm", &reference]);
    let (second, _) = node.mount(&reference);
    node.kubelet.unpublish(&first);
    unpublish(&node, &admin, &second);
    admin.json(&["gc"]);
    assert!(admin.holds(&reference));
}

#[test]
fn pins_hold_and_have_owners() {
    let (node, admin) = Admin::start(ROOMY);
    let artifact = node.small_artifact();
    let reference = node.proxy.reference(&artifact.name);
    assert!(admin.refused(&["pin", &reference]).contains("warm it first"));
    let (volume, _) = node.mount(&reference);
    unpublish(&node, &admin, &volume);
    assert_eq!(admin.json(&["pin", &reference])[0]["digest"], artifact.digest.as_str());
    assert_eq!(admin.json(&["ls"])["artifacts"][0]["pins"], json!(["admin"]));
    assert!(admin.refused(&["rm", &reference]).contains("pinned by admin"));
    admin.text(&["gc", "--target", "0"]);
    assert!(admin.holds(&reference), "pins outlive collections");
    let Node { driver, kubelet, .. } = node;
    let _driver = driver.restart();
    admin.text(&["gc", "--target", "0"]);
    assert!(admin.holds(&reference), "... and the driver");
    admin.text(&["unpin", &reference]);
    assert!(admin.refused(&["unpin", &reference]).contains("is not pinned"));
    let dry = admin.json(&["gc", "--target", "0", "--dry-run"]);
    assert_eq!(dry["victims"][0]["reason"], "least recently used");
    assert!(admin.holds(&reference), "a dry run removes nothing");
    admin.text(&["gc", "--target", "0"]);
    assert!(!admin.holds(&reference));
    drop(kubelet);
}

#[test]
fn several_references_are_pinned_unpinned_and_removed_at_once() {
    let (node, admin) = Admin::start(ROOMY);
    let [one, two] = [(); 2].map(|()| node.proxy.reference(&node.small_artifact().name));
    let missing = node.proxy.reference("there/is/none:v1");
    admin.text(&["warm", "-q", &one, &two]);
    let told = admin.ask(&["pin", "-o", "yaml", &one, &missing, &two]);
    assert_eq!(told.status.code(), Some(1));
    let (out, err) = (String::from_utf8_lossy(&told.stdout), String::from_utf8_lossy(&told.stderr));
    assert!(out.starts_with("- ") && out.contains(&one) && out.contains(&two), "{out}");
    assert!(err.contains(&missing) && err.lines().count() == 1, "{err}");
    let mut names = [one.as_str(), two.as_str()];
    names.sort_unstable();
    assert_eq!(admin.text(&["ls", "-q"]).lines().collect::<Vec<_>>(), names);
    assert_eq!(admin.json(&["unpin", &one, &two])[1]["reference"], two.as_str());
    let removed = admin.json(&["rm", &one, &two]);
    assert_eq!((&removed[0]["reference"], &removed[1]["keptBy"]), (&json!(one), &json!([])));
    assert_eq!(admin.json(&["ls"])["artifacts"], json!([]));
}

#[test]
fn a_dry_run_tells_what_is_too_young_to_be_evicted() {
    let (node, admin) = Admin::start(&ROOMY.replace("minimumAge: 0s", "minimumAge: 1h"));
    let reference = node.proxy.reference(&node.small_artifact().name);
    let (volume, _) = node.mount(&reference);
    let dry = ["gc", "--dry-run", "--target", "0"];
    assert_eq!(admin.json(&dry)["youngBytes"], 0, "what is mounted stays anyway");
    unpublish(&node, &admin, &volume);
    let collected = admin.json(&dry);
    assert!(collected["youngBytes"].as_u64() > Some(0), "{collected}");
    assert_eq!((&collected["dryRun"], &collected["victims"]), (&json!(true), &json!([])));
    let told = admin.text(&dry);
    assert!(told.contains("stay only because they are younger than cache.minimumAge"), "{told}");
}

#[test]
fn more_than_may_be_pinned_is_refused() {
    let configuration = ROOMY.replace("minimumAge", "maxPinnedBytes: 1Mi, minimumAge");
    let (node, admin) = Admin::start(&configuration);
    let repository = unique("large");
    Manifest::artifact([Layer::titled("file", noise(2 << 20, 3))]).push(
        registry(),
        &repository,
        "v1",
    );
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    node.mount(&reference);
    let told = admin.refused(&["pin", &reference]);
    assert!(told.contains("cache.maxPinnedBytes"), "{told}");
}

#[test]
fn inspect_tells_what_a_reference_means() {
    let (node, admin) = Admin::start(ROOMY);
    let reference = image(&node);
    let (_volume, _) = node.mount_with(&reference, |volume| volume.attribute("include", "etc/o*"));
    let inspected = admin.json(&["inspect", &reference]);
    assert_eq!(inspected["resolutions"][0]["layers"][0]["mediaType"], OCI_TAR_GZIP);
    assert_eq!(inspected["artifacts"][0]["include"], "etc/o*");
    assert!(admin.text(&["inspect", &reference]).contains("include=etc/o*"));
    assert!(admin.refused(&["inspect", "r.io/none:v1"]).contains("not on this node"));
}

#[test]
fn warm_fetches_pins_and_names_what_failed() {
    let (node, admin) = Admin::start(ROOMY);
    let good = node.proxy.reference(&node.small_artifact().name);
    let bad = node.proxy.reference("there/is/none:v1");
    let list = node.sandbox.path().join("list");
    fs::write(&list, format!("# two\n{good}\n\n{bad} # missing\n")).expect("a list");
    let told = admin.ask(&["warm", "--pin", "--file", list.to_str().expect("a path")]);
    let (out, err) = (
        String::from_utf8(told.stdout).expect("text"),
        String::from_utf8(told.stderr).expect("text"),
    );
    assert_eq!(told.status.code(), Some(1));
    assert!(out.contains(&format!("done    {good}")), "{out}");
    assert!(out.contains(&format!("failed  {bad}")), "{out}");
    assert!(err.contains("1 of 2") && err.contains(&bad), "{err}");
    assert_eq!(admin.json(&["ls"])["artifacts"][0]["pins"], json!(["admin"]));
    node.proxy.take_requests();
    node.mount(&good);
    assert_eq!(node.proxy.requests().len(), 0, "a warm node asks no registry");
    // An invalid line is reported, and the others are fetched.
    let other = node.proxy.reference(&node.small_artifact().name);
    fs::write(&list, format!("{other}\nnot a reference\n")).expect("a list");
    let told = admin.refused(&["warm", "--file", list.to_str().expect("a path")]);
    assert!(told.contains("line 2"), "{told}");
    node.proxy.take_requests();
    node.mount(&other);
    assert_eq!(node.proxy.requests().len(), 0, "it was warmed");
}

/// Puts a large artifact whose download stops half way until its gate opens.
fn held_back(node: &Node) -> (String, std::sync::Arc<crate::support::Gate>) {
    let repository = unique("held");
    let content = noise(8 << 20, 9);
    Manifest::artifact([Layer::titled("big", content)]).push(registry(), &repository, "v1");
    (node.proxy.reference(&format!("{repository}:v1")), node.proxy.hold_blobs())
}

#[test]
fn warming_continues_after_its_client_disconnects() {
    for signal in [Signal::SIGINT, Signal::SIGHUP, Signal::SIGTERM] {
        let (node, admin) = Admin::start(ROOMY);
        let (reference, gate) = held_back(&node);
        let mut command = admin.command(&["warm", &reference]);
        let child = command.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it");
        wait_until("the pull is under way", || gate.waiting() > 0);
        let process = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("an id"));
        nix::sys::signal::kill(process, signal).expect("a signal");
        let output = child.wait_with_output().expect("its end");
        let told = String::from_utf8(output.stderr).expect("text");
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.ends_with("the node goes on; `ls` tells what it has\n"), "{told}");
        assert_eq!(told.lines().count(), 1, "{told}");
        gate.open();
        wait_until("the node has it", || admin.holds(&reference));
    }
}

#[test]
fn a_terminal_that_vanishes_leaves_the_node_at_work() {
    let (node, admin) = Admin::start(ROOMY);
    let (reference, gate) = held_back(&node);
    // `script` is the terminal: when it is killed, the terminal goes.
    let command = admin.command(&["warm", &reference]);
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let line = words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let log = node.sandbox.path().join("terminal");
    let mut terminal = tool("script")
        .args(["--quiet", "--flush", "--command", &line])
        .arg(&log)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("script");
    wait_until("a bar shows half of it", || {
        let shown = fs::read(&log).unwrap_or_default();
        String::from_utf8_lossy(&shown).contains("4.00 MiB/8.00 MiB")
    });
    terminal.kill().expect("killed");
    terminal.wait().expect("its end");
    gate.open();
    wait_until("the node has it", || admin.holds(&reference));
}

/// Creates an OCI image layout of a reference in the registry.
fn layout(node: &Node, reference: &str) -> PathBuf {
    let folder = node.sandbox.path().join("layout");
    let name = reference.split_once('/').expect("a host").1;
    run(tool("oras")
        .args(["copy", "--from-plain-http", "--to-oci-layout"])
        .arg(format!("{}/{name}", registry().host()))
        .arg(format!("{}:v1", folder.display())));
    folder
}

#[test]
fn a_layout_is_imported_without_a_registry() {
    let (node, admin) = Admin::start(ROOMY);
    let reference = image(&node);
    let folder = layout(&node, &reference);
    let name = "registry.invalid/team/app:v1";
    let imported = admin.json(&["import", folder.to_str().expect("a path"), "--as", name]);
    assert_eq!(imported["inodes"], 5);
    let (_, tree) = node.mount_with(name, |volume| volume.attribute("pullPolicy", "Never"));
    assert_eq!(tree.names(), ["etc", "etc/link", "etc/one", "etc/two"]);
    // Also for pods with credentials of their own, like a preloaded image.
    node.mount_with(name, |volume| {
        let config = json!({"auths": {"registry.invalid": {"username": "u", "password": "p"}}});
        volume.secret(".dockerconfigjson", &config.to_string())
    });
    assert_eq!(node.proxy.requests().len(), 0);
}

#[test]
fn imported_content_is_open_to_whom_the_policy_says() {
    let name = "registry.invalid/team/app:v1";
    for (policy, listed, opens) in [
        ("NeverVerify", "", true),
        ("NeverVerifyPreloadedImages", "", true),
        ("NeverVerifyAllowlistedImages", "registry.invalid/team/*", true),
        ("NeverVerifyAllowlistedImages", "registry.invalid/other/*", false),
        ("AlwaysVerify", "", false),
    ] {
        let list = if listed.is_empty() { String::new() } else { format!("\"{listed}\"") };
        let configuration = format!(
            "{ROOMY}registries:\n  credentialsVerification: {policy}\n  \
             preloadedImagesVerificationAllowlist: [{list}]\n"
        );
        let (node, admin) = Admin::start(&configuration);
        let folder = layout(&node, &image(&node));
        admin.text(&["import", folder.to_str().expect("a path"), "--as", name]);
        let volume = node.kubelet.new_volume(name).attribute("pullPolicy", "Never");
        if opens {
            node.kubelet.publish_well(&volume);
        } else {
            node.kubelet.publish_badly(&volume, Code::NotFound);
        }
    }
}

#[test]
fn what_was_warmed_is_open_to_the_credentials_that_warmed_it() {
    let (node, admin) = Admin::start(ROOMY);
    let private = private_registry("someone", "the-password");
    let repository = unique("private");
    Manifest::artifact([Layer::titled("file", "x")]).push(
        &private.as_user("someone", "the-password"),
        &repository,
        "v1",
    );
    let proxy = Proxy::new(&private);
    let reference = proxy.reference(&format!("{repository}:v1"));
    let config = node.sandbox.path().join("config.json");
    let auths =
        json!({"auths": {proxy.host(): {"username": "someone", "password": "the-password"}}});
    fs::write(&config, auths.to_string()).expect("written");
    let refused = admin.ask(&["warm", &reference]);
    assert_eq!(refused.status.code(), Some(1), "content without access is not warmed");
    admin.text(&["warm", &reference, "--docker-config", config.to_str().expect("a path")]);
    proxy.go_down();
    let with = |password: &str| {
        let volume = node.kubelet.new_volume(&reference);
        volume.secret("username", "someone").secret("password", password)
    };
    node.kubelet.publish_well(&with("the-password"));
    for stranger in [with("another"), node.kubelet.new_volume(&reference)] {
        node.kubelet.publish_badly(&stranger, Code::Unavailable);
        let never = stranger.attribute("pullPolicy", "Never");
        node.kubelet.publish_badly(&never, Code::NotFound);
    }
}

#[test]
fn a_tar_of_a_layout_is_imported_from_a_file_and_from_standard_input() {
    let (node, admin) = Admin::start(ROOMY);
    let reference = image(&node);
    let folder = layout(&node, &reference);
    let archive = node.sandbox.path().join("layout.tar");
    run(tool("tar").arg("-cf").arg(&archive).arg("-C").arg(&folder).arg("."));
    admin.text(&["import", archive.to_str().expect("a path"), "--as", "one.invalid/app:v1"]);
    let mut command = admin.command(&["import", "-", "--as", "two.invalid/app:v1"]);
    command.stdin(Stdio::from(fs::File::open(&archive).expect("the tar")));
    run(&mut command);
    let packed = node.sandbox.path().join("layout.tar.gz");
    fs::write(&packed, gzip(&fs::read(&archive).expect("the tar"))).expect("written");
    admin.text(&["import", packed.to_str().expect("a path"), "--as", "three.invalid/app:v1"]);
    let of_skopeo = node.sandbox.path().join("skopeo.tar");
    run(tool("skopeo")
        .args(["--insecure-policy", "--tmpdir", "/var/tmp", "copy", "--quiet"])
        .args(["--src-tls-verify=false", &format!("docker://{reference}")])
        .arg(format!("oci-archive:{}", of_skopeo.display())));
    admin.text(&["import", of_skopeo.to_str().expect("a path"), "--as", "four.invalid/app:v1"]);
    for name in ["one", "two", "three", "four"].map(|host| format!("{host}.invalid/app:v1")) {
        node.mount_with(&name, |volume| volume.attribute("pullPolicy", "Never"));
    }
}

#[test]
fn archives_of_docker_are_named_and_no_file_is_quoted() {
    let (node, admin) = Admin::start(ROOMY);
    let import = |content: &[u8]| {
        let archive = node.sandbox.path().join("archive.tar");
        fs::write(&archive, content).expect("written");
        let told = admin.refused(&[
            "import",
            archive.to_str().expect("a path"),
            "--as",
            "bad.invalid/a:v1",
        ]);
        assert!(!told.contains("secret"), "{told}");
        told
    };
    // The format of `docker save` before it wrote layouts, plain and compressed.
    let docker = Tar::new()
        .file("0123.json", 0o644, "{}")
        .file("4567/layer.tar", 0o644, "layer")
        .file("manifest.json", 0o644, r#"[{"Config":"0123.json","Layers":["4567/layer.tar"]}]"#)
        .finish();
    let of_skopeo = node.sandbox.path().join("docker.tar");
    let source = image(&node);
    run(tool("skopeo")
        .args(["--insecure-policy", "--tmpdir", "/var/tmp", "copy", "--quiet"])
        .args(["--src-tls-verify=false", &format!("docker://{source}")])
        .arg(format!("docker-archive:{}:secret:v1", of_skopeo.display())));
    let of_skopeo = fs::read(&of_skopeo).expect("skopeo's archive");
    for archive in [gzip(&docker), docker, gzip(&of_skopeo), of_skopeo] {
        let told = import(&archive);
        assert!(told.contains("docker save") && told.contains("docker-archive:"), "{told}");
    }
    let index = |text: &str| Tar::new().file("index.json", 0o644, text).finish();
    for text in ["secret", r#"{"secret": 1, "mediaType": "secret"}"#, r#"{"manifests": "secret"}"#]
    {
        import(&index(text));
    }
    import(b"secret words that are no archive");
}

#[test]
fn a_layout_whose_names_would_fill_the_memory_is_refused() {
    let (node, admin) = Admin::start(ROOMY);
    let folder = layout(&node, &image(&node));
    let whole = node.sandbox.path().join("layout.tar");
    run(tool("tar").arg("-cf").arg(&whole).arg("-C").arg(&folder).arg("."));
    let whole = fs::read(&whole).expect("the tar");
    let long = "n".repeat(2 << 20);
    for first in [Tar::new().file(&long, 0o644, ""), Tar::new().pax(&[("path", &long)])] {
        let hostile = node.sandbox.path().join("hostile.tar");
        fs::write(&hostile, [first.unfinished(), whole.clone()].concat()).expect("written");
        let hostile = hostile.to_str().expect("a path");
        let told = admin.refused(&["import", hostile, "--as", "bad.invalid/app:v1"]);
        assert!(told.contains("limits.headerBytes"), "{told}");
        assert!(!admin.holds("bad.invalid/app:v1"));
    }
    let staging = node.driver.state().join("staging");
    assert_eq!(fs::read_dir(staging).expect("a folder").count(), 0);
}

#[test]
fn an_import_that_fails_leaves_the_reference_what_it_was() {
    let (node, admin) = Admin::start(ROOMY);
    let name = "registry.invalid/team/app:v1";
    let import =
        |folder: &Path| admin.ask(&["import", folder.to_str().expect("a path"), "--as", name]);
    let first = layout(&node, &image(&node));
    assert!(import(&first).status.success());
    fs::rename(&first, node.sandbox.path().join("first")).expect("renamed");
    let archive = Tar::new().file("../outside", 0o644, "x").finish();
    let repository = unique("bad");
    let bad = Image::new().packed_layer(OCI_TAR_GZIP, gzip(&archive), &archive);
    bad.push(registry(), &repository, "v1");
    let second = layout(&node, &node.proxy.reference(&format!("{repository}:v1")));
    assert!(!import(&second).status.success(), "it leaves its folder");
    let (_, tree) = node.mount_with(name, |volume| volume.attribute("pullPolicy", "Never"));
    assert_eq!(tree.names(), ["etc", "etc/link", "etc/one", "etc/two"]);
}

#[test]
fn an_import_makes_room_and_not_out_of_itself() {
    let configuration = ROOMY.replace("minimumAge", "maxBytes: 25Mi, minimumAge");
    let (node, admin) = Admin::start(&configuration);
    let repository = unique("old");
    let old = Manifest::artifact([Layer::titled("file", noise(12 << 20, 8))]);
    old.push(registry(), &repository, "v1");
    let old = node.proxy.reference(&format!("{repository}:v1"));
    let (volume, _) = node.mount(&old);
    unpublish(&node, &admin, &volume);
    // Its blob fits beside the old artifact; its possible unpacked size does not.
    let (archive, repository) =
        (Tar::new().file("one", 0o644, noise(5 << 20, 9)).finish(), unique("new"));
    Image::new().packed_layer(OCI_TAR_GZIP, gzip(&archive), &archive).push(
        registry(),
        &repository,
        "v1",
    );
    let folder = layout(&node, &node.proxy.reference(&format!("{repository}:v1")));
    let name = "registry.invalid/team/app:v1";
    admin.text(&["import", folder.to_str().expect("a path"), "--as", name]);
    assert!(admin.holds(name) && !admin.holds(&old), "unused content is evicted for it");
}

#[test]
fn a_bad_layout_is_refused_and_leaves_nothing() {
    let (node, admin) = Admin::start(ROOMY);
    let reference = image(&node);
    let folder = layout(&node, &reference);
    let import = |folder: &Path| {
        admin.refused(&["import", folder.to_str().expect("a path"), "--as", "bad.invalid/app:v1"])
    };
    assert!(import(Path::new("/nonexistent")).contains("cannot be read"));
    let told = import(&node.sandbox.folder("empty"));
    assert!(told.contains("is no OCI image layout: it has no oci-layout"), "{told}");
    let picture = node.sandbox.path().join("picture.png");
    fs::write(&picture, noise(5000, 4)).expect("a file");
    assert!(import(&picture).contains("send a tar of an OCI image layout"));
    // Standard input may contain anything.
    let mut command = admin.command(&["import", "-", "--as", "bad.invalid/app:v1"]);
    let output = command.stdin(Stdio::null()).output().expect("the binary");
    assert!(String::from_utf8_lossy(&output.stderr).contains("no index.json"));
    let other = "sha256:".to_owned() + &"0".repeat(64);
    let path = folder.to_str().expect("a path");
    let told = admin.refused(&["import", path, "--as", &format!("bad.invalid/app@{other}")]);
    assert!(told.contains(&other), "{told}");
    // Every blob is identified by its digest.
    let blobs = folder.join("blobs/sha256");
    let largest = fs::read_dir(&blobs)
        .expect("blobs")
        .flatten()
        .max_by_key(|entry| entry.metadata().expect("a size").len())
        .expect("a blob")
        .path();
    let content = fs::read(&largest).expect("a blob");
    fs::set_permissions(&largest, fs::Permissions::from_mode(0o644)).expect("a mode");
    fs::write(&largest, [&content[..content.len() - 1], b"x"].concat()).expect("another blob");
    let told = import(&folder);
    assert!(told.contains("its content has the digest"), "{told}");
    assert!(told.contains("make the archive again") && !told.contains("fetched"), "{told}");
    fs::remove_file(&largest).expect("removed");
    let told = import(&folder);
    assert!(told.contains("lacks the blob") || told.contains("no index.json"), "{told}");
    assert!(!admin.holds("bad.invalid/app:v1"));
    assert_eq!(fs::read_dir(node.driver.state().join("staging")).expect("staging").count(), 0);
    let volume = node.kubelet.new_volume("bad.invalid/app:v1").attribute("pullPolicy", "Never");
    node.kubelet.publish_badly(&volume, Code::NotFound);
}

/// Returns the first file of the store with this content.
fn find(folder: &Path, content: &[u8]) -> Option<PathBuf> {
    for entry in fs::read_dir(folder).ok()?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if let Some(found) = find(&path, content) {
                return Some(found);
            }
        } else if path.is_file() && fs::read(&path).ok()? == content {
            return Some(path);
        }
    }
    None
}

/// Changes content as a bad disk does: without a trace in times or sizes.
fn flip(path: &Path) {
    let metadata = fs::metadata(path).expect("a file");
    let mut content = fs::read(path).expect("a file");
    let middle = content.len() / 2;
    content[middle] ^= 1;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).expect("a mode");
    let mut file = fs::File::options().write(true).open(path).expect("writable");
    file.write_all(&content).expect("written");
    file.set_modified(metadata.modified().expect("a time")).expect("a time set");
    drop(file);
    fs::set_permissions(path, metadata.permissions()).expect("the mode");
}

#[test]
fn a_single_flipped_byte_in_a_layer_is_found_and_repaired() {
    let (node, admin) = Admin::start(ROOMY);
    let reference = image(&node);
    let (mounted, _) = node.mount(&reference);
    assert_eq!(admin.json(&["verify"])["findings"], json!([]));
    let path = find(&node.driver.state().join("layers"), &noise(5000, 1)).expect("the file");
    flip(&path);
    let told = admin.ask(&["verify", "--output", "json"]);
    assert_eq!(told.status.code(), Some(1));
    let found: serde_json::Value = serde_json::from_slice(&told.stdout).expect("JSON");
    let finding = &found["findings"][0];
    assert_eq!(finding["kind"], "layer");
    assert!(finding["detail"].as_str().expect("text").starts_with("etc/two"), "{finding}");
    assert!(path.ends_with(finding["path"].as_str().expect("text")), "{finding}");
    assert!(finding["digest"].as_str().expect("text").starts_with("sha256:"), "{finding}");
    // Damage is never published again: the registry is needed, and it is down.
    node.proxy.go_down();
    let volume = node.kubelet.new_volume(&reference);
    node.kubelet.publish_badly(&volume, Code::Unavailable);
    node.proxy.come_back();
    node.kubelet.publish_well(&volume);
    assert_eq!(fs::read(volume.target().join("etc/two")).expect("readable"), noise(5000, 1));
    let read = fs::read(mounted.target().join("etc/two")).expect("still mounted");
    assert_ne!(read, noise(5000, 1), "a mounted generation is left alone");
    assert_eq!(admin.json(&["verify"])["findings"], json!([]));
    node.kubelet.unpublish(&mounted);
    wait_until("the damaged generation goes with its last unpublish", || {
        let list = admin.json(&["ls"]);
        list["artifacts"]
            .as_array()
            .expect("a list")
            .iter()
            .all(|artifact| artifact["damaged"] == false)
    });
}

#[test]
fn repair_makes_a_new_generation_while_mounted_ones_stay() {
    let (node, admin) = Admin::start(ROOMY);
    let artifact = node.small_artifact();
    let reference = node.proxy.reference(&artifact.name);
    let (mounted, _) = node.mount(&reference);
    let files = node.driver.state().join("files");
    flip(&find(&files, artifact.content.as_bytes()).expect("the file"));
    let repaired = admin.json(&["verify", "--repair"]);
    assert_eq!(repaired["findings"][0]["kind"], "file");
    assert_eq!(repaired["repairs"][0]["done"], true);
    assert_eq!(repaired["unrepaired"], 0);
    mounted.assert_mounted();
    node.proxy.go_down();
    let (volume, _) = node.mount(&reference);
    let content = fs::read_to_string(volume.target().join("file.txt")).expect("readable");
    assert_eq!(content, artifact.content);
}

#[test]
fn verify_finds_a_changed_tree() {
    let (node, admin) = Admin::start(ROOMY);
    let (_volume, _) = node.mount(&image(&node));
    let trees = node.driver.state().join("trees");
    let root = fs::read_dir(trees).expect("trees").flatten().next().expect("a tree").path();
    let root = root.join("1/root");
    fs::write(root.join("strange"), "").expect("a file");
    fs::set_permissions(root.join("etc"), fs::Permissions::from_mode(0o700)).expect("a mode");
    fs::remove_file(root.join("etc/link")).expect("removed");
    let told = admin.ask(&["verify", "--output", "json"]);
    let found: serde_json::Value = serde_json::from_slice(&told.stdout).expect("JSON");
    let mut paths: Vec<_> = found["findings"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|finding| {
            assert_eq!(finding["kind"], "tree");
            let path = finding["path"].as_str().expect("text");
            path.split_once("/root").expect("in the tree").1.to_owned()
        })
        .collect();
    paths.sort();
    paths.dedup();
    // Directories have a time of their own, which adding and removing names change.
    assert_eq!(paths, ["", "/etc", "/etc/link", "/strange"]);
}

#[test]
fn a_damaged_manifest_is_found_and_fetched_again() {
    let (node, admin) = Admin::start(ROOMY);
    let artifact = node.small_artifact();
    let reference = node.proxy.reference(&artifact.name);
    node.mount(&reference);
    let digest = artifact.digest.strip_prefix("sha256:").expect("a digest");
    flip(&node.driver.state().join("blobs").join(digest));
    let told = admin.ask(&["verify", "--output", "json"]);
    let found: serde_json::Value = serde_json::from_slice(&told.stdout).expect("JSON");
    assert_eq!(found["findings"][0]["kind"], "blob");
    node.mount(&reference);
}
