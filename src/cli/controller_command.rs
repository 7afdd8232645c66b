//! `controller`: the controller of ArtifactPreloads, which the chart runs as a Deployment.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use kube::Client;

use super::logging::LogArguments;
use super::node_command::shutdown_token;
use super::{CommandError, runtime};
use crate::app::listen_address;
use crate::config::policy_config::policy_source;
use crate::config::{NodeConfiguration, Quantity};
use oci::credentials::providers::NodeCredentials;
use oci::registry::Registry;
use preload::controller::{
    self, ControllerOptions, ControllerPace, NamespaceQuota, RegistryResolver,
};

/// Arguments of `controller`. Each can be set in the environment as well.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  csi-driver-oci controller --identity $(hostname) --namespace csi-driver-oci
  KUBECONFIG=~/.kube/config csi-driver-oci controller --identity me --namespace default

Uses the service account of its pod for the Kubernetes API, or the kubeconfig that KUBECONFIG names.
An empty endpoint turns the feature off.")]
pub(super) struct ControllerArguments {
    /// A unique name of this process, such as the name of its pod.
    #[arg(long, env = "POD_NAME", value_parser = NonEmptyStringValueParser::new())]
    identity: String,
    /// The namespace of the lease.
    #[arg(long, env = "POD_NAMESPACE", value_parser = NonEmptyStringValueParser::new())]
    namespace: String,
    /// The name of the lease. Its holder is the leader.
    #[arg(long, env = "LEASE_NAME", default_value = "csi-driver-oci-controller")]
    lease_name: String,
    /// The address that serves `/healthz` and `/readyz`.
    #[arg(long, env = "HEALTH_ENDPOINT", default_value = "[::]:19818", value_parser = listen_address)]
    health_endpoint: String,
    /// The address that serves `/metrics`.
    #[arg(long, env = "METRICS_ENDPOINT", default_value = "[::]:19819", value_parser = listen_address)]
    metrics_endpoint: String,
    /// The average number of writes to the API server in a second. In a large cluster it decides how fast nodes get
    /// their assignments.
    #[arg(long, env = "WRITES_PER_SECOND", default_value_t = ControllerPace::default().writes_per_second,
        value_parser = clap::value_parser!(u32).range(1..=10_000))]
    writes_per_second: u32,
    /// The most preloads of one namespace; the oldest count. 0 means no limit.
    #[arg(long, env = "MAX_PRELOADS_PER_NAMESPACE", default_value_t = 100)]
    max_preloads_per_namespace: usize,
    /// The most bytes that the pins of one namespace's preloads hold together on each node, such as `100Gi`. 0 means no
    /// limit. `cache.maxPinnedBytes` of each node limits all pins as well.
    #[arg(long, env = "MAX_PINNED_BYTES_PER_NAMESPACE", default_value = "100Gi")]
    max_pinned_bytes_per_namespace: Quantity,
    /// A YAML file of kind NodeConfiguration, as on the nodes, for its registries, policy and limits.
    #[arg(long, env = "CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    log: LogArguments,
}

pub(super) fn run(arguments: ControllerArguments) -> Result<(), CommandError> {
    arguments.log.start();
    let configuration = NodeConfiguration::of_file(arguments.config.as_deref())
        .map_err(|error| error.to_string())?;
    let registry = configuration.registries.options(&configuration.limits)?;
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
        pace: ControllerPace {
            writes_per_second: arguments.writes_per_second,
            ..ControllerPace::default()
        },
    };
    let runtime = runtime()?;
    let done = runtime.block_on(async {
        let client = Client::try_default()
            .await
            .map_err(|error| format!("there is no access to the Kubernetes API: {error}"))?;
        let resolver = RegistryResolver {
            client: client.clone(),
            registry: Registry::new(registry).map_err(|error| error.to_string())?,
            limits: configuration.limits.manifest(),
            policy: policy_source(arguments.config, |_| {}),
            credentials: NodeCredentials::new(configuration.registries.provider_files()),
        };
        let shutdown = shutdown_token()?;
        controller::run(client, Arc::new(resolver), options, shutdown).await;
        Ok(())
    });
    runtime.shutdown_background();
    done
}
