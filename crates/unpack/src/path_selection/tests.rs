use proptest::prelude::*;

use super::super::unpack_limits::Limits;
use super::*;

fn path(text: &str) -> RelativePath {
    RelativePath::parse(text.as_bytes(), &Limits::default()).unwrap()
}

fn selects(include: &str, exclude: &str, text: &str) -> bool {
    Selection::parse(include, exclude).unwrap().selects(&path(text))
}

#[test]
fn whole_paths_and_contents_of_folders() {
    assert!(selects("", "", "a"));
    assert!(selects("bin", "", "bin/tool"));
    assert!(selects("bin/tool", "", "bin/tool"));
    assert!(!selects("tool", "", "bin/tool"));
    assert!(!selects("bin/tool", "", "bin"));
    assert!(selects("*.so", "", "a.so") && !selects("*.so", "", "lib/a.so"));
    assert!(selects("**/*.so", "", "lib/x/a.so") && selects("**/*.so", "", "a.so"));
    assert!(selects("lib/**", "", "lib/x/a.so") && !selects("lib/**", "", "lib"));
    assert!(!selects("BIN", "", "bin/tool"));
    assert!(selects("?in", "", "bin") && !selects("b?n", "", "b/n"));
}

#[test]
fn exclude_wins() {
    assert!(!selects("bin", "bin/tool", "bin/tool"));
    assert!(!selects("bin/tool", "bin", "bin/tool"));
    assert!(selects("", "bin", "lib/x") && !selects("", "bin", "bin/x"));
    assert!(!selects("**", "**", "x"));
}

#[test]
fn commas_and_spellings() {
    assert!(selects(r"a\,b", "", "a,b") && !selects(r"a\,b", "", "a"));
    assert!(selects(" a , ./b/ ,,", "", "b/c"));
    assert!(selects(r"{a\,b}.txt", "", "b.txt"));
    assert!(selects(r"\*", "", "*") && !selects(r"\*", "", "x"));
    assert!(selects("./", "", "anything/at/all"));
    assert!(Selection::parse(" , ", "").unwrap().is_everything());
}

#[test]
fn equal_selections_have_one_canonical_text() {
    let canonical = |include, exclude| Selection::parse(include, exclude).unwrap().canonical();
    assert_eq!(canonical("b,a", "c"), "+1:a+1:b-1:c");
    assert_eq!(canonical("./a/,b,a,", " c"), canonical("b,a", "c"));
    assert_eq!(canonical("", ""), "");
    assert_ne!(canonical("a,b", ""), canonical(r"a\,b", ""));
    assert_ne!(canonical("a", ""), canonical("", "a"));
}

#[test]
fn patterns_that_cannot_match_are_refused() {
    let refusal = |text: &str| Selection::parse(text, "").expect_err(text);
    assert!(matches!(refusal("/bin"), SelectionError::Absolute(_)));
    assert!(matches!(refusal("a/../b"), SelectionError::Parent(_)));
    assert!(matches!(refusal("a[b"), SelectionError::Glob { .. }));
    assert!(matches!(refusal("{a,b}"), SelectionError::Glob { .. }));
    assert_eq!(refusal(&"x".repeat(PATTERN_BYTES + 1)), SelectionError::TooLong);
    let nested = |depth: usize| format!("{}a{}", "{".repeat(depth), "}".repeat(depth));
    for depth in [NESTED_ALTERNATIVES + 1, 300, 8000] {
        assert!(matches!(refusal(&nested(depth)), SelectionError::Glob { .. }), "{depth}");
    }
    assert!(selects(&nested(NESTED_ALTERNATIVES), "", "a"));
    let many: Vec<_> = (0..300).map(|number| number.to_string()).collect();
    assert_eq!(refusal(&many.join(",")), SelectionError::TooLong);
}

#[test]
fn folders_without_selected_paths_are_recognised() {
    let may = |include, exclude, folder| {
        Selection::parse(include, exclude).unwrap().may_select_below(&path(folder))
    };
    assert!(may("", "", "bin") && may("bin", "", "bin") && may("bin", "", "bin/sub"));
    assert!(may("bin/x/*.so", "", "bin") && may("**/x", "", "bin") && may("b*/x", "", "bin"));
    assert!(!may("lib", "", "bin") && !may("bin/x", "", "bin/y") && !may("*.so", "", "bin"));
    assert!(!may("", "bin", "bin") && !may("", "bin", "bin/x") && !may("bin/x", "b*", "bin"));
    assert!(may("", "bin/*", "bin"));
    assert!(may("[b]in", "", "lib"), "what cannot be told by names is not told");
}

/// Returns patterns that are slow to compile, nearly as long as an attribute may be.
fn costly() -> Vec<String> {
    let fill = |part: &str| {
        let part = part.replace(',', "\\,");
        let pattern = |number: usize| format!("{}x{number}", part.repeat(1000 / part.len()));
        (0..16).map(pattern).collect::<Vec<_>>().join(",")
    };
    ["?/", "?", "*?", "**/a/", "*a", "[!a-c]", "[!é-ü]", "[é-\u{10ffff}]", "{a,b*,?}"]
        .map(fill)
        .into()
}

#[test]
fn patterns_are_compiled_when_a_path_is_matched_and_not_kept_by_clones() {
    for patterns in costly() {
        let selection = Selection::parse(&patterns, &patterns).unwrap();
        let is_compiled = |selection: &Selection| selection.exclude.compiled.get().is_some();
        assert!(!is_compiled(&selection));
        assert!(!selection.selects(&path("b")));
        assert!(is_compiled(&selection) && !is_compiled(&selection.clone()));
        assert!(selection.compiled_bytes() > 2 * 500 * 10_000, "{}", selection.compiled_bytes());
    }
}

/// Reference implementation of globs by exhaustive search: `*` and `?` within names, `**` across.
fn naive_match(pattern: &[&str], path: &[&str]) -> bool {
    fn name(pattern: &[u8], text: &[u8]) -> bool {
        match (pattern, text) {
            ([], []) => true,
            ([b'*', rest @ ..], _) => (0..=text.len()).any(|skip| name(rest, &text[skip..])),
            ([b'?', rest @ ..], [_, text @ ..]) => name(rest, text),
            ([first, rest @ ..], [byte, text @ ..]) => first == byte && name(rest, text),
            _ => false,
        }
    }
    match (pattern, path) {
        ([], []) => true,
        // At the end, `**` matches at least one name; elsewhere it may match none.
        (["**"], _) => !path.is_empty(),
        (["**", rest @ ..], _) => (0..=path.len()).any(|skip| naive_match(rest, &path[skip..])),
        ([first, rest @ ..], [text, path @ ..]) => {
            name(first.as_bytes(), text.as_bytes()) && naive_match(rest, path)
        }
        _ => false,
    }
}

fn naive_selects(include: &[String], exclude: &[String], path: &str) -> bool {
    let names: Vec<_> = path.split('/').collect();
    let any = |patterns: &[String]| {
        (1..=names.len()).any(|length| {
            patterns.iter().any(|pattern| {
                naive_match(&pattern.split('/').collect::<Vec<_>>(), &names[..length])
            })
        })
    };
    (include.is_empty() || any(include)) && !any(exclude)
}

fn patterns() -> impl Strategy<Value = Vec<String>> {
    let name = prop_oneof![
        Just("**".to_owned()),
        "[ab?]{1,2}",
        "[ab]\\*",
        "\\*[ab]",
        Just("*".to_owned())
    ];
    let pattern = prop::collection::vec(name, 1..4).prop_map(|names| names.join("/"));
    prop::collection::vec(pattern, 0..3)
}

fn paths() -> impl Strategy<Value = String> {
    prop::collection::vec("[ab]{1,2}", 1..5).prop_map(|names| names.join("/"))
}

proptest! {
    #[test]
    fn selecting_means_what_it_says(
        include in patterns(),
        exclude in patterns(),
        text in paths(),
        folder in paths(),
    ) {
        let selection = Selection::parse(&include.join(","), &exclude.join(",")).unwrap();
        prop_assert_eq!(selection.selects(&path(&text)), naive_selects(&include, &exclude, &text));
        if !selection.may_select_below(&path(&folder)) {
            let below = format!("{folder}/{text}");
            prop_assert!(!selection.selects(&path(&folder)));
            prop_assert!(!selection.selects(&path(&below)), "{} below {}", text, folder);
        }
    }

    #[test]
    fn any_text_is_read_or_refused(include in "\\PC{0,30}", exclude in "[*?{}\\[\\]!a/,\\\\^.-]{0,20}") {
        if let Ok(selection) = Selection::parse(&include, &exclude) {
            let _ = selection.selects(&path("a/b"));
            let _ = selection.may_select_below(&path("a/b"));
            let _ = selection.canonical();
        }
    }
}
