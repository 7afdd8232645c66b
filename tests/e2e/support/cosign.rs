//! A real cosign with a key pair of the test.

use std::path::{Path, PathBuf};

use super::{Registry, run, tool};

/// The kinds of keys that cosign accepts.
pub const KINDS: [&[&str]; 4] = [
    &["ecparam", "-name", "prime256v1", "-genkey", "-noout"],
    &["ecparam", "-name", "secp384r1", "-genkey", "-noout"],
    &["genpkey", "-algorithm", "ed25519"],
    &["genpkey", "-algorithm", "rsa", "-pkeyopt", "rsa_keygen_bits:2048"],
];

/// The format in which a signature is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Legacy,
    Bundle,
}

/// A signer with a key pair.
pub struct Cosign {
    folder: PathBuf,
    name: String,
}

impl Cosign {
    /// Creates a key pair with cosign: ECDSA P-256.
    #[track_caller]
    pub fn new(folder: &Path, name: &str) -> Self {
        let signer = Self::named(folder, name);
        run(signer.command().args(["generate-key-pair", "--output-key-prefix", name]));
        signer
    }

    /// Creates a key with openssl and these arguments.
    #[track_caller]
    pub fn with_key(folder: &Path, name: &str, openssl: &[&str]) -> Self {
        let signer = Self::named(folder, name);
        let pem = signer.path("pem");
        run(tool("openssl").args(openssl).arg("-out").arg(&pem));
        run(signer
            .command()
            .args(["import-key-pair", "-y", "--key"])
            .arg(&pem)
            .args(["--output-key-prefix", name]));
        signer
    }

    fn named(folder: &Path, name: &str) -> Self {
        std::fs::create_dir_all(folder).expect("the keys' folder");
        Self { folder: folder.to_owned(), name: name.to_owned() }
    }

    /// Returns the path of the public key.
    pub fn public_key(&self) -> PathBuf {
        self.path("pub")
    }

    /// Signs a manifest in a registry.
    #[track_caller]
    pub fn sign(&self, format: Format, registry: &Registry, repository: &str, digest: &str) {
        let reference = format!("{}/{repository}@{digest}", registry.host());
        let bundle = format!("--new-bundle-format={}", format == Format::Bundle);
        run(self
            .command()
            .args(["sign", "-y", "--use-signing-config=false", "--tlog-upload=false", &bundle])
            .args(["--allow-http-registry", "--key"])
            .arg(self.path("key"))
            .arg(reference));
    }

    fn path(&self, extension: &str) -> PathBuf {
        self.folder.join(format!("{}.{extension}", self.name))
    }

    fn command(&self) -> std::process::Command {
        let mut command = tool("cosign");
        command.current_dir(&self.folder).env("COSIGN_PASSWORD", "").env("HOME", &self.folder);
        command
    }
}
