//! Adapts a stream of messages to a blocking reader.

use std::io::{self, Read};

use tokio::sync::mpsc;

/// The capacity of the channel. A gRPC message has at most 4 MiB.
const PIECES: usize = 4;

/// The sending half.
#[derive(Debug)]
pub(super) struct Pieces(mpsc::Sender<io::Result<Vec<u8>>>);

/// The reading half. Blocking.
#[derive(Debug)]
pub(super) struct PieceReader {
    pieces: mpsc::Receiver<io::Result<Vec<u8>>>,
    piece: io::Cursor<Vec<u8>>,
}

impl Pieces {
    pub(super) fn channel() -> (Self, PieceReader) {
        let (sender, pieces) = mpsc::channel(PIECES);
        (Self(sender), PieceReader { pieces, piece: io::Cursor::default() })
    }

    /// Sends one chunk. Returns false if the reader is gone.
    pub(super) async fn send(&self, piece: Vec<u8>) -> bool {
        self.0.send(Ok(piece)).await.is_ok()
    }

    /// Ends the reader with an error, so that an incomplete stream is not taken for a complete one.
    pub(super) async fn fail(&self, error: &tonic::Status) {
        let error = io::Error::new(io::ErrorKind::UnexpectedEof, error.message().to_owned());
        let _ = self.0.send(Err(error)).await;
    }
}

impl Read for PieceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.piece.read(buffer)?;
            if count > 0 || buffer.is_empty() {
                return Ok(count);
            }
            match self.pieces.blocking_recv() {
                Some(piece) => self.piece = io::Cursor::new(piece?),
                None => return Ok(0),
            }
        }
    }
}
