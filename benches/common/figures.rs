//! Reads times from the driver's log, and prints them.

use std::time::Duration;

/// Returns the driver's own times of calls that ended with this message: of publishes, those from the cache.
pub fn driver_times(log: &str, message: &str) -> Vec<Duration> {
    log.lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|line| line["message"] == message && line["path"] != "miss")
        .filter_map(|line| line["milliseconds"].as_f64())
        .map(|milliseconds| Duration::from_secs_f64(milliseconds / 1000.0))
        .collect()
}

/// Returns the quantile of the times at `part`, from 0 to 1; zero if there are none.
pub fn quantile(times: &mut [Duration], part: f64) -> Duration {
    times.sort_unstable();
    let last = times.len().saturating_sub(1);
    times.get(((last as f64) * part).round() as usize).copied().unwrap_or_default()
}

/// Formats a time as milliseconds, with two digits.
pub fn milliseconds(time: Duration) -> String {
    format!("{:.2}", time.as_secs_f64() * 1000.0)
}
