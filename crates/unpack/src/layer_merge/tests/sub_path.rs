use super::*;

fn part(tar: &Tar, selection: (&str, &str), sub_path: &str) -> Result<Vec<String>, UnpackError> {
    let layers = [tar.clone().entries()];
    let selection = Selection::parse(selection.0, selection.1).unwrap();
    let plan = plan_recorded_part(&layers, &selection, path(sub_path))?;
    Ok(lines_from(&plan, &mut Recorded(&layers)))
}

fn problem(tar: &Tar, sub_path: &str) -> String {
    let error = part(tar, ("", ""), sub_path).expect_err("a refusal");
    assert_eq!(error.class(), Class::Refused);
    assert!(error.to_string().len() < 1024);
    match error {
        UnpackError::SubPath { problem, .. } => problem.to_string(),
        error => panic!("{error:?}"),
    }
}

fn image() -> Tar {
    Tar::new()
        .file("etc/a", "1")
        .file("etc/d/b", "22")
        .link(b'1', "hard", "etc/d/b")
        .link(b'2', "way", "etc/d")
        .link(b'2', "etc/d/up", "../a")
        .link(b'2', "etc/self", "self")
        .link(b'6', "pipe", "")
        .folder("none/", 0o755)
}

#[test]
fn a_folder_becomes_the_root() {
    let tar = image();
    assert_eq!(part(&tar, ("", ""), "etc/d").unwrap(), ["b=0.1", "up->../a"]);
    let layers = [tar.clone().folder("etc/d/", 0o700).entries()];
    let plan = plan_recorded_part(&layers, &Selection::default(), path("etc/d")).unwrap();
    // The permissions rule makes folders readable.
    assert_eq!(plan.root.permissions.mode, 0o755);
    assert_eq!(plan.root.modified.seconds, 1000, "the folder's own time");
    assert_eq!(plan.files[0].links, 1, "the other name of the hard link lies outside");
    assert_eq!((plan.totals.bytes, plan.totals.inodes), (2, 3));
}

#[test]
fn a_file_is_the_only_content_under_the_name_that_is_asked_for() {
    for (sub_path, name) in [("etc/d/b", "b"), ("hard", "hard"), ("way/b", "b"), ("way/up", "up")] {
        let file = if name == "up" { "0.0" } else { "0.1" };
        assert_eq!(part(&image(), ("", ""), sub_path).unwrap(), [format!("{name}={file}")]);
    }
}

#[test]
fn links_lead_inside_an_image_and_nowhere_in_other_artifacts() {
    let tar = image();
    assert_eq!(part(&tar, ("", ""), "way").unwrap(), ["b=0.1", "up->../a"]);
    let layers = [tar.link(b'2', "out", "../../etc").entries()];
    let out = plan_recorded_part(&layers, &Selection::default(), path("out/d")).unwrap();
    assert_eq!(out.totals.files, 1, "`..` stays at the root");
    let (limits, selection) = (Limits::default(), Selection::default());
    let mut merger = Merger::new(&limits, &selection);
    merger.sub_path = path("way/b");
    merger.archive(0, &ARTIFACT);
    image().entries().iter().try_for_each(|entry| merger.entry(entry)).unwrap();
    let error = merger.finish().expect_err("a link").to_string();
    assert!(error.contains("\"way\" is a symbolic link"), "{error}");
}

#[test]
fn what_cannot_be_shown_is_refused_with_what_is_there() {
    let tar = (0..20).fold(image(), |tar, number| tar.file(&format!("many/{number:02}"), ""));
    assert!(problem(&tar, "etc/x/y").contains("in \"etc\" is a, d, self"));
    assert!(
        problem(&tar, "many/x")
            .ends_with("in \"many\" is 00, 01, 02, 03, 04, 05, 06, 07 and 12 more")
    );
    assert!(problem(&tar, "x").contains("in \".\" is etc, hard, way, none, many"));
    assert!(problem(&tar, "none/x").contains("nothing is in \"none\""));
    assert!(problem(&tar, "none").contains("an empty folder"));
    for sub_path in ["etc/a/x", "hard/x", "pipe", "pipe/x"] {
        assert!(problem(&tar, sub_path).contains("no folder"), "{sub_path}");
    }
    assert!(problem(&tar, "etc/self").contains("too many"));
}

#[test]
fn patterns_match_the_paths_of_the_artifact() {
    let tar = image();
    assert_eq!(part(&tar, ("etc/d/b", ""), "etc").unwrap(), ["d/", "d/b=0.1"]);
    for (selection, sub_path) in [
        (("b", ""), "etc/d"),
        (("", "etc"), "etc/d"),
        (("", "**/b"), "etc/d/b"),
        (("x", ""), "etc"),
    ] {
        let error = part(&tar, selection, sub_path).expect_err("nothing");
        assert!(matches!(error, UnpackError::NothingSelected), "{selection:?}: {error:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// A part is what the whole tree has below its path.
    #[test]
    fn a_part_is_a_part_of_the_whole(
        layers in prop::collection::vec(entries(), 1..5),
        include in prop::option::of("[abc*](/[abc*]){0,2}"),
        sub_path in "[abc](/[abc]){0,2}",
    ) {
        let layers: Vec<_> = layers.iter().map(|entries| tar_of(entries).entries()).collect();
        let selection = Selection::parse(&include.unwrap_or_default(), "").expect("a pattern");
        let everything = plan_recorded(&layers, &EVERYTHING);
        let Ok(whole) = plan_recorded(&layers, &selection) else { return Ok(()) };
        let lines_of = |plan: &TreePlan| lines_from(plan, &mut Recorded(&layers));
        let all = lines_of(&everything.expect("a part of it was planned"));
        let is_folder = |path: &str| all.contains(&format!("{path}/"));
        let (folder, name) = sub_path.rsplit_once('/').unwrap_or((".", &sub_path));
        let found = plan_recorded_part(&layers, &selection, path(&sub_path));
        if is_folder(&sub_path) {
            let below = |line: &String| line.strip_prefix(&format!("{sub_path}/")).map(str::to_owned);
            let expected: Vec<_> = lines_of(&whole).iter().filter_map(below).filter(|line| !line.is_empty()).collect();
            match found {
                Ok(plan) => {
                    prop_assert_eq!(lines_of(&plan), expected);
                    prop_assert!(plan.files.iter().all(|file| file.links > 0));
                }
                Err(UnpackError::NothingSelected | UnpackError::SubPath { .. }) => prop_assert!(expected.is_empty()),
                Err(error) => prop_assert!(false, "{:?}", error),
            }
        } else if folder == "." || is_folder(folder) {
            let file = |line: &&String| line.starts_with(&format!("{sub_path}="));
            let expected = lines_of(&whole).iter().find(file).map(|line| line.replacen(&sub_path, name, 1));
            let is_link = all.iter().any(|line| line.starts_with(&format!("{sub_path}->")));
            if !is_link {
                prop_assert_eq!(found.ok().map(|plan| lines_of(&plan)), expected.map(|line| vec![line]));
            }
        }
    }
}
