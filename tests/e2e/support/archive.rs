//! Archives made by hand, with entries that no archiver writes.

use std::io::Write as _;

/// A tar that is built header by header.
#[derive(Default)]
pub struct Tar {
    bytes: Vec<u8>,
}

/// The fields of one header.
#[derive(Clone, Copy)]
struct Header<'a> {
    name: &'a [u8],
    mode: u32,
    owner: (u64, u64),
    size: u64,
    kind: u8,
    link: &'a [u8],
}

/// The time of every entry: 2001-09-09T01:46:40Z.
const TIME: u64 = 1_000_000_000;

impl Tar {
    pub fn new() -> Self {
        Self::default()
    }

    #[must_use]
    pub fn folder(self, name: &str, mode: u32) -> Self {
        self.owned_folder(name, mode, (0, 0))
    }

    #[must_use]
    pub fn owned_folder(self, name: &str, mode: u32, owner: (u64, u64)) -> Self {
        self.entry(
            Header { name: name.as_bytes(), mode, owner, size: 0, kind: b'5', link: b"" },
            &[],
        )
    }

    #[must_use]
    pub fn file(self, name: &str, mode: u32, content: impl AsRef<[u8]>) -> Self {
        self.owned_file(name, mode, (0, 0), content)
    }

    #[must_use]
    pub fn owned_file(
        self,
        name: &str,
        mode: u32,
        owner: (u64, u64),
        content: impl AsRef<[u8]>,
    ) -> Self {
        let content = content.as_ref();
        let size = content.len() as u64;
        self.entry(
            Header { name: name.as_bytes(), mode, owner, size, kind: b'0', link: b"" },
            content,
        )
    }

    #[must_use]
    pub fn symbolic_link(self, name: &str, target: &str) -> Self {
        self.special(name, b'2', target)
    }

    #[must_use]
    pub fn hard_link(self, name: &str, target: &str) -> Self {
        self.special(name, b'1', target)
    }

    /// Adds an entry of any type: `3` and `4` are devices, `6` is a FIFO.
    #[must_use]
    pub fn special(self, name: &str, kind: u8, link: &str) -> Self {
        let header = Header {
            name: name.as_bytes(),
            mode: 0o644,
            owner: (0, 0),
            size: 0,
            kind,
            link: link.as_bytes(),
        };
        self.entry(header, &[])
    }

    /// Adds a file whose header announces another size than its content has.
    #[must_use]
    pub fn lying_file(self, name: &str, size: u64, content: &[u8]) -> Self {
        self.entry(
            Header {
                name: name.as_bytes(),
                mode: 0o644,
                owner: (0, 0),
                size,
                kind: b'0',
                link: b"",
            },
            content,
        )
    }

    /// Adds extended attributes and other pax records for the next entry.
    #[must_use]
    pub fn pax(self, records: &[(&str, &str)]) -> Self {
        let mut body = Vec::new();
        for (key, value) in records {
            body.extend_from_slice(&pax_record(key, value));
        }
        let size = body.len() as u64;
        self.entry(
            Header { name: b"pax", mode: 0o644, owner: (0, 0), size, kind: b'x', link: b"" },
            &body,
        )
    }

    /// Returns the whole archive, with its end.
    pub fn finish(self) -> Vec<u8> {
        let mut bytes = self.bytes;
        bytes.extend_from_slice(&[0; 1024]);
        bytes
    }

    /// Returns the archive without its end, like a truncated download.
    pub fn unfinished(self) -> Vec<u8> {
        self.bytes
    }

    fn entry(mut self, header: Header<'_>, content: &[u8]) -> Self {
        // GNU's form for long names: an entry of their own in front.
        if header.name.len() > 100 {
            self = self.long_field(b'L', header.name);
        }
        if header.link.len() > 100 {
            self = self.long_field(b'K', header.link);
        }
        self.bytes.extend_from_slice(&block(&header));
        self.append_padded(content);
        self
    }

    fn long_field(mut self, kind: u8, value: &[u8]) -> Self {
        let mut content = value.to_vec();
        content.push(0);
        let size = content.len() as u64;
        let header =
            Header { name: b"././@LongLink", mode: 0, owner: (0, 0), size, kind, link: b"" };
        self.bytes.extend_from_slice(&block(&header));
        self.append_padded(&content);
        self
    }

    fn append_padded(&mut self, content: &[u8]) {
        self.bytes.extend_from_slice(content);
        let padding = content.len().next_multiple_of(512) - content.len();
        self.bytes.resize(self.bytes.len() + padding, 0);
    }
}

fn block(header: &Header<'_>) -> [u8; 512] {
    let mut block = [0; 512];
    let name = &header.name[..header.name.len().min(100)];
    block[..name.len()].copy_from_slice(name);
    octal(&mut block[100..108], u64::from(header.mode));
    octal(&mut block[108..116], header.owner.0);
    octal(&mut block[116..124], header.owner.1);
    octal(&mut block[124..136], header.size);
    octal(&mut block[136..148], TIME);
    block[148..156].fill(b' ');
    block[156] = header.kind;
    let link = &header.link[..header.link.len().min(100)];
    block[157..157 + link.len()].copy_from_slice(link);
    block[257..265].copy_from_slice(b"ustar  \0");
    let checksum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{checksum:06o}\0 ").as_bytes());
    block
}

fn octal(field: &mut [u8], value: u64) {
    let width = field.len() - 1;
    let text = format!("{value:0width$o}\0");
    if text.len() == field.len() {
        field.copy_from_slice(text.as_bytes());
    } else {
        // GNU's base-256 form, for numbers with too many digits.
        field.fill(0);
        let length = field.len();
        field[length - 8..].copy_from_slice(&value.to_be_bytes());
        field[0] |= 0x80;
    }
}

fn pax_record(key: &str, value: &str) -> Vec<u8> {
    // The length counts its own digits.
    let rest = format!(" {key}={value}\n");
    let mut length = rest.len() + 1;
    while length != rest.len() + length.to_string().len() {
        length = rest.len() + length.to_string().len();
    }
    format!("{length}{rest}").into_bytes()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).and_then(|()| encoder.finish()).expect("gzip in memory")
}

pub fn zstandard(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 0).expect("zstd in memory")
}
