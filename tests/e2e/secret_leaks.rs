//! Tests that secrets, planted in every input, appear in no output.

use std::{fs, os::unix::fs::PermissionsExt as _};

use base64::Engine as _;
use serde_json::json;
use tonic::Code;

use crate::support::{
    Answer, FakeRegistry, Layer, Manifest, Node, Volume, configuration_head, run, tool,
};

const PASSWORD: &str = "planted-password-1f3e";
const IDENTITY_TOKEN: &str = "planted-identity-token-77ab";
const ACCESS_TOKEN: &str = "planted-access-token-90cd";
const SERVICE_TOKEN: &str = "planted-service-token-55ee";
const OF_THE_NODE: &str = "planted-node-password-31aa";
const OF_A_PLUGIN: &str = "planted-plugin-password-42bb";
const OF_A_HEADER: &str = "planted-header-8d8d";
const IN_A_BODY: &str = "planted-in-a-body-9e9e";

/// Returns all secrets, in plain form and in that of `Basic` authentication.
fn planted_secrets() -> Vec<String> {
    let encoded = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    [
        PASSWORD,
        IDENTITY_TOKEN,
        ACCESS_TOKEN,
        SERVICE_TOKEN,
        OF_THE_NODE,
        OF_A_PLUGIN,
        OF_A_HEADER,
        IN_A_BODY,
    ]
    .into_iter()
    .flat_map(|secret| [secret.to_owned(), encoded(&format!("someone:{secret}")), encoded(secret)])
    .collect()
}

/// Starts a registry with a token server that accepts everything; with `closed`, nothing.
fn registry(closed: bool) -> FakeRegistry {
    let registry = FakeRegistry::new();
    Manifest::artifact([Layer::titled("file", "content")]).push(&registry, "hostile", "v1");
    let host = registry.host();
    registry.script(move |request| {
        if request.path == "/token" {
            if closed {
                return Some(Answer::bytes(IN_A_BODY).with_status(401));
            }
            return Some(Answer::bytes(
                json!({"token": ACCESS_TOKEN, "expires_in": 300}).to_string(),
            ));
        }
        let shown = request.header("authorization").unwrap_or_default();
        let opened = !closed && shown == format!("Bearer {ACCESS_TOKEN}");
        let challenge = format!("Bearer realm=\"http://{host}/token\",service=\"s\"");
        (!opened).then(|| {
            Answer::bytes(IN_A_BODY).with_status(401).with_header("www-authenticate", &challenge)
        })
    });
    registry
}

#[test]
#[expect(clippy::too_many_lines, reason = "one story: plant, use, look everywhere")]
fn planted_secrets_come_out_nowhere() {
    let (open, closed) = (registry(false), registry(true));
    let hosts = [open.host(), closed.host()];
    let node = Node::start_with(|sandbox, options| {
        let own = sandbox.path();
        let auths =
            json!({"auths": {hosts[1].as_str(): {"username": "someone", "password": OF_THE_NODE}}});
        fs::write(own.join("docker.json"), auths.to_string()).expect("written");
        let plugins = sandbox.folder("plugins");
        let answer = json!({"kind": "CredentialProviderResponse", "cacheKeyType": "Registry",
            "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
            "auth": {hosts[1].as_str(): {"username": "someone", "password": OF_A_PLUGIN}}});
        let script =
            format!("#!/bin/sh\necho {OF_A_PLUGIN} >&2\ncat >/dev/null\ncat <<'E'\n{answer}\nE\n");
        fs::write(plugins.join("plugin"), script).expect("the plugin");
        fs::set_permissions(plugins.join("plugin"), fs::Permissions::from_mode(0o755))
            .expect("a mode");
        let providers = format!(
            "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n\
             - name: plugin\n  apiVersion: credentialprovider.kubelet.k8s.io/v1\n  defaultCacheDuration: 1h\n  \
             matchImages: ['{}']\n  tokenAttributes: {{serviceAccountTokenAudience: sts, cacheType: Token, \
             requireServiceAccount: true}}\n",
            hosts[1]
        );
        fs::write(own.join("providers.yaml"), providers).expect("written");
        for host in &hosts {
            let folder = sandbox.folder(&format!("certs.d/{}", host.replace(':', "_") + "_"));
            let text =
                format!("server = \"http://{host}\"\n[header]\nX-Secret = \"{OF_A_HEADER}\"\n");
            fs::write(folder.join("hosts.toml"), text).expect("written");
        }
        let lines = format!(
            "{}registries:\n  hostsDir: {own}/certs.d\n  dockerConfig: {own}/docker.json\n  \
             credentialProviderConfig: {own}/providers.yaml\n  credentialProviderBinDir: {own}/plugins\n",
            configuration_head(),
            own = own.display()
        );
        fs::write(own.join("config.yaml"), lines).expect("written");
        options
            .argument(&format!("--config={}", own.join("config.yaml").display()))
            .argument("--log-level=trace,h2=trace,hyper=trace,reqwest=trace")
            .argument("--metrics-endpoint=127.0.0.1:0")
    });
    let with_token = |volume: Volume| {
        let tokens =
            json!({"sts": {"token": SERVICE_TOKEN, "expirationTimestamp": "2999-01-01T00:00:00Z"}});
        volume.secret("csi.storage.k8s.io/serviceAccount.tokens", &tokens.to_string())
    };
    let mut messages = Vec::new();
    for registry in [&open, &closed] {
        let of = |field: serde_json::Value| {
            let config = json!({"auths": {registry.host(): field}}).to_string();
            let volume = node.kubelet.new_volume(&registry.reference("v1"));
            with_token(volume).secret(".dockerconfigjson", &config)
        };
        for volume in [
            of(json!({"username": "someone", "password": PASSWORD})),
            of(json!({"username": "someone", "identitytoken": IDENTITY_TOKEN})),
        ] {
            match node.kubelet.publish(&volume) {
                Ok(()) => node.kubelet.unpublish(&volume),
                Err(status) => {
                    assert_eq!(status.code(), Code::Unauthenticated, "{}", status.message());
                    messages.push(status.message().to_owned());
                }
            }
        }
    }
    assert_eq!(messages.len(), 2, "one registry opens and the other does not");
    let broken = node.kubelet.new_volume(&open.reference("v1"));
    let broken = broken.secret(".dockerconfigjson", &format!("{{\"auths\": \"{PASSWORD}\"}}"));
    let broken = broken.attribute("pullPolicy", "Always");
    messages.push(node.kubelet.publish_badly(&broken, Code::InvalidArgument));
    // They were sent to their hosts, or this test would prove nothing.
    let sent = |secret: &str| {
        let encoded = base64::engine::general_purpose::STANDARD.encode(format!("someone:{secret}"));
        [&open, &closed].iter().any(|registry| {
            registry.requests().iter().any(|request| {
                request
                    .header("authorization")
                    .is_some_and(|shown| shown.contains(&encoded) || shown.contains(secret))
            })
        })
    };
    for secret in [PASSWORD, ACCESS_TOKEN, OF_A_PLUGIN, OF_THE_NODE] {
        assert!(sent(secret), "{secret} was never sent");
    }
    let log = node.driver.log();
    assert!(log.contains("TRACE") || log.contains("trace"), "the log is not at trace level");
    let listening =
        log.lines().find(|line| line.contains("\"metrics\"") || line.contains("metrics"));
    let local =
        listening.and_then(|line| line.split("127.0.0.1:").nth(1)).expect("the metrics' port");
    let port: String = local.chars().take_while(char::is_ascii_digit).collect();
    let metrics = run(tool("curl").args(["-sf", &format!("http://127.0.0.1:{port}/metrics")]));
    let of_process = |file: &str| {
        let bytes = fs::read(format!("/proc/{}/{file}", node.driver.id())).expect("of the process");
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let places = [
        ("the log", log),
        ("the messages", messages.join("\n")),
        ("the metrics", metrics),
        ("the command line", of_process("cmdline")),
        ("the environment", of_process("environ")),
    ];
    for secret in planted_secrets() {
        for (place, text) in &places {
            assert!(!text.contains(&secret), "{secret} is in {place}");
        }
        assert!(!node.store_holds(secret.as_bytes()), "{secret} is in the state directory");
    }
}
