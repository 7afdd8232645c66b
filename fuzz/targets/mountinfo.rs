//! The mount table's text: no panic, and the topmost mount of a point is at that point.

use store::MountedTree;
use sys::mount::MountTable;

/// Runs one input.
pub(super) fn run(text: &[u8]) {
    let table = MountTable::parse(text);
    for entry in table.iter().take(64) {
        // A whole tree is part of itself.
        if let Some(tree) = MountedTree::of(&entry.origin) {
            assert_eq!(MountedTree::containing(&entry.origin), Some(tree));
        }
        if let Some(top) = table.top_at(&entry.mount_point) {
            assert_eq!(top.mount_point, entry.mount_point);
        }
        let _ = table.containing(&entry.mount_point);
    }
}
