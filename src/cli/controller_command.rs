//! `controller`: the controllers of ArtifactPreloads and of claims, which the chart runs as a Deployment.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use clap::builder::NonEmptyStringValueParser;
use clap::{ArgAction, Args};
use futures_util::FutureExt as _;
use kube::Client;
use tokio_util::sync::CancellationToken;

use super::logging::LogArguments;
use super::node_command::shutdown_token;
use super::{CommandError, runtime};
use crate::app::{driver_name, listen_address};
use crate::config::policy_config::policy_source;
use crate::config::{NodeConfiguration, Quantity};
use crate::volume::volume_attributes::{self, KEYS, NAMING_KEYS, VolumeArtifact, VolumeAttributes};
use controller_runtime::controller_metrics::metric_families;
use controller_runtime::process::{self, LeaderTask, ProcessOptions};
use controller_runtime::{ControllerMetrics, ReferenceLookup, WriteRate};
use oci::credentials::providers::NodeCredentials;
use oci::registry::Registry;
use preload::controller::{
    ClusterState, ControllerPace, NamespaceQuota, NodeStatusRules, PreloadMetrics,
    PreloadReconciler, RegistryResolver,
};
use provision::controller::{ClaimReconciler, ProvisionMetrics};
use provision::plan::facts::{CheckedVolume, ProvisionState, VolumeRules};
use pull::PullPolicy;

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
    /// Assign the artifacts of ArtifactPreloads to nodes.
    #[arg(long, env = "PRELOADS", default_value_t = true, action = ArgAction::Set)]
    preloads: bool,
    /// Make PersistentVolumes for the claims of the driver's storage classes.
    #[arg(long, env = "PROVISIONER")]
    provisioner: bool,
    /// The CSI driver's name, which is the provisioner of its storage classes.
    #[arg(long, env = "DRIVER_NAME", default_value = "oci.custom.io", value_parser = driver_name)]
    driver_name: String,
    /// The most claims of one namespace that get a volume; the oldest count. 0 means no limit.
    #[arg(long, env = "MAX_CLAIMS_PER_NAMESPACE", default_value_t = 100)]
    max_claims_per_namespace: usize,
    /// The average number of writes to the API server in a second. In a large cluster it decides how fast nodes get
    /// their assignments.
    #[arg(long, env = "WRITES_PER_SECOND", default_value_t = 50,
        value_parser = clap::value_parser!(u32).range(1..=10_000))]
    writes_per_second: u32,
    /// The most preloads of one namespace; the oldest count. 0 means no limit.
    #[arg(long, env = "MAX_PRELOADS_PER_NAMESPACE", default_value_t = 100)]
    max_preloads_per_namespace: usize,
    /// The most bytes that the pins of one namespace's preloads hold together on each node, such as `100Gi`. 0 means no
    /// limit. `cache.maxPinnedBytes` of each node limits all pins as well.
    #[arg(long, env = "MAX_PINNED_BYTES_PER_NAMESPACE", default_value = "100Gi")]
    max_pinned_bytes_per_namespace: Quantity,
    /// Label each Node with `oci.custom.io/ready.<hash>` for the preloaded artifacts that it holds.
    #[arg(long, env = "NODE_LABELS")]
    node_labels: bool,
    /// The namespaces, separated by commas, whose preloads decide the condition `oci.custom.io/ArtifactsReady` of each
    /// Node. Without any, Nodes have no such condition.
    #[arg(long, env = "NODE_CONDITION_NAMESPACES", value_delimiter = ',')]
    node_condition_namespaces: Vec<String>,
    /// A YAML file of kind NodeConfiguration, as on the nodes, for its registries, policy and limits.
    #[arg(long, env = "CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    log: LogArguments,
}

pub(super) fn run(arguments: ControllerArguments) -> Result<(), CommandError> {
    arguments.log.start();
    if !arguments.preloads && !arguments.provisioner {
        return Err("there is nothing to do: --preloads=false needs --provisioner".to_owned());
    }
    let configuration = NodeConfiguration::of_file(arguments.config.as_deref())
        .map_err(|error| error.to_string())?;
    let registry = configuration.registries.options(&configuration.limits)?;
    let runtime = runtime()?;
    let done = runtime.block_on(async {
        let client = Client::try_default()
            .await
            .map_err(|error| format!("there is no access to the Kubernetes API: {error}"))?;
        let lookup = ReferenceLookup {
            client: client.clone(),
            registry: Registry::new(registry).map_err(|error| error.to_string())?,
            limits: configuration.limits.manifest(),
            policy: policy_source(arguments.config.clone(), |_| {}),
            credentials: NodeCredentials::new(configuration.registries.provider_files()),
        };
        let shutdown = shutdown_token()?;
        arguments.control(client, lookup, shutdown).await;
        Ok(())
    });
    runtime.shutdown_background();
    done
}

impl ControllerArguments {
    /// Runs the controllers until `shutdown`.
    async fn control(self, client: Client, lookup: ReferenceLookup, shutdown: CancellationToken) {
        let mut families = metric_families();
        let metrics = Arc::new(ControllerMetrics::new(&mut families));
        let rate = WriteRate::new(self.writes_per_second);
        let mut tasks = Vec::new();
        if self.preloads {
            let of_preloads = Arc::new(PreloadMetrics::new(&mut families));
            let resolver = Arc::new(RegistryResolver(lookup.clone()));
            let bytes = self.max_pinned_bytes_per_namespace.0;
            let quota = NamespaceQuota {
                preloads: Some(self.max_preloads_per_namespace).filter(|&count| count > 0),
                pinned_bytes: Some(bytes).filter(|&bytes| bytes > 0),
            };
            let namespaces = self.node_condition_namespaces.into_iter();
            let node_status = NodeStatusRules {
                labels: self.node_labels,
                condition_namespaces: namespaces.filter(|name| !name.is_empty()).collect(),
            };
            let (client, rate, metrics) = (client.clone(), rate.clone(), Arc::clone(&metrics));
            tasks.push(LeaderTask::new(move |lost| {
                let reconciler = PreloadReconciler::new(
                    client.clone(),
                    resolver.clone(),
                    ControllerPace::default(),
                    ClusterState::new(quota, node_status.clone()),
                    rate.clone(),
                    Arc::clone(&of_preloads),
                    Arc::clone(&metrics),
                );
                reconciler.run(lost).boxed()
            }));
        }
        if self.provisioner {
            let of_claims = Arc::new(ProvisionMetrics::new(&mut families));
            let lookup = Arc::new(lookup);
            let limit = Some(self.max_claims_per_namespace).filter(|&count| count > 0);
            let (client, metrics) = (client.clone(), Arc::clone(&metrics));
            tasks.push(LeaderTask::new(move |lost| {
                let mut state = ProvisionState::new(&self.driver_name, VOLUME_RULES);
                state.claims_per_namespace = limit;
                let reconciler = ClaimReconciler::new(
                    client.clone(),
                    lookup.clone(),
                    state,
                    rate.clone(),
                    Arc::clone(&of_claims),
                    Arc::clone(&metrics),
                );
                reconciler.run(lost).boxed()
            }));
        }
        let on = |endpoint: String| (!endpoint.is_empty()).then_some(endpoint);
        let options = ProcessOptions {
            identity: self.identity,
            namespace: self.namespace,
            lease: self.lease_name,
            health_endpoint: on(self.health_endpoint),
            metrics_endpoint: on(self.metrics_endpoint),
        };
        let router = Arc::new(families).router();
        process::run(client, options, &metrics, router, &tasks, shutdown).await;
    }
}

/// The rules of `NodePublishVolume`, so that a class that no node can serve is refused at the claim.
const VOLUME_RULES: VolumeRules =
    VolumeRules { keys: &KEYS, naming: &NAMING_KEYS, yaml: &["artifacts"], check: check_volume };

fn check_volume(
    context: &HashMap<String, String>,
    mount_options: &[String],
) -> Result<CheckedVolume, String> {
    volume_attributes::mount_flags(mount_options).map_err(|error| error.to_string())?;
    let attributes = VolumeAttributes::parse(context).map_err(|error| error.to_string())?;
    let asks = |artifact: &VolumeArtifact| artifact.pull_policy != PullPolicy::Never;
    let asks_registry = attributes.artifacts.iter().any(asks);
    let references = attributes.artifacts.into_iter().map(|artifact| artifact.reference);
    Ok(CheckedVolume { references: references.collect(), asks_registry })
}
