//! Tests the view of the kubelet's plugin watcher.

use std::{
    fs,
    io::ErrorKind,
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _},
        net::{UnixListener, UnixStream},
    },
};

use csi_driver_oci::proto::{
    csi::v1::ProbeRequest,
    pluginregistration::{InfoRequest, PluginInfo, RegistrationStatus},
};

use crate::support::{Admin, Driver, DriverOptions, Sandbox, accepts, stop_listening, wait_until};

fn plugin_info(driver: &Driver) -> PluginInfo {
    let socket = driver.options.registration_socket();
    let info = driver
        .kubelet()
        .registration(&socket, async |mut client| client.get_info(InfoRequest {}).await);
    info.expect("GetInfo")
}

#[test]
fn the_plugin_watcher_learns_type_name_versions_and_endpoint() {
    let sandbox = Sandbox::new();
    let driver = Driver::start(&sandbox);
    let info = plugin_info(&driver);
    assert_eq!(info.r#type, "CSIPlugin");
    assert_eq!(info.name, "oci.custom.io");
    assert_eq!(info.supported_versions, ["1.0.0"]);
    // The socket's path for the kubelet, not the driver's own view of it.
    let endpoint = driver.options.kubelet.join("plugins/oci.custom.io/csi.sock");
    assert_eq!(info.endpoint, endpoint.to_string_lossy());
}

#[test]
fn the_endpoint_told_to_the_kubelet_can_be_another_path() {
    let sandbox = Sandbox::new();
    let options = DriverOptions::new(&sandbox).argument("--kubelet-endpoint=/elsewhere/csi.sock");
    assert_eq!(plugin_info(&options.start()).endpoint, "/elsewhere/csi.sock");
}

#[test]
fn both_answers_of_the_kubelet_are_taken() {
    let sandbox = Sandbox::new();
    let mut driver = Driver::start(&sandbox);
    let socket = driver.options.registration_socket();
    for status in [
        RegistrationStatus { plugin_registered: false, error: "not now".to_owned() },
        RegistrationStatus { plugin_registered: true, error: String::new() },
    ] {
        let answer = driver.kubelet().registration(&socket, async |mut client| {
            client.notify_registration_status(status).await
        });
        answer.expect("NotifyRegistrationStatus");
    }
    assert!(
        driver.is_running(),
        "a refused registration is retried by the kubelet, so the driver stays"
    );
    plugin_info(&driver);
}

#[test]
fn the_csi_socket_serves_before_the_registration_socket_appears() {
    let sandbox = Sandbox::new();
    let options = DriverOptions::new(&sandbox);
    let driver = options.spawn();
    let socket = options.registration_socket();
    // Once the registration socket is visible, CSI must be served.
    wait_until("the registration socket appears", || socket.exists());
    let probe = driver.kubelet().identity(async |mut client| client.probe(ProbeRequest {}).await);
    assert_ne!(probe.expect("Probe").ready, Some(false));
}

#[test]
fn only_the_owner_may_call_the_sockets() {
    let sandbox = Sandbox::new();
    let driver = Driver::start(&sandbox);
    for socket in [driver.options.registration_socket(), driver.options.socket.clone()] {
        let mode = fs::metadata(&socket).expect("a socket").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", socket.display());
    }
}

#[test]
fn a_socket_refuses_connections_until_it_has_its_mode() {
    let sandbox = Sandbox::new();
    let go = sandbox.path().join("go");
    let fault = format!("socket.bound:pause:{}", go.display());
    let mut driver = DriverOptions::new(&sandbox).environment("CSI_OCI_FAULT", &fault).spawn();
    let folder = driver.options.socket.parent().expect("a folder").to_owned();
    wait_until("the socket is bound", || driver.log().contains("\"point\":\"socket.bound\""));
    let names: Vec<_> = fs::read_dir(folder).expect("a folder").flatten().collect();
    assert_eq!(names.len(), 1, "{names:?}");
    let refused = UnixStream::connect(names[0].path()).expect_err("not open yet");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    fs::write(&go, "").expect("a file");
    driver.wait_until_registered();
}

#[test]
fn nothing_else_lies_beside_the_csi_socket() {
    let sandbox = Sandbox::new();
    let driver = Driver::start(&sandbox);
    let folder = driver.options.socket.parent().expect("a folder");
    let names: Vec<_> = fs::read_dir(folder)
        .expect("a folder")
        .map(|entry| entry.expect("entry").file_name())
        .collect();
    assert_eq!(names, ["csi.sock"]);
}

#[test]
fn sockets_of_a_killed_driver_are_replaced() {
    let sandbox = Sandbox::new();
    let options = Driver::start(&sandbox).kill();
    assert!(options.registration_socket().exists() && options.socket.exists());
    plugin_info(&options.start());
}

#[test]
fn a_foreign_stale_socket_is_replaced() {
    let sandbox = Sandbox::new();
    let options = DriverOptions::new(&sandbox);
    fs::create_dir_all(options.kubelet.join("plugins_registry")).expect("a folder");
    for socket in [options.registration_socket(), options.socket.clone()] {
        stop_listening(UnixListener::bind(socket).expect("a socket"));
    }
    plugin_info(&options.start());
}

#[test]
fn an_orderly_end_removes_the_sockets() {
    let sandbox = Sandbox::new();
    let driver = Driver::start(&sandbox);
    driver.terminate();
    let options = driver.wait();
    assert!(!options.registration_socket().exists() && !options.socket.exists());
}

#[test]
fn an_empty_registration_folder_turns_registration_off() {
    let sandbox = Sandbox::new();
    let options = DriverOptions::new(&sandbox).argument("--registration-dir=");
    let driver = options.spawn();
    wait_until("the CSI socket serves", || accepts(&options.socket));
    let probe = driver.kubelet().identity(async |mut client| client.probe(ProbeRequest {}).await);
    probe.expect("Probe");
    assert!(!options.registration_socket().exists());
}

fn inode(driver: &Driver) -> Option<u64> {
    fs::metadata(&driver.options.socket).map(|metadata| metadata.ino()).ok()
}

#[test]
fn a_process_with_another_state_directory_takes_no_admin_socket_of_a_living_one() {
    let sandbox = Sandbox::new();
    let endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
    let argument = format!("--admin-endpoint={endpoint}");
    let _first = DriverOptions::new(&sandbox).argument(&argument).start();
    let second = DriverOptions::new(&sandbox)
        .in_folder(&sandbox.folder("second"))
        .argument(&argument)
        .argument("--node-id=second")
        .start();
    assert_eq!(Admin::at(&endpoint).json(&["status"])["nodeId"], "test-node");
    assert!(second.log().contains("another process listens there"), "{}", second.log());
    // It serves pods all the same, and leaves the socket in place when it ends.
    plugin_info(&second);
    second.terminate();
    second.wait();
    assert_eq!(Admin::at(&endpoint).json(&["status"])["nodeId"], "test-node");
}

#[test]
fn a_process_with_another_state_directory_waits_for_the_sockets_of_a_living_one() {
    let sandbox = Sandbox::new();
    let first = Driver::start(&sandbox);
    let before = inode(&first);
    let options = DriverOptions::new(&sandbox).state(&sandbox.folder("other"));
    let mut second = options.spawn();
    wait_until("the second process says that it waits", || {
        first.log().contains("waiting for the socket")
    });
    assert_eq!(inode(&first), before, "the second process replaced the socket of the first");
    plugin_info(&first);
    first.terminate();
    first.wait();
    second.wait_until_registered();
    plugin_info(&second);
}

#[test]
fn a_second_process_waits_for_the_first_ones_lock_before_it_touches_a_socket() {
    let sandbox = Sandbox::new();
    let first = Driver::start(&sandbox);
    let before = inode(&first);
    let mut second = first.options.spawn();
    wait_until("the second process says that it waits", || first.log().contains("waiting"));
    assert_eq!(inode(&first), before, "the second process replaced the socket of the first");
    plugin_info(&first);
    first.terminate();
    first.wait();
    second.wait_until_registered();
    plugin_info(&second);
}
