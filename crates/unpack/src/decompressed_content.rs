//! The decompressed bytes of a layer, produced by a thread of their own.
//!
//! Decompression takes about as long as the rest of unpacking, so both run at once. A few buffers
//! circulate between them, which bounds memory and avoids copies.

use std::io::Read;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use super::decompress::DecompressReader;
use super::error::UnpackError;
use super::unpack_limits::Limits;
use oci_types::Digest;

/// Size of a buffer: large enough that passing it on costs nothing, small enough for the
/// processor's cache.
const BUFFER: usize = 128 << 10;
/// Number of buffers in the queue, beside the one that is filled and the one that is read.
const QUEUE: usize = 2;

/// Reader of the decompressed content.
pub(super) struct DecompressedContent {
    filled: Receiver<ContentMessage>,
    emptied: Sender<Vec<u8>>,
    buffer: Vec<u8>,
    /// Bytes of the buffer that were consumed.
    used: usize,
    /// The number of bytes consumed so far.
    pub(super) position: u64,
    /// The number of compressed bytes that were read for the bytes so far.
    pub(super) packed: u64,
    end: Option<ContentSummary>,
}

/// Summary of the content, known at its end.
#[derive(Clone, Copy, Debug)]
pub(super) struct ContentSummary {
    pub(super) bytes: u64,
    /// Present only on request: computing it takes as long as decompressing.
    pub(super) digest: Option<Digest>,
}

enum ContentMessage {
    /// Decompressed bytes, and the number of compressed bytes read so far.
    Bytes(Vec<u8>, u64),
    End(ContentSummary),
    Failed(UnpackError),
}

/// Decompresses `input` on another thread and calls `with` to read it. Computes the digest if
/// `digested`.
pub(super) fn decompress<R: Read + Send, T, E: From<UnpackError>>(
    input: R,
    limits: &Limits,
    digested: bool,
    with: impl FnOnce(DecompressedContent) -> Result<T, E>,
) -> Result<T, E> {
    let (full, filled) = sync_channel(QUEUE);
    let (emptied, empty) = channel();
    std::thread::scope(|scope| {
        // `with` may return early. Sending then fails, and the thread ends too.
        std::thread::Builder::new()
            .name("decompress".to_owned())
            .spawn_scoped(scope, move || produce(input, limits, digested, &full, &empty))
            .map_err(UnpackError::Store)?;
        let buffer = Vec::new();
        with(DecompressedContent {
            filled,
            emptied,
            buffer,
            used: 0,
            position: 0,
            packed: 0,
            end: None,
        })
    })
}

fn produce<R: Read>(
    input: R,
    limits: &Limits,
    digested: bool,
    full: &SyncSender<ContentMessage>,
    empty: &Receiver<Vec<u8>>,
) {
    let produce = || -> Result<Option<ContentSummary>, UnpackError> {
        let mut content = DecompressReader::new(input, limits, digested)?;
        loop {
            let mut buffer = empty.try_recv().unwrap_or_default();
            buffer.resize(BUFFER, 0);
            let mut length = 0;
            while length < BUFFER {
                match content.read(&mut buffer[length..])? {
                    0 => break,
                    read => length += read,
                }
            }
            buffer.truncate(length);
            let is_last = length < BUFFER;
            if full.send(ContentMessage::Bytes(buffer, content.packed())).is_err() {
                return Ok(None);
            }
            if is_last {
                return Ok(Some(content.finish()));
            }
        }
    };
    // Sending fails only if the receiver was dropped.
    let _ = match produce() {
        Ok(Some(summary)) => full.send(ContentMessage::End(summary)),
        Ok(None) => Ok(()),
        Err(error) => full.send(ContentMessage::Failed(error)),
    };
}

impl DecompressedContent {
    /// Returns the next bytes; an empty slice at the end of the content, and only there.
    pub(super) fn fill(&mut self) -> Result<&[u8], UnpackError> {
        while self.used == self.buffer.len() && self.end.is_none() {
            match self.filled.recv() {
                Ok(ContentMessage::Bytes(bytes, packed)) => {
                    self.packed = packed;
                    let emptied = std::mem::replace(&mut self.buffer, bytes);
                    self.used = 0;
                    // The producer may have ended already.
                    let _ = self.emptied.send(emptied);
                }
                Ok(ContentMessage::End(summary)) => self.end = Some(summary),
                Ok(ContentMessage::Failed(error)) => return Err(error),
                Err(_) => {
                    let error = std::io::Error::other("the layer failed before");
                    return Err(UnpackError::Read(error));
                }
            }
        }
        Ok(&self.buffer[self.used..])
    }

    /// Marks this many bytes as consumed.
    pub(super) fn consume(&mut self, bytes: usize) {
        let bytes = bytes.min(self.buffer.len() - self.used);
        self.used += bytes;
        self.position += bytes as u64;
    }

    /// Reads some bytes. Returns 0 at the end of the content, and only there.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, UnpackError> {
        let bytes = self.fill()?;
        let length = bytes.len().min(buffer.len());
        buffer[..length].copy_from_slice(&bytes[..length]);
        self.consume(length);
        Ok(length)
    }

    /// Reads to the end of the content.
    pub(super) fn finish(mut self) -> Result<ContentSummary, UnpackError> {
        loop {
            let length = self.fill()?.len();
            if length == 0 {
                break;
            }
            self.consume(length);
        }
        let nothing = ContentSummary { bytes: self.position, digest: None };
        Ok(self.end.unwrap_or(nothing))
    }
}
