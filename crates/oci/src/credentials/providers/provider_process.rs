//! One run of a plugin: a program of the administrator, which may hang, crash or print too much.

use std::path::Path;
use std::time::Duration;

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
    let mut command = Command::new(&program);
    command.args(&provider.args).envs(provider.env.iter().map(|(name, value)| (name, value)));
    let running = ProcessGroup::spawn(&mut command).map_err(|error| ProviderError::Start {
        plugin: name(),
        path: program.clone(),
        reason: error.to_string(),
    })?;
    let failed = |reason| ProviderError::Failed { plugin: name(), reason };
    let exchanged = running.exchange(request, MAXIMUM_OUTPUT, timeout).await;
    match exchanged.map_err(failed)? {
        (status, output) if status.success() => Ok(output),
        (status, _) => Err(failed(format!("it ended with {status}"))),
    }
}
