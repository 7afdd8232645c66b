//! Tests the tools of the other tests, without the driver.

use std::{
    fs,
    io::ErrorKind,
    net::{TcpListener, TcpStream},
};

use crate::support::{
    FakeRegistry, Image, Layer, Manifest, Oras, Port, Proxy, Sandbox, Tar, Tree,
    enter_network_namespace, mount_with_shifted_owners, mounts_at, private_registry, registry,
    stop_listening, umoci_unpack, unique, wait_until,
};

#[test]
fn oras_pulls_what_was_pushed_by_hand_and_the_proxy_counts_it() {
    let repository = unique("tools");
    let manifest = Manifest::artifact([Layer::titled("a/b", "content")]);
    manifest.push(registry(), &repository, "v1");
    let proxy = Proxy::new(registry());
    let folder = Oras::pull(&proxy.reference(&format!("{repository}:v1")), &[]);
    assert_eq!(fs::read_to_string(folder.path().join("a/b")).expect("the file"), "content");
    assert_eq!(proxy.fetches("/blobs/"), 1);
    assert!(proxy.fetches("/manifests/") <= 1);
}

#[test]
fn umoci_unpacks_what_was_made_by_hand() {
    let repository = unique("tools");
    let image = Image::new()
        .layer(
            Tar::new()
                .folder("d", 0o755)
                .file("d/f", 0o4755, "lower")
                .file("gone", 0o644, "")
                .finish(),
        )
        .layer(
            Tar::new().file(".wh.gone", 0, "").owned_file("d/g", 0o600, (1, 2), "upper").finish(),
        );
    image.push(registry(), &repository, "v1");
    let (rootfs, _folder) = umoci_unpack(&format!("{}/{repository}:v1", registry().host()));
    let tree = Tree::of(&rootfs);
    assert_eq!(tree.names(), ["d", "d/f", "d/g"]);
    assert_eq!(tree.entry("d/g").owner, (1, 2));
}

#[test]
fn a_gate_holds_blobs_until_it_opens_and_a_proxy_can_be_down() {
    let repository = unique("tools");
    let content = crate::support::noise(1 << 20, 1);
    Manifest::artifact([Layer::titled("file", content.clone())]).push(
        registry(),
        &repository,
        "v1",
    );
    let proxy = Proxy::new(registry());
    let gate = proxy.hold_blobs();
    let reference = proxy.reference(&format!("{repository}:v1"));
    std::thread::scope(|scope| {
        let pull = scope.spawn(|| Oras::pull(&reference, &[]));
        wait_until("the blob waits", || gate.waiting() == 1);
        gate.open();
        let folder = pull.join().expect("oras");
        assert_eq!(fs::read(folder.path().join("file")).expect("the file"), content);
    });
    let address = proxy.host();
    proxy.go_down();
    assert!(TcpStream::connect(&address).is_err());
    proxy.come_back();
    assert!(TcpStream::connect(&address).is_ok());
}

#[test]
fn a_held_port_is_given_to_no_other_and_refuses_connections() {
    enter_network_namespace();
    // A range so small that each port is soon tried.
    let range = "/proc/sys/net/ipv4/ip_local_port_range";
    fs::write(range, "40000 40003").expect("a range of the thread's own network");
    let port = Port::new();
    let others: Vec<_> = std::iter::from_fn(|| TcpListener::bind("127.0.0.1:0").ok()).collect();
    let address = |listener: &TcpListener| listener.local_addr().expect("an address");
    assert_eq!(others.len(), 3);
    assert!(others.iter().all(|other| address(other) != port.address()));
    drop(others);
    let assert_refused = || {
        for _ in 0..100 {
            let refused = TcpStream::connect(port.address()).expect_err("nothing listens");
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        }
    };
    assert_refused();
    let server = TcpListener::bind(port.address()).expect("a server listens there");
    TcpStream::connect(port.address()).expect("it listens");
    stop_listening(server);
    assert_refused();
}

#[test]
fn a_private_registry_and_a_fake_one_take_content() {
    let private = private_registry("user", "password");
    let manifest = Manifest::artifact([Layer::titled("file", "content")]);
    manifest.push(&private.as_user("user", "password"), "a/b", "v1");
    let fake = FakeRegistry::new();
    manifest.push(&fake, "hostile", "v1");
    let folder = Oras::pull(&fake.reference("v1"), &[]);
    assert!(folder.path().join("file").exists());
}

#[test]
fn a_sandbox_mounts_filesystems_that_others_do_not_see() {
    let sandbox = Sandbox::new();
    for kind in ["ext4", "xfs", "btrfs"] {
        let path = sandbox.filesystem(kind, kind, "noatime");
        assert_eq!(mounts_at(&path)[0].filesystem, kind);
        let inside = path.to_string_lossy().into_owned();
        let outside = fs::read_to_string("/proc/self/mountinfo").expect("the main thread's mounts");
        assert!(!outside.contains(&inside));
        fs::write(path.join("file"), "x").expect("a file");
        let mapped = sandbox.folder(&format!("{kind}-mapped"));
        mount_with_shifted_owners(&path, &mapped, 1000);
        let owner = std::os::unix::fs::MetadataExt::uid(
            &fs::metadata(mapped.join("file")).expect("metadata"),
        );
        assert_eq!(owner, 1000);
    }
}
