//! The artifacts of the transfers, the same in every run.

use std::io::Write as _;

use crate::common::support::{
    Image, Layer, Manifest, OCI_TAR_GZIP, OCI_TAR_ZSTD, Tar, noise, registry,
};

/// The measured cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    /// One large file.
    File,
    /// The large file, with TLS.
    Tls,
    /// The large file, with a limit on each connection.
    Limited,
    /// Sixteen files of 64 MiB.
    Files,
    /// A monitoring system's program and its configuration, a few files.
    Original,
    /// An image of many files, layers compressed with gzip.
    Gzip,
    /// The image of many files, layers compressed with zstd.
    Zstd,
    /// Ten artifacts at once, to measure memory.
    Ten,
    /// The large file and the image of many files, by a driver with 128 MiB, page cache included.
    Confined,
}

/// A pushed artifact.
pub struct Artifact {
    pub description: String,
    /// `repository:tag`, one for each artifact.
    pub names: Vec<String>,
    pub repository: String,
    /// The layers' blobs, as `sha256:...`.
    pub blobs: Vec<String>,
}

impl Case {
    pub const ALL: [Self; 9] = [
        Self::File,
        Self::Tls,
        Self::Limited,
        Self::Files,
        Self::Original,
        Self::Gzip,
        Self::Zstd,
        Self::Ten,
        Self::Confined,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Tls => "tls",
            Self::Limited => "limited",
            Self::Files => "files",
            Self::Original => "original",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Ten => "ten",
            Self::Confined => "confined",
        }
    }
}

impl Artifact {
    pub fn push(case: Case, scale: usize) -> Self {
        let mebibytes = |full: usize| (full * scale / 100).max(1) << 20;
        match case {
            Case::File => {
                let size = mebibytes(1024);
                Self::files(case, "one file", &[("file".to_owned(), noise(size, 1))])
            }
            Case::Tls => {
                let what = "one file through nginx with TLS";
                Self::files(case, what, &[("file".to_owned(), noise(mebibytes(1024), 1))])
            }
            Case::Limited => {
                let limit = super::nginx::LIMIT_MEBIBYTES;
                let what = format!("one file through nginx with limit_rate {limit}m");
                Self::files(case, &what, &[("file".to_owned(), noise(mebibytes(1024), 1))])
            }
            Case::Files => {
                let file =
                    |number: u64| (format!("file-{number}"), noise(mebibytes(64), 100 + number));
                Self::files(case, "16 files", &(0..16).map(file).collect::<Vec<_>>())
            }
            Case::Original => {
                let file = |name: &str, size: usize, seed| (name.to_owned(), noise(size, seed));
                let files = [
                    file("prometheus", mebibytes(48), 201),
                    file("prometheus.yml", 4 << 10, 202),
                    file("rules.yml", 64 << 10, 203),
                    file("console.html", 16 << 10, 204),
                ];
                Self::files(case, "the original flow's artifact: a program and its files", &files)
            }
            Case::Gzip | Case::Zstd => Self::image(case, scale),
            Case::Confined => {
                let file = Self::push(Case::File, scale);
                let image = Self::push(Case::Gzip, scale);
                let description =
                    format!("{}, and {}, in 128 MiB", file.description, image.description);
                let names = [file.names, image.names].concat();
                Self { description, names, ..image }
            }
            Case::Ten => {
                let mut all = Self::files(case, "ten artifacts at once", &[]);
                all.names.clear();
                all.description = format!("ten artifacts of {} MiB at once", mebibytes(128) >> 20);
                for number in 0..10 {
                    let tag = format!("v{number}");
                    let layer = Layer::titled("file", noise(mebibytes(128), 300 + number));
                    all.blobs.push(layer.descriptor()["digest"].as_str().unwrap().to_owned());
                    Manifest::artifact([layer]).push(registry(), &all.repository, &tag);
                    all.names.push(format!("{}:{tag}", all.repository));
                }
                all
            }
        }
    }

    fn files(case: Case, what: &str, files: &[(String, Vec<u8>)]) -> Self {
        let repository = format!("bench-{}", case.name());
        let layers: Vec<_> =
            files.iter().map(|(name, bytes)| Layer::titled(name, bytes.clone())).collect();
        let blobs = layers
            .iter()
            .map(|layer| layer.descriptor()["digest"].as_str().unwrap().to_owned())
            .collect();
        let bytes: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
        Manifest::artifact(layers).push(registry(), &repository, "v1");
        let description = format!("{what}, {} MiB", bytes >> 20);
        Self { description, names: vec![format!("{repository}:v1")], repository, blobs }
    }

    /// Creates 60,000 files in four layers, 860 MB. Their sizes are distributed as in system images.
    fn image(case: Case, scale: usize) -> Self {
        const LAYERS: usize = 4;
        let files = (60_000 * scale / 100).max(LAYERS);
        let repository = format!("bench-{}", case.name());
        let text = text();
        let (mut image, mut blobs) = (Image::new(), Vec::new());
        let (mut unpacked, mut packed) = (0, 0);
        for layer in 0..LAYERS {
            let mut archive = Tar::new();
            for number in 0..files / LAYERS {
                let seed = layer * 1_000_003 + number;
                let size = size_of_file(seed);
                let start = seed * 7919 % (text.len() - size);
                let name = format!("usr/{layer}/folder-{}/file-{number}", number % 500);
                archive = archive.file(&name, 0o644, &text[start..start + size]);
                unpacked += size;
            }
            let archive = archive.finish();
            let (media_type, bytes) = match case {
                Case::Zstd => {
                    (OCI_TAR_ZSTD, zstd::encode_all(archive.as_slice(), 3).expect("zstd"))
                }
                _ => (OCI_TAR_GZIP, gzip(&archive)),
            };
            packed += bytes.len();
            blobs.push(crate::common::support::digest(&bytes));
            image = image.packed_layer(media_type, bytes, &archive);
        }
        image.push(registry(), &repository, "v1");
        let description = format!(
            "an image of {files} files in {LAYERS} layers, {} MB, {} MB packed",
            unpacked / 1_000_000,
            packed / 1_000_000
        );
        Self { description, names: vec![format!("{repository}:v1")], repository, blobs }
    }
}

/// Returns a file size: half of them below 4 KiB, a few large, 14 KiB on average.
fn size_of_file(seed: usize) -> usize {
    let random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
    match random % 100 {
        0..50 => 200 + random % 3_900,
        50..90 => 4_096 + random % 12_000,
        90..99 => 16_384 + random % 65_536,
        _ => 262_144 + random % 262_144,
    }
}

/// Returns text that compresses to about a third, like programs and texts.
fn text() -> Vec<u8> {
    let words = noise(6 * 4096, 7);
    let mut choices = noise(4 * (2 << 20), 8).into_iter();
    let mut text = Vec::new();
    while let (Some(first), Some(second), Some(third), Some(fourth)) =
        (choices.next(), choices.next(), choices.next(), choices.next())
    {
        let word = (usize::from(first) * 256 + usize::from(second)) % 4095 * 6;
        text.extend_from_slice(&words[word..word + 4 + usize::from(third % 3)]);
        if fourth % 4 == 0 {
            text.push(fourth);
        }
    }
    text
}

/// Compresses with a fast writer, at the level that most tools use.
fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).and_then(|()| encoder.finish()).expect("gzip")
}
