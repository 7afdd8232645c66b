//! Proxies that the environment names.

use std::fs;

use nix::mount::{MsFlags, mount};
use tonic::Code;

use crate::support::{
    Authority, ForwardProxy, Node, Registry, RegistryKind, configuration_head, registry,
    small_artifact,
};

#[test]
fn the_environments_proxies_are_used_and_no_proxy_is_obeyed() {
    let folder = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let authority = Authority::new(folder.path());
    let (certificate, key) = authority.issue("registry", &["secure.example"]);
    let secure = Registry::start(&RegistryKind {
        tls: Some((&certificate, &key, None)),
        content_of: Some(registry()),
        ..RegistryKind::default()
    });
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
        // Of all these names, only the one that no proxy is for is known here.
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
    // A proxy that cannot go on is not gone around.
    let volume = node.kubelet.new_volume("nowhere.example/team/app:v1");
    node.kubelet.publish_badly(&volume, Code::Unavailable);
    assert!(for_http.asked().iter().any(|asked| asked.ends_with(" nowhere.example:80")));
}
