//! One run of a plugin: a program of the administrator, which may hang, crash or print too much.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

use super::ProviderError;
use super::kubelet_provider_config::CredentialProvider;
use sys::process_group::ProcessGroup;

/// Maximum size of the output in bytes: tokens of the clouds have a few KiB.
const MAXIMUM_OUTPUT: u64 = 256 * 1024;

/// Runs a plugin with `request` on its standard input, and returns its output. At the timeout, or
/// when the future is dropped, the plugin is killed with all its child processes. Standard error is
/// discarded, since it may contain a secret.
pub(super) async fn run(
    provider: &CredentialProvider,
    folder: &Path,
    request: &[u8],
    timeout: Duration,
) -> Result<Vec<u8>, ProviderError> {
    let name = || provider.name.clone();
    let program = folder.join(&provider.name);
    let mut child = Command::new(&program)
        .args(&provider.args)
        .envs(provider.env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0)
        // The runtime reaps the child if it is dropped before its end.
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| ProviderError::Start {
            plugin: name(),
            path: program.clone(),
            reason: error.to_string(),
        })?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let mut child = ProcessGroup::new(child);
    let talk = async {
        let tell = async {
            if let Some(mut stdin) = stdin {
                // A plugin that does not read its input may still print a response.
                let _ = stdin.write_all(request).await;
            }
        };
        let listen = async {
            let mut output = Vec::new();
            if let Some(stdout) = stdout {
                stdout.take(MAXIMUM_OUTPUT + 1).read_to_end(&mut output).await?;
            }
            Ok::<_, std::io::Error>(output)
        };
        let ((), output) = tokio::join!(tell, listen);
        let output = output.map_err(|error| error.to_string())?;
        if output.len() as u64 > MAXIMUM_OUTPUT {
            return Err(format!("it printed more than {MAXIMUM_OUTPUT} bytes"));
        }
        let status = child.wait().await.map_err(|error| error.to_string())?;
        if !status.success() {
            return Err(format!("it ended with {status}"));
        }
        Ok(output)
    };
    match tokio::time::timeout(timeout, talk).await {
        Ok(Ok(output)) => Ok(output),
        Ok(Err(reason)) => Err(ProviderError::Failed { plugin: name(), reason }),
        Err(_) => {
            let reason = format!("it did not answer within {} seconds", timeout.as_secs());
            Err(ProviderError::Failed { plugin: name(), reason })
        }
    }
}
