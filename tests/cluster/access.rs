//! Access: credentials, cached content, admission, and the rights of a node's own token.

use crate::support::{
    Artifact, DRIVER_NAMESPACE, NODES, Pod, TestNamespace, driver_pod, object, on_node,
    try_kubectl, upgrade, wait_until,
};

#[test]
fn a_secret_that_is_absent_then_wrong_then_right() {
    let namespace = TestNamespace::new("secrets");
    let artifact = Artifact::push("tests/secrets", &[("file", "private\n")]);
    let pod =
        Pod::new("reader", &artifact.private(), "cat /artifact/file").with_secret("credentials");
    namespace.run(&pod);
    namespace.wait_for_event("reader", "fetching NodePublishSecretRef");
    namespace.pull_secret("credentials", "wrong-password");
    let event = namespace.wait_for_event("reader", "did not accept these credentials");
    assert!(!event.contains("wrong-password"), "{event}");
    namespace.pull_secret("credentials", "correct-password");
    namespace.wait_for_phase("reader", "Succeeded");
    assert_eq!(namespace.logs("reader"), "private\n");
}

#[test]
fn a_pod_starts_with_pull_secrets_that_its_volume_does_not_name() {
    let namespace = TestNamespace::alone("pull-secrets");
    let artifact = Artifact::push("tests/pull-secrets", &[("file", "private\n")]);
    namespace.pull_secret("credentials", "correct-password");
    let mut own = Pod::new("own", &artifact.private(), "cat /artifact/file");
    own.spec = "imagePullSecrets: [{name: credentials}]".into();
    namespace.run(&own);
    namespace.wait_for_event("own", "did not accept an anonymous request");
    namespace.delete_pod("own");
    let wait_for_secret = |pod: &Pod| {
        let path = "--output=jsonpath={.spec.volumes[0].csi.nodePublishSecretRef.name}";
        wait_until("the name of the secret", || {
            let create = ["create", "--dry-run=server", "--filename=-", path];
            namespace.try_kubectl(&create, &pod.yaml()).expect("a pod") == "credentials"
        });
    };
    upgrade(&["--set=podPullSecrets.enabled=true"], || {
        wait_for_secret(&own);
        assert_eq!(namespace.output(&own), "private\n");
        let default = Pod::new("default", &artifact.private(), "cat /artifact/file");
        let annotation = "oci.custom.io/pull-secret=credentials";
        namespace.kubectl(&["annotate", "namespace", &namespace.name, annotation]);
        wait_for_secret(&default);
        assert_eq!(namespace.output(&default), "private\n");
    });
}

#[test]
fn cached_content_of_another_namespace_needs_a_proof_of_its_own() {
    let artifact = Artifact::push("tests/proofs", &[("file", "private\n")]);
    let owner = TestNamespace::new("owner");
    owner.pull_secret("credentials", "correct-password");
    let mut pod = Pod::new("reader", &artifact.private(), "cat /artifact/file").on("node-1");
    pod.secret = Some("credentials");
    owner.output(&pod);
    let other = owner.another("other");
    pod.secret = None;
    other.run(&pod);
    other.wait_for_event("reader", "did not accept an anonymous request");
    other.delete_pod("reader");
    pod.attributes = vec![("pullPolicy", "Never".into())];
    other.run(&pod);
    other.wait_for_event("reader", "it is not cached on this node for these credentials");
    assert_eq!(other.logs("reader").trim_end().lines().count(), 1, "no container has started");
}

#[test]
fn a_nodes_token_removes_the_startup_taint_of_its_own_node_only() {
    let _namespace = TestNamespace::new("taints");
    let token = |node: &str| {
        let pod = driver_pod(node).expect("the driver's pod");
        let arguments = [
            "--namespace",
            DRIVER_NAMESPACE,
            "create",
            "token",
            "csi-driver-oci",
            "--bound-object-kind=Pod",
            "--bound-object-name",
            &pod,
        ];
        try_kubectl(&arguments, "").expect("a token").trim().to_owned()
    };
    let one = token("node-1");
    let with = |token: &str, arguments: &[&str]| {
        let server =
            try_kubectl(&["config", "view", "--output=jsonpath={.clusters[0].cluster.server}"], "")
                .expect("the server");
        let authority = try_kubectl(
            &["config", "view", "--output=jsonpath={.clusters[0].cluster.certificate-authority}"],
            "",
        )
        .expect("the authority");
        let own = [
            "--kubeconfig=/dev/null",
            "--server",
            &server,
            "--certificate-authority",
            &authority,
            "--token",
            token,
        ];
        try_kubectl(&[&own, arguments].concat(), "")
    };
    let patch = |token: &str, node: &str, patch: &str| {
        with(token, &["patch", "node", node, "--dry-run=server", "--type=merge", "--patch", patch])
    };
    let refused = |answer: Result<String, String>, reason: &str| {
        let said = answer.expect_err("a refusal");
        assert!(said.contains(reason), "{said}");
    };
    refused(patch(&one, "node-2", r#"{"spec":{"taints":[]}}"#), "own node only");
    refused(patch(&one, "node-2", r#"{"metadata":{"labels":{"a":"b"}}}"#), "own node only");
    refused(
        patch(&one, "node-1", r#"{"spec":{"unschedulable":true}}"#),
        "csi-driver-oci-startup-taint",
    );
    refused(
        patch(&one, "node-1", r#"{"metadata":{"labels":{"a":"b"}}}"#),
        "csi-driver-oci-startup-taint",
    );
    refused(
        patch(&one, "node-1", r#"{"spec":{"taints":[{"key":"a","effect":"NoSchedule"}]}}"#),
        "csi-driver-oci-startup-taint",
    );
    refused(with(&one, &["delete", "node", "node-1", "--dry-run=server"]), "forbidden");
    refused(with(&one, &["get", "secrets", "--all-namespaces"]), "forbidden");
    let taints = object(&["get", "node", "node-1"]);
    assert!(taints["spec"]["taints"].is_null(), "{taints}");
}

#[test]
fn a_credential_plugin_gets_the_pods_own_token() {
    let namespace = TestNamespace::alone("plugin");
    let artifact = Artifact::push("tests/plugin", &[("file", "private\n")]);
    // The driver's image has no shell: the plugin brings its own, beside it.
    let script = r#"
bin=/var/lib/credential-providers/bin
mkdir -p $bin
cp "$1"/*/busybox $bin/ 2>/dev/null || cp "$1"/*/bin/busybox $bin/
cat > $bin/plugin <<'END'
#!/var/lib/credential-providers/bin/busybox sh
token="$(/var/lib/credential-providers/bin/busybox sed -n 's/.*"serviceAccountToken":"\([^"]*\)".*/\1/p')"
test -n "$token" || exit 1
payload="$(echo "$token" | /var/lib/credential-providers/bin/busybox cut -d. -f2 | /var/lib/credential-providers/bin/busybox tr _- /+)"
echo "$payload===" | /var/lib/credential-providers/bin/busybox base64 -d 2>/dev/null | /var/lib/credential-providers/bin/busybox grep -q ':trusted"' || exit 1
echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Image","auth":{"private.example.com":{"username":"robot","password":"correct-password"}}}'
END
chmod 755 $bin/plugin
cat > /var/lib/credential-providers/config.yaml <<'END'
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
  - name: plugin
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    matchImages: [private.example.com]
    defaultCacheDuration: 0s
    tokenAttributes:
      serviceAccountTokenAudience: registry
      cacheType: Token
      requireServiceAccount: true
END
"#;
    let packages = std::env::var("CLUSTER_RUN").expect("the cluster's folder") + "/../root";
    for name in NODES {
        on_node(name, &["sh", "-euc", script, "sh", &packages]).expect("a plugin");
    }
    namespace.kubectl(&["create", "serviceaccount", "trusted"]);
    let pod = |name: &str, account: &str| {
        let mut pod = Pod::new(name, &artifact.private(), "cat /artifact/file");
        pod.spec = format!("serviceAccountName: {account}");
        pod
    };
    let values = [
        "--set=csiDriver.tokenRequests[0].audience=registry",
        "--set=config.registries.credentialProviderConfig=/var/lib/credential-providers/config.yaml",
        "--set=config.registries.credentialProviderBinDir=/var/lib/credential-providers/bin",
    ];
    upgrade(&values, || {
        assert_eq!(namespace.output(&pod("trusted", "trusted")), "private\n");
        namespace.run(&pod("other", "default"));
        namespace.wait_for_event("other", "private.example.com");
        assert_ne!(namespace.field("pod", "other", "{.status.phase}"), "Succeeded");
        namespace.delete_pod("other");
    });
}
