//! A node with its driver, and a registry in front of it.

use std::{fs, path::Path};

use super::{
    Driver, DriverOptions, Kubelet, Layer, Manifest, Proxy, Sandbox, Tree, Volume, registry, unique,
};

/// What most tests start from. Fields end in this order: the driver before its folders.
pub struct Node {
    pub driver: Driver,
    pub kubelet: Kubelet,
    /// The shared registry as this node's driver sees it, with requests of this node only.
    pub proxy: Proxy,
    pub sandbox: Sandbox,
}

impl Node {
    #[track_caller]
    pub fn start() -> Self {
        Self::start_with(|_, options| options)
    }

    #[track_caller]
    pub fn start_with(options: impl FnOnce(&Sandbox, DriverOptions) -> DriverOptions) -> Self {
        let sandbox = Sandbox::new();
        let driver = options(&sandbox, DriverOptions::new(&sandbox)).start();
        let kubelet = driver.kubelet();
        Self { driver, kubelet, proxy: Proxy::new(registry()), sandbox }
    }

    /// With a configuration file: these lines below its head. `{sandbox}` is the sandbox's folder.
    #[track_caller]
    pub fn start_configured(prepare: impl FnOnce(&Sandbox), lines: &str) -> Self {
        Self::start_with(|sandbox, options| {
            prepare(sandbox);
            let head = configuration_head();
            let lines = lines.replace("{sandbox}", &sandbox.path().display().to_string());
            let path = sandbox.path().join("config.yaml");
            fs::write(&path, format!("{head}{lines}")).expect("the configuration");
            options.argument(&format!("--config={}", path.display()))
        })
    }

    /// With containerd's folder of registries, `certs.d` in the sandbox.
    #[track_caller]
    pub fn start_with_hosts(lines: &str) -> Self {
        let prepare = |sandbox: &Sandbox| {
            sandbox.folder("certs.d");
        };
        Self::start_configured(
            prepare,
            &format!("registries:\n  hostsDir: \"{{sandbox}}/certs.d\"\n{lines}"),
        )
    }

    /// Writes a registry's `hosts.toml`; returns its folder.
    #[track_caller]
    pub fn hosts_toml(&self, registry: &str, text: &str) -> std::path::PathBuf {
        let folder = self.sandbox.folder(&format!("certs.d/{}", hosts_folder(registry)));
        // As tools do it: never half a file.
        fs::write(folder.join("hosts.toml.new"), text).expect("hosts.toml");
        fs::rename(folder.join("hosts.toml.new"), folder.join("hosts.toml")).expect("hosts.toml");
        folder
    }

    /// Publishes in a new pod and returns the volume and what is in it.
    #[track_caller]
    pub fn mount(&self, reference: &str) -> (Volume, Tree) {
        self.mount_with(reference, |volume| volume)
    }

    #[track_caller]
    pub fn mount_with(
        &self,
        reference: &str,
        change: impl FnOnce(Volume) -> Volume,
    ) -> (Volume, Tree) {
        let volume = change(self.kubelet.new_volume(reference));
        self.kubelet.publish_well(&volume);
        let tree = Tree::of(volume.target());
        (volume, tree)
    }

    /// See [`small_artifact`].
    #[track_caller]
    pub fn small_artifact(&self) -> SmallArtifact {
        small_artifact()
    }

    /// Whether any file of the state, half downloads apart, holds these bytes.
    pub fn store_holds(&self, needle: &[u8]) -> bool {
        holds(self.driver.state(), needle)
    }
}

/// What every configuration starts with: no floor, as a test's disk may be full for others' sake.
pub fn configuration_head() -> &'static str {
    "apiVersion: oci.custom.io/v1alpha1\nkind: NodeConfiguration\n\
     cache: {minFreePercent: 0, minFreeInodesPercent: 0}\n"
}

fn hosts_folder(registry: &str) -> String {
    match registry.rsplit_once(':') {
        Some((host, port)) => format!("{host}_{port}_"),
        None => registry.to_owned(),
    }
}

/// A small artifact in the shared registry that no other test uses.
#[track_caller]
pub fn small_artifact() -> SmallArtifact {
    let repository = unique("small");
    let content = format!("content of {repository}");
    let manifest = Manifest::artifact([Layer::titled("file.txt", content.clone())]);
    let digest = manifest.push(registry(), &repository, "v1");
    SmallArtifact { name: format!("{repository}:v1"), repository, content, digest }
}

/// An artifact of one file.
pub struct SmallArtifact {
    /// Repository and tag.
    pub name: String,
    pub repository: String,
    pub content: String,
    pub digest: String,
}

fn holds(folder: &Path, needle: &[u8]) -> bool {
    let Ok(entries) = fs::read_dir(folder) else {
        return false;
    };
    entries.flatten().any(|entry| {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => entry.file_name() != "partial" && holds(&path, needle),
            Ok(kind) if kind.is_file() => fs::read(&path)
                .is_ok_and(|bytes| bytes.windows(needle.len()).any(|window| window == needle)),
            _ => false,
        }
    })
}
