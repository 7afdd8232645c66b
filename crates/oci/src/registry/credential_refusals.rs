//! Refusals of credentials that are tried one after the other.

use super::error::RegistryError;

/// Refusals of the credentials of one request, one of which is reported in the end.
#[derive(Debug, Default)]
pub struct Refusals(Option<RegistryError>);

impl Refusals {
    /// Adds a refusal that [may depend on the credential](RegistryError::may_depend_on_credential).
    /// The first one counts, unless the registry did not know the credential: other refusals are more
    /// precise.
    pub fn add(&mut self, error: RegistryError) {
        let is_unknown = |error: &_| matches!(error, RegistryError::Unauthorized { .. });
        if self.0.as_ref().is_none_or(|first| is_unknown(first) && !is_unknown(&error)) {
            self.0 = Some(error);
        }
    }

    /// Returns whether no credential was refused.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Returns the refusal to report, if any.
    pub fn into_error(self) -> Option<RegistryError> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::super::error::ShownCredential;
    use super::*;

    #[test]
    fn the_first_refusal_of_a_known_credential_is_reported() {
        let what = || "manifest latest of r.io/a".to_owned();
        let shown = ShownCredential::Credential;
        let unknown = || RegistryError::Unauthorized { host: "r.io".into(), what: what(), shown };
        let forbidden = || RegistryError::Forbidden { host: "r.io".into(), what: what(), shown };
        let mut refusals = Refusals::default();
        assert!(refusals.is_empty());
        for error in [unknown(), forbidden(), RegistryError::NotFound { what: what() }, unknown()] {
            refusals.add(error);
        }
        assert!(!refusals.is_empty());
        assert!(matches!(refusals.into_error(), Some(RegistryError::Forbidden { .. })));
    }
}
