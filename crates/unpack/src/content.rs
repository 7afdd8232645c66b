//! A layer's decompressed bytes, made by a thread of their own.
//!
//! Decompressing takes about as long as all that is done with its outcome, so both go on
//! at once. Between them are a few buffers that go round: memory is bounded, and nothing
//! is copied on the way.

use std::io::Read;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use super::decompress::Decompressed;
use super::error::UnpackError;
use super::limits::Limits;
use oci_types::Digest;

/// Large enough that handing it over costs nothing, small enough for the processor's cache.
const BUFFER: usize = 128 << 10;
/// Buffers on their way, beside the one that is filled and the one that is used.
const QUEUE: usize = 2;

/// The decompressed content.
pub(super) struct Content {
    filled: Receiver<Message>,
    emptied: Sender<Vec<u8>>,
    buffer: Vec<u8>,
    /// What was used of the buffer.
    used: usize,
    position: u64,
    packed: u64,
    end: Option<Summary>,
}

/// What is known of the content at its end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Summary {
    pub(super) bytes: u64,
    /// Only when it was asked for: it costs as much as decompressing.
    pub(super) digest: Option<Digest>,
}

enum Message {
    /// Bytes, and how many packed ones were read for all so far.
    Bytes(Vec<u8>, u64),
    End(Summary),
    Failed(UnpackError),
}

/// Decompresses `input` and has its content used. Its digest is made if `digested`.
pub(super) fn decompress<R: Read + Send, T, E: From<UnpackError>>(
    input: R,
    limits: &Limits,
    digested: bool,
    with: impl FnOnce(Content) -> Result<T, E>,
) -> Result<T, E> {
    let (full, filled) = sync_channel(QUEUE);
    let (emptied, empty) = channel();
    std::thread::scope(|scope| {
        // Whoever uses it may end before it does; then nobody takes a message, and this ends too.
        std::thread::Builder::new()
            .name("decompress".to_owned())
            .spawn_scoped(scope, move || produce(input, limits, digested, &full, &empty))
            .map_err(UnpackError::Store)?;
        let buffer = Vec::new();
        with(Content { filled, emptied, buffer, used: 0, position: 0, packed: 0, end: None })
    })
}

fn produce<R: Read>(
    input: R,
    limits: &Limits,
    digested: bool,
    full: &SyncSender<Message>,
    empty: &Receiver<Vec<u8>>,
) {
    let produce = || -> Result<Option<Summary>, UnpackError> {
        let mut content = Decompressed::new(input, limits, digested)?;
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
            if full.send(Message::Bytes(buffer, content.packed())).is_err() {
                return Ok(None);
            }
            if is_last {
                return Ok(Some(content.finish()));
            }
        }
    };
    // Nobody listens to what is said after the last one who used it has gone.
    let _ = match produce() {
        Ok(Some(summary)) => full.send(Message::End(summary)),
        Ok(None) => Ok(()),
        Err(error) => full.send(Message::Failed(error)),
    };
}

impl Content {
    /// Bytes used so far.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Returns the number of packed bytes that were read for the bytes so far.
    pub(super) fn packed(&self) -> u64 {
        self.packed
    }

    /// The next bytes; none at the end of the content, and only there.
    pub(super) fn fill(&mut self) -> Result<&[u8], UnpackError> {
        while self.used == self.buffer.len() && self.end.is_none() {
            match self.filled.recv() {
                Ok(Message::Bytes(bytes, packed)) => {
                    self.packed = packed;
                    let emptied = std::mem::replace(&mut self.buffer, bytes);
                    self.used = 0;
                    // The other side may be done already.
                    let _ = self.emptied.send(emptied);
                }
                Ok(Message::End(summary)) => self.end = Some(summary),
                Ok(Message::Failed(error)) => return Err(error),
                Err(_) => {
                    let error = std::io::Error::other("the layer failed before");
                    return Err(UnpackError::Read(error));
                }
            }
        }
        Ok(&self.buffer[self.used..])
    }

    /// So many of the bytes were used.
    pub(super) fn consume(&mut self, bytes: usize) {
        let bytes = bytes.min(self.buffer.len() - self.used);
        self.used += bytes;
        self.position += bytes as u64;
    }

    /// Reads some bytes; none at the end of the content, and only there.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, UnpackError> {
        let bytes = self.fill()?;
        let length = bytes.len().min(buffer.len());
        buffer[..length].copy_from_slice(&bytes[..length]);
        self.consume(length);
        Ok(length)
    }

    /// Reads to the end.
    pub(super) fn finish(mut self) -> Result<Summary, UnpackError> {
        loop {
            let length = self.fill()?.len();
            if length == 0 {
                break;
            }
            self.consume(length);
        }
        let nothing = Summary { bytes: self.position, digest: None };
        Ok(self.end.unwrap_or(nothing))
    }
}
