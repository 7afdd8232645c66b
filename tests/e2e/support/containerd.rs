//! Debian's containerd, without its plugins for the kubelet.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use super::{ending_with_this_thread, tool, wait_until};

/// The plugins that serve the kubelet, in 1.x and in 2.x.
const KUBELETS: [&str; 3] =
    ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"];

/// A running containerd. Its process ends with the value.
pub struct Containerd {
    socket: PathBuf,
    pub process: Child,
}

impl Containerd {
    /// Starts containerd. Images are stored below `root`, everything else below `run`.
    #[track_caller]
    pub fn start(root: &Path, run: &Path) -> Self {
        let (socket, config) = (run.join("c.sock"), run.join("config.toml"));
        let text = format!(
            "version = 2\nroot = \"{}\"\nstate = \"{}\"\ndisabled_plugins = {KUBELETS:?}\n\
             [grpc]\naddress = \"{}\"\n",
            root.display(),
            run.join("state").display(),
            socket.display()
        );
        fs::write(&config, text).expect("a configuration");
        let process = ending_with_this_thread("containerd")
            .args(["--log-level", "error", "--config"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("containerd, which `make tools` installs");
        let containerd = Self { socket, process };
        wait_until("containerd answers", || {
            containerd.ctr().arg("version").output().is_ok_and(|output| output.status.success())
        });
        containerd
    }

    pub fn ctr(&self) -> Command {
        let mut command = tool("ctr");
        command.arg("--address").arg(&self.socket);
        command
    }

    /// Unpacks the image as a container would see it, as a copy that needs no overlay.
    #[track_caller]
    pub fn mount(&self, reference: &str, target: &Path) {
        self.try_mount(reference, target).expect("an image that containerd unpacks");
    }

    /// Returns the error of `ctr` if the image cannot be unpacked.
    #[track_caller]
    pub fn try_mount(&self, reference: &str, target: &Path) -> Result<(), String> {
        let copied = ["--snapshotter", "native", reference];
        let (mut pull, mut mount) = (self.ctr(), self.ctr());
        pull.args(["images", "pull", "--plain-http", "--local"]).args(copied);
        mount.args(["images", "mount"]).args(copied).arg(target);
        for command in [&mut pull, &mut mount] {
            let output = command.output().expect("ctr, which `make tools` installs");
            if !output.status.success() {
                return Err(String::from_utf8_lossy(&output.stderr).into_owned());
            }
        }
        Ok(())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
