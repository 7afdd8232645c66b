//! The signatures of one artifact, verified one after another, so that no two must be in memory.

use super::{
    AcceptedSignature, Bundle, FoundSignature, SignatureDemand, SignatureFlaw, SimpleSignature,
    StatementDemand, UnmetDemand, sigstore_bundle, simple_signing,
};
use crate::Digest;

/// The verdict of the signatures that were verified so far.
#[derive(Clone, Debug)]
pub struct SignatureVerification {
    demand: SignatureDemand,
    subjects: Vec<Digest>,
    /// The result for each demanded statement: its signature, or the flaw that is the closest to one.
    results: Vec<Result<AcceptedSignature, Option<SignatureFlaw>>>,
}

impl SignatureVerification {
    /// Begins without signatures. One of any of the subjects counts.
    pub fn new(demand: SignatureDemand, subjects: Vec<Digest>) -> Self {
        let results = vec![Err(None); demand.statements.len()];
        Self { demand, subjects, results }
    }

    /// Verifies one more signature. Returns whether all that is demanded is signed.
    pub fn add(&mut self, found: &FoundSignature) -> bool {
        for (statement, result) in self.demand.statements.iter().zip(&mut self.results) {
            let Err(closest) = result else { continue };
            match statement.verify(found, &self.subjects) {
                Ok(accepted) => *result = Ok(accepted),
                Err(flaw) => *closest = closest.take().max(flaw),
            }
        }
        self.results.iter().all(Result::is_ok)
    }

    /// Returns the signature of each demanded statement.
    ///
    /// # Errors
    ///
    /// The first statement without a valid signature.
    pub fn finish(self) -> Result<Vec<AcceptedSignature>, UnmetDemand> {
        let results = self.demand.statements.iter().zip(self.results);
        let finished = results.map(|(statement, result)| {
            result.map_err(|flaw| UnmetDemand {
                flaw,
                predicate_type: statement.predicate_type.clone(),
                signers: statement.signers.to_string(),
            })
        });
        finished.collect()
    }
}

impl FoundSignature {
    /// Returns the most memory that a verification takes, in bytes. Finding it out takes three times the signature.
    pub fn verification_bytes(&self) -> u64 {
        match self {
            Self::Simple(simple) => {
                let SimpleSignature { payload, certificate, log_entry, timestamp, .. } = simple;
                let texts = [certificate, log_entry, timestamp].into_iter().flatten();
                let texts = texts.map(|text| text.len() as u64).sum::<u64>();
                (payload.len() as u64 + texts) * sigstore::memory::BYTES_PER_PROOF_BYTE
            }
            Self::Bundle(Bundle { json, document }) => {
                let document = document.as_ref().map_or(0, |document| document.len() as u64);
                sigstore::memory::of_bundle(json) + 2 * document
            }
            Self::Unread(_) => 0,
        }
    }
}

impl StatementDemand {
    /// Verifies a signature, or returns its flaw: none if it is of another statement.
    fn verify(
        &self,
        found: &FoundSignature,
        subjects: &[Digest],
    ) -> Result<AcceptedSignature, Option<SignatureFlaw>> {
        match found {
            FoundSignature::Unread(reason) => Err(Some(SignatureFlaw::Unread(reason.clone()))),
            // The older format has no attestations.
            FoundSignature::Simple(_) if self.predicate_type.is_some() => Err(None),
            FoundSignature::Simple(signature) => simple_signing::verify(signature, subjects, self),
            FoundSignature::Bundle(bundle) => sigstore_bundle::verify(bundle, subjects, self),
        }
    }
}
