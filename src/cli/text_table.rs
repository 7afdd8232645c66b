//! Formats tables and times.

/// The length of a digest that is unique enough to tell artifacts apart.
const SHORT_DIGEST: usize = "sha256:".len() + 12;

/// Returns lines with columns as wide as their widest cell.
pub(super) fn lines<const N: usize>(
    heads: [&str; N],
    rows: impl Iterator<Item = [String; N]>,
) -> Vec<String> {
    let rows: Vec<_> = std::iter::once(heads.map(str::to_owned)).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<_> = (0..N).map(|column| width(column).unwrap_or_default()).collect();
    rows.iter()
        .map(|row| {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        })
        .collect()
}

/// Shortens a digest.
pub(super) fn short(digest: &str) -> String {
    digest.get(..SHORT_DIGEST).unwrap_or(digest).to_owned()
}

/// Returns one word for the kind of an artifact, if there is one.
pub(super) fn kind(kind: &str) -> &str {
    match kind {
        "application/vnd.oci.image.config.v1+json"
        | "application/vnd.docker.container.image.v1+json" => "image",
        "application/vnd.cncf.helm.config.v1+json" => "chart",
        "application/vnd.cncf.flux.config.v1+json" => "flux",
        ""
        | "application/vnd.unknown.artifact.v1"
        | "application/vnd.unknown.config.v1+json"
        | "application/vnd.oci.empty.v1+json" => "files",
        kind if kind.contains("vnd.cncf.model") || kind.contains("vnd.cnai.model") => "model",
        kind if kind.contains("wasm") => "wasm",
        kind => kind,
    }
}

/// Formats a list as one cell.
pub(super) fn list(names: &[String]) -> String {
    if names.is_empty() { "-".to_owned() } else { names.join(",") }
}

/// Formats the time since a moment as kubectl does; `-` for never.
pub(super) fn age(unix_seconds: i64) -> String {
    if unix_seconds == 0 {
        return "-".to_owned();
    }
    let seconds = jiff::Timestamp::now().as_second().saturating_sub(unix_seconds).max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned);
        let lines =
            lines(["NAME", "SIZE"], [["a", "2.0 KiB"], ["a longer one", ""]].into_iter().map(row));
        assert_eq!(lines, ["NAME          SIZE", "a             2.0 KiB", "a longer one"]);
    }

    #[test]
    fn ages_are_short() {
        let ago = |seconds: i64| age(jiff::Timestamp::now().as_second() - seconds);
        assert_eq!([ago(300), ago(10_000), ago(200_000), age(0)], ["5m", "2h", "2d", "-"]);
    }
}
