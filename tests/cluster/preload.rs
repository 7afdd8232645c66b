//! Preloads: an artifact on nodes before any pod asks.

use std::fmt::Write as _;

use crate::support::{
    Artifact, DRIVER_NAMESPACE, NODES, Pod, TestNamespace, driver_log, in_driver, kubectl, node,
    run, upgrade, wait_until,
};

fn preload(name: &str, reference: &str, more: &str) -> String {
    format!(
        "---\napiVersion: oci.custom.io/v1alpha1\nkind: ArtifactPreload\nmetadata: {{name: {name}}}\nspec: {{reference: \"{reference}\"{more}}}\n"
    )
}

fn wait_for_ready(namespace: &TestNamespace, name: &str) {
    let object = format!("artifactpreload/{name}");
    namespace.kubectl(&["wait", &object, "--for=condition=Ready", "--timeout=120s"]);
}

fn reason(namespace: &TestNamespace, name: &str) -> String {
    namespace.field("artifactpreload", name, "{.status.conditions[?(@.type=='Ready')].reason}")
}

#[test]
fn a_preload_is_ready_when_all_nodes_have_it_and_is_let_go_when_it_is_deleted() {
    let namespace = TestNamespace::new("preload");
    let artifact = Artifact::push("tests/preload", &[("file", "early\n")]);
    namespace.pull_secret("credentials", "correct-password");
    namespace.apply(&preload("tool", &artifact.private(), ", pullSecrets: [credentials]"));
    wait_for_ready(&namespace, "tool");
    assert_eq!(
        namespace.field("artifactpreload", "tool", "{.status.desired}/{.status.ready}"),
        "2/2"
    );
    let listed = namespace.kubectl(&["get", "artifactpreloads"]);
    assert!(listed.contains("Ready"), "{listed}");
    let kept = |name: &str| -> serde_json::Value {
        let list = in_driver(name, &["ls", "--output", "json"]).expect("the node's list");
        let list: serde_json::Value = serde_json::from_str(&list).expect("JSON");
        let entries = list["artifacts"].as_array().expect("a list");
        let entry = entries.iter().find(|entry| entry["digest"] == artifact.digest.as_str());
        entry.unwrap_or_else(|| panic!("{} is not on {name}: {list}", artifact.digest)).clone()
    };
    let is_pinned = |name: &str| kept(name)["pins"].as_array().is_some_and(|pins| !pins.is_empty());
    for name in NODES {
        assert!(is_pinned(name), "{name}: {}", kept(name));
    }
    // A pod with the right credentials finds the content.
    let pod = Pod::new("reader", &artifact.private(), "cat /artifact/file")
        .with_secret("credentials")
        .on("node-2");
    assert_eq!(namespace.output(&pod), "early\n");
    let log = driver_log("node-2").expect("the log");
    let published =
        log.lines().find(|line| line.contains(&namespace.name) && line.contains("\"path\""));
    assert!(published.is_some_and(|line| line.contains("\"hit\"")), "{published:?}");
    namespace.delete_pod("reader");
    namespace.kubectl(&["delete", "artifactpreload", "tool"]);
    for name in NODES {
        wait_until("the node to let it go", || !is_pinned(name));
    }
}

#[test]
fn pods_find_nodes_by_what_is_preloaded_on_them() {
    let namespace = TestNamespace::alone("scheduling");
    let artifact = Artifact::push("tests/scheduling", &[("file", "near\n")]);
    namespace.apply(&preload("tool", &artifact.reference(), ", selector: {names: [node-2]}"));
    wait_for_ready(&namespace, "tool");
    let script = "printf %s \"$1\" | sha256sum | cut -c1-32";
    let written = format!("{}/{}", namespace.name, artifact.reference());
    let hash = run("sh", &["-c", script, "sh", &written], "").expect("a hash");
    let label = format!("oci.custom.io/ready.{}", hash.trim());
    assert_eq!(namespace.field("artifactpreload", "tool", "{.status.nodeLabel}"), label);
    let wide = namespace.kubectl(&["get", "artifactpreloads", "--output=wide"]);
    assert!(wide.contains(&label), "{wide}");
    let labelled = || kubectl(&["get", "nodes", "--output=name", "--selector", &label]);
    wait_until("the label", || labelled().trim() == "node/node-2");
    let pod = |name: &str, kind: &str| {
        let mut pod = Pod::new(name, &artifact.reference(), "cat /artifact/file");
        let terms = format!("matchExpressions: [{{key: {label}, operator: Exists}}]");
        let terms = match kind {
            "required" => format!("{{nodeSelectorTerms: [{{{terms}}}]}}"),
            _ => format!("[{{weight: 100, preference: {{{terms}}}}}]"),
        };
        pod.spec = format!(
            "affinity: {{nodeAffinity: {{{kind}DuringSchedulingIgnoredDuringExecution: {terms}}}}}"
        );
        pod
    };
    for kind in ["required", "preferred"] {
        assert_eq!(namespace.output(&pod(kind, kind)), "near\n");
        assert_eq!(namespace.field("pod", kind, "{.spec.nodeName}"), "node-2");
        namespace.delete_pod(kind);
    }
    namespace.kubectl(&["delete", "artifactpreload", "tool"]);
    wait_until("no label", || labelled().is_empty());
    assert_eq!(namespace.output(&pod("later", "preferred")), "near\n");
    namespace.delete_pod("later");
}

#[test]
fn nodes_have_a_condition_for_the_preloads_of_a_namespace() {
    let namespace = TestNamespace::alone("condition");
    let artifact = Artifact::push("tests/condition", &[("file", "near\n")]);
    let condition = || {
        let path =
            "{.items[*].status.conditions[?(@.type=='oci.custom.io/ArtifactsReady')].message}";
        kubectl(&["get", "nodes", &format!("--output=jsonpath={path}")])
    };
    let on_both = |held: &str| [held; 2].join(" ");
    let nothing = on_both("the node holds 0 of 0 preloaded artifacts");
    wait_until("the condition", || condition() == nothing);
    namespace.apply(&preload("tool", &artifact.reference(), ""));
    wait_for_ready(&namespace, "tool");
    // The harness' values name it.
    kubectl(&["create", "namespace", "platform"]);
    let object = preload("tool", &artifact.reference(), "");
    run("kubectl", &["--namespace=platform", "apply", "--filename=-"], &object).expect("applied");
    let one = on_both("the node holds 1 of 1 preloaded artifacts");
    wait_until("the preload of that namespace, and no other", || condition() == one);
    kubectl(&["delete", "namespace", "platform"]);
    wait_until("nothing of it", || condition() == nothing);

    // The commands of the documentation remove labels and conditions after it is turned off.
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/preloading.md");
    let page = std::fs::read_to_string(page).expect("the page");
    let (_, commands) = page.split_once("### Turn it off").expect("a section");
    let (_, commands) = commands.split_once("```sh\n").expect("commands");
    let (commands, _) = commands.split_once("```").expect("their end");
    wait_until("a label", || !labels().is_empty());
    let off =
        ["--set=controller.nodeLabels=false", "--set-json=controller.nodeConditionNamespaces=[]"];
    upgrade(&off, || {
        run("sh", &["-euc", commands], "").expect("the commands");
        assert_eq!((labels().as_str(), condition().as_str()), ("", ""));
    });
    wait_until("both again", || !labels().is_empty() && condition() == nothing);
}

/// Returns the labels of nodes that say what they hold.
fn labels() -> String {
    let list = kubectl(&["get", "nodes", "--show-labels", "--no-headers"]);
    let labels = list.split([',', ' ', '\n']);
    labels.filter(|label| label.starts_with("oci.custom.io/")).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_node_that_joins_gets_what_is_preloaded_and_loses_its_startup_taint() {
    let namespace = TestNamespace::alone("joining");
    let artifact = Artifact::push("tests/joining", &[("file", "late\n")]);
    namespace.apply(&preload("tool", &artifact.reference(), ""));
    wait_for_ready(&namespace, "tool");
    node(&["add", "node-3"]);
    wait_until("a third node", || {
        namespace.field("artifactpreload", "tool", "{.status.ready}") == "3"
    });
    assert_eq!(
        namespace
            .output(&Pod::new("reader", &artifact.reference(), "cat /artifact/file").on("node-3")),
        "late\n"
    );
    assert!(!namespace.field("node", "node-3", "{.spec.taints}").contains("agent-not-ready"));
    namespace.delete_pod("reader");
    node(&["remove", "node-3"]);
    kubectl(&["delete", "node", "node-3"]);
    wait_until("two nodes", || {
        namespace.field("artifactpreload", "tool", "{.status.desired}") == "2"
    });
}

#[test]
fn a_preload_goes_on_when_the_leader_is_killed() {
    let namespace = TestNamespace::alone("leader");
    let artifacts: Vec<_> = (0..4)
        .map(|number| Artifact::push_large(&format!("tests/leader-{number}"), 1 << 20))
        .collect();
    let mut all = String::new();
    for (number, artifact) in artifacts.iter().enumerate() {
        let _ = write!(all, "{}", preload(&format!("tool-{number}"), &artifact.slow(), ""));
    }
    namespace.apply(&all);
    wait_until("the leader to hand out", || {
        namespace.field("artifactpreload", "tool-3", "{.status.desired}") == "2"
    });
    let leader = kubectl(&[
        "--namespace",
        DRIVER_NAMESPACE,
        "get",
        "lease",
        "csi-driver-oci-fleet",
        "--output=jsonpath={.spec.holderIdentity}",
    ]);
    let pod = kubectl(&["--namespace", DRIVER_NAMESPACE, "get", "pods", "--output=name"])
        .lines()
        .find(|name| leader.contains(name.trim_start_matches("pod/")))
        .map(str::to_owned);
    let pod = pod.unwrap_or_else(|| panic!("no pod is {leader}"));
    kubectl(&["--namespace", DRIVER_NAMESPACE, "delete", &pod, "--force", "--grace-period=0"]);
    for number in 0..artifacts.len() {
        wait_for_ready(&namespace, &format!("tool-{number}"));
    }
    kubectl(&[
        "--namespace",
        DRIVER_NAMESPACE,
        "rollout",
        "status",
        "deployment/csi-driver-oci-fleet",
        "--timeout=120s",
    ]);
}

#[test]
fn a_version_that_does_not_exist_is_named_and_comes_when_it_does() {
    let namespace = TestNamespace::new("missing");
    Artifact::push("tests/missing", &[("file", "one\n")]);
    namespace.apply(&preload("tool", "registry.example.com/tests/missing:v2", ""));
    wait_until("the reason", || reason(&namespace, "tool") == "ReferenceNotFound");
    let described = namespace.kubectl(&["describe", "artifactpreload", "tool"]);
    assert!(described.contains("registry.example.com/tests/missing:v2"), "{described}");
    Artifact::push_tag("tests/missing", "v1", &[("file", "one\n")]);
    namespace.apply(&preload("tool", "registry.example.com/tests/missing:v1", ""));
    wait_for_ready(&namespace, "tool");
}

#[test]
fn a_namespace_has_so_many_preloads_and_no_more() {
    let namespace = TestNamespace::new("quota");
    let artifact = Artifact::push("tests/quota", &[("file", "one\n")]);
    let mut all = String::new();
    // The values of the harness allow eight.
    for number in 0..9 {
        let _ = write!(all, "{}", preload(&format!("tool-{number}"), &artifact.reference(), ""));
    }
    namespace.apply(&all);
    let reasons =
        || (0..9).map(|number| reason(&namespace, &format!("tool-{number}"))).collect::<Vec<_>>();
    wait_until("eight preloads, and one over the bound", || {
        let reasons = reasons();
        let count = |wanted: &str| reasons.iter().filter(|reason| *reason == wanted).count();
        count("Ready") == 8 && count("QuotaExceeded") == 1
    });
}
