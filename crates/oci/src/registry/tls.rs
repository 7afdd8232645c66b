//! TLS configuration of a host: certificate authorities and client certificates.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{
    ResolvesClientCert, verify_server_cert_signed_by_trust_anchor, verify_server_name,
};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};

/// TLS settings of a `hosts.toml`, read from its files.
#[derive(Default)]
pub(super) struct TlsMaterial {
    /// Authorities beside those of the system.
    pub(super) authorities: Vec<CertificateDer<'static>>,
    /// Client certificates with their keys.
    pub(super) clients: Vec<ClientPair>,
    /// True if certificates are not verified at all.
    pub(super) skip_verify: bool,
}

/// Certificates that the administrator trusts, as authorities and as certificates of servers.
#[derive(Clone, Debug)]
pub(super) struct TrustedCertificates {
    authorities: RootCertStore,
    /// The same certificates, for comparison byte by byte.
    exact: Vec<CertificateDer<'static>>,
}

/// A client certificate with its chain and key.
pub(super) struct ClientPair {
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
}

impl TlsMaterial {
    /// Adds a file of authorities. A file without any is an error.
    pub(super) fn add_authorities(&mut self, pem: &[u8]) -> Result<(), &'static str> {
        self.authorities.extend(certificates(pem)?);
        Ok(())
    }

    /// Adds a client certificate and its key.
    pub(super) fn add_client(
        &mut self,
        certificate: &[u8],
        key: &[u8],
    ) -> Result<(), &'static str> {
        let chain = certificates(certificate)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| "has no usable private key")?;
        self.clients.push(ClientPair { chain, key });
        Ok(())
    }

    /// Returns the configuration for connections, in addition to the system's authorities.
    pub(super) fn configuration(
        self,
        system: &TrustedCertificates,
    ) -> Result<ClientConfig, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut trusted = system.clone();
        for authority in self.authorities {
            trusted.add(authority)?;
        }
        let trusted = (!self.skip_verify).then_some(trusted);
        let verifier = Arc::new(CertificateVerifier { provider: Arc::clone(&provider), trusted });
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut pairs = Vec::new();
        for ClientPair { chain, key } in self.clients {
            let pair = CertifiedKey::from_der(chain, key, &provider)
                .map_err(|error| format!("a client certificate is unusable: {error}"))?;
            pairs.push(Arc::new(pair));
        }
        let mut tls = if pairs.is_empty() {
            builder.with_no_client_auth()
        } else {
            builder.with_client_cert_resolver(Arc::new(ClientPairs(pairs)))
        };
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(tls)
    }
}

impl TrustedCertificates {
    /// Reads the certificates of the system, and adds `extra` ones.
    pub(super) fn of_system(extra: &[CertificateDer<'static>]) -> Result<Self, String> {
        let mut trusted = Self { authorities: RootCertStore::empty(), exact: Vec::new() };
        // Reads SSL_CERT_FILE and SSL_CERT_DIR too. A node without authorities can still use
        // registries on loopback and those whose authority is configured.
        let native = rustls_native_certs::load_native_certs();
        for error in &native.errors {
            tracing::warn!(%error, "some of the system's certificate authorities cannot be read");
        }
        for certificate in native.certs {
            if let Err(reason) = trusted.add(certificate) {
                tracing::debug!(reason, "one of the system's certificate authorities is left out");
            }
        }
        if trusted.exact.is_empty() && extra.is_empty() {
            tracing::warn!(
                "no certificate authorities found: no registry's certificate is trusted"
            );
        }
        for certificate in extra {
            trusted.add(certificate.clone())?;
        }
        Ok(trusted)
    }

    fn add(&mut self, certificate: CertificateDer<'static>) -> Result<(), String> {
        self.authorities
            .add(certificate.clone())
            .map_err(|error| format!("a certificate authority is unusable: {error}"))?;
        self.exact.push(certificate);
        Ok(())
    }

    /// Verifies the issuer of a server's certificate, its dates and its purpose, but not its name.
    fn verify_issuer(
        &self,
        certificate: &CertificateDer<'_>,
        parsed: &ParsedCertificate<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        provider: &CryptoProvider,
    ) -> Result<(), rustls::Error> {
        let is_trusted_itself = self.exact.iter().any(|trusted| trusted == certificate);
        let intermediates = if is_trusted_itself { &[] } else { intermediates };
        let algorithms = provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(
            parsed,
            &self.authorities,
            intermediates,
            now,
            algorithms,
        )
        .or_else(|error| match &error {
            // webpki checks the dates of the certificate before the errors that are excepted here.
            rustls::Error::InvalidCertificate(invalid)
                if is_trusted_itself && lacks_only_an_issuer(invalid) =>
            {
                Ok(())
            }
            _ => Err(error),
        })
    }
}

/// Parses a file of certificates, which has one at least.
fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, &'static str> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|_| "is not PEM")?;
    if found.is_empty() { Err("holds no certificate") } else { Ok(found) }
}

/// Returns whether the missing issuer is the only defect of a server's certificate.
fn lacks_only_an_issuer(error: &CertificateError) -> bool {
    match error {
        CertificateError::UnknownIssuer
        | CertificateError::BadSignature
        | CertificateError::UnsupportedSignatureAlgorithmContext { .. }
        | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => true,
        error => is_of_authority(error),
    }
}

/// Returns whether a certificate was refused because it is an authority's (CA:TRUE).
pub(super) fn is_of_authority(error: &CertificateError) -> bool {
    let CertificateError::Other(other) = error else { return false };
    other.0.downcast_ref() == Some(&webpki::Error::CaUsedAsEndEntity)
}

/// Chooses the first pair whose key supports a signature scheme of the server.
#[derive(Debug)]
struct ClientPairs(Vec<Arc<CertifiedKey>>);

impl ResolvesClientCert for ClientPairs {
    fn resolve(
        &self,
        _authorities: &[&[u8]],
        schemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        self.0.iter().find(|pair| pair.key.choose_scheme(schemes).is_some()).cloned()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Verifies certificates of servers like webpki, and also accepts a certificate that is trusted
/// itself, like Go clients. `openssl req -x509` makes one that is server and authority at once.
#[derive(Debug)]
struct CertificateVerifier {
    provider: Arc<CryptoProvider>,
    /// `None` for `skip_verify`, which accepts any certificate. Signatures are still checked, so
    /// that the peer owns the certificate that it sent.
    trusted: Option<TrustedCertificates>,
}

impl ServerCertVerifier for CertificateVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(trusted) = &self.trusted {
            let parsed = ParsedCertificate::try_from(end_entity)?;
            trusted.verify_issuer(end_entity, &parsed, intermediates, now, &self.provider)?;
            verify_server_name(&parsed, server_name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose,
        IsCa, KeyPair, date_time_ymd,
    };

    use super::*;

    const NAME: &str = "r.example";

    fn parameters(is_ca: bool) -> CertificateParams {
        let mut parameters = CertificateParams::new(vec![NAME.to_owned()]).unwrap();
        parameters.distinguished_name.push(DnType::CommonName, NAME);
        parameters.not_before = date_time_ymd(2020, 1, 1);
        parameters.not_after = date_time_ymd(2030, 1, 1);
        if is_ca {
            parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        }
        parameters
    }

    fn self_signed(parameters: &CertificateParams) -> CertificateDer<'static> {
        let key = KeyPair::generate().unwrap();
        parameters.self_signed(&key).unwrap().der().clone()
    }

    /// Verifies a server of this name in this year with these trusted certificates.
    fn verify(
        shown: &[&CertificateDer<'static>],
        trusted: &[&CertificateDer<'static>],
        name: &str,
        year: i64,
    ) -> Result<(), rustls::Error> {
        let mut certificates =
            TrustedCertificates { authorities: RootCertStore::empty(), exact: Vec::new() };
        for &certificate in trusted {
            certificates.add(certificate.clone()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = CertificateVerifier { provider, trusted: Some(certificates) };
        let seconds = u64::try_from((year - 1970) * 31_556_952 + 1_000_000).unwrap();
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds));
        let chain: Vec<_> = shown[1..].iter().map(|&certificate| certificate.clone()).collect();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        verifier.verify_server_cert(shown[0], &chain, &name, &[], now).map(|_| ())
    }

    #[test]
    fn a_self_signed_certificate_is_accepted_where_exactly_it_is_trusted() {
        for is_ca in [true, false] {
            let [own, other] = [(); 2].map(|()| self_signed(&parameters(is_ca)));
            assert_eq!(verify(&[&own], &[&own], NAME, 2025), Ok(()), "CA {is_ca}");
            assert_eq!(verify(&[&own, &other], &[&other, &own], NAME, 2025), Ok(()));
            // The same names and dates with another key are another certificate.
            for trusted in [&[&other][..], &[]] {
                assert!(verify(&[&own], trusted, NAME, 2025).is_err(), "CA {is_ca}");
            }
        }
    }

    #[test]
    fn a_renewed_certificate_of_the_same_key_is_another_one() {
        let key = KeyPair::generate().unwrap();
        let mut renewed = parameters(true);
        renewed.not_after = date_time_ymd(2040, 1, 1);
        let [old, new] = [parameters(true), renewed]
            .map(|parameters| parameters.self_signed(&key).unwrap().der().clone());
        assert_eq!(verify(&[&old], &[&old], NAME, 2025), Ok(()));
        assert!(verify(&[&new], &[&old], NAME, 2025).is_err());
    }

    #[test]
    fn name_and_dates_of_a_trusted_certificate_are_checked() {
        for is_ca in [true, false] {
            let own = self_signed(&parameters(is_ca));
            for (name, year) in
                [("other.example", 2025), ("10.0.0.1", 2025), (NAME, 2019), (NAME, 2031)]
            {
                let refused = verify(&[&own], &[&own], name, year);
                assert!(refused.is_err(), "{name} in {year}, CA {is_ca}");
            }
        }
        let mut not_a_servers = parameters(false);
        not_a_servers.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let own = self_signed(&not_a_servers);
        assert!(verify(&[&own], &[&own], NAME, 2025).is_err());
    }

    #[test]
    fn an_issued_certificate_is_trusted_by_its_authority_or_by_itself() {
        let mut authority = parameters(true);
        authority.distinguished_name.push(DnType::CommonName, "an authority");
        let authority =
            CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
        let issued = |is_ca| {
            let key = KeyPair::generate().unwrap();
            parameters(is_ca).signed_by(&key, &authority).unwrap().der().clone()
        };
        let root = authority.der();
        let server = issued(false);
        assert_eq!(verify(&[&server], &[root], NAME, 2025), Ok(()));
        assert_eq!(verify(&[&server], &[&server], NAME, 2025), Ok(()));
        assert!(verify(&[&server], &[&server], NAME, 2031).is_err());
        // A certificate of an authority is not a server's, even if it was issued.
        let between = issued(true);
        let refused = verify(&[&between], &[root], NAME, 2025).unwrap_err();
        assert!(
            matches!(&refused, rustls::Error::InvalidCertificate(error) if is_of_authority(error)),
            "{refused:?}"
        );
    }
}
