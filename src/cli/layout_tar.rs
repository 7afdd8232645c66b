//! Writes the directory of an OCI image layout as a tar, for `import`.

use std::fs::File;
use std::io::{self, Read as _, Write};
use std::path::Path;

use oci::Digest;

const BLOCK: usize = 512;
/// The octal digits of the largest size in a ustar header.
const SIZE_DIGITS: usize = 11;

/// The files of every layout.
pub(super) const DOCUMENTS: [&str; 2] = ["oci-layout", "index.json"];

/// Writes the files of a layout that the node plugin reads, and no others. Symbolic links are followed.
pub(super) fn write(layout: &Path, to: &mut impl Write) -> io::Result<()> {
    for name in DOCUMENTS {
        append(layout, name, to)?;
    }
    match layout.join("blobs/sha256").read_dir() {
        Ok(blobs) => {
            for blob in blobs {
                let name = blob?.file_name();
                if let Some(hex) = name.to_str().filter(|hex| Digest::from_hex(hex).is_some()) {
                    append(layout, &format!("blobs/sha256/{hex}"), to)?;
                }
            }
        }
        // The descriptors may contain all content.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(named("blobs/sha256", &error)),
    }
    to.write_all(&[0; 2 * BLOCK])
}

fn append(layout: &Path, name: &str, to: &mut impl Write) -> io::Result<()> {
    let path = layout.join(name);
    let metadata = path.metadata().map_err(|error| named(name, &error))?;
    if !metadata.is_file() {
        return Err(io::Error::other(format!("{name} is not a file")));
    }
    let file = File::open(&path).map_err(|error| named(name, &error))?;
    let size = metadata.len();
    to.write_all(&header(name, size))?;
    if io::copy(&mut file.take(size), to)? != size {
        return Err(io::Error::other(format!("{name} became shorter while it was read")));
    }
    let padding = size.next_multiple_of(BLOCK as u64) - size;
    io::copy(&mut io::repeat(0).take(padding), to)?;
    Ok(())
}

fn named(name: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{name}: {error}"))
}

/// Returns the header of a regular file in the ustar format. Sizes from 8 GiB on are binary, as GNU tar writes them.
fn header(name: &str, size: u64) -> [u8; BLOCK] {
    let mut header = [0; BLOCK];
    let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
    put(0, name.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    let digits = format!("{size:0SIZE_DIGITS$o}");
    if digits.len() == SIZE_DIGITS {
        put(124, digits.as_bytes());
    } else {
        put(124, &[0x80]);
        put(128, &size.to_be_bytes());
    }
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn the_tar_has_the_layouts_files_and_no_others() {
        let folder = tempfile::tempdir().expect("a folder");
        let blobs = folder.path().join("blobs/sha256");
        std::fs::create_dir_all(&blobs).expect("a folder");
        let (plain, linked) = ("a".repeat(64), "b".repeat(64));
        let files = [
            ("oci-layout".to_owned(), "{}".to_owned()),
            ("index.json".to_owned(), String::new()),
            (format!("blobs/sha256/{plain}"), "x".repeat(1000)),
            ("elsewhere".to_owned(), "linked".to_owned()),
            ("blobs/sha256/README".to_owned(), "no blob".to_owned()),
        ];
        for (name, content) in &files {
            std::fs::write(folder.path().join(name), content).expect("written");
        }
        std::os::unix::fs::symlink("../../elsewhere", blobs.join(&linked)).expect("a link");
        let mut bytes = Vec::new();
        write(folder.path(), &mut bytes).expect("written");
        let mut found = BTreeMap::new();
        for entry in tar::Archive::new(bytes.as_slice()).entries().expect("a tar") {
            let mut entry = entry.expect("an entry");
            let mut content = String::new();
            entry.read_to_string(&mut content).expect("content");
            found.insert(entry.path().expect("a name").display().to_string(), content);
        }
        let expected = [&files[0], &files[1], &files[2]].map(Clone::clone);
        let mut expected = BTreeMap::from(expected);
        expected.insert(format!("blobs/sha256/{linked}"), "linked".to_owned());
        assert_eq!(found, expected);
    }

    #[test]
    fn sizes_beyond_eight_gibibytes_are_readable() {
        for size in [0, 1, (8 << 30) - 1, 8 << 30, 1 << 40] {
            let header = header("name", size);
            let header = tar::Header::from_byte_slice(&header);
            assert_eq!(header.entry_size().expect("a size"), size);
            assert!(header.as_ustar().is_some() && header.entry_type().is_file());
        }
    }

    #[test]
    fn what_is_missing_or_no_file_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let told = write(folder.path(), &mut Vec::new()).expect_err("no layout").to_string();
        assert!(told.contains("oci-layout"), "{told}");
        std::fs::create_dir(folder.path().join("oci-layout")).expect("a folder");
        let told = write(folder.path(), &mut Vec::new()).expect_err("no file").to_string();
        assert!(told.contains("oci-layout is not a file"), "{told}");
    }
}
