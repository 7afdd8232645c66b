//! `controller`: what the chart's `Deployment` runs, to warm a fleet.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use kube::Client;

use super::logging::{self, LogFormat};
use super::node::until_told;
use super::{Failure, runtime};
use crate::config::policy::policy_source;
use crate::config::{NodeConfiguration, Quantity};
use oci::credentials::providers::NodeCredentials;
use oci::registry::{Registry, RegistryOptions};
use preload::controller::look::LookerClient;
use preload::controller::{self, ControllerOptions, Looker, NamespaceQuota, Pace};

/// Arguments of `controller`; each may be given in the environment too.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  csi-driver-oci controller --identity $(hostname) --namespace csi-driver-oci
  KUBECONFIG=~/.kube/config csi-driver-oci controller --identity me --namespace default

It talks to the Kubernetes API with its pod's service account, or with the kubeconfig that KUBECONFIG names.
An empty endpoint turns it off.")]
pub(super) struct ControllerArguments {
    /// A name of this process that no other one has: the pod's.
    #[arg(long, env = "POD_NAME")]
    identity: String,
    /// The namespace of the lease.
    #[arg(long, env = "POD_NAMESPACE")]
    namespace: String,
    /// The lease's name; whoever holds it leads.
    #[arg(long, env = "LEASE_NAME", default_value = "csi-driver-oci-controller")]
    lease_name: String,
    /// Where `/healthz` and `/readyz` are served.
    #[arg(long, env = "HEALTH_ENDPOINT", default_value = "[::]:19818")]
    health_endpoint: String,
    /// Where `/metrics` is served.
    #[arg(long, env = "METRICS_ENDPOINT", default_value = "[::]:19819")]
    metrics_endpoint: String,
    /// Writes to the API server in a second, over time: how fast nodes of a large fleet are told.
    #[arg(long, env = "WRITES_PER_SECOND", default_value_t = Pace::default().writes_per_second,
        value_parser = clap::value_parser!(u32).range(1..=10_000))]
    writes_per_second: u32,
    /// Preloads that one namespace may have; the oldest count. 0 bounds nothing.
    #[arg(long, env = "MAX_PRELOADS_PER_NAMESPACE", default_value_t = 100)]
    max_preloads_per_namespace: usize,
    /// Bytes that the pins of one namespace's preloads may hold together on each node, as `100Gi`. 0 bounds nothing;
    /// `cache.maxPinnedBytes` of each node bounds all pins in any case.
    #[arg(long, env = "MAX_PINNED_BYTES_PER_NAMESPACE", default_value = "100Gi")]
    max_pinned_bytes_per_namespace: Quantity,
    /// A YAML file of kind NodeConfiguration, as the nodes have it: registries, policy and limits count.
    #[arg(long, env = "CONFIG")]
    config: Option<PathBuf>,
    /// error, warn, info, debug or trace.
    #[arg(long, env = "LOG_LEVEL", default_value = "info")]
    log_level: String,
    /// How log lines are written [default: json, text on a terminal].
    #[arg(long, env = "LOG_FORMAT")]
    log_format: Option<LogFormat>,
}

pub(super) fn run(arguments: ControllerArguments) -> Result<(), Failure> {
    logging::start(&arguments.log_level, arguments.log_format)?;
    if arguments.identity.is_empty() || arguments.namespace.is_empty() {
        return Err(
            "--identity and --namespace are needed: the pod's name and namespace".to_owned()
        );
    }
    let configuration = match &arguments.config {
        Some(path) => NodeConfiguration::read(path).map_err(|error| error.to_string())?,
        None => NodeConfiguration::without_file(),
    };
    let mut registry = RegistryOptions {
        manifest_bytes_limit: configuration.limits.manifest_bytes,
        ..RegistryOptions::default()
    };
    configuration.registries.apply(&mut registry)?;
    let on = |endpoint: String| (!endpoint.is_empty()).then_some(endpoint);
    let options = ControllerOptions {
        identity: arguments.identity,
        namespace: arguments.namespace,
        lease: arguments.lease_name,
        health_endpoint: on(arguments.health_endpoint),
        metrics_endpoint: on(arguments.metrics_endpoint),
        quota: NamespaceQuota {
            preloads: Some(arguments.max_preloads_per_namespace).filter(|&count| count > 0),
            pinned_bytes: Some(arguments.max_pinned_bytes_per_namespace.0)
                .filter(|&bytes| bytes > 0),
        },
        pace: Pace { writes_per_second: arguments.writes_per_second, ..Pace::default() },
    };
    let runtime = runtime()?;
    let done = runtime.block_on(async {
        let client = Client::try_default()
            .await
            .map_err(|error| format!("there is no access to the Kubernetes API: {error}"))?;
        let looker = Looker {
            client: LookerClient(client.clone()),
            registry: Registry::new(registry).map_err(|error| error.to_string())?,
            limits: configuration.limits.manifest(),
            policy: policy_source(arguments.config, |_| {}),
            credentials: NodeCredentials::new(configuration.registries.provider_files()),
        };
        let shutdown = until_told()?;
        controller::run(client, Arc::new(looker), options, shutdown).await;
        Ok(())
    });
    runtime.shutdown_background();
    done
}
