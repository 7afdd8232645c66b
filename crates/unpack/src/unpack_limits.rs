//! Limits on untrusted input, each with its default and its reason.

use serde::Deserialize;

use oci_types::manifest::ManifestLimits;

const MEBIBYTE: u64 = 1 << 20;
const TEBIBYTE: u64 = 1 << 40;

/// The `limits` section of the configuration file.
///
/// A limit protects the node: it bounds the memory, disk or time that one artifact can take before
/// it is refused.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Limits {
    /// Bytes of a manifest or index: 4 MiB, the size that registries accept and that the
    /// distribution specification asks clients to expect. Held in memory.
    pub manifest_bytes: u64,
    /// Bytes of a configuration blob: 16 MiB. Held in memory where it is parsed.
    pub config_bytes: u64,
    /// Layers of a manifest, entries of an index: 10,000. More than any tool
    /// makes; each costs a request and a few records.
    pub layers: usize,
    /// Bytes of one blob: 1 TiB. A descriptor that announces more is a mistake or an attack. The
    /// free space on disk is the effective bound.
    pub blob_bytes: u64,
    /// Entries of one artifact, folders that only a path implies included: 1,000,000. Each takes
    /// about 120 bytes of memory while a tree is merged, and an inode.
    pub entries: u64,
    /// Bytes of one name: 255, the limit of ext4, xfs and btrfs.
    pub name_bytes: usize,
    /// Bytes of a whole path in the volume: 4,095, the maximum of one system call.
    pub path_bytes: usize,
    /// Names in a path: 256. Deeper trees are made to break programs that walk them.
    pub depth: usize,
    /// Unpacked bytes per compressed byte: 200, once a layer unpacks to more than
    /// [`Limits::decompression_ratio_floor`]. Real content stays below 30.
    pub decompression_ratio: u64,
    /// Unpacked bytes from which the ratio counts: 64 MiB, below which no ratio is harmful.
    pub decompression_ratio_floor: u64,
    /// Unpacked bytes of one artifact, all of its layers together: 1 TiB, for the same reason as
    /// `blobBytes`.
    pub unpacked_bytes: u64,
    /// Bytes of the extended headers of one archive entry: 1 MiB, as in Go's reader. Held in
    /// memory.
    pub header_bytes: u64,
    /// Bytes of names, link targets and extended attributes of one artifact, plus 320 for each
    /// folder and 8 for each attribute, all entries together: 128 MiB. Only folders and extended
    /// attributes are held in memory while a tree is merged.
    pub metadata_bytes: u64,
    /// Extended attributes of one entry: 128.
    pub extended_attributes: usize,
    /// Bytes of names and values of one entry's extended attributes: 64 KiB, the kernel's limit for
    /// one.
    pub extended_attribute_bytes: usize,
    /// Bytes of a symbolic link's target: 4,095, the kernel's limit.
    pub link_target_bytes: usize,
    /// Base-two logarithm of the zstd window: 27 (128 MiB), what `zstd -d` accepts by default. Held
    /// in memory.
    pub zstd_window_log: u32,
}

/// Reason why limits cannot be used: values outside the range of the kernel or of this program.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("limits.{name} is {value}: it must be from {least} to {most}")]
pub struct LimitsError {
    name: &'static str,
    value: u64,
    least: u64,
    most: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            manifest_bytes: 4 * MEBIBYTE,
            config_bytes: 16 * MEBIBYTE,
            layers: 10_000,
            blob_bytes: TEBIBYTE,
            entries: 1_000_000,
            name_bytes: 255,
            path_bytes: 4095,
            depth: 256,
            decompression_ratio: 200,
            decompression_ratio_floor: 64 * MEBIBYTE,
            unpacked_bytes: TEBIBYTE,
            header_bytes: MEBIBYTE,
            metadata_bytes: 128 * MEBIBYTE,
            extended_attributes: 128,
            extended_attribute_bytes: 64 << 10,
            link_target_bytes: 4095,
            zstd_window_log: 27,
        }
    }
}

impl Limits {
    /// Returns the largest limits that any configuration accepts.
    pub fn largest() -> Self {
        Self {
            manifest_bytes: 1 << 30,
            config_bytes: 1 << 30,
            layers: 1 << 20,
            blob_bytes: i64::MAX.unsigned_abs(),
            entries: 1 << 30,
            depth: 1024,
            unpacked_bytes: i64::MAX.unsigned_abs(),
            metadata_bytes: 1 << 40,
            extended_attributes: usize::MAX,
            extended_attribute_bytes: 1 << 20,
            ..Self::default()
        }
    }

    /// Returns the limits of manifests.
    pub fn manifest(&self) -> ManifestLimits {
        ManifestLimits { layers: self.layers, blob_bytes: self.blob_bytes }
    }

    /// Refuses values that no kernel or allocator could honour.
    pub fn check(&self) -> Result<(), LimitsError> {
        let range = |name, value: u64, least, most| {
            if (least..=most).contains(&value) {
                Ok(())
            } else {
                Err(LimitsError { name, value, least, most })
            }
        };
        range("manifestBytes", self.manifest_bytes, 1, 1 << 30)?;
        range("configBytes", self.config_bytes, 1, 1 << 30)?;
        range("layers", self.layers as u64, 1, 1 << 20)?;
        range("blobBytes", self.blob_bytes, 1, i64::MAX.unsigned_abs())?;
        // Nodes have 32-bit numbers.
        range("entries", self.entries, 1, 1 << 30)?;
        range("nameBytes", self.name_bytes as u64, 1, 255)?;
        range("pathBytes", self.path_bytes as u64, 1, 4095)?;
        // Folders are walked recursively.
        range("depth", self.depth as u64, 1, 1024)?;
        range("decompressionRatio", self.decompression_ratio, 1, u64::MAX)?;
        range("unpackedBytes", self.unpacked_bytes, 1, i64::MAX.unsigned_abs())?;
        range("headerBytes", self.header_bytes, 512, 1 << 30)?;
        range("metadataBytes", self.metadata_bytes, 4096, 1 << 40)?;
        range("extendedAttributeBytes", self.extended_attribute_bytes as u64, 0, 1 << 20)?;
        range("linkTargetBytes", self.link_target_bytes as u64, 1, 4095)?;
        range("zstdWindowLog", u64::from(self.zstd_window_log), 10, 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_usable() {
        assert_eq!(Limits::default().check(), Ok(()));
    }

    #[test]
    fn the_largest_limits_are_the_maximum_of_the_configuration() {
        let largest = Limits::largest();
        assert_eq!(largest.check(), Ok(()));
        for more in [
            Limits { layers: largest.layers + 1, ..largest.clone() },
            Limits { entries: largest.entries + 1, ..largest.clone() },
            Limits { depth: largest.depth + 1, ..largest.clone() },
            Limits { metadata_bytes: largest.metadata_bytes + 1, ..largest.clone() },
            Limits { unpacked_bytes: largest.unpacked_bytes + 1, ..largest.clone() },
        ] {
            assert!(more.check().is_err(), "{more:?}");
        }
    }

    #[test]
    fn values_beyond_the_kernel_are_refused() {
        let deep = Limits { depth: 100_000, ..Limits::default() };
        let text = deep.check().expect_err("too deep").to_string();
        assert_eq!(text, "limits.depth is 100000: it must be from 1 to 1024");
    }

    #[test]
    fn keys_are_checked_and_optional() {
        let limits: Limits = serde_json::from_str(r#"{"pathBytes": 100}"#).unwrap();
        assert_eq!(limits, Limits { path_bytes: 100, ..Limits::default() });
        assert!(serde_json::from_str::<Limits>(r#"{"pathByte": 100}"#).is_err());
    }
}
