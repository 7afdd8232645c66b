//! The kubelet's plugin registration, without the node-driver-registrar sidecar.
//!
//! The socket's name holds an `@`. The kubelet's gRPC client sends the percent-encoded path of the socket as the
//! authority, which is valid only if everything before an `@` can be taken for user information. Without it every call
//! fails with a protocol error.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tonic::{Request, Response, Status};

use crate::proto::pluginregistration::registration_server::Registration;
use crate::proto::pluginregistration::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
};

/// The service that the kubelet's plugin watcher calls.
#[derive(Clone)]
pub struct RegistrationService {
    /// The name that the driver registers.
    pub driver_name: String,
    /// The path of the CSI socket as the kubelet sees it.
    pub endpoint: String,
    /// True while the kubelet has the driver registered.
    pub registered: Arc<AtomicBool>,
}

#[tonic::async_trait]
impl Registration for RegistrationService {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: self.driver_name.clone(),
            endpoint: self.endpoint.clone(),
            // The version of the kubelet's plugin interface.
            supported_versions: vec!["1.0.0".to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let RegistrationStatus { plugin_registered, error } = request.into_inner();
        self.registered.store(plugin_registered, Ordering::SeqCst);
        if plugin_registered {
            tracing::info!(driver = self.driver_name, "registered with the kubelet");
        } else {
            // The kubelet retries by itself. To exit would only take the CSI socket away.
            tracing::error!(driver = self.driver_name, error, "the kubelet refused the driver");
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
