//! Adapts a stream of messages to a blocking reader.

use std::io::{self, Read};

use tokio::sync::mpsc;

/// The capacity of the channel. A gRPC message has at most 4 MiB.
const CHUNKS: usize = 4;

/// The sending half.
#[derive(Debug)]
pub(super) struct ChunkSender(mpsc::Sender<io::Result<Vec<u8>>>);

/// The reading half. Blocking.
#[derive(Debug)]
pub(super) struct ChunkReader {
    chunks: mpsc::Receiver<io::Result<Vec<u8>>>,
    chunk: io::Cursor<Vec<u8>>,
}

impl ChunkSender {
    pub(super) fn channel() -> (Self, ChunkReader) {
        let (sender, chunks) = mpsc::channel(CHUNKS);
        (Self(sender), ChunkReader { chunks, chunk: io::Cursor::default() })
    }

    /// Sends one chunk. Returns false if the reader is gone.
    pub(super) async fn send(&self, chunk: Vec<u8>) -> bool {
        self.0.send(Ok(chunk)).await.is_ok()
    }

    /// Ends the reader with an error, so that an incomplete stream is not taken for a complete one.
    pub(super) async fn fail(&self, error: &tonic::Status) {
        let error = io::Error::new(io::ErrorKind::UnexpectedEof, error.message().to_owned());
        let _ = self.0.send(Err(error)).await;
    }
}

impl Read for ChunkReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.chunk.read(buffer)?;
            if count > 0 || buffer.is_empty() {
                return Ok(count);
            }
            match self.chunks.blocking_recv() {
                Some(chunk) => self.chunk = io::Cursor::new(chunk?),
                None => return Ok(0),
            }
        }
    }
}
