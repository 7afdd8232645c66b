//! Tests the driver on a Kubernetes of real programs, installed from the chart, from a user's view.
//!
//! `make test-cluster` starts the cluster (see `tests/cluster/harness`) and runs these tests in its namespaces, so that
//! commands and addresses are the cluster's. A test that changes a node or the driver has the cluster for itself. All
//! others run in parallel, each in a namespace of its own.
#![allow(missing_docs, unreachable_pub, reason = "a test binary has no readers of its interface")]
#![allow(clippy::unused_self, reason = "a second namespace needs the first one to exist")]

mod support;

mod access;
mod api;
mod claims;
mod csi;
mod display;
mod disruptions;
mod follow;
mod preload;
mod volumes;
