//! The credentials that a volume may try, and whose right each of them stands for.
//!
//! In this order: the volume's own secret, the kubelet's plugins, the node's docker
//! configuration. Without any, and only then, the request is anonymous.

use super::artifact_request::Want;
use super::error::PullError;
use oci::Repository;
use oci::credentials::providers::{CredentialOwner, CredentialSource, NodeCredentials};
use oci::credentials::{Credential, WorkloadIdentity};
use store::access::access_proofs::Principal;

/// One credential, or what may give some.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    /// The principal of a proof with this credential.
    pub(super) principal: Principal,
    source: CredentialSource,
}

/// A credential, and the principal that a proof with it is for.
#[derive(Clone, Debug)]
pub(super) struct PrincipalCredential {
    /// The principal of a proof.
    pub(super) principal: Principal,
    /// The credential that the registry gets.
    pub(super) credential: Credential,
}

/// The credentials that a volume may try, in order.
#[derive(Clone, Debug)]
pub(super) struct Candidates {
    repository: Repository,
    identity: Option<WorkloadIdentity>,
    pub(super) all: Vec<Candidate>,
}

impl Candidates {
    /// Reads files of the node, without requests or plugins. Blocking.
    pub(super) fn read(want: &Want, node_key: &[u8; 32], node: &NodeCredentials) -> Self {
        let repository = want.reference.repository();
        let mut all = Vec::new();
        for credential in want.keyring.matching(repository) {
            let material = credential.principal_material();
            let principal = Principal::credential(node_key, repository.host(), &material);
            all.push(Candidate { principal, source: CredentialSource::Ready(credential) });
        }
        for offer in node.offers(repository) {
            let principal = match (offer.owner, &want.identity) {
                (
                    CredentialOwner::ServiceAccount,
                    Some(WorkloadIdentity { namespace, service_account, .. }),
                ) => Principal::service_account(node_key, namespace, service_account),
                // Without an identity a plugin gets no token: what it gives, it gives to any pod.
                (CredentialOwner::Node | CredentialOwner::ServiceAccount, _) => Principal::node(),
            };
            all.push(Candidate { principal, source: offer.source });
        }
        Self { repository: repository.clone(), identity: want.identity.clone(), all }
    }

    /// Returns the principals that the candidates stand for.
    pub(super) fn principals(&self) -> Vec<Principal> {
        self.all.iter().map(|candidate| candidate.principal.clone()).collect()
    }

    /// Returns the first candidate to try; the anonymous one if there is none.
    pub(super) fn first(&self) -> Candidate {
        self.all.first().cloned().unwrap_or_else(Self::anonymous)
    }

    /// The credentials of one of them; a plugin may know none.
    pub(super) async fn redeem(
        &self,
        candidate: &Candidate,
        node: &NodeCredentials,
    ) -> Result<Vec<Credential>, PullError> {
        let redeemed = node.redeem(&candidate.source, &self.repository, self.identity.as_ref());
        redeemed.await.map_err(PullError::Provider)
    }

    /// Returns the anonymous candidate, for principals that are proven anonymously.
    pub(super) fn anonymous() -> Candidate {
        Candidate {
            principal: Principal::anonymous(),
            source: CredentialSource::Ready(Credential::Anonymous),
        }
    }

    /// The account that it is for, where the kubelet says it and there is a credential: that
    /// it may have rotated is no reason to believe who shows none.
    pub(super) fn account(&self, node_key: &[u8; 32]) -> Option<Principal> {
        let identity = self.identity.as_ref().filter(|_| !self.all.is_empty())?;
        let (namespace, name) = (&identity.namespace, &identity.service_account);
        Some(Principal::service_account(node_key, namespace, name))
    }
}
