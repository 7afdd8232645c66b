//! A node with its driver, and a proxy in front of the registry.

use std::{fs, path::Path};

use super::{
    Driver, DriverOptions, Kubelet, Layer, Manifest, Proxy, Sandbox, Tree, Volume, registry, unique,
};

/// A node, from which most tests start. Fields are dropped in this order: the driver before its directories.
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

    /// Starts a node with a configuration file: these lines below its head. `{sandbox}` is the sandbox's directory.
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

    /// Replaces the configuration of [`Self::start_configured`], as an editor would.
    #[track_caller]
    pub fn reconfigure(&self, lines: &str) {
        let path = self.sandbox.path().join("config.yaml");
        fs::write(path.with_extension("new"), format!("{}{lines}", configuration_head()))
            .expect("the configuration");
        fs::rename(path.with_extension("new"), path).expect("the configuration");
    }

    /// Starts a node with containerd's directory of registries, `certs.d` in the sandbox.
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

    /// Writes a registry's `hosts.toml`. Returns its directory.
    #[track_caller]
    pub fn hosts_toml(&self, registry: &str, text: &str) -> std::path::PathBuf {
        let folder = self.sandbox.folder(&format!("certs.d/{}", hosts_folder(registry)));
        // Replaced atomically, as tools do it.
        fs::write(folder.join("hosts.toml.new"), text).expect("hosts.toml");
        fs::rename(folder.join("hosts.toml.new"), folder.join("hosts.toml")).expect("hosts.toml");
        folder
    }

    /// Publishes in a new pod. Returns the volume and its content.
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

    /// Pushes a [`small_artifact`].
    #[track_caller]
    pub fn small_artifact(&self) -> SmallArtifact {
        small_artifact()
    }

    /// Returns whether any file of the state holds these bytes, partial downloads excluded.
    pub fn store_holds(&self, needle: &[u8]) -> bool {
        holds(self.driver.state(), needle)
    }
}

/// Returns the head of every configuration: no limits on free space, as other processes may fill a test's disk.
pub fn configuration_head() -> &'static str {
    "apiVersion: oci.custom.io/v1alpha1\nkind: NodeConfiguration\n\
     cache: {minFreePercent: 0, minFreeInodesPercent: 0, highThresholdPercent: 100, lowThresholdPercent: 100}\n"
}

fn hosts_folder(registry: &str) -> String {
    match registry.rsplit_once(':') {
        Some((host, port)) => format!("{host}_{port}_"),
        None => registry.to_owned(),
    }
}

/// Pushes a small artifact to the shared registry that no other test uses.
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
