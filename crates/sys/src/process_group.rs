//! A program and its descendants, ended together.

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::Child;

/// A child that leads a process group. Dropped before the child has ended, it kills the whole group:
/// a shell that is killed alone leaves the programs that it waits for.
#[derive(Debug)]
pub struct ProcessGroup(Child);

impl ProcessGroup {
    /// Takes a child that was started with `process_group(0)`.
    pub fn new(child: Child) -> Self {
        Self(child)
    }

    /// Waits until the leader has ended.
    pub async fn wait(&mut self) -> std::io::Result<std::process::ExitStatus> {
        self.0.wait().await
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        // A child without a number was waited for: the kernel may have given its number to another process.
        if let Some(leader) = self.0.id().and_then(|id| i32::try_from(id).ok()) {
            let _ = killpg(Pid::from_raw(leader), Signal::SIGKILL);
        }
    }
}
