//! Artifacts and images in the cluster's registries.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use tempfile::TempDir;

use super::run;

/// An artifact of files, pushed with oras as users do.
pub struct Artifact {
    /// The repository in every registry of the cluster.
    pub repository: String,
    pub digest: String,
}

impl Artifact {
    /// Pushes files under `repository:v1`.
    #[track_caller]
    pub fn push(repository: &str, files: &[(&str, &str)]) -> Self {
        Self::push_tag(repository, "v1", files)
    }

    #[track_caller]
    pub fn push_tag(repository: &str, tag: &str, files: &[(&str, &str)]) -> Self {
        let folder = TempDir::new().expect("a folder");
        for (path, content) in files {
            write(folder.path(), path, content.as_bytes());
        }
        let names: Vec<_> = files.iter().map(|(path, _)| *path).collect();
        Self::push_folder(repository, tag, folder.path(), &names)
    }

    /// Pushes a file of this many bytes that do not compress.
    #[track_caller]
    pub fn push_large(repository: &str, bytes: usize) -> Self {
        let folder = TempDir::new().expect("a folder");
        let mut content = vec![0; bytes];
        getrandom::fill(&mut content).expect("random bytes");
        write(folder.path(), "large", &content);
        Self::push_folder(repository, "v1", folder.path(), &["large"])
    }

    /// Pushes some files and directories of a directory.
    #[track_caller]
    pub fn push_folder(repository: &str, tag: &str, folder: &Path, names: &[&str]) -> Self {
        let reference = format!("registry.example.com/{repository}:{tag}");
        let script =
            format!("cd '{}' && oras push --format=json {reference} \"$@\"", folder.display());
        let arguments = [&["-euc", &script, "oras"], names].concat();
        let said = run("sh", &arguments, "").unwrap_or_else(|error| panic!("{reference}: {error}"));
        let pushed: serde_json::Value = serde_json::from_str(&said).expect("JSON of oras");
        let digest = pushed["digest"].as_str().expect("a digest").to_owned();
        Self { repository: repository.to_owned(), digest }
    }

    /// Returns its reference in the registry that allows anonymous reads.
    pub fn reference(&self) -> String {
        format!("registry.example.com/{}:v1", self.repository)
    }

    /// Returns its reference in the registry that requires credentials.
    pub fn private(&self) -> String {
        format!("private.example.com/{}:v1", self.repository)
    }

    /// Returns its reference in the registry that sends slowly.
    pub fn slow(&self) -> String {
        format!("slow.example.com/{}:v1", self.repository)
    }
}

fn write(folder: &Path, path: &str, content: &[u8]) {
    let path = folder.join(path);
    fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
    fs::write(&path, content).expect("a file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("its mode");
}

/// Pushes an image: busybox' and a script that it starts with, whatever the arguments. The script has no comma.
#[track_caller]
fn push_image(reference: &str, script: &str) {
    let base = "docker.io/library/busybox:1.37";
    let entrypoint = format!("--entrypoint=sh,-c,set -e; {script}");
    let arguments = ["mutate", base, &entrypoint, "--tag", reference];
    run("crane", &arguments, "").unwrap_or_else(|error| panic!("{reference}: {error}"));
}

/// Pushes stand-ins for the examples' images: programs that use the volume as the real ones do at their start.
pub fn push_standard_images() {
    // Servers that are healthy once they have their models.
    push_image(
        "ghcr.io/ggml-org/llama.cpp:server-b11176",
        "test -s /models/model.gguf; mkdir /www; echo ok > /www/health; exec httpd -f -p 8080 -h /www",
    );
    push_image(
        "docker.io/vllm/vllm-openai:v0.30.0",
        "test -s /models/config.json; mkdir /www; echo ok > /www/health; exec httpd -f -p 8000 -h /www",
    );
    push_image(
        "nvcr.io/nvidia/tritonserver:26.07-py3",
        "test -s /models/detector/1/model.onnx; test -s /models/classifier/config.pbtxt; mkdir -p /www/v2/health; \
         echo ok > /www/v2/health/ready; echo ok > /www/v2/health/live; exec httpd -f -p 8000 -h /www",
    );
    push_image(
        "docker.io/envoyproxy/envoy:v1.34-latest",
        "test -s /filters/filter.wasm; test -s /etc/envoy/envoy.yaml; trap exit TERM; while :; do sleep 3600 & wait $!; done",
    );
}

/// Pushes busybox' image with the system's Perl, which makes system calls that busybox has no command for. Returns its
/// reference.
#[track_caller]
pub fn push_perl() -> String {
    let folder = TempDir::new().expect("a folder");
    let reference = "registry.example.com/tests/perl:v1";
    let script = format!(
        r#"
cd '{}'
mkdir -p image/usr/bin
cp --dereference "$(command -v perl)" image/usr/bin/perl
ldd image/usr/bin/perl | grep -o '/[^ ]*' | xargs -I '{{}}' cp --dereference --parents '{{}}' image
tar -C image -cf image.tar .
crane append --base docker.io/library/busybox:1.37 --new_layer image.tar --new_tag {reference}
"#,
        folder.path().display()
    );
    run("bash", &["-euc", &script], "").unwrap_or_else(|error| panic!("{reference}: {error}"));
    reference.to_owned()
}
