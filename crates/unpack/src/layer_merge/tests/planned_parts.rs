use super::*;
use crate::tree_plan::FolderNumber;

/// Plans each of some images, and then all of them below their paths.
fn composed(parts: &[(&str, Tar)]) -> Result<(TreePlan, Vec<Vec<Entry>>), UnpackError> {
    composed_under(&Limits::default(), parts)
}

fn composed_under(
    limits: &Limits,
    parts: &[(&str, Tar)],
) -> Result<(TreePlan, Vec<Vec<Entry>>), UnpackError> {
    let layers: Vec<_> = parts.iter().map(|(_, tar)| tar.clone().entries()).collect();
    let mut merger = Merger::new(limits, &EVERYTHING);
    for (number, (at, _)) in (0..).zip(parts) {
        let own = std::slice::from_ref(&layers[number as usize]);
        let plan = &plan_recorded(own, &EVERYTHING)?;
        let path = &RelativePath::parse(at.as_bytes(), &Limits::default()).unwrap();
        merger.part(&PlannedPart { number, path, plan }, &mut Recorded(own))?;
    }
    Ok((merger.finish()?, layers))
}

/// Reads the entries of parts that have one layer each.
struct OfParts<'a>(&'a [Vec<Entry>]);

impl EntryReader for OfParts<'_> {
    fn read(&mut self, layer: u32, offset: u64) -> std::io::Result<Entry> {
        assert_eq!(layer % LAYERS_OF_A_PART, 0, "each has one layer");
        Recorded(self.0).read(layer / LAYERS_OF_A_PART, offset)
    }
}

fn lines_of(parts: &[(&str, Tar)]) -> Vec<String> {
    let (plan, layers) = composed(parts).unwrap_or_else(|error| panic!("{error:?}"));
    let second = format!("={LAYERS_OF_A_PART}.");
    let lines = lines_from(&plan, &mut OfParts(&layers)).into_iter();
    lines.map(|line| line.replace(&second, "=1.")).collect()
}

fn collision(parts: &[(&str, Tar)]) -> (String, usize, usize) {
    match composed(parts).expect_err("a collision") {
        UnpackError::PartsCollide { path, one, two } => (path.to_string(), one, two),
        error => panic!("{error:?}"),
    }
}

fn one() -> Tar {
    Tar::new()
        .folder("etc/", 0o700)
        .file("etc/a", "1")
        .link(b'1', "etc/b", "etc/a")
        .link(b'2', "etc/c", "a")
        .link(b'1', "etc/d", "etc/c")
}

fn two() -> Tar {
    Tar::new().file("etc/x", "22").file("y", "333")
}

#[test]
fn each_part_lies_below_its_path() {
    let expected = [
        "one/",
        "one/etc/",
        "one/etc/a=0.0",
        "one/etc/b=0.0",
        "one/etc/c->a",
        "one/etc/d->a",
        "two/",
        "two/deep/",
        "two/deep/etc/",
        "two/deep/etc/x=1.0",
        "two/deep/y=1.1",
    ];
    let parts = [("one", one()), ("two/deep", two())];
    assert_eq!(lines_of(&parts), expected);
    let (plan, _) = composed(&parts).unwrap();
    assert_eq!(plan.totals.bytes, 1 + 2 + 3);
    assert_eq!(plan.files.iter().map(|file| file.links).collect::<Vec<_>>(), [2, 1, 1]);
}

#[test]
fn folders_of_one_name_are_merged_and_the_later_one_counts() {
    let expected = ["etc/", "etc/a=0.0", "etc/b=0.0", "etc/c->a", "etc/d->a", "etc/x=1.0", "y=1.1"];
    assert_eq!(lines_of(&[(".", one()), (".", two())]), expected);
    // Only an implied folder is of 1970.
    let time = |parts: &[(&str, Tar)]| {
        let (plan, _) = composed(parts).unwrap();
        plan.folder(FolderNumber(0)).modified.seconds
    };
    assert_eq!(time(&[(".", one()), (".", two())]), 0);
    assert_eq!(time(&[(".", two()), (".", one())]), 1000);
}

#[test]
fn a_name_comes_from_one_part() {
    for (other, path) in [
        (Tar::new().file("etc/a", "1"), "etc/a"),
        (Tar::new().file("etc", ""), "etc"),
        (Tar::new().file("etc/a/below", ""), "etc/a"),
        (Tar::new().link(b'2', "etc", "elsewhere"), "etc"),
        (Tar::new().link(b'2', "etc/c", "a"), "etc/c"),
        (Tar::new().folder("etc/c/", 0o755), "etc/c"),
    ] {
        assert_eq!(collision(&[(".", one()), (".", other.clone())]), (path.to_owned(), 0, 1));
        let moved = [("p", two()), (".", one()), (".", other)];
        assert_eq!(collision(&moved), (path.to_owned(), 1, 2));
    }
}

#[test]
fn a_path_belongs_to_its_part_alone() {
    let of = |path: &str| Tar::new().file(path, "");
    for (parts, path) in [
        ([(".", of("p/x")), ("p", two())], "p"),
        ([("p", two()), (".", of("p/x"))], "p"),
        ([("p", two()), (".", of("p"))], "p"),
        ([("p/q", two()), (".", of("p"))], "p"),
        ([(".", of("p")), ("p/q", two())], "p"),
        ([("p", two()), ("p", one())], "p"),
        ([("p", two()), ("p/q", one())], "p"),
        ([("p/q", one()), ("p", two())], "p"),
        ([(".", Tar::new().link(b'2', "p", "/")), ("p/q", two())], "p"),
    ] {
        assert_eq!(collision(&parts), (path.to_owned(), 0, 1), "{path}");
    }
    // Only the folder itself is its own, not those above it.
    assert_eq!(
        lines_of(&[(".", of("p/x")), ("p/q", of("x"))]),
        ["p/", "p/q/", "p/q/x=1.0", "p/x=0.0"]
    );
}

#[test]
fn limits_hold_for_all_parts_together() {
    let limits = Limits { entries: 9, ..Limits::default() };
    let two_of_them = [("a", two()), ("b", two())];
    let refused =
        composed_under(&limits, &[two_of_them.clone(), two_of_them.clone()].concat()[..2]);
    assert!(refused.is_ok(), "eight entries");
    let limits = Limits { entries: 7, ..Limits::default() };
    let refused = composed_under(&limits, &two_of_them);
    assert!(matches!(refused, Err(UnpackError::TooManyEntries { .. })), "{refused:?}");
    let limits = Limits { unpacked_bytes: 9, ..Limits::default() };
    let refused = composed_under(&limits, &two_of_them);
    assert!(matches!(refused, Err(UnpackError::TooManyBytes { .. })), "{refused:?}");
    let limits = Limits { depth: 3, ..Limits::default() };
    let refused = composed_under(&limits, &[("a/b", two())]);
    assert!(matches!(refused, Err(UnpackError::PartPlace { part: 0, .. })), "{refused:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Parts in folders of their own are what they are by themselves.
    #[test]
    fn parts_in_folders_of_their_own_stay_as_they_are(
        first in entries(),
        second in entries(),
    ) {
        let tars = [tar_of(&first), tar_of(&second)];
        let own: Vec<_> = tars.iter().map(|tar| plan(std::slice::from_ref(tar))).collect();
        let [Ok(one), Ok(two)] = &own[..] else { return Ok(()) };
        let [first, second] = tars;
        let below = |folder: &str, plan: &TreePlan, number: u32| {
            let lines = lines(plan).into_iter();
            let lines = lines.map(|line| format!("{folder}/{}", line.replace("=0.", &format!("={number}."))));
            [format!("{folder}/")].into_iter().chain(lines).collect::<Vec<_>>()
        };
        let expected = [below("x", one, 0), below("y", two, 1)].concat();
        prop_assert_eq!(lines_of(&[("x", first), ("y", second)]), expected);
    }

    /// Merged at the root they are both of them, or one name is refused that both have.
    #[test]
    fn parts_at_the_root_are_all_of_both(first in entries(), second in entries()) {
        let tars = [tar_of(&first), tar_of(&second)];
        let own: Vec<_> = tars.iter().map(|tar| plan(std::slice::from_ref(tar))).collect();
        let [Ok(one), Ok(two)] = &own[..] else { return Ok(()) };
        let names = |plan: &TreePlan| -> BTreeSet<String> {
            lines(plan).iter().map(|line| line.split(['=', '>']).next().unwrap_or_default().trim_end_matches('-').to_owned()).collect()
        };
        let (one, two) = (names(one), names(two));
        let is_leaf = |name: &String| !name.ends_with('/');
        let collides = |one: &BTreeSet<String>, two: &BTreeSet<String>| {
            one.iter().filter(|name| is_leaf(name)).any(|name| two.contains(name) || two.contains(&format!("{name}/")))
        };
        let [first, second] = tars;
        match composed(&[(".", first), (".", second)]) {
            Ok((plan, layers)) => {
                prop_assert!(!collides(&one, &two) && !collides(&two, &one));
                let all: BTreeSet<_> = one.union(&two).cloned().collect();
                let found = lines_from(&plan, &mut OfParts(&layers));
                let found: BTreeSet<_> = found.iter().map(|line| line.split(['=', '>']).next().unwrap_or_default().trim_end_matches('-').to_owned()).collect();
                prop_assert_eq!(found, all);
            }
            Err(UnpackError::PartsCollide { path, .. }) => {
                prop_assert!(collides(&one, &two) || collides(&two, &one), "{}", path);
            }
            Err(error) => prop_assert!(false, "{:?}", error),
        }
    }
}
