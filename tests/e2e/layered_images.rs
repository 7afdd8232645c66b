//! Compares random layers with every kind of archive entry with the result of containerd.
//!
//! `LAYERED_IMAGES=1000 make test ARGUMENTS='--test e2e -- layered_images::'` sets their number, and
//! `LAYERED_IMAGES_SEED` the seed.

use std::{cell::Cell, fmt};

use proptest::{
    collection::vec,
    option::weighted,
    prelude::*,
    sample::{Index, select},
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

use crate::support::{Containerd, Image, Kind, Node, Tar, Tree, registry, unique};

/// The number of images that every run compares: about half a minute.
const IMAGES: u32 = 60;

/// One entry of a layer.
#[derive(Clone)]
struct Entry {
    /// The name as it is written.
    name: String,
    what: EntryKind,
    /// Extended headers that change the form of the entry, and not its meaning.
    style: Style,
}

#[derive(Clone, Debug)]
enum EntryKind {
    Folder {
        mode: u32,
        owner: u64,
    },
    File {
        mode: u32,
        owner: u64,
        text: &'static str,
    },
    SymbolicLink {
        target: String,
    },
    /// A link to one of the files before it, or to `target` if there is none.
    HardLink {
        earlier: Option<Index>,
        target: String,
    },
    Special {
        kind: u8,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Plain,
    PaxName,
    LongName,
    Attributes,
}

/// Marks come first, as in the layers of every known builder: containerd lets a later one hide the
/// layer's own entries, which the specification forbids.
#[derive(Clone, Debug)]
struct RandomLayer {
    marks: Vec<Entry>,
    entries: Vec<Entry>,
}

impl fmt::Debug for Entry {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {:?} {:?}", self.name, self.what, self.style)
    }
}

/// Generates spellings of one name.
fn spelled(name: impl Strategy<Value = String>) -> impl Strategy<Value = String> {
    let prefix = select(vec!["", "", "", "./", "/", "//", "././/"]);
    (prefix, name, any::<u8>()).prop_map(|(prefix, name, odd)| {
        let name = if odd < 20 { name.replace('/', "//") } else { name };
        let name = if (20..40).contains(&odd) { name.replace('/', "/./") } else { name };
        format!("{prefix}{name}")
    })
}

/// Generates names of directories. Most have directories or links to directories, so that most images can be unpacked.
fn folder() -> impl Strategy<Value = String> {
    let names = vec![
        "d",
        "e",
        "d/e",
        "d",
        "e",
        "l",
        "l/d",
        "m",
        "d/l",
        "d/l/e",
        "m/l",
        "n",
        "d/f",
        "e/deep/er",
    ];
    select(names).prop_map(str::to_owned)
}

fn below(names: Vec<&'static str>) -> impl Strategy<Value = String> {
    (prop_oneof![2 => Just(None), 5 => folder().prop_map(Some)], select(names)).prop_map(
        |(folder, name)| match folder {
            None => name.to_owned(),
            Some(folder) => format!("{folder}/{name}"),
        },
    )
}

fn mode() -> impl Strategy<Value = u32> {
    select(vec![0o644, 0o755, 0o600, 0o700, 0o4755, 0o4711, 0o1777, 0o444, 0])
}

fn owner() -> impl Strategy<Value = u64> {
    select(vec![0, 0, 1000, 65_534, 0o7_777_777, 0o10_000_000, 4_000_000_000])
}

fn entry() -> impl Strategy<Value = Entry> {
    let any_name = || below(vec!["f", "g", "d", "e", "l", "m", "n"]);
    let files = || below(vec!["f", "f", "g", "h", "d"]);
    let links = || below(vec!["l", "m", "n", "l", "m", "n", "d", "f"]);
    let texts = select(vec!["", "one", "another"]);
    let targets = select(vec![
        "d",
        "e",
        "/d",
        "/d/e",
        "../d",
        "../e",
        ".",
        "/",
        "..",
        "../../..",
        "l",
        "m",
        "/l",
        "d/l",
        "nowhere",
        "no/where",
        "/e/deep",
        "f",
        "./d//e/",
        "../../d/e",
        "n",
    ]);
    let style = select(vec![
        Style::Plain,
        Style::Plain,
        Style::Plain,
        Style::PaxName,
        Style::LongName,
        Style::Attributes,
    ]);
    let named = prop_oneof![
        6 => (spelled(prop_oneof![folder(), below(vec!["d", "e", "l"])]), any::<bool>(), mode(), owner())
            .prop_map(|(name, slash, mode, owner)| {
                let name = if slash { format!("{name}/") } else { name };
                (name, EntryKind::Folder { mode, owner })
            }),
        8 => (spelled(files()), mode(), owner(), texts)
            .prop_map(|(name, mode, owner, text)| (name, EntryKind::File { mode, owner, text })),
        5 => (spelled(links()), targets)
            .prop_map(|(name, target)| (name, EntryKind::SymbolicLink { target: target.to_owned() })),
        2 => (spelled(any_name()), weighted(0.9, any::<Index>()), spelled(files()))
            .prop_map(|(name, earlier, target)| (name, EntryKind::HardLink { earlier, target })),
        1 => (spelled(any_name()), select(vec![b'3', b'4', b'6']))
            .prop_map(|(name, kind)| (name, EntryKind::Special { kind })),
        1 => (select(vec![".", "./", "/", "//", "./."]), mode())
            .prop_map(|(name, mode)| (name.to_owned(), EntryKind::Folder { mode, owner: 0 })),
    ];
    (named, style).prop_map(|((name, what), style)| Entry { name, what, style })
}

fn mark() -> impl Strategy<Value = Entry> {
    let marks = vec![".wh.f", ".wh.d", ".wh.e", ".wh.l", ".wh.m", ".wh.g", ".wh..wh..opq"];
    let what = EntryKind::File { mode: 0o644, owner: 0, text: "" };
    spelled(below(marks)).prop_map(move |name| Entry {
        name,
        what: what.clone(),
        style: Style::Plain,
    })
}

fn image() -> impl Strategy<Value = Vec<RandomLayer>> {
    let bottom = vec(entry(), 3..12).prop_map(|entries| RandomLayer { marks: Vec::new(), entries });
    let upper = (vec(mark(), 0..4), vec(entry(), 0..8)).prop_map(|(mut marks, entries)| {
        // No mark is in a directory that a later mark hides.
        marks.sort_by_key(|mark| {
            mark.name.split('/').filter(|name| !["", "."].contains(name)).count()
        });
        RandomLayer { marks, entries }
    });
    (bottom, vec(upper, 0..4)).prop_map(|(bottom, mut layers)| {
        layers.insert(0, bottom);
        aim_hard_links(&mut layers);
        layers
    })
}

/// Points most hard links at files of the image, since an image with a dangling one is refused.
fn aim_hard_links(layers: &mut [RandomLayer]) {
    let mut files: Vec<String> = Vec::new();
    for Entry { name, what, .. } in layers.iter_mut().flat_map(|layer| &mut layer.entries) {
        match what {
            EntryKind::File { .. } => files.push(name.clone()),
            EntryKind::HardLink { earlier: Some(earlier), target } if !files.is_empty() => {
                target.clone_from(earlier.get(&files));
            }
            _ => {}
        }
    }
}

impl RandomLayer {
    fn archive(&self) -> Vec<u8> {
        let entries = self.marks.iter().chain(&self.entries);
        entries.fold(Tar::new(), |tar, entry| entry.append(tar)).finish()
    }
}

impl Entry {
    fn append(&self, tar: Tar) -> Tar {
        // Longer than the field of a header, and the same name.
        let name = match self.style {
            Style::LongName => format!("{}{}", "./".repeat(60), self.name.trim_start_matches('/')),
            _ => self.name.clone(),
        };
        let (tar, name) = match self.style {
            Style::PaxName => {
                (tar.pax(&[("path", &name), ("mtime", "1000000000.25")]), "x".to_owned())
            }
            Style::Attributes => (tar.pax(&[("SCHILY.xattr.user.a", "b"), ("comment", "c")]), name),
            Style::Plain | Style::LongName => (tar, name),
        };
        match &self.what {
            EntryKind::Folder { mode, owner } => tar.owned_folder(&name, *mode, (*owner, *owner)),
            EntryKind::File { mode, owner, text } => {
                tar.owned_file(&name, *mode, (*owner, *owner), text)
            }
            EntryKind::SymbolicLink { target } => tar.symbolic_link(&name, target),
            EntryKind::HardLink { target, .. } => tar.hard_link(&name, target),
            EntryKind::Special { kind } => tar.special(&name, *kind, ""),
        }
    }
}

/// Returns whether containerd may refuse these layers although the driver unpacks them. containerd removes the entry that
/// a hard link replaces before it looks for the link's target, and it sets the times of a layer's directories after all
/// entries, also where later entries have replaced a directory.
fn may_only_containerd_refuse(error: &str, layers: &[RandomLayer]) -> bool {
    let names = |entry: &Entry| -> Vec<String> {
        let names = entry.name.split('/').filter(|name| !["", "."].contains(name));
        names.map(str::to_owned).collect()
    };
    let is_folder = |entry: &Entry| matches!(entry.what, EntryKind::Folder { .. });
    let replaces_a_folder = |layer: &RandomLayer| {
        layer.entries.iter().enumerate().any(|(index, entry)| {
            let later = layer.entries[index..].iter().filter(|later| !is_folder(later));
            let mut last_names = later.filter_map(|later| names(later).pop());
            is_folder(entry) && last_names.any(|name| names(entry).contains(&name))
        })
    };
    error.contains(": link ") || layers.iter().any(replaces_a_folder)
}

/// Returns the content that a volume shows of an image that containerd unpacks to this tree.
fn promised(mut tree: Tree, layers: &[RandomLayer]) -> Tree {
    let mut entries = layers.iter().flat_map(|layer| &layer.entries);
    // containerd gives a file the mode of its last link, the driver that of the file's own entry.
    let has_links = entries.any(|entry| matches!(entry.what, EntryKind::HardLink { .. }));
    for entry in tree.entries.values_mut() {
        entry.mode &= 0o777;
        match entry.kind {
            // Directories without an entry have the time of their creation.
            Kind::Folder => entry.modified = 0,
            _ if has_links => (entry.mode, entry.owner, entry.modified) = (0, (0, 0), 0),
            _ => {}
        }
    }
    tree
}

#[test]
fn random_layers_are_unpacked_as_containerd_does_it() {
    let number = |name: &str, default| {
        std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
    };
    let node = Node::start();
    let (root, run) = (node.sandbox.folder("containerd"), node.sandbox.folder("run"));
    let containerd = Containerd::start(&root, &run);
    let config = Config {
        cases: number("LAYERED_IMAGES", IMAGES),
        failure_persistence: None,
        max_shrink_iters: 200,
        ..Config::default()
    };
    let mut seed = [0; 32];
    seed[..4].copy_from_slice(&number("LAYERED_IMAGES_SEED", 1).to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let [unpacked, refused] = [0, 0].map(Cell::new);
    let compared = TestRunner::new_with_rng(config, rng).run(&image(), |layers| {
        let name = format!("{}:v1", unique("random"));
        let (repository, _) = name.split_once(':').expect("a tag");
        let image = layers.iter().fold(Image::new(), |image, layer| image.layer(layer.archive()));
        image.push(registry(), repository, "v1");
        let target = node.sandbox.folder(repository);
        let mounted = containerd.try_mount(&format!("{}/{name}", registry().host()), &target);
        let by_containerd = mounted.map(|()| Tree::of(&target));
        let _ = nix::mount::umount(&target);
        let volume = node.kubelet.new_volume(&node.proxy.reference(&name));
        let volume = volume.attribute("permissions", "Preserve");
        let published = node.kubelet.publish(&volume);
        let by_driver = published.map(|()| Tree::of(volume.target()));
        node.kubelet.unpublish(&volume);
        match (by_driver, by_containerd) {
            (Ok(tree), Ok(expected)) => {
                let (tree, expected) = [tree, expected].map(|tree| promised(tree, &layers)).into();
                unpacked.set(unpacked.get() + 1);
                prop_assert_eq!(tree, expected.without_special_files());
            }
            (Err(status), Ok(expected)) => {
                let is_empty = expected.without_special_files().entries.is_empty();
                prop_assert!(is_empty && status.message().contains("no files"), "{}", status);
            }
            (Ok(_), Err(error)) if may_only_containerd_refuse(&error, &layers) => {}
            (Ok(tree), Err(error)) => prop_assert!(false, "{tree:?}\ncontainerd: {error}"),
            (Err(_), Err(_)) => refused.set(refused.get() + 1),
        }
        Ok(())
    });
    let [unpacked, refused] = [unpacked, refused].map(Cell::into_inner);
    println!("{unpacked} images are the same, {refused} are refused by both");
    compared.unwrap_or_else(|error| panic!("{error}"));
    assert!(unpacked > refused / 2, "{unpacked} and {refused}");
}
