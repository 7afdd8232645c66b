//! Include, exclude and a path, each on a line of its own: what is selected may be
//! selected, and the canonical text is one for equal selections.

use unpack::{Limits, RelativePath, Selection};

/// Runs one input.
pub(super) fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let mut lines = text.splitn(3, '\n');
    let mut line = || lines.next().unwrap_or_default();
    let Ok(selection) = Selection::parse(line(), line()) else {
        return;
    };
    let Ok(path) = RelativePath::parse(line().as_bytes(), &Limits::default()) else {
        return;
    };
    assert_eq!(selection.is_everything(), selection.canonical().is_empty());
    if selection.selects(&path) {
        assert!(selection.may_select_below(&path));
        for folder in path.ancestors() {
            assert!(selection.may_select_below(&folder), "{folder} above {path}");
        }
    }
}
