//! When cached content is shown without a proof that a volume's credentials open it.

use std::time::Duration;

use serde::Deserialize;

use oci::Repository;

/// The kubelet's words (`imagePullCredentialsVerificationPolicy`), where only imported content
/// counts as preloaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum CredentialsVerification {
    /// Cached content never needs a proof.
    NeverVerify,
    /// Imported content needs no proof.
    #[default]
    NeverVerifyPreloadedImages,
    /// Imported content of repositories on the allowlist needs no proof.
    NeverVerifyAllowlistedImages,
    /// Cached content always needs a proof.
    AlwaysVerify,
}

/// The node's rule.
#[derive(Clone, Debug, Default)]
pub struct Verification {
    /// The policy of the kubelet's name.
    pub policy: CredentialsVerification,
    /// `host/path` or `host/path/*`, for `NeverVerifyAllowlistedImages`.
    pub allowlist: Vec<String>,
    /// The time that a proof of the same service account counts while the registry cannot be reached.
    pub proof_ttl: Duration,
}

impl Verification {
    /// Returns whether no proof is needed. `is_imported` is called only if it matters.
    pub fn is_waived(&self, repository: &Repository, is_imported: impl FnOnce() -> bool) -> bool {
        match self.policy {
            CredentialsVerification::NeverVerify => true,
            CredentialsVerification::NeverVerifyPreloadedImages => is_imported(),
            CredentialsVerification::NeverVerifyAllowlistedImages => {
                self.is_listed(repository) && is_imported()
            }
            CredentialsVerification::AlwaysVerify => false,
        }
    }

    /// The kubelet's matching: whole parts, a star at the end stands for one part or more.
    fn is_listed(&self, repository: &Repository) -> bool {
        let name = repository.to_string();
        self.allowlist.iter().any(|pattern| match pattern.strip_suffix("/*") {
            Some(above) => name.strip_prefix(above).is_some_and(|rest| rest.starts_with('/')),
            None => *pattern == name,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci::Reference;

    #[test]
    fn the_kubelets_policies_waive_what_they_say() {
        use CredentialsVerification::{
            AlwaysVerify, NeverVerify, NeverVerifyAllowlistedImages, NeverVerifyPreloadedImages,
        };
        let waived = |policy, reference: &str, imported: bool| {
            let allowlist = vec!["r.io/team/*".to_owned(), "r.io/one".to_owned()];
            let rule = Verification { policy, allowlist, proof_ttl: Duration::ZERO };
            let reference: Reference = reference.parse().expect("a reference");
            rule.is_waived(reference.repository(), || imported)
        };
        for imported in [true, false] {
            assert!(waived(NeverVerify, "r.io/a", imported));
            assert!(!waived(AlwaysVerify, "r.io/team/a", imported));
            assert_eq!(waived(NeverVerifyPreloadedImages, "r.io/a", imported), imported);
            for (name, listed) in [
                ("r.io/team/a", true),
                ("r.io/team/a/b", true),
                ("r.io/one", true),
                ("r.io/one/more", false),
                ("r.io/teams/a", false),
                ("r.io/team", false),
                ("evil.io/team/a", false),
            ] {
                let waived = waived(NeverVerifyAllowlistedImages, name, imported);
                assert_eq!(waived, listed && imported, "{name}");
            }
        }
    }
}
