//! Named points where a test stops, fails or holds the driver.
//!
//! They stand along every path on which names and mounts are made and undone.
//! Without the feature `fault-points`, which no release has, they compile to nothing.
//! With it, `CSI_OCI_FAULT=<point>:<action>` chooses one:
//!
//! ```text
//! abort            the process ends there, as by a power cut
//! error:<number>   the step fails with that error number of the kernel
//! pause:<file>     the thread waits there until the file exists
//! ```

use std::io;

/// All points, in the order in which a start, a first publish, an unpublish, an eviction, the removal of stale records and
/// the switch of a followed volume pass them.
pub const POINTS: [&str; 34] = [
    "socket.bound",
    "record.written",
    "record.synced",
    "hint.written",
    "hint.renamed",
    "download.verified",
    "file.moved",
    "layer.unpacked",
    "tree.built",
    "commit.staged",
    "commit.synced",
    "folder.created",
    "rename.asked",
    "rename.done",
    "rename.durable",
    "publish.acquired",
    "publish.recorded",
    "publish.folder",
    "publish.mounted",
    "publish.detached",
    "unpublish.unmounted",
    "unpublish.removed",
    "unpublish.forgotten",
    "gc.planned",
    "gc.condemned",
    "gc.renamed",
    "gc.removed",
    "recovery.swept",
    "reconcile.decided",
    "follow.linked",
    "follow.named",
    "follow.added",
    "follow.switched",
    "follow.removed",
];

/// Returns a time in milliseconds that a test sets in place of the driver's own; `None` in a release.
#[cfg(not(feature = "fault-points"))]
#[inline]
pub const fn milliseconds(_: &'static str) -> Option<u64> {
    None
}

/// Returns a time in milliseconds that a test sets in place of the driver's own, from this variable of the environment.
#[cfg(feature = "fault-points")]
pub fn milliseconds(variable: &'static str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Passes a fault point, which does nothing in a release.
///
/// # Errors
///
/// None without the feature `fault-points`.
#[cfg(not(feature = "fault-points"))]
#[inline]
pub const fn point(_: &'static str) -> io::Result<()> {
    Ok(())
}

/// Passes a fault point, and does there what `CSI_OCI_FAULT` asks for.
///
/// # Errors
///
/// The error that `CSI_OCI_FAULT` names for this point.
#[cfg(feature = "fault-points")]
pub fn point(name: &'static str) -> io::Result<()> {
    use std::sync::LazyLock;
    static FAULT: LazyLock<Option<(String, String)>> = LazyLock::new(|| {
        let fault = std::env::var("CSI_OCI_FAULT").ok()?;
        let (point, action) = fault.split_once(':')?;
        Some((point.to_owned(), action.to_owned()))
    });
    debug_assert!(POINTS.contains(&name), "{name} is not listed");
    let Some((_, action)) = FAULT.as_ref().filter(|(point, _)| point == name) else {
        return Ok(());
    };
    tracing::warn!(point = name, action, "a fault, as the test has asked for");
    match action.split_once(':') {
        Some(("error", number)) => Err(io::Error::from_raw_os_error(number.parse().unwrap_or(5))),
        Some(("pause", file)) => {
            while !std::path::Path::new(file).exists() {
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            Ok(())
        }
        _ => std::process::abort(),
    }
}
