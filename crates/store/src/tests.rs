use std::collections::HashSet;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;

use super::access::access_proofs::Principal;
use super::access::{ProofSource, RepositorySources};
use super::content_verification::{FindingKind, ReadPace, Reader};
use super::gc::Now;
use super::partial_downloads::Purpose;
use super::resolution_records::Resolution;
use super::single_files::{StoredFile, starts_executable};
use super::trees::{Objects, TreeRecord, View};
use super::*;
use oci_types::{Digest, Platform, Reference};
use unpack::archive_entry::Metadata;
use unpack::layer_merge::{Merger, TreePlan};
use unpack::layer_rule::{ArchiveRule, FileRule};
use unpack::{Entry, EntryKind, Limits, Permissions, RelativePath, Selection};

/// The disk of the tests' machine may be full.
fn without_floor() -> CacheOptions {
    CacheOptions { min_free_percent: 0, min_free_inodes_percent: 0, ..CacheOptions::default() }
}

/// Returns the sources of a reference's repository, with the mirrors that are configured.
fn sources(
    reference: &Reference,
    mirrors: Option<&[&std::sync::Arc<str>]>,
    is_private: bool,
) -> RepositorySources {
    let repository = reference.repository().clone();
    let mirrors = mirrors.map(|all| all.iter().map(|&address| address.clone()).collect());
    RepositorySources { repository, mirrors, is_private }
}

pub(crate) fn options() -> StoreOptions {
    StoreOptions { cache: without_floor(), ..StoreOptions::default() }
}

fn store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open(folder.path(), options()).expect("a store");
    (folder, store)
}

/// The files belong to the user that runs the test.
fn permissions(mode: u32) -> Permissions {
    let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
    Permissions { mode, uid, gid }
}

fn file(store: &Store, content: &[u8], mode: u32) -> (FileKey, StoredFile) {
    let key = FileKey { digest: Digest::of(content), permissions: permissions(mode) };
    let path = store.files().commit_inline(key, content).expect("a file");
    (key, path)
}

fn tree(store: &Store, name: &str, key: FileKey, file: &StoredFile) -> Tree {
    let limits = Limits::default();
    let everything = Selection::default();
    let mut merger = Merger::new(&limits, &everything);
    let rule = FileRule {
        path: RelativePath::parse(name.as_bytes(), &limits).expect("a path"),
        recorded: None,
    };
    merger.file(0, &rule, key.digest, 1, key.permissions).expect("a file");
    let plan = merger.finish().expect("a plan");
    let mut objects = Objects::default();
    objects.files.insert(key, file.clone());
    let tree_key = TreeKey::new(key.digest, name, "Readable", "");
    let built = store.trees().build(&plan, &objects).expect("a tree");
    store
        .trees()
        .commit(tree_key, record(key), built, &[], std::slice::from_ref(file))
        .expect("a tree")
}

fn record(key: FileKey) -> TreeRecord {
    TreeRecord {
        manifest: key.digest,
        kind: "test".into(),
        bytes: 1,
        inodes: 2,
        compressed_bytes: 1,
        own_inodes: 1,
        own_bytes: 0,
        view: View::default(),
        parts: Vec::new(),
    }
}

fn shown(store: &Store, tree: &Tree, name: &str) -> std::fs::Metadata {
    let folder = format!("trees/{}/{}/root", tree.key, tree.generation);
    std::fs::metadata(store.root().join(folder).join(name)).expect("shown")
}

#[test]
fn trees_share_the_inode_of_a_file() {
    let (_folder, store) = store();
    let (key, path) = file(&store, b"x", 0o444);
    let (one, two) = (tree(&store, "a/b", key, &path), tree(&store, "c", key, &path));
    let inode = std::fs::metadata(&path.path).expect("the file").ino();
    assert_eq!(shown(&store, &one, "a/b").ino(), inode);
    assert_eq!(shown(&store, &two, "c").ino(), inode);
    assert_eq!(store.trees().get(one.key).expect("readable"), Some(one));
}

/// A tree of one file with so many names.
fn tree_of_names(key: FileKey, names: u32, size: u64) -> TreePlan {
    let (limits, everything) = (Limits::default(), Selection::default());
    let mut merger = Merger::new(&limits, &everything);
    for number in 0..names {
        let path = RelativePath::parse(number.to_string().as_bytes(), &limits).expect("a path");
        let rule = FileRule { path, recorded: None };
        merger.file(0, &rule, key.digest, size, key.permissions).expect("a name");
    }
    merger.finish().expect("a plan")
}

#[test]
fn a_file_that_has_all_the_names_it_can_have_is_copied_once_for_the_next_65_000() {
    const ATTRIBUTE: &std::ffi::CStr = c"user.a";
    let is_root = nix::unistd::geteuid().is_root();
    let label = is_root.then(|| SecurityLabel::new("a_label")).flatten();
    let folder = tempfile::tempdir().expect("a folder");
    let options = StoreOptions { label, cache: without_floor() };
    let store = Store::open(folder.path(), options).expect("a store");
    let (key, file) = file(&store, b"content", 0o444);
    let source = std::fs::File::open(&file.path).expect("the file");
    sys::extended_attributes::set(source.as_fd(), ATTRIBUTE, b"value").expect("an attribute");
    let mut plan = tree_of_names(key, 131_000, 7);
    plan.root.permissions = permissions(0o755);
    let mut objects = Objects::default();
    objects.files.insert(key, file.clone());
    let built = store.trees().build(&plan, &objects).expect("a tree");
    let record = TreeRecord { own_inodes: 1, ..record(key) };
    let tree = TreeKey::new(key.digest, "many", "Readable", "");
    let tree = store.trees().commit(tree, record, built, &[], &[file]).expect("a tree");
    let shown = std::fs::read_dir(tree.path.join("root")).expect("a folder");
    let mut inodes = std::collections::BTreeMap::new();
    for entry in shown.flatten() {
        *inodes.entry(entry.metadata().expect("a file").ino()).or_insert(0) += 1;
        assert!(inodes.len() <= 3, "a copy for each name");
    }
    assert_eq!(inodes.values().sum::<u32>(), 131_000);
    let original = source.metadata().expect("the file");
    if inodes.len() == 1 {
        // ext4 stops at 65,000; a filesystem that does not stop has nothing to prove here.
        return;
    }
    assert_eq!(inodes.len(), 3);
    // And the names of a folder that has more of them than fit into a block.
    let names = plan.nodes.iter().map(|node| disk_units::bytes_of_a_name(node.name_bytes));
    let own_bytes = 14 + store.0.directory.units.more_names(names.sum());
    assert_eq!((tree.record.own_inodes, tree.record.own_bytes), (3, own_bytes), "counted");
    assert!(!tree.path.join("copies").exists());
    let copies = (0..131_000).map(|number| tree.path.join("root").join(number.to_string()));
    let copies = copies.filter(|path| path.metadata().expect("a file").ino() != original.ino());
    let mut seen = std::collections::HashSet::new();
    for copy in copies {
        let copy = std::fs::File::open(copy).expect("a copy");
        let metadata = copy.metadata().expect("a copy");
        if !seen.insert(metadata.ino()) {
            continue;
        }
        let what = |metadata: &std::fs::Metadata| {
            let owner = (metadata.uid(), metadata.gid());
            (metadata.mode(), owner, metadata.len(), metadata.modified().ok())
        };
        assert_eq!(what(&metadata), what(&original));
        let value = |name| sys::extended_attributes::value(copy.as_fd(), name);
        assert_eq!(value(ATTRIBUTE).expect("the attribute"), b"value");
        if is_root {
            assert_eq!(value(c"security.selinux").expect("the label"), b"a_label\0");
        }
    }
}

#[test]
fn another_mode_is_another_inode_of_verified_content() {
    let (_folder, store) = store();
    let (_, path) = file(&store, b"#!x", 0o555);
    let other = FileKey { digest: Digest::of(b"#!x"), permissions: permissions(0o400) };
    let copy = store.files().copy(other, &path.path).expect("a copy");
    assert_eq!(std::fs::metadata(&copy.path).expect("the copy").mode() & 0o777, 0o400);
    assert_eq!(std::fs::read(&copy.path).expect("readable"), b"#!x");
    // What the disk has changed since is found, and not passed on.
    std::fs::remove_file(&path.path).expect("removed");
    std::fs::write(&path.path, b"#!y").expect("written");
    let third = FileKey { digest: Digest::of(b"#!x"), permissions: permissions(0o440) };
    assert!(matches!(store.files().copy(third, &path.path), Err(StoreError::Damaged { .. })));
    assert_eq!(store.files().get(third).expect("readable"), None);
}

#[test]
fn a_damaged_generation_is_never_current_again() {
    let (_folder, store) = store();
    let (key, path) = file(&store, b"x", 0o444);
    store.inventory().mark_damaged(&path.path).expect("marked");
    assert_eq!(store.files().get(key).expect("readable"), None);
    let again = store.files().commit_inline(key, b"x").expect("a file");
    assert_eq!(again.generation, 2);
    assert_eq!(store.files().get(key).expect("readable"), Some(again));
    assert!(path.path.exists(), "whoever has it mounted keeps it");
}

/// Opens a download of a file of the store.
fn download(store: &Store, host: &str, digest: Digest, size: u64) -> partial_downloads::Partial {
    store.downloads().open(host, digest, size, Purpose::Keep, &|| true).expect("a download")
}

#[test]
fn a_download_counts_only_what_is_hashed_again() {
    let (_folder, store) = store();
    let digest = Digest::of(b"0123456789");
    let mut partial = download(&store, "r.io", digest, 10);
    partial.write(0, b"01234").expect("written");
    drop(partial);
    // A reader without a caller reads nothing back, and leaves the content.
    let unwanted = store.downloads().open("r.io", digest, 10, Purpose::Keep, &|| false);
    assert!(unwanted.is_err(), "given up");
    let mut partial = download(&store, "r.io", digest, 10);
    assert_eq!(partial.length(), 5);
    partial.write(5, b"56789").expect("written");
    assert!(partial.is_verified());
    // Another host's download of the same blob starts for itself.
    assert_eq!(download(&store, "evil.io", digest, 10).length(), 0);
    // More than the blob has is no prefix of it.
    assert_eq!(download(&store, "r.io", digest, 9).length(), 0);
}

#[test]
fn a_download_is_written_in_any_order_and_read_in_one_while_it_grows() {
    use std::io::Read as _;
    let (_folder, store) = store();
    let digest = Digest::of(b"0123456789");
    let mut partial = download(&store, "r.io", digest, 10);
    let mut follower = partial.follow();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        follower.read_to_string(&mut text).map(|_| text)
    });
    partial.write(6, b"67").expect("written");
    partial.write(0, b"01").expect("written");
    assert_eq!(partial.missing(), [2..6, 8..10]);
    drop(partial);
    assert!(reader.join().expect("a reader").is_err(), "nobody adds anything any more");
    let mut partial = download(&store, "r.io", digest, 10);
    assert_eq!(partial.missing(), [2..6, 8..10], "a hole is no content");
    let mut old = partial.follow();
    partial.restart().expect("empty");
    assert_eq!(partial.length(), 0);
    let mut new = partial.follow();
    partial.write(0, b"0123456789").expect("written");
    assert!(partial.is_verified());
    assert!(old.read(&mut [0; 10]).is_err(), "what it followed was thrown away");
    let mut bytes = [0; 10];
    new.read_exact(&mut bytes).expect("all of it");
    assert_eq!(&bytes, b"0123456789");
}

#[test]
fn what_a_crash_left_in_staging_is_swept() {
    let (folder, store) = store();
    let staging = store.0.directory.stage().expect("staging");
    std::fs::write(staging.path().join("half"), "a layer").expect("written");
    std::mem::forget(staging);
    let staging = folder.path().join("staging");
    std::fs::write(staging.join(durable_rename::temporary_name()), "half a record")
        .expect("written");
    // A directory of that name from before keeps its content.
    std::fs::write(staging.join("index.html"), "of a web site").expect("written");
    drop(store);
    Store::open(folder.path(), options()).expect("opened again");
    let left = std::fs::read_dir(staging).expect("a folder").flatten();
    assert_eq!(left.map(|entry| entry.file_name()).collect::<Vec<_>>(), ["index.html"]);
}

#[test]
fn an_unknown_format_is_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("format"), "csi-driver-oci 99\n").expect("written");
    let refused = Store::open(folder.path(), options()).err().expect("unknown");
    assert!(matches!(refused, StoreError::Format { .. }));
    assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 1);
}

#[test]
fn executables_are_known_by_their_start() {
    for (content, executable) in
        [(&b"\x7fELF\x02"[..], true), (b"#!/bin/sh", true), (b"#", false), (b"", false)]
    {
        assert_eq!(starts_executable(content), executable);
    }
}

/// A manifest that is kept, what a tag meant, and a proof.
fn records_of(store: &Store, text: &str) -> (Digest, Reference) {
    let manifest = Digest::of(text.as_bytes());
    let reference: Reference = format!("r.io/{text}:v1").parse().expect("a reference");
    let resolution = Resolution {
        reference: reference.to_string(),
        resolved: manifest,
        manifest,
        platform: None,
    };
    store.documents().put(manifest, text.as_bytes()).expect("a manifest");
    store
        .resolutions()
        .put(&reference, &Platform::of_this_node(), &resolution)
        .expect("a resolution");
    let (who, by) = (Principal::anonymous(), ProofSource::Registry);
    store.proofs().put(reference.repository(), manifest, &who, &by).expect("a proof");
    (manifest, reference)
}

#[test]
fn records_that_lead_nowhere_go_when_they_are_old_and_those_of_a_pull_stay() {
    let (folder, store) = store();
    let [gone, shown, pinned, pulled] =
        ["gone", "shown", "pinned", "pulled"].map(|text| records_of(&store, text));
    let (key, path) = file(&store, b"x", 0o444);
    let mut tree = tree(&store, "file", key, &path);
    // As a tree of that manifest; the catalog reads it when it is opened again.
    tree.record.manifest = shown.0;
    let record = serde_json::to_vec(&tree.record).expect("JSON");
    let record_path = folder.path().join(format!("trees/{}/1/tree.json", tree.key));
    std::fs::write(record_path, record).expect("written");
    drop((tree, store));
    let store = Store::open(folder.path(), options()).expect("opened again");
    store.pins().add(&pinned.1, &Platform::of_this_node(), pinned.0, "admin").expect("a pin");
    let now = Now::read();
    assert_eq!(store.collector().sweep_records(now).expect("swept"), 0, "nothing is old");
    let later = |seconds: i64| Now { unix_seconds: now.unix_seconds + seconds, ..now };
    let hours = 3600;
    // Half a day before a sweep a pull began with what was kept for weeks.
    let old = std::time::SystemTime::now() - std::time::Duration::from_hours(500);
    for digest in [pulled.0, shown.0, pinned.0] {
        let file =
            std::fs::File::open(store.0.directory.document_path(digest)).expect("the manifest");
        file.set_modified(old).expect("a time");
    }
    store.documents().mark_used(pulled.0).expect("a pull begins");
    let gone_blob =
        std::fs::File::open(store.0.directory.document_path(gone.0)).expect("the manifest");
    gone_blob.set_modified(old).expect("a time");
    for entry in std::fs::read_dir(folder.path().join("resolutions")).expect("a folder") {
        let file = std::fs::File::open(entry.expect("an entry").path()).expect("a record");
        file.set_modified(old).expect("a time");
    }
    let swept = store.collector().sweep_records(later(12 * hours)).expect("swept");
    assert_eq!(swept, 1, "what the tag meant");
    let platform = Platform::of_this_node();
    for ((_, reference), stays) in
        [(&gone, false), (&shown, true), (&pinned, true), (&pulled, true)]
    {
        assert_eq!(store.resolutions().get(reference, &platform).is_some(), stays, "{reference}");
    }
    drop(store);
    let store = Store::open(folder.path(), options()).expect("opened again");
    store.collector().collect(&gc::Want::Room(SpaceAmount::default())).expect("collected");
    for (manifest, stays) in [(gone.0, false), (shown.0, true), (pinned.0, true), (pulled.0, true)]
    {
        assert_eq!(store.documents().get(manifest).expect("readable").is_some(), stays);
    }
    // What the pull did not make a tree of goes in the end, proofs too.
    for entry in std::fs::read_dir(folder.path().join("blobs")).expect("a folder") {
        let file = std::fs::File::open(entry.expect("an entry").path()).expect("a manifest");
        file.set_modified(old).expect("a time");
    }
    drop(store);
    let store = Store::open(folder.path(), options()).expect("opened again");
    store.collector().collect(&gc::Want::Room(SpaceAmount::default())).expect("collected");
    assert!(store.collector().sweep_records(later(48 * hours)).expect("swept") >= 2);
    for ((manifest, reference), stays) in [(shown, true), (pinned, true), (pulled, false)] {
        assert_eq!(
            store.documents().get(manifest).expect("readable").is_some(),
            stays,
            "{reference}"
        );
        let (who, sources) = (Principal::anonymous(), sources(&reference, Some(&[]), false));
        let proven = store.proofs().is_proven(&sources, manifest, &who);
        assert_eq!(proven, stays, "{reference}");
    }
}

/// The last record of a repository goes while the next one is written: neither may lose the other's
/// folder, and a proof that was just given is not swept for the age of the one before it.
#[test]
fn a_proof_that_is_being_written_is_not_swept_away() {
    let (folder, store) = store();
    let reference: Reference = "r.io/swept:v1".parse().expect("a reference");
    let repository = reference.repository();
    let (who, by) = (Principal::anonymous(), ProofSource::Registry);
    let sources = sources(&reference, Some(&[]), false);
    let now = Now::read();
    let later = Now { unix_seconds: now.unix_seconds + 48 * 3600, ..now };
    std::thread::scope(|scope| {
        let sweeping = scope.spawn(|| {
            for _ in 0..2000 {
                store.collector().sweep_records(later).expect("swept");
            }
        });
        let mut number = 0_u64;
        while !sweeping.is_finished() {
            number += 1;
            let manifest = Digest::of(&number.to_le_bytes());
            store.proofs().put(repository, manifest, &who, &by).expect("a proof is written");
        }
    });
    let manifest = Digest::of(b"old");
    store.proofs().put(repository, manifest, &who, &by).expect("a proof");
    for place in std::fs::read_dir(folder.path().join("access")).expect("a folder") {
        for proof in std::fs::read_dir(place.expect("an entry").path()).expect("a folder") {
            let path = proof.expect("an entry").path();
            let text = format!("{{\"unix_seconds\":{}}}", now.unix_seconds - 500 * 3600);
            std::fs::write(&path, text).expect("an old proof");
            let old = std::time::SystemTime::now() - std::time::Duration::from_hours(500);
            let file = std::fs::File::options().write(true).open(&path).expect("the proof");
            file.set_modified(old).expect("a time");
        }
    }
    store.proofs().put(repository, manifest, &who, &by).expect("given again");
    store.collector().sweep_records(now).expect("swept");
    assert!(store.proofs().is_proven(&sources, manifest, &who), "it was given just now");
}

#[test]
fn a_mirrors_proof_goes_with_the_mirror_and_the_registrys_own_stays() {
    let (folder, store) = store();
    let reference: Reference = "r.io/mirrored:v1".parse().expect("a reference");
    let repository = reference.repository();
    let who = Principal::anonymous();
    let address: std::sync::Arc<str> = "https://mirror.example/v2/".into();
    let mirror = |is_anonymous| ProofSource::Mirror { address: address.clone(), is_anonymous };
    let configured = |is_private| sources(&reference, Some(&[&address]), is_private);
    let gone = sources(&reference, Some(&[]), false);
    let unknown = sources(&reference, None, false);
    let manifest = |name: &str| Digest::of(name.as_bytes());
    let put = |name: &str, by: &ProofSource| {
        store.proofs().put(repository, manifest(name), &who, by).expect("a proof");
    };
    let counts = |name: &str, sources: &RepositorySources| {
        store.proofs().is_proven(sources, manifest(name), &who)
    };
    // A mirror's counts with the mirror alone, and is forgotten without it.
    put("mirror", &mirror(false));
    assert!(counts("mirror", &configured(false)) && counts("mirror", &configured(true)));
    assert!(counts("mirror", &unknown), "a file that cannot be read names no mirror that has gone");
    assert!(!counts("mirror", &gone));
    assert!(!counts("mirror", &configured(false)), "it is forgotten");
    // What a mirror gives without a credential says nothing of what the registry refuses without.
    put("anonymous", &mirror(true));
    assert!(counts("anonymous", &configured(false)) && !counts("anonymous", &configured(true)));
    // The registry's own is lost by no change of mirrors, whatever came first.
    for order in [[ProofSource::Registry, mirror(false)], [mirror(true), ProofSource::Registry]] {
        for by in &order {
            put("both", by);
        }
        assert!(counts("both", &gone) && counts("both", &configured(true)));
    }
    // One that does not say who gave it counts as the registry's until it is renewed.
    put("old", &ProofSource::Registry);
    let name = format!("m-{}-anonymous.json", manifest("old").hex());
    let write = || {
        for place in std::fs::read_dir(folder.path().join("access")).expect("a folder") {
            let path = place.expect("an entry").path().join(&name);
            if path.exists() {
                std::fs::write(path, "{\"unix_seconds\":1700000000}").expect("written");
            }
        }
    };
    write();
    assert!(counts("old", &gone) && counts("old", &configured(true)));
    put("old", &mirror(false));
    assert!(counts("old", &configured(false)) && !counts("old", &gone), "it was the mirror's");
    // A tree needs all that gave a part of it.
    let tree = crate::TreeKey::new(manifest("tree"), "", "", "");
    let put_tree = |by: &[ProofSource]| {
        let by = by.iter().cloned().collect();
        store.origins().put_tree(repository, tree, &by).expect("a proof");
    };
    put_tree(&[ProofSource::Registry, mirror(false)]);
    assert!(store.origins().tree_came_from(&configured(false), tree));
    assert!(!store.origins().tree_came_from(&gone, tree));
    put_tree(&[ProofSource::Registry]);
    assert!(store.origins().tree_came_from(&gone, tree));
}

#[test]
fn owners_pin_no_more_than_their_share() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open(folder.path(), options()).expect("a store");
    let platform = Platform::of_this_node();
    let pin = |content: &[u8], owner: &str, max_bytes: u64| {
        let (key, path) = file(&store, content, 0o444);
        tree(&store, "file", key, &path);
        let reference: Reference =
            format!("r.io/{}:v1", key.digest.hex()).parse().expect("a reference");
        let share = PinShare { owner_prefix: "preload/team/", owners: "the team", max_bytes };
        store.pins().add_within(&reference, &platform, key.digest, owner, Some(share))
    };
    let (one, two) = (vec![b'1'; 64 << 10], vec![b'2'; 64 << 10]);
    pin(&one, "preload/team/one", 100 << 10).expect("within the share");
    let refused = pin(&two, "preload/team/two", 100 << 10);
    let Err(StoreError::PinShareExceeded { wanted, max, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert!(wanted > max && max == 100 << 10, "{wanted} of {max}");
    // What these owners have pinned already takes nothing more; what another one has pinned does.
    pin(&one, "preload/team/twin", 1).expect("the same content");
    pin(&two, "admin", 1 << 20).expect("within a larger share");
    let refused = pin(&two, "preload/team/two", 100 << 10);
    assert!(matches!(refused, Err(StoreError::PinShareExceeded { .. })), "{refused:?}");
}

#[test]
fn what_was_left_of_a_blob_is_no_room_for_that_blob() {
    let folder = tempfile::tempdir().expect("a folder");
    let cache = CacheOptions {
        max_bytes: Some(1 << 20),
        min_free_percent: 0,
        min_free_inodes_percent: 0,
        minimum_age: std::time::Duration::ZERO,
        ..CacheOptions::default()
    };
    let options = StoreOptions { cache, ..StoreOptions::default() };
    let store = Store::open(folder.path(), options).expect("a store");
    let (key, path) = file(&store, &vec![7; 500_000], 0o444);
    drop(tree(&store, "file", key, &path));
    drop(path);
    let [own, other] = [b"own", b"oth"].map(|name| {
        let blob = Digest::of(name);
        let mut partial = download(&store, "r.io", blob, 1 << 20);
        partial.write(0, &vec![1; 100_000]).expect("written");
        blob
    });
    let length = |blob| download(&store, "r.io", blob, 1 << 20).length();
    let claim = |bytes| space_reservations::Claim { blob: own, bytes, inodes: 1 };
    let refused = store.space().reserve(&[claim(2 << 20)]).err().expect("more than the quota");
    let StoreError::NoRoom(shortage) = refused else { panic!("{refused}") };
    assert!((600_000..650_000).contains(&shortage.evictable), "{shortage}");
    assert_eq!((length(own), length(other)), (100_000, 100_000), "nothing goes for nothing");
    let _reservation = store.space().reserve(&[claim(1 << 20)]).expect("room");
    assert!(store.files().get(key).expect("readable").is_none(), "it was the least recently used");
    assert_eq!((length(own), length(other)), (100_000, 0));
}

/// Nothing may be written: the disk is below its floor.
fn below_the_floor() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().expect("a folder");
    let cache = CacheOptions { min_free_percent: 100, ..without_floor() };
    let options = StoreOptions { cache, ..StoreOptions::default() };
    let store = Store::open(folder.path(), options).expect("a store");
    (folder, store)
}

#[test]
fn many_small_layers_stop_at_the_floor_like_a_large_one() {
    let (_folder, store) = below_the_floor();
    let write = || store.layers().write(Digest::of(b"small"));
    let stopped = (0..400).find_map(|_| write().err()).expect("stopped");
    assert!(matches!(stopped, StoreError::NoSpace { .. }), "{stopped}");
    // The next writer is not the first of another thousand.
    assert!(matches!(write(), Err(StoreError::NoSpace { .. })));
}

#[test]
fn folders_and_symbolic_links_of_a_tree_stop_at_the_floor() {
    let (_folder, store) = below_the_floor();
    let target = b"x".as_slice().into();
    for kind in [EntryKind::Directory, EntryKind::SymbolicLink { target }] {
        let (limits, everything) = (Limits::default(), Selection::default());
        let mut merger = Merger::new(&limits, &everything);
        let rule = ArchiveRule { whiteouts: false, tar_digest: None, within: None };
        merger.archive(0, &rule);
        for number in 0..1100 {
            let path = RelativePath::parse(number.to_string().as_bytes(), &limits);
            let (path, kind) = (path.expect("a path"), kind.clone());
            merger.entry(&Entry { path, kind, metadata: own_folder() }).expect("an entry");
        }
        let mut plan = merger.finish().expect("a plan");
        plan.root = own_folder();
        let stopped = store.trees().build(&plan, &Objects::default()).err().expect("stopped");
        assert!(matches!(stopped, StoreError::NoSpace { .. }), "{stopped}");
        // Before the first of them too.
        let key = TreeKey::new(Digest::of(b"manifest"), "", "Readable", "");
        let claim = space_reservations::Claim::of_tree(key, &plan);
        assert_eq!(claim.inodes, 1105);
        assert!(claim.bytes > 1105 * 4096, "{claim:?}");
        assert!(matches!(store.space().reserve(&[claim]), Err(StoreError::NoRoom(_))));
    }
}

#[test]
fn what_is_written_and_has_no_name_yet_is_not_claimed_twice() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open(folder.path(), options()).expect("a store");
    let free = store.space().disk().expect("room").free_bytes;
    let claim = |text: &str, bytes| space_reservations::Claim {
        blob: Digest::of(text.as_bytes()),
        bytes,
        inodes: 1,
    };
    let layer = claim("layer", free / 4 * 3);
    let _layer = store.space().reserve(&[layer]).expect("room");
    let tree = claim("tree", free / 2);
    assert!(matches!(store.space().reserve(&[tree]), Err(StoreError::NoRoom(_))));
    let written = HashSet::from([layer.blob]);
    store.space().reserve_after(&[tree], &written).expect("the layer is on the disk");
}

#[test]
fn what_has_its_name_and_its_claim_counts_once_against_the_quota() {
    const QUOTA: u64 = 1 << 20;
    let folder = tempfile::tempdir().expect("a folder");
    let cache = CacheOptions { max_bytes: Some(QUOTA), ..without_floor() };
    let store = Store::open(folder.path(), StoreOptions { cache, ..StoreOptions::default() });
    let store = store.expect("a store");
    let content = vec![b'x'; 600 << 10];
    let claim = |blob, bytes| space_reservations::Claim { blob, bytes, inodes: 1 };
    let layer = claim(Digest::of(&content), 600 << 10);
    let _claimed = store.space().reserve(&[layer]).expect("room");
    let (_key, _lease) = file(&store, &content, 0o444);
    let tree = claim(Digest::of(b"tree"), 8 << 10);
    assert!(matches!(store.space().reserve(&[tree]), Err(StoreError::NoRoom(_))));
    store.space().reserve_after(&[tree], &HashSet::from([layer.blob])).expect("it counts once");
}

#[test]
fn damage_that_is_found_on_the_way_marks_what_shows_it() {
    let (_folder, store) = store();
    let (key, path) = file(&store, b"x", 0o444);
    let shown = tree(&store, "file", key, &path);
    let (other, other_path) = file(&store, b"y", 0o444);
    let sound = tree(&store, "file", other, &other_path);
    store.inventory().mark_damaged(&path.path).expect("marked");
    assert_eq!(store.trees().get(shown.key).expect("readable"), None, "it is made anew");
    assert_eq!(store.trees().get(sound.key).expect("readable"), Some(sound));
}

#[test]
fn what_a_crash_left_unmarked_over_damaged_content_is_found_and_marked() {
    let (folder, store) = store();
    let (key, path) = file(&store, b"x", 0o444);
    let shown = tree(&store, "file", key, &path);
    let mark = path.path.with_extension("damaged");
    drop((shown.clone(), path, store));
    std::fs::write(mark, "").expect("a mark");
    let store = Store::open(folder.path(), options()).expect("opened again");
    let mut found = Vec::new();
    store
        .verification()
        .verify_objects(&mut Reader::new(ReadPace::Full), &mut |finding| found.push(finding))
        .expect("read");
    let [finding] = &found[..] else { panic!("{found:?}") };
    assert_eq!((finding.kind, finding.digest), (FindingKind::Tree, Some(shown.record.manifest)));
    assert!(finding.detail.contains("which is damaged"), "{finding:?}");
    assert_eq!(store.trees().get(shown.key).expect("readable"), None, "it is made anew");
}

#[test]
fn no_tree_is_named_over_what_was_found_damaged_meanwhile() {
    let (_folder, store) = store();
    let (key, file) = file(&store, b"x", 0o444);
    let mut plan = tree_of_names(key, 1, 1);
    plan.root = own_folder();
    let mut objects = Objects::default();
    objects.files.insert(key, file.clone());
    let built = store.trees().build(&plan, &objects).expect("a tree");
    store.inventory().mark_damaged(&file.path).expect("marked");
    let tree = TreeKey::new(key.digest, "", "Readable", "");
    let refused = store.trees().commit(tree, record(key), built, &[], &[file]);
    assert!(matches!(refused, Err(StoreError::Damaged { .. })), "{refused:?}");
    assert_eq!(store.trees().get(tree).expect("readable"), None, "it is made anew");
}

/// Returns the metadata of a directory of the user that runs the test.
fn own_folder() -> Metadata {
    Metadata { permissions: permissions(0o755), ..Metadata::of_implied_folder() }
}

#[test]
fn what_cannot_be_removed_keeps_nothing_else_from_going() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open(folder.path(), options()).expect("a store");
    let files = [b"one", b"two", b"six"].map(|content| {
        let (key, stored) = file(&store, content, 0o444);
        (key, stored.path)
    });
    // Nothing is removed behind a link. Whichever of them goes first resists.
    let elsewhere = tempfile::tempdir().expect("a folder");
    let mut digests = files.each_ref().map(|(key, _)| key.digest.hex());
    digests.sort();
    let of_file = folder.path().join("files").join(&digests[0]);
    std::fs::rename(&of_file, elsewhere.path().join("moved")).expect("moved");
    std::os::unix::fs::symlink(elsewhere.path().join("moved"), &of_file).expect("a link");
    let collected = store.collector().collect(&gc::Want::AtMost(4200)).expect("collected");
    assert_eq!(collected.victims.len(), 2, "another one goes in its place: {collected:?}");
    assert_eq!(store.inventory().usage().expect("known").objects, 1);
}

#[test]
fn downloads_and_copies_stop_at_the_floor() {
    let (_folder, store) = below_the_floor();
    let content = vec![1; 5 << 20];
    let digest = Digest::of(&content);
    let mut partial = download(&store, "r.io", digest, 5 << 20);
    let stopped = content
        .chunks(1 << 20)
        .zip(0..)
        .find_map(|(chunk, number)| partial.write(number << 20, chunk).err());
    assert!(matches!(stopped, Some(StoreError::NoSpace { .. })), "{stopped:?}");
    let (_folder, store) = below_the_floor();
    let (_, source) = file(&store, &content, 0o444);
    let other = FileKey { digest, permissions: permissions(0o400) };
    let stopped = store.files().copy(other, &source.path);
    assert!(matches!(stopped, Err(StoreError::NoSpace { .. })), "{stopped:?}");
}

#[test]
fn a_verified_download_that_gets_no_name_is_a_download_again() {
    let (folder, store) = store();
    let digest = Digest::of(b"content");
    let open = || download(&store, "r.io", digest, 7);
    let mut partial = open();
    partial.write(0, b"content").expect("written");
    let key = FileKey { digest, permissions: permissions(0o444) };
    // The folder of its name cannot be made.
    std::fs::write(folder.path().join("files").join(digest.hex()), "in the way").expect("a file");
    store.files().commit(key, &partial).expect_err("no name");
    drop(partial);
    let partial = open();
    assert!(partial.is_verified(), "nothing is fetched again");
    std::fs::remove_file(folder.path().join("files").join(digest.hex())).expect("removed");
    let file = store.files().commit(key, &partial).expect("a file");
    drop(partial);
    assert_eq!(std::fs::read(&file.path).expect("readable"), b"content");
    assert_eq!(open().length(), 0, "it has gone to its name");
}

#[test]
fn a_blob_that_is_kept_again_is_young_and_whole() {
    let (_folder, store) = store();
    let content = b"manifest";
    let digest = Digest::of(content);
    store.documents().put(digest, content).expect("kept");
    let path = store.0.directory.document_path(digest);
    let old = std::time::SystemTime::now() - std::time::Duration::from_hours(500);
    std::fs::write(&path, "damaged!").expect("written");
    std::fs::File::open(&path).expect("the blob").set_modified(old).expect("a time");
    store.documents().put(digest, content).expect("kept again");
    assert_eq!(std::fs::read(&path).expect("readable"), content);
    std::fs::File::open(&path).expect("the blob").set_modified(old).expect("a time");
    store.documents().put(digest, content).expect("kept once more");
    store.collector().sweep_records(Now::read()).expect("swept");
    assert!(path.exists(), "a pull that is under way has kept it just now");
}

#[test]
fn a_document_whose_name_is_older_than_its_entry_is_counted_and_evicted() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open(folder.path(), options()).expect("a store");
    let before = store.inventory().usage().expect("known");
    let content = vec![b'm'; 100_000];
    let digest = Digest::of(&content);
    // Its folder could not be synced after the rename, so that it was not added.
    std::fs::write(store.0.directory.document_path(digest), &content).expect("written");
    drop(store.documents().put(digest, &content).expect("kept"));
    assert!(store.inventory().usage().expect("known").bytes >= before.bytes + 100_000);
    store.collector().collect(&gc::Want::AtMost(0)).expect("collected");
    assert!(!store.0.directory.document_path(digest).exists());
}

#[test]
fn a_document_that_was_truncated_counts_in_full_once_it_is_whole() {
    let (folder, store) = store();
    let content = vec![b'm'; 100_000];
    let digest = Digest::of(&content);
    drop(store.documents().put(digest, &content).expect("kept"));
    let whole = store.inventory().usage().expect("known");
    std::fs::write(store.0.directory.document_path(digest), "").expect("truncated");
    drop(store);
    let store = Store::open(folder.path(), options()).expect("a store");
    assert!(store.inventory().usage().expect("known").bytes < whole.bytes);
    drop(store.documents().put(digest, &content).expect("kept"));
    assert_eq!(store.inventory().usage().expect("known"), whole);
}

#[test]
fn a_forgotten_tree_that_cannot_be_removed_keeps_no_other_from_going() {
    let (folder, store) = store();
    let (key, stored) = file(&store, b"content", 0o444);
    let trees = ["one", "two"].map(|name| tree(&store, name, key, &stored));
    drop(stored);
    let names = trees.each_ref().map(|tree| ObjectName::tree(tree.key, tree.generation));
    for tree in &trees {
        store.trees().forget(tree).expect("forgotten");
    }
    drop(trees);
    // Nothing is removed behind a link. The last one is tried first.
    let elsewhere = tempfile::tempdir().expect("a folder");
    let resisting = folder.path().join(names[1].as_str()).parent().expect("a folder").to_owned();
    std::fs::rename(&resisting, elsewhere.path().join("moved")).expect("moved");
    std::os::unix::fs::symlink(elsewhere.path().join("moved"), &resisting).expect("a link");
    let collected = store.collector().collect_trees(&names).expect("collected");
    let gone: Vec<_> = collected.victims.iter().map(|victim| &victim.name).collect();
    assert_eq!(gone, [&names[0]]);
}

#[test]
fn names_of_a_later_version_in_objects_json_are_ignored() {
    let (folder, store) = store();
    let (key, stored) = file(&store, b"content", 0o444);
    let tree = tree(&store, "file", key, &stored);
    let links = store.trees().links(&tree).expect("links");
    assert_eq!(links.len(), 1);
    let path = tree.path.join("objects.json");
    let mut names: Vec<String> = json_records::read(&path).expect("names");
    names.push("images/of-a-later-version".to_owned());
    std::fs::write(&path, serde_json::to_vec(&names).expect("JSON")).expect("written");
    assert_eq!(store.trees().links(&tree).expect("links"), links);
    // The same is true of the catalog.
    drop((tree, stored, store));
    let store = Store::open(folder.path(), options()).expect("a store");
    let [(_, entry)] = &store.inventory().trees().expect("trees")[..] else { panic!("one tree") };
    assert!(entry.links.contains(&links[0]));
}

#[test]
fn only_marks_of_generations_are_removed_with_the_folder_of_a_key() {
    let (folder, store) = store();
    drop(store);
    let key = folder.path().join("layers").join(Digest::of(b"key").hex());
    std::fs::create_dir(&key).expect("a folder");
    for name in ["1", "1.damaged", "1.x.damaged", "2.damaged"] {
        std::fs::write(key.join(name), "").expect("written");
    }
    let store = Store::open(folder.path(), options()).expect("a store");
    store.inventory().load().expect("loaded");
    assert!(key.join("1.damaged").exists() && key.join("1.x.damaged").exists());
    assert!(!key.join("2.damaged").exists());
}

#[test]
fn a_manifest_names_the_signers_of_all_its_verdicts() {
    let (_folder, store) = store();
    let reference: Reference = "r.io/team/app:v1".parse().expect("a reference");
    let other: Reference = "r.io/team/other:v1".parse().expect("a reference");
    let (repository, signatures) = (reference.repository(), store.verified_signatures());
    let [manifest, another, key, identity] =
        ["manifest", "another", "key", "identity"].map(|text| Digest::of(text.as_bytes()));
    let put = |manifest, demand, signers: &[&str]| {
        let signers = signers.iter().map(|&signer| signer.to_owned()).collect();
        signatures.put(repository, manifest, demand, signers).expect("recorded");
    };
    put(manifest, key, &["release"]);
    put(manifest, identity, &["ci: a job", "release"]);
    put(another, key, &["stranger"]);
    assert!(signatures.contains(repository, manifest, identity));
    let signers = |reference: &Reference| {
        let signers = signatures.signers(reference.repository(), manifest).expect("signers");
        signers.into_iter().collect::<Vec<_>>()
    };
    assert_eq!(signers(&reference), ["ci: a job", "release"]);
    assert!(signers(&other).is_empty());
}
