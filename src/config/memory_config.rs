//! Checks that the limits fit into the memory of the container.

use super::NodeConfiguration;
use pull::memory::{
    BYTES_PER_MANIFEST_BYTE, BYTES_PER_PART, MemoryPlan, PLAIN_WINDOW, bytes_beside,
};
use text::human_units::Bytes;
use unpack::Selection;
use unpack::layer_merge::Merger;

impl NodeConfiguration {
    /// Compares `pull.memory` with the container's limit, and the needs of one artifact within the
    /// limits with `pull.memory`.
    ///
    /// # Errors
    ///
    /// Names the first key that does not fit, with the numbers and what to change.
    pub fn check_memory(&self, container: Option<u64>) -> Result<(), String> {
        let total = self.pull.memory_bytes(container);
        let beside = bytes_beside(self.pull.unpacks);
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
        let MemoryPlan { fixed, kept, large, .. } = MemoryPlan::new(total, self.pull.unpacks);
        if fixed > total / 2 {
            return Err(format!(
                "pull.unpacks: {} layers at once take {} of the {} of pull.memory, and may take half of it: lower pull.unpacks, or raise pull.memory",
                self.pull.unpacks,
                Bytes(fixed),
                Bytes(total)
            ));
        }
        let limits = &self.limits;
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
    use crate::config::{API_VERSION, KIND, NodeConfiguration};

    fn check(text: &str, container: u64) -> Result<(), String> {
        let text = format!("apiVersion: {API_VERSION}\nkind: {KIND}\n{text}");
        NodeConfiguration::parse(&text).expect("valid").check_memory(Some(container << 20))
    }

    #[test]
    fn the_defaults_fit_the_container_of_the_chart() {
        assert_eq!(check("", 512), Ok(()));
        assert_eq!(NodeConfiguration::without_file().check_memory(None), Ok(()));
    }

    #[test]
    fn what_does_not_fit_is_named_with_its_numbers() {
        let refused = |text, container| check(text, container).expect_err(text);
        let text = refused("pull: {memory: 500Mi}\n", 512);
        assert!(
            text.starts_with("pull.memory is 500.0 MiB") && text.contains("512.0 MiB"),
            "{text}"
        );
        let text = refused("", 160);
        assert!(text.starts_with("pull.unpacks: 4 layers at once take 39.0 MiB"), "{text}");
        // The windows of paused unpackings count as well.
        let text = refused("pull: {memory: 192Mi}\n", 256);
        assert!(text.contains("beside it the driver takes up to 100.0 MiB"), "{text}");
        assert_eq!(check("pull: {memory: 192Mi, unpacks: 2}\n", 274), Ok(()));
        for (key, text) in [
            ("entries", "limits: {entries: 5000000}\n"),
            ("manifestBytes", "limits: {manifestBytes: 104857600}\n"),
            ("zstdWindowLog", "limits: {zstdWindowLog: 28}\n"),
            ("layers", "limits: {layers: 100000}\n"),
        ] {
            let said = refused(text, 512);
            assert!(said.starts_with(&format!("limits.{key}: ")), "{said}");
            assert_eq!(check(&format!("{text}pull: {{memory: 4Gi}}\n"), 8192), Ok(()), "{text}");
        }
    }
}
