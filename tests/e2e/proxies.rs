//! Tests proxies of the environment.

use std::{fs, path::Path};

use nix::mount::{MsFlags, mount};
use tonic::Code;

use crate::support::{
    Authority, ForwardProxy, Node, Registry, RegistryKind, configuration_head, registry,
    small_artifact,
};

/// Starts `secure.example` with the content of the shared registry.
fn registry_with_tls(folder: &Path) -> (Authority, Registry) {
    let authority = Authority::new(folder);
    let (certificate, key) = authority.issue("registry", &["secure.example"]);
    let secure = Registry::start(&RegistryKind {
        tls: Some((&certificate, &key, None)),
        content_of: Some(registry()),
        ..RegistryKind::default()
    });
    (authority, secure)
}

#[test]
fn the_environments_proxies_are_used_and_no_proxy_is_obeyed() {
    let folder = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let (authority, secure) = registry_with_tls(folder.path());
    let (for_http, for_https) = (
        ForwardProxy::start([("plain.example:80", registry().address())]),
        ForwardProxy::start([("secure.example:443", secure.address())]),
    );
    let port = registry().address().port();
    let node = Node::start_with(|sandbox, options| {
        let own = sandbox.path().display();
        for (folder, server) in [
            ("plain.example".to_owned(), "plain.example".to_owned()),
            (format!("direct.example_{port}_"), format!("direct.example:{port}")),
            ("nowhere.example".to_owned(), "nowhere.example".to_owned()),
        ] {
            let folder = sandbox.folder(&format!("certs.d/{folder}"));
            let text = format!("server = \"http://{server}\"\n");
            fs::write(folder.join("hosts.toml"), text).expect("hosts.toml");
        }
        // Of all these names, only the one without a proxy is known here.
        let (names, none) = (sandbox.path().join("hosts"), None::<&str>);
        fs::write(&names, "127.0.0.1 localhost direct.example\n").expect("the names");
        mount(Some(&names), "/etc/hosts", none, MsFlags::MS_BIND, none).expect("names of its own");
        let lines = format!("{}registries:\n  hostsDir: \"{own}/certs.d\"\n", configuration_head());
        fs::write(sandbox.path().join("config.yaml"), lines).expect("the configuration");
        options
            .argument(&format!("--config={own}/config.yaml"))
            .environment("HTTP_PROXY", &for_http.url())
            .environment("HTTPS_PROXY", &for_https.url())
            .environment("NO_PROXY", "10.0.0.0/8,direct.example")
            .environment("SSL_CERT_FILE", &authority.certificate().display().to_string())
    });
    let mount_from = |host: &str| {
        let artifact = small_artifact();
        let (volume, _) = node.mount(&format!("{host}/{}", artifact.name));
        assert_eq!(volume.text("file.txt"), artifact.content);
        node.kubelet.unpublish(&volume);
    };
    mount_from(&format!("direct.example:{port}"));
    mount_from(&registry().host());
    assert_eq!(for_http.asked(), [""; 0], "what NO_PROXY names, and loopback, is asked directly");
    assert_eq!(for_https.asked(), [""; 0]);
    mount_from("plain.example");
    let asked = for_http.asked();
    assert!(asked.len() >= 2, "the manifest and the blob: {asked:?}");
    assert!(asked.iter().all(|asked| asked.ends_with(" plain.example:80")), "{asked:?}");
    assert_eq!(for_https.asked(), [""; 0]);
    // TLS ends at the registry: the proxy sees a name and nothing else.
    mount_from("secure.example");
    let tunnels = for_https.asked();
    assert!(!tunnels.is_empty());
    assert!(tunnels.iter().all(|asked| asked == "CONNECT secure.example:443"), "{tunnels:?}");
    assert_eq!(for_http.asked(), asked);
    // A proxy that fails is not bypassed.
    let volume = node.kubelet.new_volume("nowhere.example/team/app:v1");
    node.kubelet.publish_badly(&volume, Code::Unavailable);
    assert!(for_http.asked().iter().any(|asked| asked.ends_with(" nowhere.example:80")));
}

/// Starts a node with these variables, which knows two names as its own and uses them without TLS.
fn node_behind(names: &Path, variables: &[(&str, &str)]) -> Node {
    Node::start_with(|sandbox, options| {
        let own = sandbox.path().display();
        let port = registry().address().port();
        for host in [format!("a.corp.example:{port}"), format!("corp.example:{port}")] {
            let folder = sandbox.folder(&format!("certs.d/{}", host.replace(':', "_") + "_"));
            let text = format!("server = \"http://{host}\"\n");
            fs::write(folder.join("hosts.toml"), text).expect("hosts.toml");
        }
        let none = None::<&str>;
        fs::write(names, "127.0.0.1 localhost a.corp.example corp.example\n").expect("the names");
        mount(Some(names), "/etc/hosts", none, MsFlags::MS_BIND, none).expect("names of its own");
        let lines = format!("{}registries:\n  hostsDir: \"{own}/certs.d\"\n", configuration_head());
        fs::write(sandbox.path().join("config.yaml"), lines).expect("the configuration");
        let options = options.argument(&format!("--config={own}/config.yaml"));
        variables.iter().fold(options, |options, (name, value)| options.environment(name, value))
    })
}

#[test]
fn no_proxy_is_read_as_by_go_and_an_empty_variable_is_an_unset_one() {
    // Outlives the nodes, since a later mount still needs it.
    let names = tempfile::NamedTempFile::new_in("/var/tmp").expect("a file");
    let port = registry().address().port();
    for (no_proxy, of_lower, of_upper) in [
        ("*.corp.example".to_owned(), true, false),
        (".corp.example".to_owned(), true, false),
        ("corp.example".to_owned(), true, true),
        (format!("a.corp.example:{port}"), true, false),
        (format!("corp.example:{}", port ^ 1), false, false),
    ] {
        let address = registry().address();
        let (lower, upper) = (format!("a.corp.example:{port}"), format!("corp.example:{port}"));
        let proxy = ForwardProxy::start([(lower.as_str(), address), (upper.as_str(), address)]);
        let url = proxy.url();
        let variables =
            [("HTTP_PROXY", ""), ("http_proxy", &url), ("NO_PROXY", ""), ("no_proxy", &no_proxy)];
        let node = node_behind(names.path(), &variables);
        for (host, is_direct) in [(&lower, of_lower), (&upper, of_upper)] {
            let before = proxy.asked().len();
            let artifact = small_artifact();
            let (volume, _) = node.mount(&format!("{host}/{}", artifact.name));
            node.kubelet.unpublish(&volume);
            assert_eq!(proxy.asked().len() == before, is_direct, "NO_PROXY={no_proxy} for {host}");
        }
    }
}

#[test]
fn a_proxy_may_speak_socks_and_resolves_names_itself() {
    let folder = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let (authority, secure) = registry_with_tls(folder.path());
    let proxy = ForwardProxy::start_socks([
        ("secure.example:443", secure.address()),
        ("plain.example:80", registry().address()),
    ]);
    let roots = authority.certificate().display().to_string();
    let url = proxy.socks_url();
    let names = folder.path().join("hosts");
    let node = node_behind(&names, &[("HTTPS_PROXY", &url), ("SSL_CERT_FILE", &roots)]);
    let artifact = small_artifact();
    let (volume, _) = node.mount(&format!("secure.example/{}", artifact.name));
    assert_eq!(volume.text("file.txt"), artifact.content);
    node.kubelet.unpublish(&volume);
    assert!(proxy.asked().iter().all(|asked| asked == "SOCKS secure.example:443"));
    // A proxy for one host alone, and none in the environment.
    let node = Node::start_with_hosts("");
    let text = format!("server = \"http://plain.example\"\nproxy = \"{url}\"\n");
    node.hosts_toml("plain.example", &text);
    let (volume, _) = node.mount(&format!("plain.example/{}", small_artifact().name));
    node.kubelet.unpublish(&volume);
    assert!(proxy.asked().iter().any(|asked| asked == "SOCKS plain.example:80"));
}
