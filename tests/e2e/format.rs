//! Tests the format on disk, as `docs/on-disk-format.md` describes it, written by hand and served by the driver.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use prost::Message as _;
use serde_json::{Value, json};
use sha2::Digest as _;
use store::layer_index_proto::{Entry, entry::Kind};
use tonic::Code;

use crate::support::{
    Admin, DriverOptions, Image, Layer, Manifest, Node, OCI_TAR, Sandbox, Tar, hexadecimal_sha256,
    node_architecture,
};

const REPOSITORY: &str = "registry.invalid/team/by-hand";

/// Returns the key of a list of texts, each preceded by its length.
fn key(parts: &[&str]) -> String {
    let parts: Vec<_> = parts.iter().map(|part| format!("{}:{part},", part.len())).collect();
    hexadecimal_sha256(parts.concat().as_bytes())
}

/// A state directory that was written without a driver.
struct HandWrittenState(PathBuf);

impl HandWrittenState {
    fn put(&self, path: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(&path, content).expect("a file");
        path
    }

    /// Writes read-only content; its time is 1970.
    fn content(&self, path: &str, content: &[u8]) -> PathBuf {
        let path = self.put(path, content);
        let file = fs::File::open(&path).expect("a file");
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(7)).expect("a time");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).expect("a mode");
        path
    }

    /// Writes a manifest, the resolution of the tag, and the proof of anonymous access.
    fn manifest(&self, tag: &str, manifest: &Value) -> String {
        let bytes = manifest.to_string();
        let digest = hexadecimal_sha256(bytes.as_bytes());
        self.put(&format!("blobs/{digest}"), bytes);
        let resolution = json!({
            "reference": format!("{REPOSITORY}:{tag}"),
            "resolved": format!("sha256:{digest}"),
            "manifest": format!("sha256:{digest}"),
        });
        let platform = format!("linux/{}", node_architecture());
        let name = key(&[&format!("{REPOSITORY}:{tag}"), &platform]);
        self.put(&format!("resolutions/{name}.json"), resolution.to_string());
        self.access(&format!("m-{digest}-anonymous"));
        digest
    }

    fn access(&self, name: &str) {
        let proof = json!({"unix_seconds": 1_700_000_000});
        self.put(&format!("access/{}/{name}.json", key(&[REPOSITORY])), proof.to_string());
    }

    /// Writes a tree of files, which are linked from an object.
    fn tree(
        &self,
        manifest: &str,
        object: &str,
        compressed: usize,
        files: &[(&Path, &str)],
        folders: usize,
    ) {
        let tree = key(&["tree", "1", manifest, "", "Readable", ""]);
        let mut bytes = 0;
        for (file, shown) in files {
            let path = self.0.join(format!("trees/{tree}/1/root")).join(shown);
            fs::create_dir_all(path.parent().expect("a folder")).expect("the tree");
            fs::hard_link(file, &path).expect("a link");
            bytes += file.metadata().expect("the file").len();
        }
        // The directories that no archive has named have a time of 1970.
        let root = self.0.join(format!("trees/{tree}/1/root"));
        for (_, shown) in files {
            for folder in root.join(shown).ancestors().skip(1) {
                let folder = folder.starts_with(&root).then(|| fs::File::open(folder));
                let Some(folder) = folder else { break };
                let folder = folder.expect("a folder");
                folder.set_modified(SystemTime::UNIX_EPOCH).expect("a time");
            }
        }
        let record = json!({
            "manifest": format!("sha256:{manifest}"),
            "kind": "by hand",
            "bytes": bytes,
            "inodes": folders + files.len(),
            "compressed_bytes": compressed,
            "own_inodes": folders,
            "view": {"permissions": "Readable"},
        });
        self.put(&format!("trees/{tree}/1/tree.json"), record.to_string());
        self.put(&format!("trees/{tree}/1/objects.json"), json!([object]).to_string());
        self.access(&format!("t-{tree}"));
    }
}

/// Writes one artifact of a titled file, and one of an archive.
fn write(state: &Path, format: &str) {
    let state = HandWrittenState(state.to_owned());
    state.put("format", format);
    let text = b"a file by hand\n";
    let artifact = Manifest::artifact([Layer::titled("notes/one.txt", text)]);
    let manifest = state.manifest("file", &artifact.json());
    let object = format!("files/{}/0444-0-0/1", hexadecimal_sha256(text));
    let file = state.content(&object, text);
    state.tree(&manifest, &object, text.len(), &[(&file, "notes/one.txt")], 2);

    let (text, other) = (b"of an archive by hand\n", b"with the newer checksum\n");
    let archive = Tar::new().file("two.txt", 0o444, text).file("three.txt", 0o444, other).finish();
    let image = Image::new().packed_layer(OCI_TAR, archive.clone(), &archive);
    let manifest = state.manifest("archive", &image.manifest().json());
    let blob = hexadecimal_sha256(&archive);
    let layer = key(&["layer", "1", &blob, "image-tar ", "Readable"]);
    let object = format!("layers/{layer}/1");
    let two = state.content(&format!("{object}/data/0/0"), text);
    let three = state.content(&format!("{object}/data/0/1"), other);
    let entry = |name: &str, text: &[u8], data| Entry {
        kind: Kind::File.into(),
        path: name.as_bytes().to_vec(),
        mode: 0o444,
        size: text.len() as u64,
        mtime_seconds: 7,
        data,
        ..Entry::default()
    };
    // The format of version 0.1 at its start, and the current one.
    let entries = [
        Entry { sha256: sha2::Sha256::digest(text).to_vec(), ..entry("two.txt", text, 0) },
        Entry {
            xxh3: twox_hash::XxHash3_128::oneshot(other).to_be_bytes().to_vec(),
            ..entry("three.txt", other, 1)
        },
    ];
    let totals = json!({
        "entries": 2,
        "bytes": text.len() + other.len(),
        "files": 2,
        "blob": format!("sha256:{blob}"),
    });
    let mut index = b"OCI layer index 1\n".to_vec();
    for entry in entries {
        index.extend(entry.encode_length_delimited_to_vec());
    }
    index.push(0);
    index.extend(totals.to_string().into_bytes());
    let checksum = sha2::Sha256::digest(&index);
    index.extend(checksum);
    state.put(&format!("{object}/index"), index);
    state.tree(&manifest, &object, archive.len(), &[(&two, "two.txt"), (&three, "three.txt")], 1);
}

#[test]
fn a_state_directory_that_was_written_by_the_documents_word_is_served() {
    serve("csi-driver-oci 2\n");
}

#[test]
fn one_of_the_format_before_is_served_after_it_was_read_back() {
    serve("csi-driver-oci 1\n");
}

#[track_caller]
fn serve(format: &str) {
    let sandbox = Sandbox::new();
    let endpoint = format!("unix://{}", sandbox.path().join("admin.sock").display());
    let options = DriverOptions::new(&sandbox).argument(&format!("--admin-endpoint={endpoint}"));
    write(&options.state, format);
    let driver = options.start();
    let (kubelet, admin) = (driver.kubelet(), Admin::at(&endpoint));
    // The registry does not respond: the content comes from the store.
    for (tag, name, content) in [
        ("file", "notes/one.txt", "a file by hand\n"),
        ("archive", "two.txt", "of an archive by hand\n"),
        ("archive", "three.txt", "with the newer checksum\n"),
    ] {
        let volume = kubelet.new_volume(&format!("{REPOSITORY}:{tag}"));
        kubelet.publish_well(&volume);
        assert_eq!(volume.text(name), content);
        kubelet.unpublish(&volume);
        assert!(admin.holds(&format!("{REPOSITORY}:{tag}")));
    }
    let verified = admin.json(&["verify"]);
    assert_eq!(verified["findings"], json!([]));
    assert!(verified["objects"].as_u64() >= Some(6), "{verified}");
}

#[test]
fn a_format_of_another_version_stops_publishing_and_never_unpublishing() {
    let node = Node::start();
    let reference = node.proxy.reference(&node.small_artifact().name);
    let [volume, other] = [(); 2].map(|()| node.mount(&reference).0);
    let Node { driver, kubelet, proxy: _proxy, sandbox: _sandbox } = node;
    let options = driver.kill();
    let format = options.state.join("format");
    let ours = fs::read(&format).expect("the format");
    for unknown in [&b"csi-driver-oci 99\n"[..], b"", b"csi-driver-oci 2", b"\xff\xfe"] {
        fs::write(&format, unknown).expect("written");
        let driver = options.start();
        let message = kubelet.publish_badly(&kubelet.new_volume(&reference), Code::Unavailable);
        assert!(message.contains("format"), "{message}");
        // A mounted volume stays, is found again, and its unpublish succeeds.
        kubelet.publish_well(&volume);
        kubelet.unpublish(&kubelet.new_volume(&reference));
        assert_eq!(fs::read(&format).expect("the format"), unknown, "it is left as it is");
        driver.kill();
    }
    fs::write(&format, b"csi-driver-oci 99\n").expect("written");
    let driver = options.start();
    kubelet.unpublish(&other);
    driver.kill();
    fs::write(&format, ours).expect("written");
    let _driver = options.start();
    kubelet.publish_well(&volume);
    kubelet.unpublish(&volume);
    kubelet.publish_well(&kubelet.new_volume(&reference));
}
