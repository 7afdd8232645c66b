//! Checks that the limits fit into the memory of the container.

use super::{
    BYTES_PER_MANIFEST_BYTE, BYTES_PER_PART, BYTES_PER_UNPACK, MemoryPlan, PLAIN_WINDOW,
    PROCESS_BYTES,
};
use crate::PullOptions;
use text::human_units::Bytes;
use unpack::layer_merge::Merger;
use unpack::{Limits, Selection};

impl PullOptions {
    /// Compares `pull.memory` with the container's limit, and the needs of one artifact within the
    /// limits with `pull.memory`.
    ///
    /// # Errors
    ///
    /// Names the first key that does not fit, with the numbers and what to change.
    pub fn check_memory(&self, limits: &Limits, container: Option<u64>) -> Result<(), String> {
        let total = self.memory_bytes(container);
        // As many unpackings as run may be paused with their windows.
        let paused = BYTES_PER_UNPACK.saturating_mul(self.unpacks as u64);
        let beside = paused.saturating_add(PROCESS_BYTES);
        if let Some(limit) = container
            && total.saturating_add(beside) > limit
        {
            return Err(format!(
                "pull.memory is {}, and beside it the driver takes up to {}, which is more than the container's limit of {}: lower pull.memory or raise the container's limit",
                Bytes(total),
                Bytes(beside),
                Bytes(limit)
            ));
        }
        let MemoryPlan { fixed, kept, large, .. } = MemoryPlan::new(total, self.unpacks);
        if fixed > total / 2 {
            return Err(format!(
                "pull.unpacks: {} layers at once take {} of the {} of pull.memory, and may take half of it: lower pull.unpacks, or raise pull.memory",
                self.unpacks,
                Bytes(fixed),
                Bytes(total)
            ));
        }
        let window = |log: u32| 1_u64.checked_shl(log).unwrap_or(u64::MAX);
        let needs = [
            ("entries", Merger::estimate(limits.entries, &Selection::default()), large),
            ("manifestBytes", limits.manifest_bytes.saturating_mul(BYTES_PER_MANIFEST_BYTE), large),
            ("zstdWindowLog", window(limits.zstd_window_log).saturating_sub(PLAIN_WINDOW), large),
            ("layers", (limits.layers as u64).saturating_mul(BYTES_PER_PART), kept / 2),
        ];
        match needs.into_iter().find(|(_, needs, most)| needs > most) {
            None => Ok(()),
            Some((key, needs, most)) => Err(format!(
                "limits.{key}: one artifact may take {} of memory, and of the {} of pull.memory it can have {}: lower limits.{key}, or raise pull.memory",
                Bytes(needs),
                Bytes(total),
                Bytes(most)
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(memory: Option<u64>) -> PullOptions {
        PullOptions { memory: memory.map(|mebibytes| mebibytes << 20), ..PullOptions::default() }
    }

    fn check(options: PullOptions, limits: &Limits, container: u64) -> Result<(), String> {
        options.check_memory(limits, Some(container << 20))
    }

    #[test]
    fn the_defaults_fit_the_container_of_the_chart() {
        let limits = Limits::default();
        assert_eq!(check(options(None), &limits, 512), Ok(()));
        assert_eq!(options(None).check_memory(&limits, None), Ok(()));
    }

    #[test]
    fn what_does_not_fit_is_named_with_its_numbers() {
        let defaults = Limits::default();
        let refused = |memory, container| {
            check(options(memory), &defaults, container).expect_err("too much memory")
        };
        let text = refused(Some(500), 512);
        assert!(
            text.starts_with("pull.memory is 500.0 MiB") && text.contains("512.0 MiB"),
            "{text}"
        );
        let text = refused(None, 160);
        assert!(text.starts_with("pull.unpacks: 4 layers at once take 39.0 MiB"), "{text}");
        // The windows of paused unpackings count as well.
        let text = refused(Some(192), 256);
        assert!(text.contains("beside it the driver takes up to 100.0 MiB"), "{text}");
        let fewer = PullOptions { unpacks: 2, ..options(Some(192)) };
        assert_eq!(check(fewer, &defaults, 274), Ok(()));
        for (key, limits) in [
            ("entries", Limits { entries: 5_000_000, ..Limits::default() }),
            ("manifestBytes", Limits { manifest_bytes: 104_857_600, ..Limits::default() }),
            ("zstdWindowLog", Limits { zstd_window_log: 28, ..Limits::default() }),
            ("layers", Limits { layers: 100_000, ..Limits::default() }),
        ] {
            let said = check(options(None), &limits, 512).expect_err(key);
            assert!(said.starts_with(&format!("limits.{key}: ")), "{said}");
            assert_eq!(check(options(Some(4096)), &limits, 8192), Ok(()), "{key}");
        }
    }
}
