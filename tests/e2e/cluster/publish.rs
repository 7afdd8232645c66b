//! Tests `deploy/publish/push`: the driver shows what it pushes with the real oras.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

use k8s_openapi::api::batch::v1::Job;
use serde_json::Value;
use tonic::Code;

use super::{container::Image, deployed::Deployed, only, rendered};
use crate::support::{Node, Oras, own_registry, registry, run, tool, unique};

/// Returns the script, for a registry without TLS.
pub fn push(reference: &str, home: &Path) -> Command {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/publish/push");
    let mut command = tool(&script.to_string_lossy());
    command.env("ORAS_FLAGS", "--plain-http").env("HOME", home).arg(reference);
    for name in ["ARTIFACT_TYPE", "SOURCE_DATE_EPOCH", "SIGNING_KEY"] {
        command.env_remove(name);
    }
    command
}

fn build(folder: &Path, platform: &str) {
    for (name, mode, content) in [
        ("bin/tool", 0o755, "#!/bin/sh\n"),
        ("bin/library of the tool", 0o644, "data"),
        ("config/tool.yml", 0o640, "key: value\n"),
        ("platform", 0o644, platform),
    ] {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(&path, content).expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("its mode");
    }
    std::os::unix::fs::symlink("tool", folder.join("bin/alias")).expect("a link");
}

#[test]
fn a_pushed_folder_keeps_names_modes_and_platforms_and_its_digest() {
    let room = tempfile::tempdir().expect("a folder");
    let pairs = ["linux/amd64", "linux/arm64"].map(|platform| {
        let folder = room.path().join(platform);
        build(&folder, platform);
        format!("{platform}={}", folder.display())
    });
    let repository = unique("published");
    let reference = format!("{}/{repository}:v1", registry().host());
    let pinned = run(push(&reference, room.path()).args(&pairs));
    let pinned = pinned.trim();
    assert!(pinned.starts_with(&format!("{reference}@sha256:")), "{pinned}");
    // The times of the files and of the push do not change the artifact.
    run(tool("touch").arg(room.path().join("linux/amd64/bin/tool")));
    assert_eq!(run(push(&reference, room.path()).args(&pairs)).trim(), pinned);

    let node = Node::start();
    let reference = node.proxy.reference(&format!("{repository}:v1"));
    for platform in ["linux/amd64", "linux/arm64"] {
        let (volume, tree) =
            node.mount_with(&reference, |volume| volume.attribute("platform", platform));
        let expected = [
            "bin",
            "bin/alias",
            "bin/library of the tool",
            "bin/tool",
            "config",
            "config/tool.yml",
            "platform",
        ];
        assert_eq!(tree.names(), expected);
        assert_eq!(tree.entry("bin/tool").mode & 0o777, 0o755);
        assert_eq!(tree.entry("bin/library of the tool").mode & 0o777, 0o644);
        let shown = fs::read_to_string(volume.target().join("platform")).expect("the file");
        assert_eq!(shown, platform);
    }
}

/// Creates a key pair with `openssl`: `key.pem` and `key.pub`.
fn make_keys(folder: &Path) {
    let keys = "openssl ecparam -genkey -name prime256v1 -noout -out key.pem
        openssl ec -in key.pem -pubout -out key.pub";
    run(tool("sh").args(["-euc", keys]).current_dir(folder));
}

#[test]
fn what_is_signed_passes_the_job_before_a_rollout_and_the_policy_on_the_node() {
    let room = tempfile::tempdir().expect("a folder");
    make_keys(room.path());
    let key = fs::read_to_string(room.path().join("key.pub")).expect("the key");
    let mut objects = rendered("chart")["policy"].clone();
    let configuration = objects.iter_mut().find(|object| object["data"]["release.pub"].is_string());
    configuration.expect("the key's place")["data"]["release.pub"] = key.clone().into();
    let mut deployed = Deployed::start(&objects);
    let registry = own_registry();
    let repository = format!("{}/signed/prometheus", registry.host());
    let pairs = ["linux/amd64", "linux/arm64"].map(|platform| {
        let folder = room.path().join(platform);
        fs::create_dir_all(folder.join("bin")).expect("a folder");
        let program = folder.join("bin/prometheus");
        fs::write(&program, format!("#!/bin/sh\n# {platform}\n")).expect("a program");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("its mode");
        format!("{platform}={}", folder.display())
    });
    let mut signed = push(&format!("{repository}:signed"), room.path());
    run(signed.env("SIGNING_KEY", room.path().join("key.pem")).args(&pairs));
    fs::write(room.path().join("linux/amd64/another"), "").expect("another artifact");
    run(push(&format!("{repository}:unsigned"), room.path()).args(&pairs));

    let job = only(&rendered("kustomize")["deploy__gitops__argo-cd__prometheus"], "Job").clone();
    let job: Job = serde_json::from_value(job).expect("a job");
    let pod = job.spec.and_then(|spec| spec.template.spec).expect("a pod");
    deployed.machine.files.insert("keys".into(), [("cosign.pub".into(), key)].into());
    for (version, passes) in [("signed", true), ("unsigned", false), ("missing", false)] {
        let mut container = pod.containers[0].clone();
        container.args.as_mut().expect("arguments")[1] = format!("{repository}:{version}");
        let image = Image::of_the_driver();
        let checked = deployed.machine.start(&pod, &container, &image).wait().expect("the job");
        let log = deployed.machine.log(&container);
        assert_eq!(checked.success(), passes, "{version}: {log}");
    }

    let volume = |tag: &str| deployed.kubelet().new_volume(&format!("{repository}:{tag}"));
    deployed.publish(&volume("signed"));
    let refused = deployed.try_publish(&volume("unsigned")).expect_err("it is not signed");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{}", refused.message());
}

#[test]
fn a_signature_is_one_that_cosign_would_have_made() {
    let room = tempfile::tempdir().expect("a folder");
    build(&room.path().join("build"), "any");
    make_keys(room.path());
    let repository = format!("{}/{}", registry().host(), unique("signed"));
    let mut command = push(&format!("{repository}:v1"), room.path());
    command.env("SIGNING_KEY", room.path().join("key.pem"));
    command.arg(format!("linux/amd64={}", room.path().join("build").display()));
    let pinned = run(&mut command);
    let digest = pinned.trim().split_once('@').expect("a digest").1;

    let oras = Oras::new();
    let tag = digest.replace(':', "-");
    let signature = format!("{repository}:{tag}.sig");
    let manifest = oras.call(&["manifest", "fetch", "--plain-http", &signature]);
    let manifest: Value = serde_json::from_str(&manifest).expect("a manifest");
    let layer = &manifest["layers"][0];
    assert_eq!(layer["mediaType"], "application/vnd.dev.cosign.simplesigning.v1+json");
    let payload = layer["digest"].as_str().expect("a digest");
    let payload = format!("{repository}@{payload}");
    oras.call(&["blob", "fetch", "--plain-http", "--output", "payload.json", &payload]);
    let payload = fs::read(oras.path().join("payload.json")).expect("the payload");
    let payload: Value = serde_json::from_slice(&payload).expect("JSON");
    assert_eq!(payload["critical"]["image"]["docker-manifest-digest"], digest);
    let signature = layer["annotations"]["dev.cosignproject.cosign/signature"].as_str();
    fs::write(oras.path().join("signature"), signature.expect("a signature")).expect("a file");
    let verify = format!(
        "base64 --decode signature > raw; openssl dgst -sha256 -verify {}/key.pub -signature raw payload.json",
        room.path().display()
    );
    run(tool("sh").args(["-euc", &verify]).current_dir(oras.path()));
}

#[test]
fn what_cannot_be_pushed_is_said_before_anything_is() {
    let room = tempfile::tempdir().expect("a folder");
    fs::create_dir(room.path().join("empty")).expect("a folder");
    let empty = format!("linux/amd64={}", room.path().join("empty").display());
    let host = registry().host();
    let cases = [
        (format!("{host}/a"), empty.clone(), "has no tag"),
        (format!("{host}/a:v1@sha256:0"), empty.clone(), "has no tag"),
        (format!("{host}/a:v1"), "build".to_owned(), "is not PLATFORM=FOLDER"),
        (format!("{host}/a:v1"), "linux/amd64=/nonexistent".to_owned(), "is not a folder"),
        (format!("{host}/{}:v1", unique("empty")), empty, "is empty"),
    ];
    for (reference, pair, message) in cases {
        let output = push(&reference, room.path()).arg(pair).output().expect("the script");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(message), "{reference}: {said}");
    }
}
