//! `import`: imports an OCI image layout in place of a pull.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::Args;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::admin_call::{AdminCallArguments, platform_text};
use super::{CommandError, layout_tar};
use crate::proto::admin::import_request::Part;
use crate::proto::admin::{ImportHeader, ImportRequest, ImportResponse};
use oci::{Platform, Reference};
use text::human_units::Bytes;

/// The bytes of one message. gRPC accepts 4 MiB.
const CHUNK_BYTES: usize = 1 << 20;
/// The capacity of the queue of messages.
const CHUNKS: usize = 4;

/// Arguments of `import`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  oras copy --to-oci-layout registry.example.com/app:v2 layout:v2
  csi-driver-oci import layout --as registry.example.com/app:v2
  skopeo copy docker://registry.example.com/app:v2 oci-archive:app.tar
  csi-driver-oci import app.tar --as registry.example.com/app:v2
  kubectl exec -i -n csi-driver-oci POD -- csi-driver-oci import - --as registry.example.com/app:v2 < app.tar")]
pub(super) struct ImportArguments {
    /// A directory with an OCI image layout, a tar of one (plain, gzip or zstd), or `-` for a tar on standard input.
    layout: PathBuf,
    /// The reference that pods use for the artifact.
    #[arg(long = "as", value_name = "REF")]
    reference: Reference,
    /// The platform to choose from an index, such as `linux/arm64` [default: the node's].
    #[arg(long)]
    platform: Option<Platform>,
    #[command(flatten)]
    admin: AdminCallArguments,
}

pub(super) fn run(arguments: &ImportArguments) -> Result<(), CommandError> {
    // The layout is read by this process: the node plugin sees another file system.
    let layout = arguments.layout.clone();
    let shown = layout.display().to_string();
    if layout != Path::new("-") {
        let kind = layout.metadata().map_err(|error| format!("{shown} cannot be read: {error}"))?;
        let lacks = |name: &&&str| kind.is_dir() && !layout.join(name).exists();
        if let Some(name) = layout_tar::DOCUMENTS.iter().find(lacks) {
            return Err(format!(
                "{shown} is no OCI image layout: it has no {name}; `oras copy --to-oci-layout` makes one"
            ));
        }
    }
    let header = ImportHeader {
        reference: arguments.reference.to_string(),
        platform: platform_text(arguments.platform.as_ref()),
    };
    let imported = arguments.admin.call(async move |mut client| {
        let (sender, receiver) = mpsc::channel(CHUNKS);
        let sending = tokio::task::spawn_blocking(move || send(&layout, header, &sender));
        let answer = client.import(ReceiverStream::new(receiver)).await;
        let sent = sending.await.map_err(|error| tonic::Status::internal(error.to_string()))?;
        match (answer, sent) {
            // A layout that could not be read is the cause of any error of the node plugin.
            (_, Err(error)) => {
                Err(tonic::Status::invalid_argument(format!("{shown} cannot be read: {error}")))
            }
            (answer, Ok(())) => Ok(answer?.into_inner()),
        }
    })?;
    arguments.admin.output.result(&imported, || {
        let ImportResponse { reference, digest, bytes, inodes } = &imported;
        let bytes = Bytes(*bytes);
        vec![format!("{reference} is on this node: {digest}, {bytes}, {inodes} inodes")]
    })
}

fn send(
    layout: &Path,
    header: ImportHeader,
    requests: &mpsc::Sender<ImportRequest>,
) -> io::Result<()> {
    let request = |part| ImportRequest { part: Some(part) };
    if requests.blocking_send(request(Part::Header(header))).is_err() {
        return Ok(());
    }
    let mut chunks = io::BufWriter::with_capacity(CHUNK_BYTES, ChunkSender(requests));
    if layout == Path::new("-") {
        io::copy(&mut io::stdin().lock(), &mut chunks)?;
    } else if layout.is_dir() {
        layout_tar::write(layout, &mut chunks)?;
    } else {
        io::copy(&mut std::fs::File::open(layout)?.take(u64::MAX), &mut chunks)?;
    }
    io::Write::flush(&mut chunks)
}

/// A writer that sends its input as messages.
struct ChunkSender<'a>(&'a mpsc::Sender<ImportRequest>);

impl io::Write for ChunkSender<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let chunk = &bytes[..bytes.len().min(CHUNK_BYTES)];
        let part = Part::Data(chunk.to_vec());
        // A node plugin that no longer reads has sent the reason in its response.
        let _ = self.0.blocking_send(ImportRequest { part: Some(part) });
        Ok(chunk.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
