//! A node that is a directory, and a container runtime for it that applies a pod's mounts, environment, arguments, user
//! and read-only root filesystem.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Stdio},
};

use k8s_openapi::api::core::v1::{Container, EnvVar, PodSpec, Volume, VolumeMount};
use nix::mount::{MsFlags, mount};

use crate::support::{
    Authority, Sandbox, ending_with_this_thread, enter_network_namespace, run, tool,
};

/// The node name that the downward API returns.
pub const NODE_NAME: &str = "worker-1";
pub const POD_NAME: &str = "pod-of-a-test";
pub const NAMESPACE: &str = "csi-driver-oci";

/// The token of every pod's service account.
pub const TOKEN: &str = "the-token-of-the-service-account";

/// The kernel's setting of file leases. Each node here has one of its own.
const LEASES: &str = "leases-enable";

/// The directory in which the kubelet mounts a pod's token.
const SERVICE_ACCOUNT: &str = "var/run/secrets/kubernetes.io/serviceaccount";

/// A node: the directory that is its root, shared with containers like that of a real node.
///
/// The calling thread gets a network of its own, with a loopback only, so that every node has the same ports.
pub struct Machine {
    pub root: PathBuf,
    /// Files of config maps and secrets by volume name. They belong to the node here, and not to a pod.
    pub files: BTreeMap<String, BTreeMap<String, String>>,
    /// The paths of published CSI volumes, by name.
    pub published: BTreeMap<String, PathBuf>,
    /// The directory with the service account's token for pods, and the API server's port on the loopback.
    pub api: Option<(PathBuf, u16)>,
    sandbox: Sandbox,
}

impl Machine {
    #[track_caller]
    pub fn new() -> Self {
        let sandbox = Sandbox::new();
        enter_network_namespace();
        // Short, because the path of a socket is limited to 107 bytes.
        let root = sandbox.folder("n");
        let none: Option<&str> = None;
        mount(Some(&root), &root, none, MsFlags::MS_BIND, none).expect("bind the node's root");
        mount(none, &root, none, MsFlags::MS_SHARED, none).expect("share the node's root");
        fs::write(sandbox.path().join(LEASES), "1\n").expect("the setting of leases");
        Self { root, files: BTreeMap::new(), published: BTreeMap::new(), api: None, sandbox }
    }

    /// Returns a path of the node as this process sees it.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// Mounts a disk at a path of the node. Containers see it according to their propagation.
    #[track_caller]
    pub fn mount_disk(&self, path: &str) {
        fs::create_dir_all(self.path(path)).expect("a mount point");
        self.sandbox.filesystem("ext4", &format!("n{path}"), "rw");
    }

    /// Starts a container of a pod, with an image of these programs and their libraries.
    #[track_caller]
    pub fn start(&self, pod: &PodSpec, container: &Container, image: &Image) -> Child {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.log_path(container))
            .expect("the container's log");
        ending_with_this_thread("unshare")
            .args(["--mount", "--propagation", "unchanged", "--", "sh", "-euc"])
            .arg(self.script(pod, container, image))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log twice"))
            .stderr(log)
            .spawn()
            .expect("a container")
    }

    /// Returns the path of the node's `fs.leases-enable`.
    pub fn leases_setting(&self) -> PathBuf {
        self.sandbox.path().join(LEASES)
    }

    pub fn log(&self, container: &Container) -> String {
        fs::read_to_string(self.log_path(container)).unwrap_or_default()
    }

    /// Returns the path of a pod's volume, whatever its source.
    pub fn volume(&self, name: &str) -> PathBuf {
        self.sandbox.folder(&format!("volumes/{name}"))
    }

    fn log_path(&self, container: &Container) -> PathBuf {
        self.sandbox.path().join(format!("{}.log", container.name))
    }

    /// Returns the script that prepares the container before its program starts.
    fn script(&self, pod: &PodSpec, container: &Container, image: &Image) -> String {
        let root = self.sandbox.folder(&format!("containers/{}", container.name));
        let mut script = format!("mount -t tmpfs -o mode=0755 image {}\n", root.display());
        for (inside, outside) in &image.files {
            bind(&mut script, outside, &root.join(inside.trim_start_matches('/')), false);
        }
        for (folder, kind) in [("proc", "--rbind"), ("dev", "--rbind")] {
            let target = root.join(folder);
            let _ = writeln!(script, "mkdir {0}; mount {kind} /{folder} {0}", target.display());
        }
        // The setting of this machine stays as it is.
        let proc = root.join("proc");
        let _ = writeln!(script, "mount --make-rprivate {}", proc.display());
        bind(&mut script, &self.leases_setting(), &proc.join("sys/fs/leases-enable"), false);
        for mount in container.volume_mounts.iter().flatten() {
            let volume = pod
                .volumes
                .iter()
                .flatten()
                .find(|volume| volume.name == mount.name)
                .unwrap_or_else(|| panic!("the pod has no volume {}", mount.name));
            self.mount(&mut script, volume, mount, &root);
        }
        let api = self.api.as_ref().filter(|_| pod.automount_service_account_token != Some(false));
        if let Some((folder, _)) = api {
            bind(&mut script, folder, &root.join(SERVICE_ACCOUNT), true);
        }
        let security = container.security_context.as_ref();
        if security.and_then(|security| security.read_only_root_filesystem) == Some(true) {
            let _ = writeln!(script, "mount -o remount,ro,bind {}", root.display());
        }
        let user = security
            .and_then(|security| security.run_as_user)
            .or(pod.security_context.as_ref().and_then(|security| security.run_as_user))
            .unwrap_or(0);
        // Runtimes give every container a PATH.
        script.push_str("chroot=$(command -v chroot)\nexec env -i PATH=/usr/bin");
        if let Some((_, port)) = api {
            let _ =
                write!(script, " KUBERNETES_SERVICE_HOST=127.0.0.1 KUBERNETES_SERVICE_PORT={port}");
        }
        for variable in container.env.iter().flatten() {
            let _ =
                write!(script, " {}", quoted(&format!("{}={}", variable.name, value(variable))));
        }
        let _ = write!(script, " $chroot --userspec={user}:{user} {}", root.display());
        let command = container.command.clone().unwrap_or_else(|| vec![image.entrypoint.clone()]);
        for word in command.iter().chain(container.args.iter().flatten()) {
            let _ = write!(script, " {}", quoted(word));
        }
        script
    }

    fn mount(&self, script: &mut String, volume: &Volume, mount: &VolumeMount, root: &Path) {
        let source = self.source(volume);
        let target = root.join(mount.mount_path.trim_start_matches('/'));
        bind(script, &source, &target, mount.read_only == Some(true));
        let propagation = match mount.mount_propagation.as_deref() {
            None | Some("None") => "--make-rprivate",
            Some("HostToContainer") => "--make-rslave",
            Some("Bidirectional") => "--make-rshared",
            Some(other) => panic!("{other} is no propagation"),
        };
        let _ = writeln!(script, "mount {propagation} {}", target.display());
    }

    /// Returns the source of a volume before it is mounted.
    fn source(&self, volume: &Volume) -> PathBuf {
        if let Some(host) = &volume.host_path {
            let path = self.path(&host.path);
            match host.type_.as_deref() {
                Some("DirectoryOrCreate") => fs::create_dir_all(&path).expect("a host path"),
                Some("Directory") => assert!(path.is_dir(), "{} is no folder", host.path),
                Some("File") => assert!(path.is_file(), "{} is no file", host.path),
                other => panic!("no test knows the type {other:?} of {}", host.path),
            }
            return path;
        }
        if volume.csi.is_some() {
            return self.published[&volume.name].clone();
        }
        let path = self.volume(&volume.name);
        if volume.config_map.is_some() || volume.secret.is_some() {
            let files = self.files.get(&volume.name);
            let files = files.unwrap_or_else(|| panic!("no files for volume {}", volume.name));
            for (name, text) in files {
                fs::write(path.join(name), text).expect("a file of a volume");
            }
        } else if volume.empty_dir.is_some() {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("its mode");
        }
        path
    }
}

/// The contents of an image: paths in it, and their paths on this machine.
pub struct Image {
    files: BTreeMap<String, PathBuf>,
    entrypoint: String,
}

impl Image {
    /// Returns the driver's image, as the Dockerfile builds it: the binary and its libraries.
    pub fn of_the_driver() -> Self {
        let binary = Path::new(env!("CARGO_BIN_EXE_csi-driver-oci"));
        let mut image = Self::of_libraries(&[binary]);
        "/usr/local/bin/csi-driver-oci".clone_into(&mut image.entrypoint);
        image.files.insert(image.entrypoint.clone(), binary.to_owned());
        image
    }

    /// Returns an image with the libraries of these programs, without the programs.
    pub fn of_libraries(programs: &[&Path]) -> Self {
        let mut files = BTreeMap::new();
        for program in programs {
            let listed = run(tool("ldd").arg(program));
            let paths = listed.split_whitespace().filter(|word| word.starts_with('/'));
            for path in paths {
                let real = fs::canonicalize(path).expect("a library");
                files.insert(path.to_owned(), real);
            }
        }
        Self { files, entrypoint: String::new() }
    }

    /// Adds a file at this path.
    #[must_use]
    pub fn with_file(mut self, inside: &str, outside: &Path) -> Self {
        self.files.insert(inside.to_owned(), outside.to_owned());
        self
    }

    /// Adds programs of this system at their own paths.
    #[must_use]
    pub fn with_programs(mut self, programs: &[&str]) -> Self {
        let paths: Vec<PathBuf> = programs
            .iter()
            .map(|name| run(tool("sh").args(["-c", &format!("command -v {name}")])).trim().into())
            .collect();
        let paths: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
        self.files.extend(Self::of_libraries(&paths).files);
        for (name, path) in programs.iter().zip(paths) {
            let real = fs::canonicalize(path).expect("a program");
            self.files.insert(format!("/usr/bin/{name}"), real);
        }
        self
    }
}

/// Creates the service account's files for pods below `folder`: a token, and the authority of the API server.
#[track_caller]
pub fn service_account(folder: &Path, authority: &Authority) -> PathBuf {
    let account = folder.join("account");
    fs::create_dir(&account).expect("a folder");
    fs::copy(authority.certificate(), account.join("ca.crt")).expect("the authority");
    fs::write(account.join("token"), TOKEN).expect("the token");
    fs::write(account.join("namespace"), NAMESPACE).expect("the namespace");
    account
}

fn bind(script: &mut String, source: &Path, target: &Path, read_only: bool) {
    let parent = target.parent().expect("a folder");
    let (source, path) = (source.display(), target.display());
    let _ = writeln!(script, "mkdir -p {}", parent.display());
    let _ = writeln!(script, "if [ -d {source} ]; then mkdir -p {path}; else touch {path}; fi");
    let _ = writeln!(script, "mount --rbind {source} {path}");
    if read_only {
        let _ = writeln!(script, "mount -o remount,ro,bind {path}");
    }
}

/// Returns the value of a variable in a container on this node.
fn value(variable: &EnvVar) -> String {
    let field = variable.value_from.as_ref().and_then(|source| source.field_ref.as_ref());
    match field.map(|field| field.field_path.as_str()) {
        Some("spec.nodeName") => NODE_NAME.to_owned(),
        Some("metadata.name") => POD_NAME.to_owned(),
        Some("metadata.namespace") => NAMESPACE.to_owned(),
        Some(other) => panic!("no test knows {other}"),
        None => variable.value.clone().unwrap_or_default(),
    }
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
