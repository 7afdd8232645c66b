//! Tests `csi-driver-oci check`, for a job before a rollout.

use std::process::{Command, Output};

use crate::support::{
    Answer, Cosign, FakeRegistry, Format, Image, Layer, Manifest, OCI_MANIFEST, Tar,
    clean_environment, node_architecture, private_registry, push_index, registry, small_artifact,
    unique,
};

fn check(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_csi-driver-oci"));
    clean_environment(&mut command);
    command.arg("check").args(arguments).env_remove("DOCKER_CONFIG").env("HOME", "/nonexistent");
    command.output().expect("the binary")
}

#[track_caller]
fn passes(arguments: &[&str]) -> serde_json::Value {
    let output = check(&[arguments, &["--output", "json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[track_caller]
fn fails(arguments: &[&str], named: &str) {
    let output = check(arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains(named) && error.lines().count() == 1, "{error}");
}

#[test]
fn files_sizes_and_modes_of_files_and_archives_are_told() {
    let repository = unique("checked");
    let archive =
        Tar::new().file("bin/tool", 0o755, "#!/bin/sh\n").file("etc/tool.yml", 0o644, "a: 1\n");
    Image::new().layer(archive.finish()).push(registry(), &repository, "image");
    let titled = [Layer::titled("tool", "#!/bin/sh\n"), Layer::titled("notes.txt", "words")];
    Manifest::artifact(titled).push(registry(), &repository, "files");
    let reference = |tag: &str| format!("{}/{repository}:{tag}", registry().host());
    let report = passes(&[&reference("files")]);
    let manifest = &report["manifests"][0];
    assert_eq!(manifest["filesAreComplete"], true);
    let file = |path: &str| {
        let files = manifest["files"].as_array().expect("files");
        files.iter().find(|file| file["path"] == path).expect("the file").clone()
    };
    assert_eq!(
        (file("tool")["executable"].clone(), file("notes.txt")["bytes"].clone()),
        (true.into(), 5.into())
    );
    assert_eq!(passes(&[&reference("image")])["manifests"][0]["filesAreComplete"], false);
    passes(&[
        &reference("image"),
        "--require-file",
        "bin/tool:exec",
        "--require-file",
        "etc/tool.yml",
    ]);
    passes(&[&reference("files"), "--require-file", "tool:exec"]);
    fails(&[&reference("image"), "--require-file", "etc/tool.yml:exec"], "not executable");
    fails(&[&reference("image"), "--require-file", "bin/other"], "bin/other");
    fails(&[&reference("missing")], "no manifest");
    let table = check(&[&reference("files")]);
    assert!(String::from_utf8_lossy(&table.stdout).contains("notes.txt"));
    assert_eq!(check(&["not a reference"]).status.code(), Some(2));
}

#[test]
fn names_of_an_author_cannot_change_the_terminal_or_forge_a_line() {
    let repository = unique("checked");
    let titled = [Layer::titled("tool\u{1b}[2J\nsigned by the given key", "#!/bin/sh\n")];
    Manifest::artifact(titled).push(registry(), &repository, "v1");
    let output = check(&[&format!("{}/{repository}:v1", registry().host())]);
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8(text).expect("text");
    assert!(text.contains("tool\\u{1b}[2J\\nsigned"), "{text}");
    assert!(!text.contains('\u{1b}'), "{text}");
}

#[test]
fn platforms_are_told_and_demanded() {
    let repository = unique("platforms");
    let image = Image::new().layer(Tar::new().file("a", 0o644, "a").finish());
    let image = image.platform("linux", node_architecture());
    let manifest = image.push(registry(), &repository, "own");
    let entry = serde_json::json!({
        "mediaType": OCI_MANIFEST, "digest": manifest,
        "size": image.manifest().json().to_string().len(),
        "platform": {"os": "linux", "architecture": node_architecture()},
    });
    push_index(registry(), &repository, "v1", &[entry]);
    let reference = format!("{}/{repository}:v1", registry().host());
    let platform = format!("linux/{}", node_architecture());
    assert_eq!(passes(&[&reference])["manifests"][0]["platform"], platform);
    passes(&[&reference, "--platform", &platform]);
    fails(&[&reference, "--platform", "linux/s390x"], "linux/s390x");
    // A single manifest names its platform in its configuration.
    let own = format!("{}/{repository}:own", registry().host());
    assert_eq!(passes(&[&own])["manifests"][0]["platform"], platform);
    fails(&[&own, "--platform", "linux/s390x"], "linux/s390x");
}

#[test]
fn a_signature_is_demanded_with_a_key() {
    let folder = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let (signer, stranger) =
        (Cosign::new(folder.path(), "release"), Cosign::new(folder.path(), "stranger"));
    let artifact = small_artifact();
    let reference = format!("{}/{}", registry().host(), artifact.name);
    let key = |cosign: &Cosign| cosign.public_key().display().to_string();
    fails(&[&reference, "--key", &key(&signer)], "not signed");
    signer.sign(Format::Bundle, registry(), &artifact.repository, &artifact.digest);
    let report = passes(&[&reference, "--key", &key(&signer)]);
    assert_eq!(report["manifests"][0]["signatures"]["state"], "verified");
    fails(&[&reference, "--key", &key(&stranger)], "none of the demanded keys");
    assert_eq!(passes(&[&reference])["manifests"][0]["signatures"]["count"], 1);
    fails(&[&reference, "--key", "/missing.pub"], "/missing.pub");
}

#[test]
fn credentials_are_those_of_a_docker_configuration() {
    let private = private_registry("someone", "planted-password");
    let repository = unique("private");
    Manifest::artifact([Layer::titled("file", "x")]).push(
        &private.as_user("someone", "planted-password"),
        &repository,
        "v1",
    );
    let reference = format!("{}/{repository}:v1", private.host());
    fails(&[&reference], "401");
    let folder = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let path = folder.path().join("config.json");
    let auths = serde_json::json!({"auths": {private.host(): {"username": "someone", "password": "planted-password"}}});
    std::fs::write(&path, auths.to_string()).expect("written");
    passes(&[&reference, "--docker-config", path.to_str().expect("a path")]);
}

#[test]
fn a_credential_that_sees_nothing_is_not_the_last_one() {
    let hiding = FakeRegistry::new();
    Manifest::artifact([Layer::titled("file", "x")]).push(&hiding, "hostile", "v1");
    // A hidden repository looks like a missing one.
    hiding.script(|request| match request.header("authorization") {
        None => Some(Answer::status(401).with_header("www-authenticate", "Basic realm=\"hiding\"")),
        Some(shown) if shown.contains("c29tZW9uZTpyaWdodA==") => None,
        Some(_) => Some(Answer::error(404, "NAME_UNKNOWN")),
    });
    let folder = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let path = folder.path().join("config.json");
    let config = |right: bool| {
        let mut auths = serde_json::Map::new();
        let pair =
            |password: &str| serde_json::json!({"username": "someone", "password": password});
        auths.insert(format!("{}/hostile", hiding.host()), pair("wrong"));
        if right {
            auths.insert(hiding.host(), pair("right"));
        }
        std::fs::write(&path, serde_json::json!({"auths": auths}).to_string()).expect("written");
    };
    let file = path.to_str().expect("a path");
    config(false);
    fails(&[&hiding.reference("v1"), "--docker-config", file], "no manifest");
    config(true);
    passes(&[&hiding.reference("v1"), "--docker-config", file]);
}

#[test]
fn without_a_key_signatures_that_cannot_be_looked_up_fail_nothing() {
    let fake = FakeRegistry::new();
    Manifest::artifact([Layer::titled("file", "x")]).push(&fake, "any", "v1");
    let key = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let key = Cosign::new(key.path(), "release").public_key().display().to_string();
    for (place, codes) in
        [("/referrers/", &[401, 403, 500][..]), (".sig", &[400, 401, 403, 405, 500])]
    {
        for &code in codes {
            fake.script(move |request| request.path.contains(place).then(|| Answer::status(code)));
            let reference = fake.reference("v1");
            let report = passes(&[&reference]);
            let reason = report["manifests"][0]["signatures"]["reason"].to_string();
            assert!(reason.contains(&code.to_string()), "{report}");
            assert_eq!(report["manifests"][0]["files"][0]["path"], "file");
            let output = check(&[&reference]);
            let table = String::from_utf8(output.stdout).expect("text");
            let line = table.lines().find(|line| line.contains("cannot be looked up"));
            let line = line.unwrap_or_else(|| panic!("{table}"));
            assert!(
                line.starts_with("  signatures ") && line.contains(&code.to_string()),
                "{table}"
            );
            fails(&[&reference, "--key", &key], &code.to_string());
        }
    }
}
