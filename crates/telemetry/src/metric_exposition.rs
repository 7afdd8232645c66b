//! The two text formats of metrics.
//!
//! The library writes OpenMetrics. A client that does not accept it gets Prometheus' older text format, which
//! every tool reads: there a counter's family has the name of its samples, and there are neither units nor an end.

use std::fmt::Write as _;

/// The media type of OpenMetrics.
pub(super) const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// The media type of Prometheus' older text format.
pub(super) const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Returns whether an `Accept` header names OpenMetrics.
pub(super) fn accepts_open_metrics(accept: &str) -> bool {
    accept.contains("application/openmetrics-text")
}

/// Converts OpenMetrics to Prometheus' older text format.
pub(super) fn to_prometheus_text(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    // The type of a family, which decides its name, follows its help.
    let mut help = String::new();
    for line in open_metrics.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("HELP"), Some(name), text) => {
                help = format!("{name} {}", text.unwrap_or_default());
            }
            (Some("#"), Some("TYPE"), Some(name), Some(kind)) => {
                let (suffix, kind) = match kind {
                    "counter" => ("_total", "counter"),
                    "info" => ("_info", "gauge"),
                    kind => ("", kind),
                };
                let help = help.strip_prefix(name).unwrap_or_default();
                // Writing to a string cannot fail.
                let _ = writeln!(text, "# HELP {name}{suffix}{help}\n# TYPE {name}{suffix} {kind}");
            }
            (Some("#"), ..) => {}
            _ => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_have_the_names_of_their_samples() {
        let open = "# HELP a_hits Publishes from the cache.\n# TYPE a_hits counter\na_hits_total 3\n\
                    # HELP a_build The version.\n# TYPE a_build info\na_build_info{version=\"1\"} 1\n\
                    # HELP a_bytes Bytes.\n# TYPE a_bytes gauge\n# UNIT a_bytes bytes\na_bytes 5\n# EOF\n";
        assert_eq!(
            to_prometheus_text(open),
            "# HELP a_hits_total Publishes from the cache.\n# TYPE a_hits_total counter\na_hits_total 3\n\
             # HELP a_build_info The version.\n# TYPE a_build_info gauge\na_build_info{version=\"1\"} 1\n\
             # HELP a_bytes Bytes.\n# TYPE a_bytes gauge\na_bytes 5\n"
        );
        assert!(accepts_open_metrics(
            "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"
        ));
        assert!(!accepts_open_metrics("*/*"));
    }
}
