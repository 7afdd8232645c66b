//! A program and its descendants, ended together.

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};

/// A child that leads a process group. Dropped before the child has ended, it kills the whole group:
/// a shell that is killed alone leaves the programs that it waits for.
#[derive(Debug)]
pub struct ProcessGroup(Child);

impl ProcessGroup {
    /// Starts a program as the leader of a group, with pipes for its input and output. Its errors go nowhere.
    pub fn spawn(command: &mut Command) -> std::io::Result<Self> {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            // The runtime reaps the child if it is dropped before its end.
            .kill_on_drop(true)
            .spawn()
            .map(Self)
    }

    /// Writes to the leader's standard input, and returns its exit status and standard output.
    ///
    /// # Errors
    ///
    /// The reason, if the leader prints more than `limit` bytes, runs longer than `timeout`, or cannot be read.
    pub async fn exchange(
        mut self,
        input: &[u8],
        limit: u64,
        timeout: Duration,
    ) -> Result<(ExitStatus, Vec<u8>), String> {
        let (stdin, stdout) = (self.0.stdin.take(), self.0.stdout.take());
        let talk = async {
            let write = async {
                if let Some(mut stdin) = stdin {
                    // A program that does not read its input may still print a response.
                    let _ = stdin.write_all(input).await;
                }
            };
            let read = async {
                let mut output = Vec::new();
                if let Some(stdout) = stdout {
                    stdout.take(limit + 1).read_to_end(&mut output).await?;
                }
                Ok::<_, std::io::Error>(output)
            };
            let ((), output) = tokio::join!(write, read);
            let output = output.map_err(|error| error.to_string())?;
            if output.len() as u64 > limit {
                return Err(format!("it printed more than {limit} bytes"));
            }
            let status = self.0.wait().await.map_err(|error| error.to_string())?;
            Ok((status, output))
        };
        tokio::time::timeout(timeout, talk).await.unwrap_or_else(|_| {
            Err(format!("it did not answer within {} seconds", timeout.as_secs()))
        })
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
