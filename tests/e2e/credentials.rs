//! Tests the node's own credentials: a docker configuration, and the kubelet's credential plugins.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use base64::Engine as _;
use serde_json::json;
use tonic::Code;

use crate::support::{
    Admin, Layer, Manifest, Node, Pod, Proxy, Registry, Sandbox, Volume, clean_environment,
    private_registry, registry, small_artifact, tool, unique, wait_until,
};

const USER: &str = "robot";
const PASSWORD: &str = "planted-password-of-the-node";
const TOKEN: &str = "planted-service-account-token";

/// A registry that requires a password, with artifacts, and the proxy in front of it.
struct PrivateRegistry {
    proxy: Proxy,
    registry: Registry,
}

impl PrivateRegistry {
    fn new() -> Self {
        let registry = private_registry(USER, PASSWORD);
        Self { proxy: Proxy::new(&registry), registry }
    }

    /// Returns a reference to an artifact that has not been pulled yet.
    fn artifact(&self) -> String {
        self.artifact_and_digest().0
    }

    /// Returns references to such an artifact, by tag and by digest.
    fn artifact_and_digest(&self) -> (String, String) {
        let repository = unique("private");
        let layer = Layer::titled("secret.txt", format!("of {repository}"));
        let registry = self.registry.as_user(USER, PASSWORD);
        let digest = Manifest::artifact([layer]).push(&registry, &repository, "v1");
        let reference = |name: &str| self.proxy.reference(&format!("{repository}{name}"));
        (reference(":v1"), reference(&format!("@{digest}")))
    }

    fn auths(&self) -> serde_json::Value {
        json!({self.proxy.host(): {"username": USER, "password": PASSWORD}})
    }
}

fn docker_config(auths: &serde_json::Value) -> String {
    json!({"auths": auths}).to_string()
}

const LINES: &str = "registries:
  credentialProviderConfig: \"{sandbox}/providers.yaml\"
  credentialProviderBinDir: \"{sandbox}/plugins\"
  credentialProviderTimeout: 2s
";

/// Installs a plugin that counts its runs, keeps its input, and runs these commands.
fn plugin(sandbox: &Path, commands: &str) {
    let folder = sandbox.join("plugins");
    fs::create_dir_all(&folder).expect("the plugins' folder");
    let own = sandbox.display();
    let script = format!(
        "#!/bin/sh\ncat >'{own}/request.new' && mv '{own}/request.new' '{own}/request'\n\
         echo \"$1 $VARIABLE\" >>'{own}/runs'\n{commands}\n"
    );
    let path = folder.join("plugin");
    fs::write(&path, script).expect("the plugin");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
}

/// Returns a command that prints this response.
fn answers(auths: &serde_json::Value, kind: &str, duration: &str) -> String {
    let response = json!({
        "kind": "CredentialProviderResponse",
        "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
        "cacheKeyType": kind,
        "cacheDuration": duration,
        "auth": auths,
    });
    format!("cat <<'END'\n{response}\nEND")
}

fn providers_for(sandbox: &Path, host: &str, rest: &str) {
    let text = format!(
        "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n\
         - name: plugin\n  apiVersion: credentialprovider.kubelet.k8s.io/v1\n\
         \x20 matchImages: ['{host}', 'elsewhere.example']\n  defaultCacheDuration: 1h\n\
         \x20 args: [get-credentials]\n  env: [{{name: VARIABLE, value: set}}]\n{rest}"
    );
    fs::write(sandbox.join("providers.yaml"), text).expect("the providers");
}

fn runs(sandbox: &Path) -> usize {
    fs::read_to_string(sandbox.join("runs")).unwrap_or_default().lines().count()
}

fn with_plugin(private: &PrivateRegistry, commands: &str, rest: &str, lines: &str) -> Node {
    let prepare = |sandbox: &Sandbox| {
        plugin(sandbox.path(), commands);
        providers_for(sandbox.path(), &private.proxy.host(), rest);
    };
    Node::start_configured(prepare, &format!("{LINES}{lines}"))
}

/// Returns a volume of this account, with a token if the kubelet would have requested one.
fn volume_of(node: &Node, reference: &str, (namespace, account): (&str, &str)) -> Volume {
    let pod = Pod { namespace: namespace.to_owned(), ..Pod::new() };
    node.kubelet
        .inline(&pod, "artifact", reference)
        .attribute("csi.storage.k8s.io/serviceAccount.name", account)
}

fn with_token(volume: Volume, token: &str) -> Volume {
    let tokens = json!({"sts": {"token": token, "expirationTimestamp": "2999-01-01T00:00:00Z"}});
    volume.secret("csi.storage.k8s.io/serviceAccount.tokens", &tokens.to_string())
}

const WITH_TOKEN: &str = "  tokenAttributes: {serviceAccountTokenAudience: sts, \
                          cacheType: ServiceAccount, requireServiceAccount: true";

fn assert_no_secret(node: &Node, message: &str) {
    for planted in [PASSWORD, TOKEN] {
        let encoded = base64::engine::general_purpose::STANDARD.encode(planted);
        for secret in [planted, &encoded] {
            assert!(!message.contains(secret), "{message}");
            assert!(!node.driver.log().contains(secret), "a secret is in the log");
            assert!(!node.store_holds(secret.as_bytes()), "a secret is in the state directory");
        }
    }
}

#[test]
fn the_nodes_docker_configuration_opens_a_registry_for_every_pod_and_is_read_again() {
    let private = PrivateRegistry::new();
    let node = Node::start_configured(
        |sandbox| fs::write(sandbox.path().join("docker.json"), "{}").expect("written"),
        "registries:\n  dockerConfig: \"{sandbox}/docker.json\"\n",
    );
    let reference = private.artifact();
    let volume = node.kubelet.new_volume(&reference);
    node.kubelet.publish_badly(&volume, Code::Unauthenticated);
    let next = node.sandbox.path().join("next.json");
    fs::write(&next, docker_config(&private.auths())).expect("written");
    fs::rename(next, node.sandbox.path().join("docker.json")).expect("swapped");
    node.kubelet.publish_well(&volume);
    // Credentials that any pod can use have proven access for any pod.
    private.proxy.take_requests();
    let (other, _) = node.mount(&reference);
    assert_eq!(private.proxy.requests(), []);
    node.kubelet.unpublish(&other);
    node.kubelet.unpublish(&volume);
    fs::write(node.sandbox.path().join("docker.json"), "{\"auths\": 5}").expect("broken");
    let message = node
        .kubelet
        .publish_badly(&node.kubelet.new_volume(&private.artifact()), Code::Unavailable);
    assert!(message.contains("docker.json"), "{message}");
    assert_no_secret(&node, &message);
}

#[test]
fn a_volumes_own_secret_comes_first_and_the_nodes_credentials_after_it() {
    let private = PrivateRegistry::new();
    let config = docker_config(&private.auths());
    let node = Node::start_configured(
        |sandbox| fs::write(sandbox.path().join("docker.json"), config).expect("written"),
        "registries:\n  dockerConfig: \"{sandbox}/docker.json\"\n",
    );
    let volume = node.kubelet.new_volume(&private.artifact());
    let volume = volume.secret("username", USER).secret("password", "wrong");
    node.kubelet.publish_well(&volume);
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_plugin_is_run_as_the_kubelet_runs_it_and_its_answer_is_kept_as_it_says() {
    let private = PrivateRegistry::new();
    for (kind, duration, expected) in
        [("Registry", "1h0m0s", 1), ("Global", "1h", 1), ("Image", "1h", 2), ("Registry", "0s", 2)]
    {
        let node = with_plugin(&private, &answers(&private.auths(), kind, duration), "", "");
        for _ in 0..2 {
            let reference = private.artifact();
            let (volume, _) = node.mount(&reference);
            let request = fs::read(node.sandbox.path().join("request")).expect("a request");
            let request: serde_json::Value = serde_json::from_slice(&request).expect("JSON");
            assert_eq!(request["kind"], "CredentialProviderRequest");
            assert_eq!(request["apiVersion"], "credentialprovider.kubelet.k8s.io/v1");
            if expected == 2 {
                assert_eq!(request["image"], reference.trim_end_matches(":v1"));
            }
            node.kubelet.unpublish(&volume);
        }
        assert_eq!(runs(node.sandbox.path()), expected, "{kind} for {duration}");
        let runs = fs::read_to_string(node.sandbox.path().join("runs")).expect("the runs");
        assert!(runs.starts_with("get-credentials set\n"), "{runs}");
        assert_no_secret(&node, "");
    }
}

#[test]
fn a_plugin_that_fails_in_any_way_is_named_and_the_kubelet_tries_again() {
    let private = PrivateRegistry::new();
    for (commands, named) in [
        ("echo planted-password-of-the-node; sleep 60", "did not answer within 2 seconds"),
        ("echo planted-password-of-the-node >&2; exit 3", "exit status: 3"),
        ("kill -9 $$", "signal"),
        ("echo planted-password-of-the-node", "no CredentialProviderResponse"),
        ("head -c 1000000 /dev/zero", "printed more than"),
        ("exit 0", "no CredentialProviderResponse"),
    ] {
        let node = with_plugin(&private, commands, "", "");
        let volume = node.kubelet.new_volume(&private.artifact());
        let message = node.kubelet.publish_badly(&volume, Code::Unavailable);
        assert!(message.contains("credential provider plugin"), "{message}");
        assert!(message.contains(named), "{commands}: {message}");
        assert_no_secret(&node, &message);
        plugin(node.sandbox.path(), &answers(&private.auths(), "Registry", "1h"));
        node.kubelet.publish_well(&volume);
        node.kubelet.unpublish(&volume);
    }
    let node = with_plugin(&private, "", "", "");
    fs::remove_file(node.sandbox.path().join("plugins/plugin")).expect("removed");
    let volume = node.kubelet.new_volume(&private.artifact());
    let message = node.kubelet.publish_badly(&volume, Code::Unavailable);
    assert!(
        message.contains("cannot be started") && message.contains("plugins/plugin"),
        "{message}"
    );
}

/// Returns the number of processes of this machine that were started with this word.
fn processes_with(word: &str) -> usize {
    let all = fs::read_dir("/proc").expect("processes").flatten();
    let has_word = |path: &Path| {
        let line = fs::read(path.join("cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|argument| argument == word.as_bytes())
    };
    all.filter(|entry| has_word(&entry.path())).count()
}

#[test]
fn a_plugin_that_hangs_ends_with_all_that_it_has_started() {
    let private = PrivateRegistry::new();
    // A number of seconds that no other process sleeps.
    let word = format!("{}.5", 100_000 + std::process::id());
    let node = with_plugin(&private, &format!("sleep {word} & sleep {word}"), "", "");
    let volume = node.kubelet.new_volume(&private.artifact());
    let message = node.kubelet.publish_badly(&volume, Code::Unavailable);
    assert!(message.contains("did not answer within 2 seconds"), "{message}");
    wait_until("all of the plugin has ended", || processes_with(&word) == 0);
}

#[test]
fn a_plugin_that_fails_does_not_keep_what_is_public_away() {
    let private = PrivateRegistry::new();
    let node = with_plugin(&private, "exit 1", "", "");
    let artifact = node.small_artifact();
    providers_for(node.sandbox.path(), &node.proxy.host(), "");
    let (volume, _) = node.mount(&node.proxy.reference(&artifact.name));
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_broken_provider_configuration_is_named() {
    let private = PrivateRegistry::new();
    let node = with_plugin(&private, "", "  unclosed: [\n", "");
    let volume = node.kubelet.new_volume(&private.artifact());
    let message = node.kubelet.publish_badly(&volume, Code::Unavailable);
    assert!(message.contains("providers.yaml") && message.contains("line"), "{message}");
    providers_for(node.sandbox.path(), &private.proxy.host(), "");
    plugin(node.sandbox.path(), &answers(&private.auths(), "Registry", "1h"));
    node.kubelet.publish_well(&volume);
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_service_accounts_token_goes_to_the_plugin_and_opens_for_this_account_alone() {
    let private = PrivateRegistry::new();
    let commands = format!(
        "if grep -q {TOKEN} \"$(dirname \"$0\")/../request\"; then\n{}\nelse exit 1; fi",
        answers(&private.auths(), "Registry", "0s")
    );
    let node = with_plugin(&private, &commands, &format!("{WITH_TOKEN}}}\n"), "");
    let reference = private.artifact();
    let mine = with_token(volume_of(&node, &reference, ("team", "app")), TOKEN);
    node.kubelet.publish_well(&mine);
    // In the volume context, as before Kubernetes 1.35, and with another token: the proof belongs to the account.
    private.proxy.take_requests();
    let tokens = json!({"sts": {"token": "another"}}).to_string();
    let again = volume_of(&node, &reference, ("team", "app"))
        .attribute("csi.storage.k8s.io/serviceAccount.tokens", &tokens);
    node.kubelet.publish_well(&again);
    assert_eq!(private.proxy.requests(), []);
    for other in [("team", "other"), ("other", "app")] {
        let other = with_token(volume_of(&node, &reference, other), "not the right one");
        node.kubelet.publish_badly(&other, Code::Unavailable);
    }
    let without = volume_of(&node, &reference, ("team", "third"));
    let message = node.kubelet.publish_badly(&without, Code::Unavailable);
    assert!(message.contains("tokenRequests") && message.contains("\"sts\""), "{message}");
    assert_no_secret(&node, &message);
    node.kubelet.unpublish(&mine);
    node.kubelet.unpublish(&again);
}

#[test]
fn annotations_that_only_the_api_could_give_are_named_with_the_setting_that_gives_them() {
    let private = PrivateRegistry::new();
    let rest =
        format!("{WITH_TOKEN}, requiredServiceAccountAnnotationKeys: [example.com/role]}}\n");
    let commands = answers(&private.auths(), "Registry", "1h");
    let node = with_plugin(&private, &commands, &rest, "");
    let reference = private.artifact();
    let volume = with_token(volume_of(&node, &reference, ("team", "app")), TOKEN);
    let message = node.kubelet.publish_badly(&volume, Code::Unavailable);
    for named in ["example.com/role", "team/app", "registries.serviceAccountAnnotations"] {
        assert!(message.contains(named), "{message}");
    }
    let lines = "  serviceAccountAnnotations:\n  - namespace: team\n    annotations: {example.com/role: reader}\n";
    let node = with_plugin(&private, &commands, &rest, lines);
    let volume = with_token(volume_of(&node, &reference, ("team", "app")), TOKEN);
    node.kubelet.publish_well(&volume);
    let request = fs::read_to_string(node.sandbox.path().join("request")).expect("a request");
    assert!(request.contains("\"serviceAccountAnnotations\":{\"example.com/role\":\"reader\"}"));
    node.kubelet.unpublish(&volume);
}

fn basic(volume: Volume, password: &str) -> Volume {
    volume.secret("username", USER).secret("password", password)
}

#[test]
fn credentials_that_rotate_are_known_by_their_account_while_the_registry_is_down() {
    for (ttl, counts) in [("1h", true), ("0s", false)] {
        let private = PrivateRegistry::new();
        let node = Node::start_configured(|_| {}, &format!("registries:\n  proofTTL: {ttl}\n"));
        let (reference, by_digest) = private.artifact_and_digest();
        let of = |account, password| basic(volume_of(&node, &reference, account), password);
        let first = of(("team", "app"), PASSWORD);
        node.kubelet.publish_well(&first);
        // With no time to live, a proof is too old in the next second.
        std::thread::sleep(std::time::Duration::from_millis(1100));
        private.proxy.go_down();
        let rotated = of(("team", "app"), "rotated");
        if counts {
            node.kubelet.publish_well(&rotated);
            node.kubelet.unpublish(&rotated);
        } else {
            node.kubelet.publish_badly(&rotated, Code::Unavailable);
        }
        for other in [("team", "other"), ("other", "app")] {
            node.kubelet.publish_badly(&of(other, "rotated"), Code::Unavailable);
        }
        // A pod without credentials has no access either.
        let bare = volume_of(&node, &reference, ("team", "app"));
        node.kubelet.publish_badly(&bare, Code::Unavailable);
        // A pod that asks every time gets no response, whatever the account.
        let always =
            volume_of(&node, &by_digest, ("team", "app")).attribute("pullPolicy", "Always");
        node.kubelet.publish_badly(&basic(always, "rotated"), Code::Unavailable);
        // The registry is asked as soon as it responds.
        private.proxy.come_back();
        node.kubelet.publish_badly(&of(("team", "app"), "wrong"), Code::Unauthenticated);
        node.kubelet.unpublish(&first);
    }
}

#[test]
fn the_kubelets_verification_policies_are_obeyed() {
    for (policy, opens) in [
        ("NeverVerify", true),
        ("NeverVerifyPreloadedImages", false),
        ("NeverVerifyAllowlistedImages", false),
        ("AlwaysVerify", false),
    ] {
        let private = PrivateRegistry::new();
        let lines = format!("registries:\n  credentialsVerification: {policy}\n");
        let node = Node::start_configured(|_| {}, &lines);
        let reference = private.artifact();
        let first = basic(node.kubelet.new_volume(&reference), PASSWORD);
        node.kubelet.publish_well(&first);
        let other = node.kubelet.new_volume(&reference);
        if opens {
            node.kubelet.publish_well(&other);
            node.kubelet.unpublish(&other);
        } else {
            node.kubelet.publish_badly(&other, Code::Unauthenticated);
        }
        node.kubelet.unpublish(&first);
    }
}

/// A person's home, and the commands that use a registry.
struct Home {
    registry: PrivateRegistry,
    sandbox: Sandbox,
}

impl Home {
    fn new() -> Self {
        Self { registry: PrivateRegistry::new(), sandbox: Sandbox::new() }
    }

    fn write(&self, path: &str, content: &serde_json::Value) {
        let path = self.sandbox.path().join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, content.to_string()).expect("written");
    }

    /// Installs a credential helper.
    fn helper(&self, name: &str, script: &str) {
        let path = self.sandbox.folder("bin").join(format!("docker-credential-{name}"));
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("a mode");
    }

    fn command(&self, arguments: &[&str], variables: &[(&str, &str)]) -> std::process::Output {
        let mut command = tool(env!("CARGO_BIN_EXE_csi-driver-oci"));
        clean_environment(&mut command);
        let path = format!("{}:/usr/bin:/bin", self.sandbox.folder("bin").display());
        command.args(arguments).env("PATH", path).env_remove("DOCKER_CONFIG");
        command.env("HOME", self.sandbox.path().join("home"));
        for (name, file) in variables {
            command.env(name, self.sandbox.path().join(file));
        }
        command.output().expect("the binary")
    }

    #[track_caller]
    fn check_opens(&self, variables: &[(&str, &str)]) {
        let output = self.command(&["check", &self.registry.artifact()], variables);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.stderr, b"");
    }
}

#[test]
fn commands_use_the_files_of_docker_and_podman() {
    for (file, variable) in [
        ("home/.docker/config.json", None),
        ("docker/config.json", Some(("DOCKER_CONFIG", "docker"))),
        ("auth.json", Some(("REGISTRY_AUTH_FILE", "auth.json"))),
        ("run/containers/auth.json", Some(("XDG_RUNTIME_DIR", "run"))),
        ("home/.config/containers/auth.json", None),
        ("config/containers/auth.json", Some(("XDG_CONFIG_HOME", "config"))),
    ] {
        let home = Home::new();
        home.write(file, &json!({"auths": home.registry.auths()}));
        home.check_opens(variable.as_slice());
    }
    let home = Home::new();
    home.write("home/.dockercfg", &home.registry.auths());
    home.check_opens(&[]);
    // The first file with an entry counts, and one without says nothing.
    home.write("home/.docker/config.json", &json!({"auths": {"other.io": {}}}));
    home.check_opens(&[]);
}

#[test]
fn commands_ask_credential_helpers_for_their_registry_alone() {
    let home = Home::new();
    let asked = home.sandbox.path().join("asked");
    let answer = json!({"ServerURL": "x", "Username": USER, "Secret": PASSWORD});
    let script =
        format!("read -r server; echo \"$1 $server\" >> {}; echo '{answer}'", asked.display());
    home.helper("good", &script);
    home.helper("empty", "echo 'credentials not found in native keychain'; exit 1");
    home.write(
        "home/.docker/config.json",
        &json!({"credsStore": "good", "credHelpers": {"other.io": "none"}}),
    );
    home.check_opens(&[]);
    let host = home.registry.proxy.host();
    assert_eq!(fs::read_to_string(&asked).expect("asked"), format!("get {host}\n"));
    home.write(
        "home/.docker/config.json",
        &json!({"credsStore": "empty", "credHelpers": {host: "good"}}),
    );
    home.check_opens(&[]);
    // Without an entry of the helper, that of the file counts.
    home.write(
        "home/.docker/config.json",
        &json!({"credsStore": "empty", "auths": home.registry.auths()}),
    );
    home.check_opens(&[]);
}

#[test]
fn a_helper_that_fails_is_named_and_public_content_needs_none() {
    let home = Home::new();
    home.helper("talkative", "yes planted-secret | head -c 1000000");
    home.helper("broken", "echo planted-secret; exit 3");
    let public = format!("{}/{}", registry().host(), small_artifact().name);
    for (name, reason) in [
        ("talkative", "it printed more than"),
        ("broken", "it ended with exit status: 3"),
        ("missing", "it cannot be started"),
        ("../broken", "its name has a slash"),
    ] {
        home.write("home/.docker/config.json", &json!({"credsStore": name}));
        let output = home.command(&["check", &public], &[]);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{told}");
        assert!(
            told.contains(&format!("docker-credential-{name}")) && told.contains(reason),
            "{told}"
        );
        assert!(!told.contains("planted-secret"), "{told}");
    }
}

#[test]
fn mount_and_warm_use_a_helper_and_speak_of_logins() {
    let home = Home::new();
    let (node, admin) = Admin::start("");
    let folder = home.sandbox.folder("mounted");
    let (folder, state) = (folder.to_str().expect("a path"), home.sandbox.folder("state"));
    let endpoint = format!("unix://{}", node.sandbox.path().join("admin.sock").display());
    let run = |command: &str| {
        let reference = home.registry.artifact();
        let output = match command {
            "mount" => home.command(
                &["mount", &reference, folder, "--state-dir", state.to_str().expect("a path")],
                &[],
            ),
            _ => home.command(
                &[command, &reference, "--admin-endpoint", &endpoint]
                    [..if command == "warm" { 4 } else { 2 }],
                &[],
            ),
        };
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    };
    let host = home.registry.proxy.host();
    for command in ["check", "mount", "warm"] {
        let (done, told) = run(command);
        assert!(!done && told.contains(&format!("`docker login {host}`")), "{command}: {told}");
        assert!(!told.contains("nodePublishSecretRef"), "{command}: {told}");
    }
    let answer = json!({"Username": USER, "Secret": PASSWORD});
    home.helper("good", &format!("echo '{answer}'"));
    home.write("home/.docker/config.json", &json!({"credsStore": "good"}));
    for command in ["check", "mount", "warm"] {
        let (done, told) = run(command);
        assert!(done, "{command}: {told}");
    }
    nix::mount::umount(folder).expect("unmounted");
    // The node has run no helper, and keeps no credential.
    assert_eq!(admin.json(&["ls"])["artifacts"].as_array().map(Vec::len), Some(1));
}
