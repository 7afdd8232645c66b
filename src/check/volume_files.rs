//! Finds the files that a volume would show: by their titles, or by reading the archives once.

use std::collections::HashMap;
use std::io::{self, BufRead};

use bytes::Bytes;
use serde::Serialize;
use sha2::Digest as _;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::ArtifactReader;
use oci::Digest;
use oci::manifest::{Descriptor, ImageManifest};
use pull::PullError;
use store::single_files::starts_executable;
use unpack::archive::{FileHeader, Sink, StoredContent, unpack};
use unpack::layer_merge::Merger;
use unpack::layer_rule::{ArchiveRule, LayerRule, classify};
use unpack::tree_plan::{FileSource, PlannedKind};
use unpack::{
    Checksum, Entry, Limits, Permissions, PermissionsRule, Selection, UnpackError, UnpackMode,
};

/// The capacity of the queue between the network and the archive's reader, in chunks.
const QUEUE: usize = 16;

/// A file of the volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileReport {
    /// The path in the volume.
    pub path: String,
    /// The size of its content.
    pub bytes: u64,
    /// The file is executable.
    pub executable: bool,
}

/// A sink that records names and modes, and skips contents.
#[derive(Default)]
struct NameRecorder {
    entries: Vec<Entry>,
    modes: Vec<u32>,
}

impl Sink for NameRecorder {
    fn file(
        &mut self,
        header: &FileHeader,
        _content: &mut dyn BufRead,
    ) -> io::Result<StoredContent> {
        let data = u32::try_from(self.modes.len()).map_err(io::Error::other)?;
        self.modes.push(header.metadata.permissions.mode);
        Ok(StoredContent { data, checksum: Checksum::of(b"") })
    }

    fn entry(&mut self, entry: Entry) -> io::Result<()> {
        self.entries.push(entry);
        Ok(())
    }
}

impl ArtifactReader<'_> {
    /// Returns the files of a volume, and whether the list is complete: archives are read only for `whole`.
    pub(super) async fn files(
        &self,
        image: &ImageManifest,
        whole: bool,
    ) -> Result<(Vec<FileReport>, bool), PullError> {
        let everything = Selection::default();
        let mut merger = Merger::new(self.limits, &everything);
        let mut modes = HashMap::new();
        let mut complete = true;
        let rules = classify(image, UnpackMode::Auto, self.limits)?;
        for (layer, (descriptor, rule)) in image.layers.iter().zip(rules).enumerate() {
            match rule {
                LayerRule::Skip => {}
                LayerRule::File(rule) => {
                    let executable = match rule.recorded {
                        Some(recorded) => recorded.mode & 0o111 != 0,
                        None => self.starts_executable(descriptor).await?,
                    };
                    let mode = if executable { 0o555 } else { 0o444 };
                    let permissions = Permissions { mode, uid: 0, gid: 0 };
                    merger.file(layer, &rule, descriptor.digest, descriptor.size, permissions)?;
                }
                LayerRule::Archive(_) if !whole => complete = false,
                LayerRule::Archive(rule) => {
                    let names = self.names(descriptor, &rule).await?;
                    merger.archive(layer, &rule);
                    for entry in &names.entries {
                        merger.entry(entry)?;
                    }
                    let layer = u32::try_from(layer).unwrap_or(u32::MAX);
                    for (data, mode) in (0..).zip(names.modes) {
                        modes.insert(FileSource::Archive { layer, data }, mode);
                    }
                }
            }
        }
        let plan = match merger.finish() {
            // All files may be in archives.
            Err(UnpackError::Empty) if !complete => return Ok((Vec::new(), false)),
            plan => plan?,
        };
        let mut paths: Vec<String> = Vec::new();
        let mut files = Vec::new();
        for node in &plan.nodes {
            let above = node.parent.and_then(|parent| paths.get(parent as usize));
            let name = String::from_utf8_lossy(plan.held_name(node));
            let path = above.map_or_else(|| name.to_string(), |above| format!("{above}/{name}"));
            if let PlannedKind::File(number) = node.kind
                && let Some(file) = plan.files.get(number as usize)
            {
                let mode = match plan.source(number) {
                    FileSource::Blob { permissions, .. } => permissions.mode,
                    archive @ FileSource::Archive { .. } => {
                        modes.get(&archive).copied().unwrap_or(0)
                    }
                };
                let executable = mode & 0o111 != 0;
                files.push(FileReport { path: path.clone(), bytes: file.size, executable });
            }
            paths.push(path);
        }
        files.sort_by(|one, other| one.path.split('/').cmp(other.path.split('/')));
        Ok((files, complete))
    }

    /// Fetches a small blob, whole and verified.
    pub(super) async fn blob(&self, descriptor: &Descriptor) -> Result<Vec<u8>, PullError> {
        let (size, limit) = (descriptor.size, self.limits.config_bytes);
        if size > limit {
            return Err(PullError::ConfigTooLarge { size, limit });
        }
        let (sender, mut chunks) = mpsc::channel::<Bytes>(QUEUE);
        let collect = async move {
            let mut bytes = Vec::new();
            while let Some(chunk) = chunks.recv().await {
                bytes.extend_from_slice(&chunk);
            }
            bytes
        };
        let (fetched, bytes) = tokio::join!(self.fetch(descriptor, sender), collect);
        fetched.map(|()| bytes)
    }

    /// Forwards a blob while it arrives, and verifies its digest at the end.
    async fn fetch(
        &self,
        descriptor: &Descriptor,
        chunks: mpsc::Sender<Bytes>,
    ) -> Result<(), PullError> {
        let (digest, expected) = (descriptor.digest, descriptor.size);
        let mut hasher = sha2::Sha256::new();
        let (mut got, mut encoding) = (0, None);
        if let Some(data) = &descriptor.data {
            hasher.update(data);
            got = data.len() as u64;
            let _ = chunks.send(Bytes::from(data.clone())).await;
        } else {
            let mut body = self.client.blob(digest, 0).await?;
            encoding = body.encoding.take();
            while let Some(chunk) = body.chunk().await? {
                got += chunk.len() as u64;
                if got > expected {
                    break;
                }
                hasher.update(&chunk);
                // The receiver has failed, and reports the reason itself.
                if chunks.send(chunk).await.is_err() {
                    return Ok(());
                }
            }
        }
        if got != expected {
            return Err(PullError::BlobSize { digest, expected, got, encoding });
        }
        let got = Digest::from_bytes(hasher.finalize().into());
        if got == digest { Ok(()) } else { Err(PullError::BlobDigest { expected: digest, got }) }
    }

    async fn starts_executable(&self, descriptor: &Descriptor) -> Result<bool, PullError> {
        if let Some(data) = &descriptor.data {
            return Ok(starts_executable(data));
        }
        let mut body = self.client.blob(descriptor.digest, 0).await?;
        let mut start = Vec::new();
        while start.len() < 4
            && let Some(chunk) = body.chunk().await?
        {
            start.extend_from_slice(&chunk);
        }
        Ok(starts_executable(&start))
    }

    async fn names(
        &self,
        descriptor: &Descriptor,
        rule: &ArchiveRule,
    ) -> Result<NameRecorder, PullError> {
        let (sender, chunks) = mpsc::channel(QUEUE);
        let (rule, limits): (_, Limits) = (rule.clone(), self.limits.clone());
        let blob = ReceiverStream::new(chunks).map(Ok::<_, io::Error>);
        let blob = SyncIoBridge::new(StreamReader::new(blob));
        let reader = tokio::task::spawn_blocking(move || {
            let mut names = NameRecorder::default();
            let unpacked = unpack(blob, &rule, PermissionsRule::Readable, &limits, &mut names);
            unpacked.map(|_| names)
        });
        self.fetch(descriptor, sender).await?;
        let names = reader.await.map_err(|_| PullError::Crashed)?;
        Ok(names?)
    }
}
