//! Tests the site: its links lead somewhere, its pages are all in it, its commands work, and its metrics exist.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use csi_driver_oci::csi::grpc_status::is_final;
use tonic::Code;

use crate::support::{
    Admin, Node, Port, Registry, clean_environment, metrics, own_registry, private_registry, tool,
};

const ROOMY: &str = "cache: {minFreePercent: 0, minFreeInodesPercent: 0, highThresholdPercent: 100, \
                     lowThresholdPercent: 100, minimumAge: 0s}\n";

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")
}

fn pages(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(pages(&path));
        } else if path.extension().is_some_and(|kind| kind == "md") {
            found.push(path);
        }
    }
    found
}

/// Returns the targets of `[...](...)`, outside of code.
fn links(text: &str) -> Vec<String> {
    let mut code = false;
    let mut found = Vec::new();
    for line in text.lines() {
        code ^= line.trim_start().starts_with("```");
        if code {
            continue;
        }
        found.extend(
            line.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0.to_owned())),
        );
    }
    found
}

/// Returns the names that headings have in the site and on GitHub.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let name = |heading: &str| -> String {
        let text = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = text.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(name).collect()
}

#[test]
fn every_page_is_in_the_site_and_every_link_leads_somewhere() {
    let summary = fs::read_to_string(docs().join("SUMMARY.md")).expect("the summary");
    let mut listed: BTreeSet<_> =
        links(&summary).into_iter().map(|link| docs().join(link)).collect();
    let decisions = docs().join("decisions");
    let index = fs::read_to_string(decisions.join("README.md")).expect("the index of decisions");
    listed.extend(links(&index).into_iter().map(|link| decisions.join(link)));
    for page in pages(&docs()) {
        if page.file_name().is_some_and(|name| name == "SUMMARY.md") {
            continue;
        }
        assert!(listed.contains(&page), "{} is in no list of pages", page.display());
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let others =
        ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"].map(|name| root.join(name));
    for page in pages(&docs()).into_iter().chain(others) {
        let text = fs::read_to_string(&page).expect("a page");
        for link in links(&text).iter().filter(|link| !link.contains("://")) {
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() {
                page.clone()
            } else {
                page.parent().expect("a folder").join(path)
            };
            assert!(target.exists(), "{}: {link} leads nowhere", page.display());
            if !anchor.is_empty() {
                let there = fs::read_to_string(&target).expect("a page");
                let known = anchors(&there);
                assert!(known.contains(anchor), "{}: {link}: {known:?}", page.display());
            }
        }
    }
}

/// The index names each decision by its title, below its area.
#[test]
fn every_decision_has_a_status_a_date_and_an_area_of_the_index() {
    let folder = docs().join("decisions");
    let index = fs::read_to_string(folder.join("README.md")).expect("the index");
    let areas: Vec<_> = index.split("\n## ").skip(1).filter_map(|it| it.split_once('\n')).collect();
    for page in pages(&folder) {
        let name = page.file_name().expect("a name").to_string_lossy();
        if name == "README.md" {
            continue;
        }
        let text = fs::read_to_string(&page).expect("a page");
        let [title, "", status, date, area, ""] = text.lines().take(6).collect::<Vec<_>>()[..]
        else {
            panic!("{name} has no header");
        };
        let title = title.strip_prefix("# ").expect("a title");
        assert!(title.starts_with(&format!("{}. ", name[..4].trim_start_matches('0'))), "{name}");
        assert!(status.starts_with("- Status: "), "{name}: {status}");
        let date = date.strip_prefix("- Date: ").expect("a date");
        assert!(date.len() == 10 && date.split('-').count() == 3, "{name}: {date}");
        let area = area.strip_prefix("- Area: ").expect("an area");
        let listed = format!("- [{title}]({name})");
        let (_, pages) =
            areas.iter().find(|(name, _)| *name == area).expect("an area of the index");
        assert!(pages.lines().any(|line| line == listed), "the index lacks {listed} below {area}");
    }
}

/// Adds the names of all functions below the folder.
fn functions(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            functions(&path, found);
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            let text = fs::read_to_string(&path).expect("a file");
            let names = text.split("fn ").skip(1).filter_map(|rest| rest.split_once('('));
            found.extend(names.map(|(name, _)| name.to_owned()));
        }
    }
}

/// Returns whether `a::b::c` is a module of a crate or of the driver, or is mentioned in the module `a::b`.
fn is_module(root: &Path, path: &str) -> bool {
    let mut names = path.split("::").peekable();
    let first = names.peek().expect("a name").replace('_', "-");
    let library = root.join("crates").join(first).join("src");
    let mut place = if library.is_dir() {
        names.next();
        library
    } else {
        root.join("src")
    };
    while let Some(name) = names.next() {
        let next = place.join(name);
        if next.is_dir() || next.with_extension("rs").exists() {
            place = next;
            continue;
        }
        let files = [place.with_extension("rs"), place.join("mod.rs"), place.join("lib.rs")];
        let texts = files.iter().filter_map(|file| fs::read_to_string(file).ok());
        return names.peek().is_none() && texts.into_iter().any(|text| text.contains(name));
    }
    true
}

#[test]
fn pages_name_modules_and_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut tests = BTreeSet::new();
    for folder in ["src", "crates", "tests"] {
        functions(&root.join(folder), &mut tests);
    }
    for page in ["docs/architecture.md", "docs/security.md", "CONTRIBUTING.md"] {
        let text = fs::read_to_string(root.join(page)).expect("a page");
        let is_word = |c: char| c.is_alphanumeric() || matches!(c, '_' | ':');
        let words = text.split(|c| !is_word(c)).map(|word| word.trim_matches(':'));
        for path in words.filter(|word| word.contains("::")) {
            let last = path.rsplit("::").next().expect("a name");
            assert!(is_module(root, path) || tests.contains(last), "{page}: {path} does not exist");
        }
    }
    let page = fs::read_to_string(docs().join("security.md")).expect("the page");
    for row in page.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<_> = row.split(" | ").collect();
        let [_, _, _, named] = cells[..] else { continue };
        for name in named.split('`').skip(1).step_by(2) {
            assert!(tests.contains(name), "docs/security.md: there is no test {name}");
        }
    }
}

#[test]
fn the_architecture_lists_all_crates_and_all_modules_of_the_driver() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(docs().join("architecture.md")).expect("the page");
    let (_, list) = page.split_once("\nsrc  ").expect("the list");
    let (list, _) = list.split_once("```").expect("its end");
    let (modules, crates) = list.split_at(list.find("\ncrates/").expect("the crates"));
    let first = |line: &str| line.split_whitespace().next().unwrap_or_default().to_owned();
    let listed: BTreeSet<_> = modules.lines().skip(2).map(first).collect();
    let library = fs::read_to_string(root.join("src/lib.rs")).expect("the library");
    let declared = library.lines().filter_map(|line| line.strip_prefix("pub mod "));
    let mut expected: BTreeSet<_> =
        declared.map(|name| name.trim_end_matches(';').to_owned()).collect();
    // These are in the line above the list.
    for name in ["app", "cli", "config"] {
        assert!(expected.remove(name), "{name}");
    }
    assert_eq!(listed, expected);
    let listed: BTreeSet<_> = crates
        .lines()
        .filter_map(|line| first(line).strip_prefix("crates/").map(str::to_owned))
        .collect();
    let folders = fs::read_dir(root.join("crates")).expect("the crates").flatten();
    let expected: BTreeSet<_> =
        folders.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    assert_eq!(listed, expected);
}

#[test]
fn the_page_of_metrics_is_what_is_served() {
    let port = Port::new();
    let address = port.address();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let health = taken.local_addr().expect("an address");
    let node = Node::start_with(|_, options| {
        options
            .argument(&format!("--metrics-endpoint={address}"))
            .argument(&format!("--health-endpoint={health}"))
    });
    let (_volume, _) = node.mount(&node.proxy.reference(&node.small_artifact().name));
    let page = docs().join("metrics.md");
    let before = fs::read_to_string(&page).expect("the page");
    let (head, rest) = before.split_once(METRICS_MARKS[0]).expect("a mark");
    let (_, tail) = rest.split_once(METRICS_MARKS[1]).expect("a mark");
    let table = table_of_metrics(&metrics(address));
    let expected = [head, METRICS_MARKS[0], "\n", &table, "\n", METRICS_MARKS[1], tail].concat();
    if std::env::var_os("RENDER").is_some() {
        fs::write(&page, &expected).expect("written");
    }
    let page = fs::read_to_string(page).expect("the page");
    assert!(page == expected, "docs/metrics.md is not what is served: run make render. {table}");
}

/// The text before and after the table of `docs/metrics.md`.
const METRICS_MARKS: [&str; 2] =
    ["<!-- Made from the metrics by make render. -->\n", "<!-- End of the metrics. -->\n"];

/// Returns a row for each metric that is served: its name, type, labels and help.
fn table_of_metrics(served: &str) -> String {
    let mut table = "| name | type | labels | meaning |\n| --- | --- | --- | --- |\n".to_owned();
    let mut meaning = "";
    for line in served.lines() {
        if let Some((_, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' '))
        {
            meaning = help.trim_end_matches('.');
        }
        let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        else {
            continue;
        };
        let sample = served.lines().find_map(|line| {
            let (sample, rest) = line.split_once('{')?;
            (sample.trim_end_matches("_bucket") == name).then(|| rest.split('}').next())?
        });
        let labels = sample.unwrap_or_default().split(',');
        let labels = labels.filter_map(|label| label.split_once('=')).map(|(label, _)| label);
        let labels: Vec<_> =
            labels.filter(|label| *label != "le").map(|label| format!("`{label}`")).collect();
        let labels = labels.join(", ");
        let _ = writeln!(table, "| `{name}` | {kind} | {labels} | {meaning} |");
    }
    table
}

/// Returns the words in backticks in the first `cells` cells of each row of all tables.
fn table_words(text: &str, cells: usize) -> BTreeSet<String> {
    let rows = text.lines().filter(|line| line.starts_with("| "));
    let heads = rows.flat_map(|row| row.split(" | ").take(cells));
    heads.flat_map(|cell| cell.split('`').skip(1).step_by(2)).map(str::to_owned).collect()
}

/// Returns what the binary prints with these arguments.
#[track_caller]
fn printed(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_csi-driver-oci")).args(arguments).output();
    let output = output.expect("the binary");
    assert!(output.status.success(), "{arguments:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_page_of_commands_has_all_of_them_and_no_other() {
    let page = fs::read_to_string(docs().join("commands.md")).expect("the page");
    let told: BTreeSet<_> = table_words(&page, 1)
        .iter()
        .filter_map(|usage| usage.split(' ').next().map(str::to_owned))
        .collect();
    let help = printed(&["--help"]);
    let (_, list) = help.split_once("Commands:\n").expect("the commands");
    let (list, _) = list.split_once("\n\n").expect("their end");
    let names = list.lines().filter_map(|line| line.split_whitespace().next());
    let known: BTreeSet<_> = names.filter(|name| *name != "help").map(str::to_owned).collect();
    assert_eq!(told, known);
}

#[test]
fn the_page_of_error_codes_has_all_codes_of_a_publish_and_their_kinds() {
    let page = fs::read_to_string(docs().join("error-codes.md")).expect("the page");
    let (_, section) = page.split_once("## NodePublishVolume\n").expect("the section");
    let (section, _) = section.split_once("\n## ").expect("its end");
    let code = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/csi/grpc_status.rs");
    let code = fs::read_to_string(code).expect("the code");
    let (_, chosen) = code.split_once("pub fn code(").expect("the choice");
    let used: BTreeSet<_> = chosen
        .split("Code::")
        .skip(1)
        .map(|rest| rest.chars().take_while(char::is_ascii_alphabetic).collect::<String>())
        .collect();
    let codes = (0..=16).map(Code::from).filter(|code| used.contains(&format!("{code:?}")));
    // Each with what the kubelet takes it for.
    let expected: BTreeSet<_> = codes
        .map(|code| {
            let kind = if is_final(code) { "final" } else { "uncertain" };
            (upper_snake(&format!("{code:?}")), kind.to_owned())
        })
        .collect();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    let told: BTreeSet<_> = rows
        .map(|row| {
            let cells: Vec<_> = row.split('|').map(str::trim).collect();
            (cells[1].trim_matches('`').to_owned(), cells[2].to_owned())
        })
        .collect();
    assert_eq!(told, expected);
}

/// Returns the spelling of the gRPC specification for the name of a [`Code`].
fn upper_snake(name: &str) -> String {
    let mut words = String::new();
    for letter in name.chars() {
        if letter.is_ascii_uppercase() && !words.is_empty() {
            words.push('_');
        }
        words.push(letter.to_ascii_uppercase());
    }
    words
}

/// A command of a page, and its expected output.
pub struct Step {
    pub command: String,
    pub expected: Vec<String>,
}

/// Returns the commands of a page's `console` blocks.
pub fn steps(text: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        if line.starts_with("```") {
            inside = line == "```console";
        } else if inside {
            let last = steps.last_mut();
            match (line.strip_prefix("$ "), last) {
                (Some(command), _) => {
                    steps.push(Step { command: command.to_owned(), expected: Vec::new() });
                }
                // A command that is broken over several lines.
                (None, Some(step)) if step.expected.is_empty() && step.command.ends_with('\\') => {
                    step.command.push('\n');
                    step.command.push_str(line);
                }
                (None, step) => {
                    step.expect("a command first").expected.push(line.to_owned());
                }
            }
        }
    }
    steps
}

/// Returns whether a line matches its expected form, in which `...` stands for anything.
pub fn fits(line: &str, shown: &str) -> bool {
    let shown = shown.split_whitespace().collect::<Vec<_>>().join(" ");
    let line = line.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut rest = line.as_str();
    for (number, part) in shown.split("...").enumerate() {
        let part = part.trim();
        match rest.find(part) {
            Some(at) if number > 0 || at == 0 => rest = &rest[at + part.len()..],
            _ => return false,
        }
    }
    shown.ends_with("...") || rest.is_empty()
}

/// The environment of a reader: the binary, its tools, a node, a directory.
struct Reader {
    node: Node,
    endpoint: String,
    folder: PathBuf,
    registry: Registry,
}

impl Reader {
    fn new(registry: Registry) -> Self {
        let (node, _) = Admin::start(ROOMY);
        let endpoint = format!("unix://{}", node.sandbox.path().join("admin.sock").display());
        let folder = node.sandbox.folder("reader");
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        std::os::unix::fs::symlink(root.join("deploy"), folder.join("deploy")).expect("a link");
        make_programs(&node.sandbox.folder("programs"));
        Self { node, endpoint, folder, registry }
    }

    /// Runs the page's commands in one shell, as a reader does in one window.
    #[track_caller]
    fn follows(&self, page: &str) {
        let text = fs::read_to_string(docs().join(page)).expect("a page");
        let steps = steps(&text);
        assert!(!steps.is_empty(), "{page} has no console block");
        let mut folder = self.folder.clone();
        for Step { command, expected } in steps {
            let typed = command.replace("registry.example.com", &self.registry.host());
            let script = format!("set -euo pipefail\n{typed}\npwd >&3\n");
            let place = self.node.sandbox.path().join("place");
            let mut shell: Command = tool("bash");
            clean_environment(&mut shell);
            let programs = self.node.sandbox.path().join("programs");
            let output = shell
                .arg("-c")
                .arg(format!("exec 3>'{}'\n{script}", place.display()))
                .current_dir(&folder)
                .env("PATH", format!("{}:{}", programs.display(), run_path()))
                .env("HOME", &self.folder)
                .env("ORAS_FLAGS", "--plain-http")
                .env("ADMIN_ENDPOINT", &self.endpoint)
                .env("STATE_DIR", self.node.sandbox.path().join("cli"))
                .env_remove("DOCKER_CONFIG")
                .output()
                .expect("a shell");
            let (out, err) =
                (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            assert!(output.status.success(), "{page}: {command}\n{out}{err}");
            for shown in expected.iter().filter(|line| !line.trim().is_empty()) {
                let shown = shown.replace("registry.example.com", &self.registry.host());
                assert!(
                    out.lines().any(|line| fits(line, &shown)),
                    "{page}: {command}\nno line is as shown: {shown}\n{out}"
                );
            }
            folder = fs::read_to_string(&place).expect("where it ended").trim().into();
        }
    }
}

/// Creates the programs of a reader: the binary, and an `oras` for the registry of the tests, which has no TLS.
pub fn make_programs(folder: &Path) {
    let path = run_path();
    let oras = format!(
        "#!/bin/sh\nPATH='{path}'\ncase \"$1\" in\n  copy) shift; exec oras copy --from-plain-http \"$@\" ;;\n  push | \
         login) verb=\"$1\"; shift; exec oras \"$verb\" --plain-http \"$@\" ;;\n  *) exec oras \"$@\" ;;\nesac\n"
    );
    make_program(folder, "oras", &oras);
    let binary = env!("CARGO_BIN_EXE_csi-driver-oci");
    std::os::unix::fs::symlink(binary, folder.join("csi-driver-oci")).expect("a link");
}

pub fn make_program(folder: &Path, name: &str, script: &str) {
    fs::write(folder.join(name), script).expect("a program");
    fs::set_permissions(folder.join(name), fs::Permissions::from_mode(0o755)).expect("a mode");
}

/// Returns PATH with the test tools in front.
pub fn run_path() -> String {
    let tool = tool("true");
    let path = tool.get_envs().find(|(name, _)| *name == "PATH").and_then(|(_, value)| value);
    path.expect("a path").to_string_lossy().into_owned()
}

macro_rules! pages {
    ($($test:ident $page:literal,)+) => {
        $(
            #[test]
            fn $test() {
                Reader::new(own_registry()).follows($page);
            }
        )+

        // The page on Crossplane is compared with the output of the evaluator of Compositions in `cluster::crossplane`,
        // that on followed tags with volumes in `follow`. `tests/cluster` applies the objects of the page on claims.
        const FOLLOWED: &[&str] = &[
            $($page),+,
            "how-to/claims.md",
            "how-to/follow-a-tag.md",
            "how-to/private-registry.md",
            "how-to/prometheus-by-crossplane.md",
        ];
    };
}

pages! {
    the_quick_start_works "quick-start.md",
    publishing_works "how-to/publish.md",
    an_air_gapped_node_is_served "how-to/air-gapped.md",
    warming_before_a_rollout_works "how-to/warm-before-a-rollout.md",
    mirrors_work "how-to/mirrors.md",
    signing_and_enforcing_work "how-to/sign-and-enforce.md",
    models_are_selected_from "how-to/models.md",
    parts_are_shown "how-to/several-artifacts.md",
    capacity_is_told "how-to/capacity.md",
    long_pulls_are_told "how-to/long-pulls.md",
    a_node_tells_what_it_holds "how-to/deleted-pull-secret.md",
}

#[test]
fn a_private_registry_is_used() {
    Reader::new(private_registry("robot", "secret")).follows("how-to/private-registry.md");
}

#[test]
fn every_how_to_is_followed_by_a_test() {
    for page in pages(&docs().join("how-to")) {
        let name = page.strip_prefix(docs()).expect("a page").to_string_lossy().into_owned();
        assert!(FOLLOWED.contains(&name.as_str()), "{name} is followed by no test");
    }
}
