//! A program and all that it starts, ended together.

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::Child;

/// A child that leads a process group. Dropped before the child has ended, it ends the whole group:
/// a shell that is killed alone leaves what it waits for.
#[derive(Debug)]
pub struct ProcessGroup(Child);

impl ProcessGroup {
    /// Of a child that was started with `process_group(0)`.
    #[must_use]
    pub fn led_by(child: Child) -> Self {
        Self(child)
    }

    /// Waits for the leader's end.
    pub async fn wait(&mut self) -> std::io::Result<std::process::ExitStatus> {
        self.0.wait().await
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        // Without a number it was waited for, and the number may be somebody else's by now.
        if let Some(leader) = self.0.id().and_then(|id| i32::try_from(id).ok()) {
            let _ = killpg(Pid::from_raw(leader), Signal::SIGKILL);
        }
    }
}
