//! The meaning of layers, as directly as it can be written: one flat map from paths to
//! what is there, and every step a search through all of it.

use std::collections::BTreeMap;

use crate::archive_entry::{Entry, EntryKind};

#[derive(Clone, PartialEq)]
enum What {
    Folder,
    File(String),
    Link(String),
    Special,
}

type Path = Vec<String>;
type Tree = BTreeMap<Path, (usize, What)>;

/// The tree's lines, or none if something is refused.
pub(super) fn apply(layers: &[Vec<Entry>]) -> Option<Vec<String>> {
    let mut tree = Tree::new();
    for (layer, entries) in layers.iter().enumerate() {
        for entry in entries {
            step(&mut tree, layer, entry)?;
        }
    }
    let line = |(path, (_, what)): (&Path, &(usize, What))| {
        let path = path.join("/");
        Some(match what {
            What::Folder => format!("{path}/"),
            What::File(file) => format!("{path}={file}"),
            What::Link(target) => format!("{path}->{target}"),
            What::Special => return None,
        })
    };
    Some(tree.iter().filter_map(line).collect())
}

fn step(tree: &mut Tree, layer: usize, entry: &Entry) -> Option<()> {
    let mut path = names(entry.path.as_bytes());
    if entry.kind == EntryKind::Opaque {
        let folder = real(tree, &path)?;
        make(tree, layer, &folder)?;
        hide(tree, layer, |path| path.starts_with(&folder) && path.len() > folder.len());
        return Some(());
    }
    let name = path.pop()?;
    let mut path = real(tree, &path)?;
    make(tree, layer, &path)?;
    path.push(name);
    let what = match &entry.kind {
        EntryKind::Directory => What::Folder,
        EntryKind::File { data, .. } => What::File(format!("{layer}.{data}")),
        EntryKind::SymbolicLink { target } => What::Link(text(target)),
        EntryKind::Special => What::Special,
        EntryKind::HardLink { target } => {
            let mut target = names(target.as_bytes());
            let name = target.pop()?;
            let mut target = real(tree, &target)?;
            target.push(name);
            let (_, what) = tree.get(&target)?;
            if *what == What::Folder {
                return None;
            }
            what.clone()
        }
        EntryKind::Whiteout => {
            hide(tree, layer, |candidate| candidate.starts_with(&path));
            return Some(());
        }
        EntryKind::Opaque => return None,
    };
    if what != What::Folder || tree.get(&path).is_some_and(|(_, what)| *what != What::Folder) {
        tree.retain(|candidate, _| !candidate.starts_with(&path));
    }
    tree.insert(path, (layer, what));
    Some(())
}

/// Removes what lower layers have, then gives what is left its folders back.
fn hide(tree: &mut Tree, layer: usize, is_hidden: impl Fn(&Path) -> bool) {
    tree.retain(|path, (made_by, _)| *made_by == layer || !is_hidden(path));
    let left: Vec<Path> = tree.keys().cloned().collect();
    for path in left {
        for length in 1..path.len() {
            tree.entry(path[..length].to_vec()).or_insert((layer, What::Folder));
        }
    }
}

/// Resolves a directory's path, one link after the other.
fn real(tree: &Tree, path: &[String]) -> Option<Path> {
    let mut path = path.to_vec();
    for _ in 0..41 {
        // The first `..` or link decides how the path goes on.
        let mut index = 0;
        let target = loop {
            if index == path.len() {
                return Some(path);
            }
            if path[index] == ".." {
                path.drain(index.saturating_sub(1)..=index);
                index = index.saturating_sub(1);
                continue;
            }
            if let Some((_, What::Link(target))) = tree.get(&path[..=index]) {
                break target;
            }
            index += 1;
        };
        let start = if target.starts_with('/') { 0 } else { index };
        let mut followed = path[..start].to_vec();
        followed.extend(names(target.as_bytes()));
        followed.extend_from_slice(&path[index + 1..]);
        path = followed;
    }
    None
}

fn make(tree: &mut Tree, layer: usize, folder: &[String]) -> Option<()> {
    for length in 1..=folder.len() {
        let (_, what) = tree.entry(folder[..length].to_vec()).or_insert((layer, What::Folder));
        if *what != What::Folder {
            return None;
        }
    }
    Some(())
}

fn names(path: &[u8]) -> Path {
    text(path).split('/').filter(|name| !["", "."].contains(name)).map(str::to_owned).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
