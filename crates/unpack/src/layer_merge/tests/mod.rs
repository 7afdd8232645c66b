use std::collections::BTreeSet;

use proptest::prelude::*;

use super::super::archive_entry::FOLDER_BYTES;
use super::super::checksum::Checksum;
use super::super::error::Class;
use super::super::testing::{ARTIFACT, IMAGE, Tar};
use super::super::volume_path::PathError;
use super::symlink_walk::LINKS_ON_A_PATH;
use super::*;

mod oracle;
mod planned_parts;
mod sub_path;

fn path(text: &str) -> RelativePath {
    RelativePath::parse(text.as_bytes(), &Limits::default()).unwrap()
}

fn plan_under(
    limits: &Limits,
    layers: &[Tar],
    selection: &Selection,
) -> Result<TreePlan, UnpackError> {
    let mut merger = Merger::new(limits, selection);
    for (layer, tar) in layers.iter().enumerate() {
        merger.archive(layer, &IMAGE);
        for entry in tar.clone().entries() {
            merger.entry(&entry)?;
        }
    }
    merger.finish()
}

static EVERYTHING: std::sync::LazyLock<Selection> = std::sync::LazyLock::new(Selection::default);

/// A reader for plans that hold all names themselves.
struct NoEntries;

impl EntryReader for NoEntries {
    fn read(&mut self, _: u32, _: u64) -> std::io::Result<Entry> {
        Err(std::io::ErrorKind::NotFound.into())
    }
}

/// Entries of layers that are read again, as from their indexes.
struct Recorded<'a>(&'a [Vec<Entry>]);

impl EntryReader for Recorded<'_> {
    fn read(&mut self, layer: u32, offset: u64) -> std::io::Result<Entry> {
        Ok(self.0[layer as usize][usize::try_from(offset).expect("small")].clone())
    }
}

/// Merges layers whose entries can be read again.
fn plan_recorded(layers: &[Vec<Entry>], selection: &Selection) -> Result<TreePlan, UnpackError> {
    plan_recorded_part(layers, selection, RelativePath::root())
}

/// Merges layers whose entries can be read again, and plans the part at a path.
fn plan_recorded_part(
    layers: &[Vec<Entry>],
    selection: &Selection,
    sub_path: RelativePath,
) -> Result<TreePlan, UnpackError> {
    let (limits, mut records) = (Limits::default(), Recorded(layers));
    let mut merger = Merger::new(&limits, selection);
    merger.sub_path = sub_path;
    merger.records = Some(&mut records);
    for (layer, entries) in layers.iter().enumerate() {
        merger.archive(layer, &IMAGE);
        for (offset, entry) in (0..).zip(entries) {
            merger.recorded(entry, offset)?;
        }
    }
    merger.finish()
}

fn plan(layers: &[Tar]) -> Result<TreePlan, UnpackError> {
    plan_under(&Limits::default(), layers, &Selection::default())
}

fn refusal(layers: &[Tar]) -> UnpackError {
    let error = plan(layers).expect_err("a refusal");
    assert_eq!(error.class(), Class::Refused);
    assert!(error.to_string().len() < 1024);
    error
}

/// Returns paths in order, with `/` for folders, `=LAYER.DATA` for files, `->TARGET` for links.
pub(super) fn lines(plan: &TreePlan) -> Vec<String> {
    lines_from(plan, &mut NoEntries)
}

fn lines_from(plan: &TreePlan, records: &mut dyn EntryReader) -> Vec<String> {
    let mut paths: Vec<Vec<String>> = Vec::new();
    let mut lines = Vec::new();
    for node in &plan.nodes {
        let leaf = match node.kind {
            PlannedKind::Directory(_) => {
                PlannedLeaf { name: plan.held_name(node).into(), link: None }
            }
            _ => plan.leaf(node, records).expect("a leaf"),
        };
        let mut path = node.parent.map(|parent| paths[parent as usize].clone()).unwrap_or_default();
        path.push(String::from_utf8_lossy(&leaf.name).into_owned());
        let text = path.join("/");
        let line = match (node.kind, leaf.link) {
            (PlannedKind::Directory(_), _) => format!("{text}/"),
            (PlannedKind::File(file), _) => match plan.source(file) {
                FileSource::Archive { layer, data } => format!("{text}={layer}.{data}"),
                FileSource::Blob { digest, .. } => format!("{text}={}", &digest.hex()[..4]),
            },
            (PlannedKind::SymbolicLink(_), link) => {
                let (target, _) = link.expect("a link");
                format!("{text}->{}", String::from_utf8_lossy(&target))
            }
        };
        lines.push((path.clone(), line));
        paths.push(path);
    }
    lines.sort();
    lines.into_iter().map(|(_, line)| line).collect()
}

fn merged(layers: &[Tar]) -> Vec<String> {
    lines(&plan(layers).unwrap_or_else(|error| panic!("{error:?}")))
}

#[test]
fn layers_lie_over_each_other() {
    let lower = Tar::new().file("a", "").file("d/x", "").folder("e/", 0o700).file("e/y", "");
    let upper = Tar::new().file("a", "").folder("e/", 0o755).file("d/z", "");
    let expected = ["a=1.0", "d/", "d/x=0.1", "d/z=1.1", "e/", "e/y=0.2"];
    assert_eq!(merged(&[lower, upper]), expected);
}

#[test]
fn duplicate_entries_the_last_wins() {
    assert_eq!(merged(&[Tar::new().file("a", "1").file("./a", "2")]), ["a=0.1"]);
}

#[test]
fn whiteouts_hide_lower_layers_only() {
    let lower = Tar::new().file("a", "").file("d/x", "").file("d/y", "").file("e/f/x", "");
    let upper = Tar::new().file(".wh.a", "").file("d/x", "").file(".wh.d", "").file("e/.wh.f", "");
    assert_eq!(merged(&[lower.clone(), upper]), ["d/", "d/x=1.0", "e/"]);
    // Entries of the mark's own layer stay, before or after the mark.
    let before = Tar::new().file(".wh.a", "").file("a", "");
    let after = Tar::new().file("a", "").file(".wh.a", "");
    for upper in [before, after] {
        assert_eq!(merged(&[lower.clone(), upper])[0], "a=1.0");
    }
    assert_eq!(merged(&[lower, Tar::new().file(".wh.no", "")]).len(), 7);
}

#[test]
fn opaque_folders_hide_lower_layers_only() {
    let lower = Tar::new().file("d/x", "").file("d/s/y", "").file("d/s/z", "").file("k", "");
    let before = Tar::new().file("d/.wh..wh..opq", "").file("d/s/y", "").file("d/n", "");
    let after = Tar::new().file("d/s/y", "").file("d/n", "").file("d/.wh..wh..opq", "");
    for upper in [before, after] {
        let lines = merged(&[lower.clone(), upper]);
        assert_eq!(lines, ["d/", "d/n=1.1", "d/s/", "d/s/y=1.0", "k=0.3"]);
    }
    let all = Tar::new().file(".wh..wh..opq", "").file("n", "");
    assert_eq!(merged(&[lower, all]), ["n=1.0"]);
}

#[test]
fn a_folder_that_hiding_leaves_is_an_implied_one() {
    let lower = Tar::new().folder("d/", 0o777).file("d/x", "");
    let upper = Tar::new().file("d/y", "").file(".wh.d", "");
    let plan = plan(&[lower, upper]).unwrap();
    let PlannedKind::Directory(folder) = plan.nodes[0].kind else { panic!("{plan:?}") };
    assert_eq!(*plan.folder(folder), Metadata::of_implied_folder());
}

#[test]
fn folders_files_and_links_replace_each_other() {
    let lower = Tar::new().file("a/x", "").file("b", "").link(b'2', "c", "a");
    let upper = Tar::new().file("a", "").folder("b/", 0o755).folder("c/", 0o755).file("c/y", "");
    let expected = ["a=1.0", "b/", "c/", "c/y=1.1"];
    assert_eq!(merged(&[lower, upper]), expected);
}

#[test]
fn links_of_lower_layers_are_followed_inside_the_root() {
    let lower = Tar::new()
        .folder("usr/lib/", 0o755)
        .link(b'2', "lib", "usr/lib")
        .link(b'2', "usr/up", "../usr/./lib/")
        .link(b'2', "run", "/var/run");
    let upper = Tar::new().file("lib/a", "").file("usr/up/b", "").file("run/c", "");
    let lines = merged(&[lower, upper]);
    let files: Vec<_> = lines.iter().filter(|line| line.contains('=')).collect();
    assert_eq!(files, ["usr/lib/a=1.0", "usr/lib/b=1.1", "var/run/c=1.2"]);
}

#[test]
fn links_of_the_same_layer_are_followed_inside_the_root() {
    let file = Tar::new().link(b'2', "l", "/etc").file("l/passwd", "");
    assert_eq!(merged(&[file]), ["etc/", "etc/passwd=0.0", "l->/etc"]);
    let hard = Tar::new().file("d/x", "").link(b'2', "l", "d").link(b'1', "h", "l/x");
    assert_eq!(merged(&[hard]), ["d/", "d/x=0.0", "h=0.0", "l->d"]);
    let folder = Tar::new().link(b'2', "l", "m").link(b'2', "m", "n/o").folder("l/d/", 0o755);
    assert_eq!(merged(&[folder]), ["l->m", "m->n/o", "n/", "n/o/", "n/o/d/"]);
    let again = [
        Tar::new().link(b'2', "l", "a"),
        Tar::new().link(b'2', "l", "b").file("l/x", "").link(b'2', "l", "c").file("l/y", ""),
    ];
    assert_eq!(merged(&again), ["b/", "b/x=1.0", "c/", "c/y=1.1", "l->c"]);
}

#[test]
fn marks_below_a_link_of_the_same_layer_hide_lower_layers_only() {
    let lower = Tar::new().file("d/old", "").file("d/x", "");
    let link = || Tar::new().link(b'2', "l", "d").file("l/new", "");
    let whiteout = link().file("l/.wh.old", "").file("l/.wh.new", "");
    assert_eq!(merged(&[lower.clone(), whiteout]), ["d/", "d/new=1.0", "d/x=0.1", "l->d"]);
    let opaque = link().file("l/.wh..wh..opq", "");
    assert_eq!(merged(&[lower, opaque]), ["d/", "d/new=1.0", "l->d"]);
}

#[test]
fn the_folder_above_the_root_is_the_root() {
    for target in ["../x", "/../x", "d/../../x", "../../../x", "no/../../x"] {
        let links = Tar::new().folder("d/", 0o755).link(b'2', "l", target);
        for layers in [vec![links.clone(), Tar::new().file("l/f", "")], vec![links.file("l/f", "")]]
        {
            let tree = merged(&layers);
            assert!(tree.iter().any(|line| line.starts_with("x/f=")), "{target}: {tree:?}");
        }
    }
    let to_root = Tar::new().link(b'2', "l", "..").file("l/f", "");
    assert_eq!(merged(&[to_root]), ["f=0.0", "l->.."]);
}

#[test]
fn special_files_replace_what_was_there_and_are_not_shown() {
    let special = |tar: Tar, name: &str| tar.link(b'6', name, "");
    let lower = special(Tar::new().file("a", "").file("d/b/x", ""), "dev/console");
    let upper = special(special(Tar::new(), "a"), "d/b").file("dev/null", "");
    assert_eq!(merged(&[lower.clone(), upper]), ["d/", "dev/", "dev/null=1.0"]);
    // A special file that replaces one of its own layer, and the target of a hard link.
    let same = special(Tar::new().file("a", ""), "a").link(b'1', "e", "a").file("f", "");
    assert_eq!(merged(&[lower.clone(), same]), ["d/", "d/b/", "d/b/x=0.1", "dev/", "f=1.1"]);
    // A file and a whiteout of a higher layer replace and hide them.
    let over = Tar::new().file("dev/console", "").file(".wh.d", "");
    assert_eq!(merged(&[lower.clone(), over]), ["a=0.0", "dev/", "dev/console=1.0"]);
    let below = refusal(&[lower, Tar::new().file("dev/console/x", "")]);
    assert!(matches!(below, UnpackError::NotAFolder { .. }), "{below:?}");
}

#[test]
fn a_link_that_leaves_the_root_is_only_text() {
    let tar = Tar::new().link(b'2', "l", "../../etc").link(b'2', "m", "/etc/passwd");
    assert_eq!(merged(&[tar]), ["l->../../etc", "m->/etc/passwd"]);
}

#[test]
fn link_loops_are_refused() {
    let links = Tar::new().link(b'2', "a", "b").link(b'2', "b", "a");
    for layers in [vec![links.clone(), Tar::new().file("a/x", "")], vec![links.file("a/x", "")]] {
        assert!(matches!(refusal(&layers), UnpackError::TooManyLinks { .. }));
    }
    // The maximum number of links on a path, and one more.
    let chain = |links: usize| {
        let link = |tar: Tar, n| tar.link(b'2', &format!("l{n}"), &format!("l{}", n + 1));
        (0..links).fold(Tar::new(), link).file("l0/x", "")
    };
    assert_eq!(merged(&[chain(LINKS_ON_A_PATH)]).len(), LINKS_ON_A_PATH + 2);
    let error = refusal(&[chain(LINKS_ON_A_PATH + 1)]);
    assert!(matches!(error, UnpackError::TooManyLinks { .. }));
    // Steps through links are bounded for the whole merge.
    let limits = Limits { entries: 40, ..Limits::default() };
    let lower = Tar::new().link(b'2', "a", &"d/../".repeat(15)).folder("d/", 0o755);
    let upper = (0..36).fold(Tar::new(), |tar, number| tar.file(&format!("a/{number}"), ""));
    let error = plan_under(&limits, &[lower, upper], &Selection::default()).unwrap_err();
    assert!(matches!(error, UnpackError::TooManyLinks { .. }), "{error:?}");
}

#[test]
fn limits_apply_to_places_that_links_lead_to() {
    let limits = Limits { depth: 3, path_bytes: 20, ..Limits::default() };
    let lower = Tar::new().folder("a/b/", 0o755).link(b'2', "l", "a/b");
    let deep =
        plan_under(&limits, &[lower.clone(), Tar::new().file("l/c/d", "")], &Selection::default());
    assert!(matches!(
        deep,
        Err(UnpackError::Place { reason: PathError::TooDeep { limit: 3 }, .. })
    ));
    let long = Tar::new().file("l/xxxxxxxxxxxxxxxxx", "");
    let long = plan_under(&limits, &[lower, long], &Selection::default());
    assert!(matches!(
        long,
        Err(UnpackError::Place { reason: PathError::TooLong { length: 21, .. }, .. })
    ));
    let name = "n".repeat(60);
    let limits = Limits { name_bytes: 50, ..Limits::default() };
    let lower = Tar::new().link(b'2', "l", &name);
    let named = plan_under(&limits, &[lower, Tar::new().file("l/x", "")], &Selection::default());
    assert!(matches!(named, Err(UnpackError::Place { reason: PathError::NameTooLong { .. }, .. })));
}

#[test]
fn an_entry_below_a_file_is_refused() {
    for layers in [
        vec![Tar::new().file("a", "").file("a/b", "")],
        vec![Tar::new().file("a", ""), Tar::new().file("a/b/c", "")],
        vec![Tar::new().file("a", ""), Tar::new().file("a/.wh..wh..opq", "")],
    ] {
        let error = refusal(&layers);
        assert!(matches!(&error, UnpackError::NotAFolder { name, .. } if name == "a"), "{error:?}");
    }
}

#[test]
fn hard_links_share_what_their_target_is() {
    let lower =
        Tar::new().file("a", "A").link(b'2', "s", "a").link(b'2', "d", "e").folder("e/", 0o755);
    let upper = Tar::new().link(b'1', "b", "a").link(b'1', "t", "s").file("a", "new");
    let last = Tar::new().link(b'1', "d/c", "b").link(b'1', "b", "b");
    let plan = plan(&[lower, upper, last]).unwrap();
    assert_eq!(lines(&plan), ["a=1.0", "b=0.0", "d->e", "e/", "e/c=0.0", "s->a", "t->a"]);
    let links: Vec<_> = plan.files.iter().map(|file| (file.size, file.links)).collect();
    assert_eq!(links, [(1, 2), (3, 1)]);
    assert_eq!((plan.totals.bytes, plan.totals.files, plan.totals.inodes), (4, 2, 7));
}

#[test]
fn hard_links_to_nothing_or_to_a_folder_are_refused() {
    let missing = refusal(&[Tar::new().link(b'1', "l", "no/such")]);
    assert!(matches!(missing, UnpackError::HardLinkMissing { .. }));
    let hidden = [Tar::new().file("a", ""), Tar::new().file(".wh.a", "").link(b'1', "l", "a")];
    assert!(matches!(refusal(&hidden), UnpackError::HardLinkMissing { .. }));
    let later = refusal(&[Tar::new().link(b'1', "l", "a").file("a", "")]);
    assert!(matches!(later, UnpackError::HardLinkMissing { .. }));
    let folder = refusal(&[Tar::new().folder("d/", 0o755).link(b'1', "l", "d")]);
    assert!(matches!(folder, UnpackError::HardLinkToFolder { .. }));
    let below_file = refusal(&[Tar::new().file("a", "").link(b'1', "l", "a/x")]);
    assert!(matches!(below_file, UnpackError::HardLinkMissing { .. }));
}

#[test]
fn the_root_has_metadata_and_stays_a_folder() {
    let plan = plan(&[Tar::new().folder("./", 0o700).file("a", "")]).unwrap();
    assert_eq!(plan.root.permissions.mode, 0o755);
    assert_eq!(plan.root.modified.seconds, 1000);
    let limits = Limits::default();
    let mut merger = Merger::new(&limits, &EVERYTHING);
    let kind = EntryKind::SymbolicLink { target: (*b"x").into() };
    let metadata = Metadata::of_implied_folder();
    let link = Entry { path: RelativePath::root(), kind, metadata };
    assert!(matches!(merger.entry(&link), Err(UnpackError::RootReplaced { .. })));
}

#[test]
fn entries_and_implied_folders_are_bounded_together() {
    let limits = Limits { entries: 5, ..Limits::default() };
    let count = |tar: Tar| plan_under(&limits, &[tar], &Selection::default());
    assert!(count(Tar::new().file("a/b/c/d/e", "")).is_ok());
    let error = count(Tar::new().file("a/b/c/d/e/f", "")).unwrap_err();
    assert!(matches!(error, UnpackError::TooManyEntries { limit: 5 }));
}

#[test]
fn bytes_of_a_tree_are_bounded() {
    let limits = Limits { unpacked_bytes: 5, ..Limits::default() };
    let layers = [Tar::new().file("a", "123"), Tar::new().file("b", "456")];
    let error = plan_under(&limits, &layers, &Selection::default()).unwrap_err();
    assert!(matches!(error, UnpackError::TooManyBytes { limit: 5 }));
    let only = Selection::parse("a", "").unwrap();
    assert!(plan_under(&limits, &layers, &only).is_ok());
}

#[test]
fn a_selection_includes_the_folders_above_it() {
    let tar = Tar::new()
        .file("bin/a", "")
        .file("bin/b", "")
        .link(b'1', "lib/a", "bin/a")
        .folder("empty/", 0o755)
        .file("lib/x/y", "");
    let selected = |include, exclude| {
        let selection = Selection::parse(include, exclude).unwrap();
        plan_under(&Limits::default(), std::slice::from_ref(&tar), &selection)
            .map(|plan| lines(&plan))
    };
    assert_eq!(selected("bin", "bin/b").unwrap(), ["bin/", "bin/a=0.0"]);
    assert_eq!(selected("lib/a", "").unwrap(), ["lib/", "lib/a=0.0"]);
    assert_eq!(selected("empty", "").unwrap(), ["empty/"]);
    assert_eq!(selected("**/y", "").unwrap(), ["lib/", "lib/x/", "lib/x/y=0.2"]);
    assert_eq!(selected("", "bin, lib/x").unwrap(), ["empty/", "lib/", "lib/a=0.0"]);
    assert!(matches!(selected("nothing", ""), Err(UnpackError::NothingSelected)));
    assert!(matches!(plan(&[]), Err(UnpackError::Empty)));
}

const READABLE: Permissions = Permissions { mode: 0o444, uid: 0, gid: 0 };

fn title(merger: &mut Merger<'_>, layer: usize, title: &str) -> Result<(), UnpackError> {
    let rule = FileRule { path: path(title), recorded: None };
    merger.file(layer, &rule, Digest::of(b"blob"), 4, READABLE)
}

/// Adds an ORAS folder.
fn folder(merger: &mut Merger<'_>, layer: usize, title: &str, tar: Tar) -> Result<(), UnpackError> {
    merger.archive(layer, &ArchiveRule { within: Some(path(title)), ..ARTIFACT });
    tar.entries().iter().try_for_each(|entry| merger.entry(entry))
}

#[test]
fn titles_of_one_blob_are_one_inode() {
    let limits = Limits::default();
    let mut merger = Merger::new(&limits, &EVERYTHING);
    title(&mut merger, 0, "a").unwrap();
    title(&mut merger, 1, "d/b").unwrap();
    let plan = merger.finish().unwrap();
    assert_eq!((plan.totals.bytes, plan.totals.files), (4, 1));
    assert_eq!(plan.files[0].links, 2);
    let source = FileSource::Blob { digest: Digest::of(b"blob"), permissions: READABLE };
    assert_eq!(plan.source(0), source);
}

#[test]
fn titles_never_replace_and_are_never_replaced() {
    let limits = Limits::default();
    for (first, second) in [("a", "a"), ("a/b", "a")] {
        let mut merger = Merger::new(&limits, &EVERYTHING);
        title(&mut merger, 0, first).unwrap();
        let error = title(&mut merger, 1, second).unwrap_err();
        assert!(matches!(error, UnpackError::TitleCollides { layer: 1, other: 0, .. }));
    }
    let mut merger = Merger::new(&limits, &EVERYTHING);
    title(&mut merger, 0, "d/f").unwrap();
    for tar in [Tar::new().file("d/f", ""), Tar::new().folder("d/f/", 0o755)] {
        let error = folder(&mut merger, 1, "d", tar).unwrap_err();
        assert!(matches!(error, UnpackError::TitleCollides { layer: 0, other: 1, .. }));
    }
    let error = folder(&mut merger, 1, "d", Tar::new().file("d/f/x", "")).unwrap_err();
    assert!(matches!(error, UnpackError::NotAFolder { .. }));
    let mut merger = Merger::new(&limits, &EVERYTHING);
    folder(&mut merger, 0, "d", Tar::new().file("d/f/x", "")).unwrap();
    let error = title(&mut merger, 1, "d/f").unwrap_err();
    assert!(matches!(error, UnpackError::TitleCollides { layer: 1, other: 0, .. }));
    title(&mut merger, 2, "d/g").unwrap();
}

#[test]
fn entries_outside_the_title_of_their_folder_are_refused() {
    let limits = Limits::default();
    let outcome = |tar: Tar| folder(&mut Merger::new(&limits, &EVERYTHING), 0, "d/e", tar);
    outcome(Tar::new().folder("./", 0o755).folder("d/", 0o755).file("d/e/x", "")).unwrap();
    for tar in [
        Tar::new().file("x", ""),
        Tar::new().file("d/x", ""),
        Tar::new().file("d/ex", ""),
        Tar::new().folder("f/", 0o755),
        Tar::new().link(b'2', "d", "x"),
        Tar::new().file("d/e/x", "").link(b'1', "d/e/y", "d/x"),
    ] {
        let error = outcome(tar).unwrap_err();
        assert!(matches!(error, UnpackError::OutsideTitle { .. }), "{error:?}");
    }
}

#[test]
fn links_are_followed_in_images_only() {
    let limits = Limits::default();
    let mut merger = Merger::new(&limits, &EVERYTHING);
    merger.archive(0, &ARTIFACT);
    for entry in Tar::new().folder("d/", 0o755).link(b'2', "l", "d").entries() {
        merger.entry(&entry).unwrap();
    }
    let error = title(&mut merger, 1, "l/x").unwrap_err();
    assert!(matches!(error, UnpackError::ThroughLink { .. }));
    merger.archive(2, &ARTIFACT);
    let entry = &Tar::new().file("l/x", "").entries()[0];
    assert!(matches!(merger.entry(entry), Err(UnpackError::ThroughLink { .. })));
}

fn entries() -> impl Strategy<Value = Vec<(u8, String, String)>> {
    let paths = || prop::collection::vec("[abc]", 1..4).prop_map(|names| names.join("/"));
    let target = prop_oneof![
        4 => paths(),
        1 => paths().prop_map(|path| format!("/{path}")),
        2 => paths().prop_map(|path| format!("../{path}")),
        1 => (paths(), paths()).prop_map(|(a, b)| format!("{a}/../{b}")),
    ];
    prop::collection::vec((0..12_u8, paths(), target), 1..6)
}

fn tar_of(entries: &[(u8, String, String)]) -> Tar {
    entries.iter().fold(Tar::new(), |tar, (kind, path, target)| {
        let (folder, name) = path.rsplit_once('/').unwrap_or((".", path));
        match kind {
            0..=3 => tar.file(path, "content"),
            4..=5 => tar.folder(&format!("{path}/"), 0o755),
            6..=7 => tar.link(b'2', path, target),
            8 => tar.link(b'1', path, target.rsplit("../").next().unwrap().trim_start_matches('/')),
            9 => tar.link(b'6', path, ""),
            10 => tar.file(&format!("{folder}/.wh.{name}"), ""),
            _ => tar.file(&format!("{path}/.wh..wh..opq"), ""),
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn merging_is_what_applying_one_by_one_is(layers in prop::collection::vec(entries(), 1..5)) {
        let layers: Vec<_> = layers.iter().map(|entries| tar_of(entries)).collect();
        let expected = oracle::apply(&layers.iter().map(|tar| tar.clone().entries()).collect::<Vec<_>>());
        let found = plan(&layers);
        match (&found, &expected) {
            (Ok(plan), Some(expected)) => prop_assert_eq!(&lines(plan), expected),
            (Err(UnpackError::Empty), Some(expected)) => prop_assert!(expected.is_empty()),
            (Err(_), None) => {}
            _ => prop_assert!(false, "{:?} is not {:?}", found, expected),
        }
        if let Ok(plan) = found {
            // Parents come first, and the number of links of every file is right.
            let mut seen = BTreeSet::new();
            let mut links = vec![0; plan.files.len()];
            for (index, node) in plan.nodes.iter().enumerate() {
                prop_assert!(node.parent.is_none_or(|parent| (parent as usize) < index));
                let name = plan.held_name(node).to_vec();
                prop_assert!(!name.is_empty() && seen.insert((node.parent, name)));
                if let PlannedKind::File(file) = node.kind {
                    links[file as usize] += 1;
                }
            }
            prop_assert_eq!(links, plan.files.iter().map(|file| file.links).collect::<Vec<_>>());
        }
    }
}

#[test]
fn folders_count_with_the_memory_they_take() {
    assert!(
        (size_of::<Folder>() + size_of::<Metadata>() + size_of::<MergeNode>()) as u64
            <= FOLDER_BYTES
    );
    // Short names, each of a folder.
    let tar = |name: fn(u32) -> String| (0..300).fold(Tar::new(), |tar, n| tar.file(&name(n), ""));
    let limits = Limits { metadata_bytes: 64 << 10, ..Limits::default() };
    assert!(plan_under(&limits, &[tar(|n| format!("{n}"))], &Selection::default()).is_ok());
    let implied = tar(|n| format!("{n}/a"));
    let explicit = (0..300).fold(Tar::new(), |tar, n| tar.folder(&format!("{n}/"), 0o755));
    for layer in [implied, explicit] {
        let refused = plan_under(&limits, &[layer], &Selection::default());
        assert!(matches!(refused, Err(UnpackError::TooMuchMetadata { .. })), "{refused:?}");
    }
}

/// Returns the selected lines of a plan of everything, and those of the folders that lead to them.
fn selected_lines(whole: &[String], selection: &Selection) -> Vec<String> {
    let path_of = |line: &str| {
        let end = line.find(['=', '>']).map_or(line.len(), |end| end);
        path(line[..end].trim_end_matches(['-', '/']))
    };
    let shown: Vec<_> = whole.iter().filter(|line| selection.selects(&path_of(line))).collect();
    let leads = |line: &&String| {
        line.ends_with('/') && shown.iter().any(|shown| path_of(shown).is_within(&path_of(line)))
    };
    whole.iter().filter(|line| shown.contains(line) || leads(line)).cloned().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// A selected tree is a part of the whole one, also if its names are read again. Refusals do not
    /// depend on the selection.
    #[test]
    fn what_is_read_again_and_selected_is_a_part_of_the_whole(
        layers in prop::collection::vec(entries(), 1..5),
        include in prop::option::of("[abc*](/[abc*]){0,2}"),
        exclude in prop::option::of("[abc](/[abc*]){0,2}"),
    ) {
        let tars: Vec<_> = layers.iter().map(|entries| tar_of(entries)).collect();
        let layers: Vec<_> = tars.iter().map(|tar| tar.clone().entries()).collect();
        let (include, exclude) = (include.unwrap_or_default(), exclude.unwrap_or_default());
        let selection = Selection::parse(&include, &exclude).expect("patterns");
        let whole = plan(&tars);
        let everything = plan_recorded(&layers, &EVERYTHING);
        let selected = plan_recorded(&layers, &selection);
        let lines_of = |plan: &TreePlan| lines_from(plan, &mut Recorded(&layers));
        match whole {
            Ok(whole) => {
                let whole = lines(&whole);
                prop_assert_eq!(&lines_of(&everything.expect("the same")), &whole);
                let expected = selected_lines(&whole, &selection);
                match selected {
                    Ok(plan) => {
                        prop_assert_eq!(lines_of(&plan), expected);
                        prop_assert!(plan.files.iter().all(|file| file.links > 0));
                    }
                    Err(UnpackError::NothingSelected | UnpackError::Empty) => prop_assert!(expected.is_empty()),
                    Err(error) => prop_assert!(false, "{:?}", error),
                }
            }
            Err(UnpackError::Empty) => prop_assert!(selected.is_err()),
            Err(error) => {
                let class = |error: &UnpackError| std::mem::discriminant(error);
                prop_assert_eq!(class(&error), class(&everything.expect_err("refused")));
                prop_assert_eq!(class(&error), class(&selected.expect_err("refused")));
            }
        }
    }
}

/// Entries of files with long names, created lazily.
fn long_names(count: u32) -> impl Iterator<Item = Entry> {
    (0..count).map(|number| {
        let kind = EntryKind::File { size: 0, data: number, checksum: Checksum::Xxh3(0) };
        let path = RelativePath::parse(format!("{number:0100}").as_bytes(), &Limits::default());
        Entry { path: path.expect("a path"), kind, metadata: Metadata::of_implied_folder() }
    })
}

#[test]
fn a_million_entries_fit_the_default_budget() {
    let limits = Limits::default();
    let of_few = 20_000;
    let mut merger = Merger::new(&limits, &EVERYTHING);
    merger.archive(0, &IMAGE);
    (0..).zip(long_names(of_few)).try_for_each(|(at, entry)| merger.recorded(&entry, at)).unwrap();
    let of_each = merger.memory_bytes() / u64::from(of_few);
    assert!(of_each * 1_000_000 < 125 << 20, "{of_each} bytes for each");
    assert!(merger.memory_bytes() <= Merger::estimate(of_few.into(), &EVERYTHING));
    // Names that are not selected are neither kept nor planned.
    let nothing = Selection::parse("other", "").unwrap();
    let mut merger = Merger::new(&limits, &nothing);
    merger.archive(0, &IMAGE);
    long_names(of_few).try_for_each(|entry| merger.entry(&entry)).unwrap();
    assert!(merger.memory_bytes() / u64::from(of_few) < 100, "{}", merger.memory_bytes());
}

#[test]
fn merging_fails_before_it_takes_more_memory_than_allowed() {
    let limits = Limits::default();
    let mut merger = Merger::new(&limits, &EVERYTHING);
    merger.allowance = 64 << 10;
    merger.archive(0, &IMAGE);
    let stopped = long_names(20_000).try_for_each(|entry| merger.entry(&entry)).unwrap_err();
    let UnpackError::Memory { bytes, entries } = stopped else { panic!("{stopped:?}") };
    assert!(bytes < 80 << 10 && entries < 1000, "{bytes} bytes, {entries} entries");
}

/// Counts the entries that are read again.
struct CountingReader<'a>(Recorded<'a>, u64);

impl EntryReader for CountingReader<'_> {
    fn read(&mut self, layer: u32, offset: u64) -> std::io::Result<Entry> {
        self.1 += 1;
        self.0.read(layer, offset)
    }
}

#[test]
fn reads_of_link_targets_are_bounded() {
    let entry = |text: &str, kind| {
        let metadata = Metadata::of_implied_folder();
        Entry { path: path(text), kind, metadata }
    };
    // More links than the cache holds, each to its own folder.
    let names: Vec<_> = (0..LINKS_ON_A_PATH).map(|number| format!("l{number}")).collect();
    let link = |name: &String| entry(name, EntryKind::SymbolicLink { target: (*b".").into() });
    let through = names.join("/");
    let file = |data| {
        let kind = EntryKind::File { size: 0, data, checksum: Checksum::Xxh3(0) };
        entry(&format!("{through}/f{data}"), kind)
    };
    let layers = [names.iter().map(link).collect(), (0..1000).map(file).collect::<Vec<_>>()];
    let limits = Limits { entries: 2000, ..Limits::default() };
    let everything = Selection::default();
    let mut reader = CountingReader(Recorded(&layers), 0);
    let mut merger = Merger::new(&limits, &everything);
    merger.records = Some(&mut reader);
    let mut merge = || -> Result<(), UnpackError> {
        for (layer, entries) in layers.iter().enumerate() {
            merger.archive(layer, &IMAGE);
            for (offset, entry) in (0..).zip(entries) {
                merger.recorded(entry, offset)?;
            }
        }
        Ok(())
    };
    let result = merge();
    assert!(matches!(result, Err(UnpackError::TooManyLinks { .. })), "{result:?}");
    assert!(reader.1 <= limits.entries, "{} reads", reader.1);
}
