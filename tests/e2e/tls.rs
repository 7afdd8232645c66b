//! Tests certificates: private authorities, clients' certificates, and certificates that do not fit.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use tonic::Code;

use crate::support::{
    Authority, Nginx, Node, Registry, RegistryKind, clean_environment, registry, run,
    small_artifact, tool, wait_until,
};

/// Serves the shared registry's content with TLS.
fn with_tls((certificate, key): &(PathBuf, PathBuf), clients: Option<&Path>) -> Registry {
    Registry::start(&RegistryKind {
        tls: Some((certificate, key, clients)),
        content_of: Some(registry()),
        ..RegistryKind::default()
    })
}

#[test]
fn a_private_authority_is_trusted_where_it_is_configured() {
    let node = Node::start_with_hosts("");
    let authority = Authority::new(&node.sandbox.folder("authority"));
    let other = Authority::new(&node.sandbox.folder("other"));
    let registry = with_tls(&authority.issue("registry", &["127.0.0.1"]), None);
    let artifact = small_artifact();
    let reference = format!("{}/{}", registry.host(), artifact.name);
    let volume = node.kubelet.new_volume(&reference);
    let server = format!("server = \"https://{}\"\n", registry.host());
    let ca =
        |authority: &Authority| format!("{server}ca = \"{}\"\n", authority.certificate().display());
    // Without a certificate authority, and with another one.
    for text in [server.clone(), ca(&other)] {
        node.hosts_toml(&registry.host(), &text);
        let message = node.kubelet.publish_badly(&volume, Code::Unavailable);
        assert!(message.contains("no trusted TLS connection"), "{message}");
    }
    node.hosts_toml(&registry.host(), &ca(&authority));
    node.kubelet.publish_well(&volume);
    node.kubelet.unpublish(&volume);
    // The same with skip_verify, and with the files in Docker's layout.
    let artifact = small_artifact();
    let folder = node.hosts_toml(&registry.host(), &format!("{server}skip_verify = true\n"));
    let (volume, _) = node.mount(&format!("{}/{}", registry.host(), artifact.name));
    node.kubelet.unpublish(&volume);
    fs::remove_file(folder.join("hosts.toml")).expect("removed");
    fs::copy(authority.certificate(), folder.join("ca.crt")).expect("copied");
    let artifact = small_artifact();
    let volume = node.kubelet.new_volume(&format!("{}/{}", registry.host(), artifact.name));
    // Loopback without a hosts.toml is used without TLS; with certificates, TLS comes first.
    node.kubelet.publish_well(&volume);
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_certificate_for_another_name_or_time_is_refused_and_the_clock_is_named() {
    let node = Node::start_with_hosts("");
    let authority = Authority::new(&node.sandbox.folder("authority"));
    let artifact = small_artifact();
    for (pair, named) in [
        (authority.issue("other", &["elsewhere.example"]), "not valid for"),
        (authority.issue_for_the_future("future", &["127.0.0.1"]), "clock"),
    ] {
        let registry = with_tls(&pair, None);
        let ca = authority.certificate();
        let text = format!("server = \"https://{}\"\nca = \"{}\"\n", registry.host(), ca.display());
        node.hosts_toml(&registry.host(), &text);
        let volume = node.kubelet.new_volume(&format!("{}/{}", registry.host(), artifact.name));
        let message = node.kubelet.publish_badly(&volume, Code::Unavailable);
        assert!(message.contains(named), "{message}");
    }
}

/// Creates a certificate and its key with `openssl req -x509`.
fn self_signed(folder: &Path, options: &[&str]) -> (PathBuf, PathBuf) {
    let (certificate, key) = (folder.join("own.crt"), folder.join("own.key"));
    run(tool("openssl")
        .args(["req", "-x509", "-nodes", "-subj", "/CN=registry", "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .args(options));
    (certificate, key)
}

#[test]
fn the_self_signed_certificate_of_openssl_is_accepted_where_exactly_it_is_configured() {
    let node = Node::start_with_hosts("");
    let san = "subjectAltName=IP:127.0.0.1";
    let ec = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-addext", san];
    let elsewhere = "subjectAltName=DNS:elsewhere.example,IP:127.0.0.2";
    for (number, (options, refused)) in [
        (vec!["-newkey", "rsa:2048", "-days", "30", "-addext", san], None),
        ([&ec[..], &["-days", "30"]].concat(), None),
        ([&ec[..], &["-days", "30", "-addext", "basicConstraints=CA:FALSE"]].concat(), None),
        (
            vec!["-newkey", "ed25519", "-addext", san, "-addext", "keyUsage=critical,keyCertSign"],
            None,
        ),
        ([&ec[..4], &["-addext", elsewhere]].concat(), Some("not valid for")),
        // Go's clients refuse a certificate without alternative names as well.
        (ec[..4].to_vec(), Some("not valid for")),
    ]
    .into_iter()
    .enumerate()
    {
        let folder = node.sandbox.folder(&format!("own-{number}"));
        let pair = self_signed(&folder, &options);
        let registry = with_tls(&pair, None);
        let volume = |reference: String| node.kubelet.new_volume(&reference);
        let volume = volume(format!("{}/{}", registry.host(), small_artifact().name));
        let server = format!("server = \"https://{}\"\n", registry.host());
        // Another certificate of the same kind is not enough.
        let other = self_signed(&node.sandbox.folder(&format!("other-{number}")), &options).0;
        for text in [server.clone(), format!("{server}ca = \"{}\"\n", other.display())] {
            node.hosts_toml(&registry.host(), &text);
            let message = node.kubelet.publish_badly(&volume, Code::Unavailable);
            assert!(message.contains("no trusted TLS connection"), "{options:?}: {message}");
        }
        node.hosts_toml(&registry.host(), &format!("{server}ca = \"{}\"\n", pair.0.display()));
        if let Some(named) = refused {
            let message = node.kubelet.publish_badly(&volume, Code::Unavailable);
            assert!(message.contains(named), "{options:?}: {message}");
            continue;
        }
        node.kubelet.publish_well(&volume);
        node.kubelet.unpublish(&volume);
    }
}

#[test]
fn a_key_that_the_driver_does_not_support_is_named() {
    let node = Node::start_with_hosts("");
    let san = "subjectAltName=IP:127.0.0.1";
    let p521 = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-521", "-addext", san];
    let pair = self_signed(&node.sandbox.folder("own"), &p521);
    let registry = with_tls(&pair, None);
    node.hosts_toml(
        &registry.host(),
        &format!("server = \"https://{}\"\nca = \"{}\"\n", registry.host(), pair.0.display()),
    );
    let volume = node.kubelet.new_volume(&format!("{}/{}", registry.host(), small_artifact().name));
    let message = node.kubelet.publish_badly(&volume, Code::Unavailable);
    assert!(message.contains("RSA, P-256, P-384 and Ed25519 keys"), "{message}");
}

#[test]
fn a_registry_that_is_a_host_and_the_server_gives_its_own_answers() {
    let node = Node::start_with_hosts("");
    let authority = Authority::new(&node.sandbox.folder("authority"));
    let registry = with_tls(&authority.issue("registry", &["127.0.0.1"]), None);
    let host = registry.host();
    let ca = format!("ca = \"{}\"\n", authority.certificate().display());
    let table = format!("[host.\"https://{host}\"]\n{ca}");
    let server = format!("server = \"https://{host}\"\n");
    let other = "[host.\"http://127.0.0.1:1\"]\n";
    for text in [
        format!("{server}{table}"),
        table.clone(),
        format!("{server}{table}capabilities = [\"pull\", \"resolve\", \"referrers\"]\n"),
        format!("{table}capabilities = [\"pull\"]\n"),
        format!("{server}{table}{other}"),
    ] {
        node.hosts_toml(&host, &text);
        let (volume, _) = node.mount(&format!("{host}/{}", small_artifact().name));
        node.kubelet.unpublish(&volume);
        let volume =
            node.kubelet.new_volume(&format!("{host}/{}:none", small_artifact().repository));
        let message = node.kubelet.publish_badly(&volume, Code::NotFound);
        assert!(message.contains("the registry has no manifest none"), "{message}");
        // An unsigned artifact: the tag of signatures is missing, and no referrers are listed.
        let mut check = Command::new(env!("CARGO_BIN_EXE_csi-driver-oci"));
        check.arg("check").arg(format!("{host}/{}", small_artifact().name)).arg("--config");
        clean_environment(&mut check);
        let output = check.arg(node.sandbox.path().join("config.yaml")).output().expect("check");
        let told = String::from_utf8_lossy(&output.stdout);
        let failed = String::from_utf8_lossy(&output.stderr);
        assert!(told.contains("not signed"), "{text}{told}{failed}");
    }
}

#[test]
fn a_clients_certificate_opens_what_asks_for_one() {
    let node = Node::start_with_hosts("");
    let authority = Authority::new(&node.sandbox.folder("authority"));
    let pair = authority.issue("registry", &["127.0.0.1"]);
    let registry = with_tls(&pair, Some(&authority.certificate()));
    let artifact = small_artifact();
    let volume = node.kubelet.new_volume(&format!("{}/{}", registry.host(), artifact.name));
    let (certificate, key) = authority.issue("client", &["client"]);
    let text = format!(
        "server = \"https://{}\"\nca = \"{}\"\n",
        registry.host(),
        authority.certificate().display()
    );
    node.hosts_toml(&registry.host(), &text);
    node.kubelet.publish_badly(&volume, Code::Unavailable);
    let pair = format!("client = [[\"{}\", \"{}\"]]\n", certificate.display(), key.display());
    node.hosts_toml(&registry.host(), &format!("{text}{pair}"));
    node.kubelet.publish_well(&volume);
    node.kubelet.unpublish(&volume);
}

#[test]
fn a_host_that_offers_http2_is_spoken_to_with_http11() {
    let node = Node::start_with_hosts("");
    let authority = Authority::new(&node.sandbox.folder("authority"));
    let (certificate, key) = authority.issue("nginx", &["127.0.0.1"]);
    let log = node.sandbox.path().join("access.log");
    let answer = format!(
        "access_log {} combined; proxy_set_header Host $http_host; proxy_pass http://{};",
        log.display(),
        registry().host()
    );
    let folder = node.sandbox.folder("nginx");
    let nginx = Nginx::start_with_http2(&folder, (&certificate, &key), &answer);
    let (host, ca) = (format!("127.0.0.1:{}", nginx.port()), authority.certificate());
    let protocols = || -> Vec<String> {
        let log = fs::read_to_string(&log).unwrap_or_default();
        let requests = log.lines().filter_map(|line| line.split('"').nth(1));
        requests.filter_map(|request| request.rsplit(' ').next()).map(str::to_owned).collect()
    };
    // It does offer it.
    run(tool("curl")
        .args(["-sSf", "--http2", "--cacert"])
        .arg(&ca)
        .arg(format!("https://{host}/v2/")));
    wait_until("curl's request is logged", || !protocols().is_empty());
    assert_eq!(protocols(), ["HTTP/2.0"]);
    fs::write(&log, "").expect("the log");
    let text = format!("server = \"https://{host}\"\nca = \"{}\"\n", ca.display());
    node.hosts_toml(&host, &text);
    let artifact = small_artifact();
    let (volume, _) = node.mount(&format!("{host}/{}", artifact.name));
    wait_until("manifest and blob are logged", || protocols().len() >= 2);
    let protocols = protocols();
    assert!(protocols.iter().all(|protocol| protocol == "HTTP/1.1"), "{protocols:?}");
    node.kubelet.unpublish(&volume);
}
