//! A directory and a mount namespace for one test.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};

/// The environment of one test: a directory on a disk, and a mount namespace that ends with the test's last process.
///
/// The namespace belongs to the calling thread and its children, which is all that libtest gives a test.
pub struct Sandbox {
    directory: tempfile::TempDir,
}

impl Sandbox {
    #[track_caller]
    pub fn new() -> Self {
        enter_mount_namespace();
        // Not the default directory: that is often a tmpfs, and paths of sockets must stay short.
        let directory = tempfile::Builder::new()
            .prefix("e2e")
            .tempdir_in("/var/tmp")
            .expect("a folder in /var/tmp");
        Self { directory }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Returns a directory in the sandbox, created if it does not exist.
    pub fn folder(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::create_dir_all(&path).expect("a folder in the sandbox");
        path
    }

    /// Mounts a tmpfs on a directory of the sandbox.
    #[track_caller]
    pub fn tmpfs(&self, name: &str, flags: MsFlags) -> PathBuf {
        let path = self.folder(name);
        mount(Some("e2e"), &path, Some("tmpfs"), flags, Some("mode=0755")).expect("mount tmpfs");
        path
    }

    /// Returns the path of the file that contains a filesystem.
    pub fn image(&self, name: &str, kind: &str) -> PathBuf {
        self.path().join(format!("{name}.{kind}"))
    }

    /// Creates a filesystem in a file, mounted on a directory of the sandbox.
    #[track_caller]
    pub fn filesystem(&self, kind: &str, name: &str, options: &str) -> PathBuf {
        // The smallest size that every mkfs accepts without being forced.
        self.filesystem_of(512 << 20, kind, name, options)
    }

    /// Creates a filesystem of a size that its `mkfs` accepts.
    #[track_caller]
    pub fn filesystem_of(&self, size: u64, kind: &str, name: &str, options: &str) -> PathBuf {
        let image = self.image(name, kind);
        fs::File::create(&image).and_then(|file| file.set_len(size)).expect("a sparse file");
        super::run(super::tool(&format!("mkfs.{kind}")).arg("-q").arg(&image));
        let path = self.folder(name);
        super::run(
            super::tool("mount").args(["-o", &format!("loop,{options}")]).arg(&image).arg(&path),
        );
        path
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // Mounts here are removed before the directory, so that removing it removes nothing through a mount.
        let mut mounts = mounts_under(self.path());
        mounts.reverse();
        for entry in mounts {
            let _ = nix::mount::umount2(&entry.target, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

/// One line of the mount table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    pub target: PathBuf,
    pub options: Vec<String>,
    pub filesystem: String,
}

/// Returns the mounts on exactly this path, lowest first.
pub fn mounts_at(path: &Path) -> Vec<MountEntry> {
    mount_table().into_iter().filter(|entry| entry.target == path).collect()
}

/// Returns the mounts on and below this path, in the order of the table.
pub fn mounts_under(path: &Path) -> Vec<MountEntry> {
    mount_table().into_iter().filter(|entry| entry.target.starts_with(path)).collect()
}

fn mount_table() -> Vec<MountEntry> {
    // The thread's own table: the process's is that of the main thread, which is in another namespace.
    let table = fs::read_to_string("/proc/thread-self/mountinfo").expect("the mount table");
    table.lines().map(parse_mount).collect()
}

fn parse_mount(line: &str) -> MountEntry {
    let (mount, filesystem) = line.split_once(" - ").expect("a separator in mountinfo");
    let fields: Vec<&str> = mount.split(' ').collect();
    MountEntry {
        target: unescape(fields[4]).into(),
        options: fields[5].split(',').map(str::to_owned).collect(),
        filesystem: filesystem.split(' ').next().unwrap_or_default().to_owned(),
    }
}

fn unescape(field: &str) -> String {
    field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[track_caller]
#[allow(unsafe_code, reason = "nix is built without its sched feature")]
fn enter_mount_namespace() {
    // SAFETY: unshare takes flags only; CLONE_NEWNS concerns the calling thread alone.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    assert!(
        result == 0,
        "cannot make a mount namespace ({}): the end-to-end tests need root, or a user namespace as `make test` sets up",
        std::io::Error::last_os_error()
    );
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .expect("make the namespace private");
}

/// Gives the calling thread, and its children, a network of its own with a loopback only.
#[track_caller]
#[allow(unsafe_code, reason = "nix is built without its sched and net features")]
pub fn enter_network_namespace() {
    // SAFETY: unshare takes flags only; CLONE_NEWNET concerns the calling thread alone. The request names a live
    // structure of the size that the kernel writes.
    unsafe {
        assert_eq!(libc::unshare(libc::CLONE_NEWNET), 0, "{}", std::io::Error::last_os_error());
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[..2].copy_from_slice(&[b'l'.cast_signed(), b'o'.cast_signed()]);
        request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_UP).expect("a flag");
        let up = libc::ioctl(socket, libc::SIOCSIFFLAGS, &raw const request);
        libc::close(socket);
        assert_eq!(up, 0, "{}", std::io::Error::last_os_error());
    }
}

/// Mounts a copy of a mount whose owners are shifted, as container runtimes do for pods in user namespaces.
#[track_caller]
#[allow(unsafe_code, reason = "the system calls have no safe wrapper")]
pub fn mount_with_shifted_owners(source: &Path, target: &Path, first: u32) {
    use std::{
        ffi::CString,
        os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        os::unix::ffi::OsStrExt as _,
    };

    // The mapping is that of a process: one that waits, in a user namespace of its own.
    let mut holder = super::registry::ending_with_this_thread("unshare")
        .args(["--user", "sh", "-c", "echo ready && exec sleep 3600"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("a process in a user namespace");
    let mut ready = String::new();
    let output = holder.stdout.take().expect("its output");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut ready)
        .expect("its line");
    let process = PathBuf::from(format!("/proc/{}", holder.id()));
    for map in ["uid_map", "gid_map"] {
        fs::write(process.join(map), format!("0 {first} 65536")).expect("the mapping");
    }
    let namespace = fs::File::open(process.join("ns/user")).expect("the namespace");

    let path = |path: &Path| CString::new(path.as_os_str().as_bytes()).expect("a path");
    let (source, target, empty) = (path(source), path(target), CString::default());
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(namespace.as_raw_fd()).expect("a descriptor"),
    };
    // SAFETY: every pointer is to a live string or structure of the size that is given.
    let failed = unsafe {
        let tree = libc::syscall(
            libc::SYS_open_tree,
            libc::AT_FDCWD,
            source.as_ptr(),
            libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC,
        );
        assert!(tree >= 0, "open_tree: {}", std::io::Error::last_os_error());
        let tree = OwnedFd::from_raw_fd(i32::try_from(tree).expect("a descriptor"));
        let set = libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        );
        assert!(
            set == 0,
            "mount_setattr with MOUNT_ATTR_IDMAP: {}",
            std::io::Error::last_os_error()
        );
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        ) != 0
    };
    assert!(!failed, "move_mount: {}", std::io::Error::last_os_error());
    let _ = holder.kill();
    let _ = holder.wait();
}
