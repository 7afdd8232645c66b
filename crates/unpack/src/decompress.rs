//! Decompression of a layer's bytes, which are counted and optionally hashed on the way.
//!
//! The compression is detected from the first bytes of the content, never from the media type.
//! Media types are unreliable (an ORAS folder is tar+gzip under any type), and a decoder that
//! depends on the bytes alone gives one blob one form in the store. No well-formed uncompressed tar
//! archive starts like gzip or zstd.

use std::io::{self, BufRead, BufReader, Chain, Cursor, Read};

use flate2::bufread::GzDecoder;
use sha2::{Digest as _, Sha256};

use super::decompressed_content::ContentSummary;
use super::error::UnpackError;
use super::unpack_limits::Limits;
use oci_types::Digest;

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Common bytes of the magic numbers of skippable zstd frames, `0x184D2A50` to `0x184D2A5F` in
/// little-endian order. A stream may start with one.
const ZSTD_SKIPPABLE: [u8; 3] = [0x2a, 0x4d, 0x18];
const MAGIC_LENGTH: u64 = 4;
/// Size that one read of a file or a channel usually returns.
const INPUT_BUFFER: usize = 64 << 10;

/// Reader of the decompressed content.
pub(super) struct DecompressReader<'a, R: Read> {
    decoder: ContentDecoder<CompressedInput<R>>,
    limits: &'a Limits,
    hash: Option<Sha256>,
    position: u64,
}

/// Compressed content: the bytes that were read for detection, then the rest.
type CompressedInput<R> = Chain<Cursor<Vec<u8>>, BufReader<InputSource<R>>>;

enum ContentDecoder<I: BufRead> {
    Stored(I),
    Gzip(GzipMembers<I>),
    Zstd(zstd::stream::read::Decoder<'static, I>),
}

/// Reader that the caller passed. It keeps its own errors, since decoders return only errors that
/// look like theirs.
struct InputSource<R> {
    reader: R,
    count: u64,
    failure: Option<io::Error>,
}

/// State of a multi-member gzip stream. Zeros after the last member are padding of tapes and of
/// some writers. Other trailing bytes are refused.
enum GzipMembers<I: BufRead> {
    Member(Box<GzDecoder<I>>),
    Between(I),
    Ended(I),
    /// Placeholder while one state is replaced by another.
    Taken,
}

impl<'a, R: Read> DecompressReader<'a, R> {
    pub(super) fn new(reader: R, limits: &'a Limits, digested: bool) -> Result<Self, UnpackError> {
        let source = InputSource { reader, count: 0, failure: None };
        let mut input = BufReader::with_capacity(INPUT_BUFFER, source);
        let mut start = Vec::new();
        if let Err(error) = input.by_ref().take(MAGIC_LENGTH).read_to_end(&mut start) {
            return Err(UnpackError::Read(input.get_mut().failure.take().unwrap_or(error)));
        }
        let is_gzip = start.starts_with(&GZIP);
        let is_zstd = start == ZSTD
            || (start.ends_with(&ZSTD_SKIPPABLE) && start.first().is_some_and(|b| b >> 4 == 5));
        let input = Cursor::new(start).chain(input);
        let decoder = if is_gzip {
            ContentDecoder::Gzip(GzipMembers::Between(input))
        } else if is_zstd {
            let mut decoder =
                zstd::stream::read::Decoder::with_buffer(input).map_err(UnpackError::Decompress)?;
            decoder.window_log_max(limits.zstd_window_log).map_err(UnpackError::Decompress)?;
            ContentDecoder::Zstd(decoder)
        } else {
            ContentDecoder::Stored(input)
        };
        let hash = digested.then(Sha256::new);
        Ok(Self { decoder, limits, hash, position: 0 })
    }

    /// Reads some bytes. Returns 0 at the end of the content, and only there.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, UnpackError> {
        let read = loop {
            match self.decoder.read(buffer) {
                Ok(read) => break read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(match self.source().failure.take() {
                        Some(failure) => UnpackError::Read(failure),
                        None => UnpackError::Decompress(error),
                    });
                }
            }
        };
        if let Some(hash) = &mut self.hash {
            hash.update(&buffer[..read]);
        }
        self.position += read as u64;
        let limits = self.limits;
        if self.position > limits.unpacked_bytes {
            return Err(UnpackError::TooManyBytes { limit: limits.unpacked_bytes });
        }
        let packed = self.packed();
        if self.position > limits.decompression_ratio_floor
            && self.position > packed.saturating_mul(limits.decompression_ratio)
        {
            return Err(UnpackError::Ratio { limit: limits.decompression_ratio });
        }
        Ok(read)
    }

    /// Returns the summary of the bytes that were read.
    pub(super) fn finish(self) -> ContentSummary {
        let digest = self.hash.map(|hash| Digest::from_bytes(hash.finalize().into()));
        ContentSummary { bytes: self.position, digest }
    }

    /// Returns the number of compressed bytes that were read so far.
    pub(super) fn packed(&mut self) -> u64 {
        self.source().count
    }

    fn source(&mut self) -> &mut InputSource<R> {
        self.decoder.input().get_mut().1.get_mut()
    }
}

impl<I: BufRead> ContentDecoder<I> {
    fn input(&mut self) -> &mut I {
        match self {
            Self::Stored(input)
            | Self::Gzip(GzipMembers::Between(input) | GzipMembers::Ended(input)) => input,
            Self::Zstd(decoder) => decoder.get_mut(),
            Self::Gzip(GzipMembers::Member(decoder)) => decoder.get_mut(),
            Self::Gzip(GzipMembers::Taken) => unreachable!("no state is left taken"),
        }
    }
}

impl<I: BufRead> Read for ContentDecoder<I> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Stored(input) => input.read(buffer),
            Self::Gzip(gzip) => gzip.read(buffer),
            Self::Zstd(decoder) => decoder.read(buffer),
        }
    }
}

impl<R: Read> Read for InputSource<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.reader.read(buffer) {
            Ok(read) => {
                self.count += read as u64;
                Ok(read)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                let passed_on = io::Error::from(error.kind());
                self.failure = Some(error);
                Err(passed_on)
            }
        }
    }
}

impl<I: BufRead> Read for GzipMembers<I> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self {
                Self::Member(decoder) => {
                    let read = decoder.read(buffer)?;
                    if read > 0 || buffer.is_empty() {
                        return Ok(read);
                    }
                    // The checksum of the member was right: otherwise the decoder had failed.
                    if let Self::Member(decoder) = std::mem::replace(self, Self::Taken) {
                        *self = Self::Between(decoder.into_inner());
                    }
                }
                Self::Between(input) => {
                    let is_end = input.fill_buf()?.first().is_none_or(|&byte| byte == 0);
                    if is_end {
                        skip_zeros(input)?;
                    }
                    if let Self::Between(input) = std::mem::replace(self, Self::Taken) {
                        *self = if is_end {
                            Self::Ended(input)
                        } else {
                            Self::Member(Box::new(GzDecoder::new(input)))
                        };
                    }
                }
                Self::Ended(_) => return Ok(0),
                Self::Taken => unreachable!("no state is left taken"),
            }
        }
    }
}

/// Skips zeros until the end of the input. Fails on any other byte.
fn skip_zeros(input: &mut impl BufRead) -> io::Result<()> {
    loop {
        let bytes = input.fill_buf()?;
        if bytes.is_empty() {
            return Ok(());
        }
        if bytes.iter().any(|&byte| byte != 0) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "something else follows the end of the gzip stream",
            ));
        }
        let length = bytes.len();
        input.consume(length);
    }
}
