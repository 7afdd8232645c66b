use std::collections::BTreeSet;
use std::os::fd::AsRawFd as _;

use proptest::prelude::*;

use super::*;
use crate::trees::{Objects, TreeRecord, View};
use crate::{FileKey, Store};
use oci_types::Digest;
use unpack::layer_merge::Merger;
use unpack::layer_rule::FileRule;
use unpack::{Limits, Permissions, RelativePath, Selection};

/// Returns a tree with these files, whose content is the number.
fn tree(store: &Store, number: u32, names: &BTreeSet<String>) -> Tree {
    let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
    let permissions = Permissions { mode: 0o444, uid, gid };
    let content = number.to_string();
    let key = FileKey { digest: Digest::of(content.as_bytes()), permissions };
    let file = store.files().commit_inline(key, content.as_bytes()).expect("a file");
    let (limits, everything) = (Limits::default(), Selection::default());
    let mut merger = Merger::new(&limits, &everything);
    for (layer, name) in names.iter().enumerate() {
        let path = RelativePath::parse(name.as_bytes(), &limits).expect("a path");
        let rule = FileRule { path, recorded: None };
        merger.file(layer, &rule, key.digest, 1, permissions).expect("a file");
    }
    let plan = merger.finish().expect("a plan");
    let mut objects = Objects::default();
    objects.files.insert(key, file.clone());
    let record = TreeRecord {
        manifest: key.digest,
        kind: "test".into(),
        bytes: plan.totals.bytes,
        inodes: plan.totals.inodes,
        compressed_bytes: 1,
        own_inodes: plan.totals.directories,
        own_bytes: 0,
        view: View::default(),
        parts: Vec::new(),
    };
    let tree_key = TreeKey::new(key.digest, &format!("{names:?}"), "Readable", "");
    if let Some(tree) = store.trees().get(tree_key).expect("readable") {
        return tree;
    }
    let built = store.trees().build(&plan, &objects).expect("a tree");
    store.trees().commit(tree_key, record, built, &[], &[file]).expect("a tree")
}

fn names_of(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

fn record() -> FollowRecord {
    FollowRecord {
        volume_id: "volume".into(),
        target: "/kubelet/target".into(),
        fingerprint: Digest::of(b""),
        boot_id: boot_id(),
        attributes: BTreeMap::new(),
        namespace: None,
        pod: None,
        uid: None,
        had_credentials: false,
    }
}

fn open_store(folder: &Path) -> Store {
    Store::open(folder, crate::tests::options()).expect("a store")
}

/// Records that the volume is published, as a publish does before it makes anything.
fn publish(store: &Store, record: &FollowRecord, tree: &Tree) {
    store.followed().directory.catalog.publish(
        &record.target,
        crate::object_catalog::PublishedTree {
            tree: ObjectName::tree(tree.key, tree.generation),
            kubelet_knew: true,
        },
    );
    store.followed().publish(record, tree).expect("published");
}

/// Checks that a volume shows a tree, and nothing else.
fn check(store: &Store, key: FollowKey, number: u32, names: &BTreeSet<String>) {
    let shown = store.followed().shown(key);
    let own = |name: &String| name.starts_with("..");
    let found: BTreeSet<_> = names_in(&shown).into_iter().filter(|name| !own(name)).collect();
    let tops = names.iter().filter_map(|name| name.split('/').next());
    assert_eq!(found, tops.map(str::to_owned).collect());
    for name in names {
        for path in [shown.join(name), shown.join(DATA).join(name)] {
            assert_eq!(fs::read_to_string(&path).expect("a file"), number.to_string(), "{name}");
        }
    }
    assert!(!shown.join(NEXT_DATA).is_symlink());
}

fn names_in(folder: &Path) -> Vec<String> {
    names(folder).expect("a folder")
}

#[test]
fn files_are_the_inodes_of_the_tree_and_folders_have_its_metadata() {
    use std::os::unix::fs::MetadataExt as _;
    let folder = tempfile::tempdir().expect("a folder");
    let store = open_store(folder.path());
    let (record, names) = (record(), names_of(&["a", "folder/inner/b"]));
    let tree = tree(&store, 1, &names);
    publish(&store, &record, &tree);
    check(&store, record.key(), 1, &names);
    let shown = store.followed().shown(record.key());
    for name in ["a", "folder/inner/b"] {
        let inode = |path: PathBuf| path.metadata().expect("a file").ino();
        assert_eq!(inode(shown.join(name)), inode(tree.root().join(name)), "{name}");
    }
    for name in ["", "folder", "folder/inner"] {
        let facts = |path: PathBuf| {
            let metadata = path.metadata().expect("a folder");
            (
                metadata.mode(),
                metadata.uid(),
                metadata.gid(),
                metadata.mtime(),
                metadata.mtime_nsec(),
            )
        };
        assert_eq!(facts(shown.join(DATA).join(name)), facts(tree.root().join(name)), "{name}");
    }
}

#[test]
fn names_that_are_the_volumes_own_and_too_many_names_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = open_store(folder.path());
    let (record, first) = (record(), names_of(&["a"]));
    publish(&store, &record, &tree(&store, 1, &first));
    for (number, name) in (2..).zip(["..data/x", "..data_tmp", "..7", "...", "..x"]) {
        let tree = tree(&store, number, &names_of(&["a", name]));
        let refused = store.followed().link(&tree).err().expect("refused").to_string();
        assert!(refused.contains("two dots"), "{refused}");
    }
    // Below the top they are names as any other.
    let deeper = names_of(&["a/..data", ".hidden"]);
    let version = store.followed().link(&tree(&store, 20, &deeper)).expect("linked");
    assert!(store.followed().switch(record.key(), version).expect("switched"));
    check(&store, record.key(), 20, &deeper);
}

#[test]
fn versions_stay_for_their_time_and_are_bounded() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = open_store(folder.path());
    let (record, names) = (record(), names_of(&["a"]));
    publish(&store, &record, &tree(&store, 0, &names));
    let followed = store.followed();
    let before = store.inventory().usage().expect("known");
    let switch = |number| {
        let version = followed.link(&tree(&store, number, &names)).expect("linked");
        followed.switch(record.key(), version)
    };
    for number in 1..MAXIMUM_VERSIONS {
        assert!(switch(u32::try_from(number % 2).expect("small")).expect("switched"));
    }
    assert!(store.inventory().usage().expect("known").inodes > before.inodes);
    let refused = switch(1000).expect_err("too many").to_string();
    assert!(refused.contains("100 versions"), "{refused}");
    check(&store, record.key(), 1, &names);
    assert_eq!(followed.sweep().expect("swept"), 0, "none is old enough");
    assert_eq!(followed.sweep_older(Duration::ZERO).expect("swept"), MAXIMUM_VERSIONS - 1);
    assert_eq!(followed.versions(record.key()), 1);
    check(&store, record.key(), 1, &names);
    assert!(switch(1000).expect("there is room again"));
    let version = followed.link(&tree(&store, 1000, &names)).expect("linked");
    assert!(!followed.switch(record.key(), version).expect("it is shown already"));
}

#[test]
fn a_volume_stays_while_a_record_names_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = open_store(folder.path());
    let (record, names) = (record(), names_of(&["a"]));
    let tree = tree(&store, 1, &names);
    let objects = store.inventory().usage().expect("known").bytes;
    publish(&store, &record, &tree);
    assert_eq!(store.followed().sweep().expect("swept"), 0);
    check(&store, record.key(), 1, &names);
    store.publications().remove(&record.target).expect("removed");
    assert_eq!(store.followed().sweep().expect("swept"), 1);
    assert!(names_in(&folder.path().join(FOLDER)).is_empty());
    assert!(names_in(&folder.path().join("staging")).is_empty());
    assert_eq!(store.inventory().usage().expect("known").bytes, objects);
    assert!(store.followed().current(record.key()).is_none());
}

#[test]
fn volumes_of_another_boot_are_made_anew() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = open_store(folder.path());
    let (earlier, names) =
        (FollowRecord { boot_id: "earlier".into(), ..record() }, names_of(&["a"]));
    let tree = tree(&store, 1, &names);
    publish(&store, &earlier, &tree);
    drop((tree, store));
    let store = open_store(folder.path());
    assert!(store.followed().current(earlier.key()).is_none(), "it is not trusted");
    let other = self::tree(&store, 2, &names);
    publish(&store, &record(), &other);
    check(&store, record().key(), 2, &names);
    assert_eq!(store.followed().versions(record().key()), 1);
}

/// A step of a volume's life.
#[derive(Clone, Debug)]
enum Step {
    Switch(BTreeSet<String>),
    /// The process ends, and leaves this of a switch behind.
    Restart(Leftover),
    Sweep,
}

#[derive(Clone, Copy, Debug)]
enum Leftover {
    Nothing,
    /// A version without `..data`.
    Version,
    /// A link of a name that no version has, and the next `..data`.
    Links,
    /// A name of the version has no link.
    MissingLink,
}

fn step() -> impl Strategy<Value = Step> {
    let name = prop::sample::select(vec!["a", "b", "c", "folder/a", "folder/b", ".x"]);
    let names = prop::collection::btree_set(name.prop_map(str::to_owned), 1..5);
    let left = prop::sample::select(vec![
        Leftover::Nothing,
        Leftover::Version,
        Leftover::Links,
        Leftover::MissingLink,
    ]);
    prop_oneof![
        4 => names.prop_map(Step::Switch),
        2 => left.prop_map(Step::Restart),
        1 => Just(Step::Sweep),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn a_volume_shows_one_version_whatever_happens(steps in prop::collection::vec(step(), 1..20)) {
        let folder = tempfile::tempdir().expect("a folder");
        let mut store = open_store(folder.path());
        let record = record();
        let key = record.key();
        let mut names = names_of(&["a"]);
        let mut number = 0;
        publish(&store, &record, &tree(&store, number, &names));
        for step in steps {
            match step {
                Step::Switch(next) => {
                    number += 1;
                    names = next;
                    let version = store.followed().link(&tree(&store, number, &names)).expect("linked");
                    prop_assert!(store.followed().switch(key, version).expect("switched"));
                }
                Step::Restart(left) => {
                    let shown = store.followed().shown(key);
                    let link = |target: &str, name: &str| {
                        std::os::unix::fs::symlink(target, shown.join(name)).expect("a link");
                    };
                    match left {
                        Leftover::Nothing => {}
                        Leftover::Version => {
                            let tree = TreeKey::new(Digest::of(b"left"), "", "", "");
                            let number = u64::MAX / 2;
                            let name = VersionName { number, tree, generation: 1 };
                            let _ = fs::create_dir(shown.join(name.to_string()));
                        }
                        Leftover::Links => {
                            link("..data/none", "none");
                            link("..none", NEXT_DATA);
                        }
                        Leftover::MissingLink => {
                            let top = names.first().and_then(|name| name.split('/').next());
                            fs::remove_file(shown.join(top.expect("a name"))).expect("removed");
                        }
                    }
                    drop(store);
                    store = open_store(folder.path());
                    store.followed().directory.catalog.publish(
                        &record.target,
                        crate::object_catalog::PublishedTree {
                            tree: ObjectName::document(Digest::of(b"")),
                            kubelet_knew: true,
                        },
                    );
                }
                Step::Sweep => {
                    store.followed().sweep_older(Duration::ZERO).expect("swept");
                    prop_assert_eq!(store.followed().versions(key), 1);
                }
            }
            check(&store, key, number, &names);
        }
    }
}

/// Readers that open `..data` once find one version, whatever they read in whatever order.
#[test]
fn readers_of_one_resolution_see_one_version() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let folder = tempfile::tempdir().expect("a folder");
    let store = open_store(folder.path());
    let (record, names) = (record(), names_of(&["a", "folder/b", "folder/c"]));
    let key = record.key();
    publish(&store, &record, &tree(&store, 0, &names));
    let data = store.followed().shown(key).join(DATA);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let read = || {
            let mut passes = 0_u64;
            while !is_over.load(Ordering::Relaxed) {
                let pass = std::os::fd::OwnedFd::from(fs::File::open(&data).expect("..data"));
                let pass = PathBuf::from(format!("/proc/self/fd/{}", pass.as_raw_fd()));
                let read = |name| fs::read_to_string(pass.join(name)).expect("a file");
                let one = read("a");
                assert_eq!([read("folder/b"), read("folder/c")], [one.clone(), one]);
                passes += 1;
            }
            passes
        };
        let readers: Vec<_> = (0..2).map(|_| scope.spawn(read)).collect();
        for number in 1..50 {
            let version = store.followed().link(&tree(&store, number % 3, &names)).expect("linked");
            assert!(store.followed().switch(key, version).expect("switched"));
        }
        is_over.store(true, Ordering::Relaxed);
        for reader in readers {
            assert!(reader.join().expect("a reader") > 0);
        }
    });
}
