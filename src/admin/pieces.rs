//! A stream of messages as a reader, for code that reads on a blocking thread.

use std::io::{self, Read};

use tokio::sync::mpsc;

/// Pieces on their way; a message of gRPC has at most 4 MiB.
const PIECES: usize = 4;

/// Where pieces go in.
#[derive(Debug)]
pub(super) struct Pieces(mpsc::Sender<io::Result<Vec<u8>>>);

/// Where they come out, one after the other. Blocking.
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

    /// Whether anybody still reads.
    pub(super) async fn send(&self, piece: Vec<u8>) -> bool {
        self.0.send(Ok(piece)).await.is_ok()
    }

    /// What came is not all there is: the end must not look like one.
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
