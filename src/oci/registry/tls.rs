//! With which certificates a host is spoken to.

use std::sync::Arc;

use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

/// What a `hosts.toml` says about TLS, read from its files.
#[derive(Default)]
pub(super) struct TlsMaterial {
    /// Authorities beside the system's.
    pub(super) authorities: Vec<CertificateDer<'static>>,
    /// Pairs of certificate and key.
    pub(super) clients: Vec<ClientPair>,
    /// Whether certificates are not verified at all.
    pub(super) skip_verify: bool,
}

/// A client's certificate with its chain, and its key.
pub(super) struct ClientPair {
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
}

impl TlsMaterial {
    /// Adds a file of authorities; a file without any is an error.
    pub(super) fn add_authorities(&mut self, pem: &[u8]) -> Result<(), &'static str> {
        let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
        let found = found.map_err(|_| "is not PEM")?;
        if found.is_empty() {
            return Err("holds no certificate");
        }
        self.authorities.extend(found);
        Ok(())
    }

    /// Adds a client's certificate and its key.
    pub(super) fn add_client(
        &mut self,
        certificate: &[u8],
        key: &[u8],
    ) -> Result<(), &'static str> {
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(certificate).collect();
        let chain = chain.map_err(|_| "is not PEM")?;
        if chain.is_empty() {
            return Err("holds no certificate");
        }
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| "has no usable private key")?;
        self.clients.push(ClientPair { chain, key });
        Ok(())
    }

    /// The configuration for connections, on top of the system's roots.
    pub(super) fn configuration(self, system: &RootCertStore) -> Result<ClientConfig, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = system.clone();
        for authority in self.authorities {
            roots
                .add(authority)
                .map_err(|error| format!("a certificate authority is unusable: {error}"))?;
        }
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?;
        let builder = if self.skip_verify {
            let verifier = Arc::new(NoVerification(Arc::clone(&provider)));
            builder.dangerous().with_custom_certificate_verifier(verifier)
        } else {
            builder.with_root_certificates(roots)
        };
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

/// The system's certificate authorities, and `extra` ones.
pub(super) fn system_roots(extra: &[CertificateDer<'static>]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    // Reads SSL_CERT_FILE and SSL_CERT_DIR too. A node without roots still speaks
    // to registries on loopback and to those whose authority is configured.
    let native = rustls_native_certs::load_native_certs();
    for error in &native.errors {
        tracing::warn!(%error, "some of the system's certificate authorities cannot be read");
    }
    let (usable, _) = roots.add_parsable_certificates(native.certs);
    if usable == 0 && extra.is_empty() {
        tracing::warn!("no certificate authorities found: no registry's certificate is trusted");
    }
    for root in extra {
        roots
            .add(root.clone())
            .map_err(|error| format!("a certificate authority is unusable: {error}"))?;
    }
    Ok(roots)
}

/// The first pair whose key can sign what the server understands.
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

/// `skip_verify`: any certificate will do. Signatures are still checked, so that
/// at least the one that was shown is the peer's own.
#[derive(Debug)]
struct NoVerification(Arc<CryptoProvider>);

impl ServerCertVerifier for NoVerification {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
