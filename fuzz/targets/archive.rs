//! Bytes to entries to a tree: nothing panics, and nothing that comes out leaves the volume.
//!
//! Tar checks each header with a sum, which a fuzzer does not find by chance. So the
//! sums are made right first, unless the first byte of the input says otherwise.

use std::io::{self, BufRead};

use unpack::Checksum;
use unpack::archive::{FileHeader, Sink, StoredContent, unpack};
use unpack::layer_merge::Merger;
use unpack::layer_rule::ArchiveRule;
use unpack::{Entry, Limits, PermissionsRule, Selection};

#[derive(Default)]
struct Entries(Vec<Entry>);

impl Sink for Entries {
    fn file(
        &mut self,
        header: &FileHeader,
        content: &mut dyn BufRead,
    ) -> io::Result<StoredContent> {
        let read = io::copy(content, &mut io::sink())?;
        assert_eq!(read, header.size, "a short content must be an error");
        Ok(StoredContent { data: 0, checksum: Checksum::of(b"") })
    }

    fn entry(&mut self, entry: Entry) -> io::Result<()> {
        self.0.push(entry);
        Ok(())
    }
}

fn with_right_sums(archive: &mut [u8]) {
    for block in archive.chunks_exact_mut(512) {
        // Only what claims to be a header: contents stay what they are.
        if &block[257..262] == b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
}

/// Runs one input.
pub(super) fn run(input: &[u8]) {
    let Some((&form, archive)) = input.split_first() else {
        return;
    };
    let mut archive = archive.to_vec();
    if form & 1 == 0 {
        with_right_sums(&mut archive);
    }
    let limits = Limits {
        entries: 100,
        unpacked_bytes: 1 << 20,
        decompression_ratio_floor: 1 << 16,
        header_bytes: 4096,
        zstd_window_log: 20,
        depth: 8,
        ..Limits::default()
    };
    let whiteouts = form & 2 == 0;
    let rule = ArchiveRule { whiteouts, tar_digest: None, within: None };
    let permissions =
        if form & 4 == 0 { PermissionsRule::Readable } else { PermissionsRule::Preserve };
    let mut entries = Entries::default();
    if let Err(error) = unpack(&*archive, &rule, permissions, &limits, &mut entries) {
        assert!(error.to_string().len() < 1024);
    }
    // Twice the same layer: now its own links are also those of a lower one.
    let everything = Selection::default();
    let mut merger = Merger::new(&limits, &everything);
    for layer in 0..2 {
        merger.archive(layer, &rule);
        for entry in &entries.0 {
            assert!(entry.metadata.permissions.mode <= 0o777);
            if let Err(error) = merger.entry(entry) {
                assert!(error.to_string().len() < 1024);
                return;
            }
        }
    }
    if let Ok(plan) = merger.finish() {
        for (index, node) in plan.nodes.iter().enumerate() {
            assert!(node.parent.is_none_or(|parent| (parent as usize) < index));
            let name = plan.held_name(node);
            assert!(!name.is_empty() && name != b"." && name != b"..");
            assert!(!name.contains(&b'/') && !name.contains(&0));
        }
    }
}
