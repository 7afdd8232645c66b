//! Measures whether the node's processors have time.
//!
//! A writer that waits for bytes waits for the network only if they have. Otherwise more connections would take
//! processor time from each other.

/// The part of the time in which processors must have had nothing to do.
const ENOUGH: f64 = 0.2;

/// Time of all processors since the boot, as the kernel counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ProcessorTimes {
    idle: u64,
    all: u64,
}

/// Compares from look to look.
pub(super) struct Processors {
    before: Option<ProcessorTimes>,
}

impl Processors {
    /// Looks for the first time.
    pub(super) fn new() -> Self {
        Self { before: ProcessorTimes::now() }
    }

    /// Returns whether the processors had time since the last check; true if the kernel does not say.
    pub(super) fn had_time(&mut self) -> bool {
        let now = ProcessorTimes::now();
        let before = std::mem::replace(&mut self.before, now);
        match (before, now) {
            (Some(before), Some(now)) => now.has_idled_since(before),
            _ => true,
        }
    }
}

impl ProcessorTimes {
    fn now() -> Option<Self> {
        Self::parse(&std::fs::read_to_string("/proc/stat").ok()?)
    }

    /// The first line of `/proc/stat` (`proc_stat(5)`): user, nice, system, idle, iowait, irq, softirq,
    /// steal; the guests' time after them is part of the first two.
    fn parse(text: &str) -> Option<Self> {
        let line = text.lines().next()?.strip_prefix("cpu ")?;
        let times: Vec<u64> =
            line.split_whitespace().take(8).map(|time| time.parse().ok()).collect::<Option<_>>()?;
        let (idle, waiting) = (times.get(3)?, times.get(4)?);
        Some(Self { idle: idle + waiting, all: times.iter().sum() })
    }

    fn has_idled_since(self, before: Self) -> bool {
        // Counters of idle time may go back a little.
        let passed = self.all.saturating_sub(before.all);
        let idle = self.idle.saturating_sub(before.idle);
        #[expect(clippy::cast_precision_loss, reason = "a part, not an account")]
        let enough = idle as f64 >= passed as f64 * ENOUGH;
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_line_is_read() {
        let text = "cpu  10 1 20 300 9 2 3 5 4 1\ncpu0 1 2 3 4\n";
        assert_eq!(ProcessorTimes::parse(text), Some(ProcessorTimes { idle: 309, all: 350 }));
        for text in ["", "cpu", "cpu 1 2 3", "cpu 1 2 3 x 5", "intr 1 2 3 4 5 6"] {
            assert_eq!(ProcessorTimes::parse(text), None, "{text}");
        }
        assert!(ProcessorTimes::now().is_some());
    }

    #[test]
    fn a_fifth_of_the_time_is_enough() {
        let before = ProcessorTimes { idle: 100, all: 1000 };
        for (idle, all, enough) in
            [(120, 1100, true), (119, 1100, false), (100, 1100, false), (200, 1100, true)]
        {
            assert_eq!(
                ProcessorTimes { idle, all }.has_idled_since(before),
                enough,
                "{idle} of {all}"
            );
        }
    }
}
