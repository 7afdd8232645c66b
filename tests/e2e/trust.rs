//! Tests `csi-driver-oci trust fetch` against TUF repositories.

use std::{
    fs,
    os::unix::{
        fs::{MetadataExt as _, symlink},
        net::UnixListener,
    },
    path::PathBuf,
    process::{Command, Output},
};

use serde_json::Value;
use tonic::Code;

use crate::support::{
    Answer, AnswerBody, ForwardProxy, Node, PAST, Release, TufKey, TufRepository,
    clean_environment, small_artifact,
};

/// A trust root of a public instance.
pub const TRUST_ROOT: &str = include_str!(concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/crates/sigstore/testdata/rekor2-dsse/trusted_root.json"
));

/// Returns another trust root that can be used.
fn newer(number: u32) -> Vec<u8> {
    TRUST_ROOT.replacen('{', &format!("{{\"number\":{number},"), 1).into_bytes()
}

/// An administrator's folder, and a repository.
struct Administrator {
    folder: tempfile::TempDir,
    repository: TufRepository,
    root: PathBuf,
}

impl Administrator {
    fn new() -> Self {
        let folder = tempfile::tempdir_in("/var/tmp").expect("a folder");
        let repository = TufRepository::start(TRUST_ROOT.as_bytes());
        let root = repository.first_root(folder.path());
        Self { folder, repository, root }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn command(&self, url: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_csi-driver-oci"));
        clean_environment(&mut command);
        command.args(["trust", "fetch", "--url", url, "--root"]).arg(&self.root);
        command.current_dir(self.folder.path());
        command
    }

    fn fetch(&self, arguments: &[&str]) -> Output {
        self.command(&self.repository.url()).args(arguments).output().expect("the binary")
    }

    #[track_caller]
    fn updates(&self) -> Value {
        let output = self.fetch(&["--to", "public.json", "-o", "json"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    /// Expects a refusal that changes nothing.
    #[track_caller]
    fn is_refused(&self, named: &str) {
        let files =
            || ["public.json", "public.json.tuf"].map(|name| fs::read(self.path(name)).ok());
        let before = files();
        let output = self.fetch(&["--to", "public.json"]);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{named}: {error}");
        assert!(error.contains(named) && error.lines().count() == 1, "{named}: {error}");
        assert!(files() == before, "{named}: the files have changed");
    }
}

#[test]
fn a_trust_root_is_fetched_and_updated_through_new_roots() {
    let mut administrator = Administrator::new();
    let report = administrator.updates();
    assert_eq!(report["isNew"], true);
    assert_eq!(report["versions"]["root"], 1);
    assert_eq!(administrator.read("public.json"), TRUST_ROOT.as_bytes());
    // Nodes that watch the file see no change if there is none.
    let inode = || fs::metadata(administrator.path("public.json")).expect("the file").ino();
    let before = inode();
    assert_eq!(administrator.updates()["isNew"], false);
    assert_eq!(inode(), before);

    administrator.repository.rotate();
    administrator.repository.rotate();
    administrator.repository.release(&Release::new(2, &newer(2)));
    let report = administrator.updates();
    assert_eq!((&report["isNew"], &report["versions"]["root"]), (&true.into(), &3.into()));
    assert_eq!(report["versions"]["targets"], 2);
    assert_eq!(administrator.read("public.json"), newer(2));
    let mode = fs::metadata(administrator.path("public.json")).expect("the file").mode();
    assert_eq!(mode & 0o777, 0o644);

    // The roots that were seen are not fetched again.
    let requests = administrator.repository.requested().len();
    administrator.repository.release(&Release { content: &newer(3), ..Release::new(3, b"") });
    administrator.updates();
    let requested = administrator.repository.requested().split_off(requests);
    let root = |path: &&String| path.ends_with(".root.json");
    assert_eq!(requested.iter().filter(root).collect::<Vec<_>>(), ["/4.root.json"]);
    assert_eq!(administrator.read("public.json"), newer(3));

    let output = administrator.fetch(&[]);
    assert!(output.status.success());
    assert_eq!(output.stdout.trim_ascii_end(), newer(3).trim_ascii_end());
    let names = fs::read_dir(administrator.folder.path()).expect("the folder").flatten();
    let mut names: Vec<_> = names.map(|entry| entry.file_name()).collect();
    names.sort();
    assert_eq!(names, ["public.json", "public.json.tuf", "root.json"]);
}

#[test]
fn what_is_older_expired_or_not_signed_is_refused() {
    let mut administrator = Administrator::new();
    let first = administrator.repository.files();
    let second = Release::new(2, TRUST_ROOT.as_bytes());
    administrator.repository.release(&second);
    administrator.updates();

    let good = administrator.repository.files();
    administrator.repository.restore(first);
    administrator.is_refused("rollback detected for timestamp: trusted version 2 > new version 1");
    // The metadata of the last update is what shows that this one is older.
    let output = administrator.fetch(&["--to", "public.json", "--state", "another.tuf"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let (stranger, other) = (TufKey::new(), newer(2));
    for (release, key, named) in [
        (
            Release { snapshot: 1, ..Release::new(3, &other) },
            None,
            "rollback detected for snapshot",
        ),
        (Release { targets: 1, ..Release::new(3, &other) }, None, "rollback detected for targets"),
        (Release { expires: PAST, ..Release::new(3, &other) }, None, "timestamp metadata expired"),
        (
            Release::new(3, &other),
            Some(&stranger),
            "signature threshold not met for role timestamp",
        ),
        (
            Release::new(3, b"{}"),
            None,
            "the trusted_root.json of the TUF repository cannot be used",
        ),
    ] {
        match key {
            Some(key) => administrator.repository.release_by(key, &release),
            None => administrator.repository.release(&release),
        }
        administrator.is_refused(named);
        administrator.repository.restore(good.clone());
    }
    administrator.repository.rotate_without_the_previous_key();
    administrator.is_refused("signature threshold not met for role root");
    administrator.repository.restore(good);
    assert_eq!(administrator.updates()["isNew"], false);
}

#[test]
fn changed_missing_and_endless_files_are_refused() {
    let administrator = Administrator::new();
    administrator.updates();
    let (first, other) = (administrator.repository.files(), newer(2));
    administrator.repository.release(&Release::new(2, &other));
    let good = administrator.repository.files();
    let is_target = |path: &&String| path.starts_with("/targets/") && !first.contains_key(*path);
    let target = good.keys().find(is_target).expect("a target");
    let changed =
        String::from_utf8(other.clone()).expect("text").replacen("\"number\":2", "\"number\":7", 1);
    for (path, answer, named) in [
        (target.as_str(), Answer::bytes(changed), "integrity check failed"),
        (target, Answer::bytes([&other[..], b" "].concat()), "larger than the limit of"),
        (target, Answer::status(404), "not found"),
        ("/2.snapshot.json", Answer::bytes("{}"), "integrity check failed"),
        ("/timestamp.json", Answer::bytes("{}"), "malformed metadata: missing `signed`"),
        ("/timestamp.json", Answer::status(403), "timestamp.json not found"),
        ("/timestamp.json", Answer::status(503), "the status 503"),
        (
            "/timestamp.json",
            Answer::body(AnswerBody::Endless),
            "timestamp.json is larger than the limit of 16384 bytes",
        ),
        (
            "/2.root.json",
            Answer::body(AnswerBody::Endless),
            "2.root.json is larger than the limit of 131072 bytes",
        ),
    ] {
        administrator.repository.serve(path, answer);
        administrator.is_refused(named);
        administrator.repository.restore(good.clone());
    }
    fs::write(administrator.path("public.json.tuf"), "{").expect("written");
    administrator.is_refused("public.json.tuf: the metadata of earlier updates cannot be read");
    fs::remove_file(administrator.path("public.json.tuf")).expect("removed");
    fs::write(administrator.path("root.json"), "{}").expect("written");
    administrator.is_refused("the root.json to start from cannot be used");
}

#[test]
fn a_repository_is_reached_through_the_proxy_of_the_environment() {
    let administrator = Administrator::new();
    let address = administrator.repository.url();
    let address = address.trim_start_matches("http://").parse().expect("an address");
    let proxy = ForwardProxy::start([("tuf.example:80", address)]);
    let mut command = administrator.command("http://tuf.example");
    let output = command.env("HTTP_PROXY", proxy.url()).output().expect("the binary");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.stdout.trim_ascii_end(), TRUST_ROOT.trim_end().as_bytes());
    assert!(proxy.asked().iter().all(|asked| asked.ends_with(" tuf.example:80")));
}

#[test]
fn a_state_of_another_repository_is_refused() {
    let mut administrator = Administrator::new();
    administrator.repository.release(&Release::new(2, TRUST_ROOT.as_bytes()));
    administrator.updates();
    let (url, second) = (administrator.repository.url(), administrator.repository.files());
    let folder = administrator.path("other");
    fs::create_dir(&folder).expect("a folder");
    let other = TufRepository::start(&newer(9));
    let first_root = std::mem::replace(&mut administrator.root, other.first_root(&folder));
    let first = other.files();
    other.release(&Release::new(9, &newer(9)));
    let repository = std::mem::replace(&mut administrator.repository, other);
    administrator
        .is_refused(&format!("public.json.tuf: the metadata of earlier updates is of {url}/"));
    // Another one at the same URL: its keys are others, and the state of before does not verify.
    administrator.repository = repository;
    administrator.repository.restore(first);
    administrator.is_refused("timestamp.json has version 1, but version 2 was seen before");
    administrator.root = first_root;
    administrator.repository.restore(second);
    assert_eq!(administrator.updates()["isNew"], false);
}

#[test]
fn a_damaged_state_lets_nothing_older_pass() {
    let mut administrator = Administrator::new();
    let first = administrator.repository.files();
    administrator.repository.rotate();
    administrator.repository.release(&Release::new(2, TRUST_ROOT.as_bytes()));
    administrator.updates();
    let (second, good) = (administrator.repository.files(), administrator.read("public.json.tuf"));
    let damage = |change: &dyn Fn(&str) -> String| {
        let mut state: Value = serde_json::from_slice(&good).expect("JSON");
        let files = if state["files"].is_object() { &mut state["files"] } else { &mut state };
        for file in files.as_object_mut().expect("files").values_mut() {
            *file = change(file.as_str().expect("a text")).into();
        }
        fs::write(administrator.path("public.json.tuf"), state.to_string()).expect("written");
    };
    damage(&|file| file[..50].to_owned());
    administrator.is_refused("public.json.tuf: the metadata of earlier updates cannot be read");
    damage(&|file| file.replace("\"sig\":\"", "\"sig\":\"00"));
    administrator.repository.restore(first.clone());
    administrator.is_refused("root.json has version 1, but version 2 was seen before");
    let root = "/2.root.json";
    administrator.repository.serve(root, second[root].clone());
    administrator.repository.release(&Release::new(1, &newer(1)));
    administrator.is_refused("timestamp.json has version 1, but version 2 was seen before");
    // New keys may start the versions anew.
    administrator.repository.rotate();
    administrator.repository.release(&Release::new(1, &newer(1)));
    let report = administrator.updates();
    assert_eq!((&report["versions"]["root"], &report["isNew"]), (&3.into(), &true.into()));
}

#[test]
fn links_are_followed() {
    let administrator = Administrator::new();
    fs::create_dir(administrator.path("real")).expect("a folder");
    for link in ["public.json", "public.json.tuf"] {
        symlink(format!("real/{link}"), administrator.path(link)).expect("a link");
    }
    // The links lead to nothing at first, then to files.
    for version in [2, 3] {
        let content = newer(version);
        administrator.repository.release(&Release::new(version.into(), &content));
        administrator.updates();
        for name in ["public.json", "public.json.tuf"] {
            assert!(administrator.path(name).is_symlink(), "{name}");
            assert!(administrator.path("real").join(name).is_file(), "{name}");
        }
        assert_eq!(administrator.read("real/public.json"), content);
    }
}

#[test]
fn what_cannot_be_replaced_leaves_the_state_as_it_is() {
    let administrator = Administrator::new();
    fs::create_dir(administrator.path("folder")).expect("a folder");
    let _socket = UnixListener::bind(administrator.path("socket")).expect("a socket");
    let arguments: [&[&str]; 3] = [
        &["--to", "folder"],
        &["--to", "socket", "--state", "new.tuf"],
        &["--to", "no/file.json", "--state", "new.tuf"],
    ];
    for wrong in arguments {
        let output = administrator.fetch(wrong);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{wrong:?}: {error}");
        assert!(error.contains(&format!("{} cannot be written: ", wrong[1])), "{error}");
        for state in ["folder.tuf", "new.tuf"] {
            assert!(!administrator.path(state).exists(), "{wrong:?}: {state} is written");
        }
    }
}

#[test]
fn wrong_places_are_named() {
    let administrator = Administrator::new();
    let missing = administrator.fetch(&["--to", "no/such/folder.json"]);
    let error = String::from_utf8_lossy(&missing.stderr);
    assert!(error.contains("no/such/folder.json.tuf cannot be written"), "{error}");
    let outside = administrator.fetch(&["--config-map", "team/trust"]);
    let error = String::from_utf8_lossy(&outside.stderr);
    assert!(error.contains("no access to the Kubernetes API"), "{error}");
    for wrong in [&["--config-map", "team"][..], &["--config-map", "a/b", "--to", "c"]] {
        assert_eq!(administrator.fetch(wrong).status.code(), Some(2), "{wrong:?}");
    }
    let wrong = administrator.command("ftp://tuf.example").output().expect("the binary");
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn a_node_reads_the_trust_root_of_a_config_map_when_the_kubelet_brings_it() {
    let lines = "policy:\n  trustRoots: [{name: public, file: \"{sandbox}/trust/trusted_root.json\"}]\n  \
         identities: [{name: ci, issuer: https://issuer.example, subject: ci}]\n  \
         rules: [{signatures: {mode: Enforce, identities: [ci]}}]\n";
    let node = Node::start_configured(|_| {}, lines);
    let reference = node.proxy.reference(&small_artifact().name);
    let volume = node.kubelet.new_volume(&reference);
    let folder = node.sandbox.folder("trust");
    let message = node.kubelet.publish_badly(&volume, Code::Unavailable);
    assert!(message.contains("trusted_root.json"), "{message}");
    // A volume of a ConfigMap: each version is a folder, and one rename shows the next.
    symlink("..data/trusted_root.json", folder.join("trusted_root.json")).expect("a link");
    let bring = |version: &str, content: &str| {
        fs::create_dir(folder.join(version)).expect("a folder");
        fs::write(folder.join(version).join("trusted_root.json"), content).expect("a file");
        symlink(version, folder.join("..next")).expect("a link");
        fs::rename(folder.join("..next"), folder.join("..data")).expect("the rename");
    };
    bring("..1", "{}");
    let message = node.kubelet.publish_badly(&volume, Code::Unavailable);
    assert!(message.contains("is no trust root"), "{message}");
    bring("..2", TRUST_ROOT);
    let message = node.kubelet.publish_badly(&volume, Code::FailedPrecondition);
    assert!(message.contains("not signed"), "{message}");
}
