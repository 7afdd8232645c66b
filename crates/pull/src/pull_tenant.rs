//! The tenant of a pull, to which connections, memory and processor time are charged.
//!
//! Shares are fair between tenants first, so that a namespace gains nothing by more pods, artifacts
//! or registries.

use std::fmt;
use std::sync::Arc;

use super::artifact_request::Priority;

/// The party that a pull works for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tenant {
    /// The pods and preloads of a Kubernetes namespace.
    Namespace(Arc<str>),
    /// One pod, by its uid, where the kubelet does not send the pod's namespace.
    Pod(Arc<str>),
    /// A command of the node's administrator, or a publish without any information on its pod.
    Admin,
    /// The node's configuration, and the driver's own maintenance.
    Config,
}

/// A caller of a flight: a volume, or another flight with all its tenants.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The highest priority of those that wait.
    pub priority: Priority,
    /// The tenants that wait, in the order of their arrival.
    pub tenants: Vec<Tenant>,
}

/// The tenants that wait for one flight, each with the number of its callers.
#[derive(Debug, Default)]
pub(super) struct WaitingTenants {
    /// Tenants in the order of their arrival.
    waiting: Vec<(Tenant, usize)>,
    /// The tenant that left last, which a flight without callers is charged to.
    last: Option<Tenant>,
}

impl Tenant {
    /// Returns the tenant of a pod: its namespace, or its uid where the namespace is not known.
    pub fn of_pod(namespace: Option<&str>, uid: Option<&str>) -> Self {
        match (namespace, uid) {
            (Some(namespace), _) => Self::Namespace(namespace.into()),
            (None, Some(uid)) => Self::Pod(uid.into()),
            (None, None) => Self::Admin,
        }
    }

    /// Returns the Kubernetes namespace, where it is known.
    pub fn namespace(&self) -> Option<&str> {
        match self {
            Self::Namespace(name) => Some(name),
            Self::Pod(_) | Self::Admin | Self::Config => None,
        }
    }
}

impl fmt::Display for Tenant {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Namespace(name) => write!(formatter, "namespace {name}"),
            Self::Pod(uid) => write!(formatter, "pod {uid}"),
            Self::Admin => formatter.write_str("the administrator"),
            Self::Config => formatter.write_str("the node's configuration"),
        }
    }
}

impl Caller {
    /// Returns a caller of one tenant.
    pub fn new(priority: Priority, tenant: Tenant) -> Self {
        Self { priority, tenants: vec![tenant] }
    }
}

impl WaitingTenants {
    /// Adds one caller of a tenant.
    pub(super) fn enter(&mut self, tenant: &Tenant) {
        match self.waiting.iter_mut().find(|(waiting, _)| waiting == tenant) {
            Some((_, callers)) => *callers += 1,
            None => self.waiting.push((tenant.clone(), 1)),
        }
    }

    /// Removes one caller of a tenant.
    pub(super) fn leave(&mut self, tenant: &Tenant) {
        let Some(place) = self.waiting.iter().position(|(waiting, _)| waiting == tenant) else {
            return;
        };
        self.waiting[place].1 -= 1;
        if self.waiting[place].1 == 0 {
            self.last = Some(self.waiting.remove(place).0);
        }
    }

    /// Returns the tenants that wait, or the one that waited last.
    pub(super) fn all(&self) -> Vec<Tenant> {
        if self.waiting.is_empty() {
            return self.last.iter().cloned().collect();
        }
        self.waiting.iter().map(|(tenant, _)| tenant.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_without_a_namespace_is_a_tenant_of_its_own() {
        assert_eq!(Tenant::of_pod(Some("team"), Some("1")), Tenant::Namespace("team".into()));
        assert_eq!(Tenant::of_pod(None, Some("1")), Tenant::Pod("1".into()));
        assert_eq!(Tenant::of_pod(None, None), Tenant::Admin);
    }

    #[test]
    fn a_tenant_waits_until_its_last_caller_has_left() {
        let (first, second) = (Tenant::Namespace("a".into()), Tenant::Namespace("b".into()));
        let mut tenants = WaitingTenants::default();
        for tenant in [&first, &second, &first] {
            tenants.enter(tenant);
        }
        tenants.leave(&first);
        assert_eq!(tenants.all(), [first.clone(), second.clone()]);
        tenants.leave(&first);
        assert_eq!(tenants.all(), std::slice::from_ref(&second));
        tenants.leave(&second);
        assert_eq!(tenants.all(), [second], "the flight is charged to the last one");
    }
}
