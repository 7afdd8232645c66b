//! The target path of a volume, as the kubelet sends it.

use std::fmt;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::error::VolumeError;
use sys::mount::MountTarget;
use text::printable::excerpt;

/// A path below the kubelet's root directory: absolute, and without `.` and `..`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TargetPath {
    base: PathBuf,
    relative: PathBuf,
}

impl TargetPath {
    /// Checks the form of the path only. The file system is not read.
    pub fn parse(kubelet_dir: &Path, text: &str) -> Result<Self, VolumeError> {
        let refuse = |why: &str| {
            VolumeError::Invalid(format!("the target path \"{}\" {why}", excerpt(text, 300)))
        };
        if text.is_empty() {
            return Err(VolumeError::Invalid("the target path is missing".into()));
        }
        if !text.starts_with('/') {
            return Err(refuse("is not absolute"));
        }
        // Compares the components as they are written: `Path` silently drops "." and double slashes.
        if text.split('/').any(|part| part == "." || part == "..") || text.contains('\0') {
            return Err(refuse("must not contain \".\" or \"..\""));
        }
        let relative = Path::new(text).strip_prefix(kubelet_dir).map_err(|_| {
            refuse(&format!(
                "is not below the kubelet's folder {} (--kubelet-dir)",
                kubelet_dir.display()
            ))
        })?;
        if relative.as_os_str().is_empty() {
            return Err(refuse("is the kubelet's folder itself"));
        }
        Ok(Self { base: kubelet_dir.to_owned(), relative: relative.to_owned() })
    }

    /// Opens the folder that holds the target, as [`MountTarget::open`] does.
    pub fn open(&self) -> io::Result<MountTarget> {
        MountTarget::open(&self.base, &self.relative)
    }

    /// Returns the absolute path.
    pub fn full(&self) -> PathBuf {
        self.base.join(&self.relative)
    }

    /// Returns whether the path ends like that of a volume of the kubelet.
    pub fn is_kubelet_volume(&self) -> bool {
        pod_of_volume(&self.full()).is_some()
    }

    /// Returns the pod's uid if the path has the kubelet's form: `pods/<uid>/...`.
    pub fn pod_uid(&self) -> Option<&str> {
        let mut parts = self.relative.components();
        match (parts.next(), parts.next()) {
            (Some(Component::Normal(pods)), Some(Component::Normal(uid))) if pods == "pods" => {
                uid.to_str()
            }
            _ => None,
        }
    }
}

/// Returns the pod's uid if a path ends like that of a volume of the kubelet:
/// `pods/<uid>/volumes/kubernetes.io~csi/<name>/mount`.
pub fn pod_of_volume(path: &Path) -> Option<&str> {
    let mut parts = path.iter().rev().map(|part| part.to_str());
    let last: [Option<&str>; 5] = [(); 5].map(|()| parts.next().flatten());
    match (last, parts.next().flatten()) {
        ([Some("mount"), _, Some("kubernetes.io~csi"), Some("volumes"), uid], Some("pods")) => uid,
        _ => None,
    }
}

impl fmt::Display for TargetPath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.full().display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<TargetPath, VolumeError> {
        TargetPath::parse(Path::new("/var/lib/kubelet"), text)
    }

    #[test]
    fn paths_of_the_kubelet() {
        let path = "/var/lib/kubelet/pods/uid-1/volumes/kubernetes.io~csi/v/mount";
        let target = parse(path).expect("a target");
        assert_eq!(target.pod_uid(), Some("uid-1"));
        assert_eq!(target.full(), Path::new(path));
        assert!(target.is_kubelet_volume());
        assert!(
            !parse("/var/lib/kubelet/pods/u/volumes/mount").expect("a target").is_kubelet_volume()
        );
        let path = "/var/lib/kubelet/pods/1b2c/volumes/kubernetes.io~csi/volumes/mount";
        assert_eq!(pod_of_volume(Path::new(path)), Some("1b2c"));
        for path in ["pods/u/volumes/kubernetes.io~csi/v", "pods/u/volume-subpaths/v/c/0", "/mnt/x"]
        {
            assert_eq!(pod_of_volume(Path::new(path)), None, "{path}");
        }
        assert_eq!(parse("/var/lib/kubelet/x").expect("a target").pod_uid(), None);
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "pods/uid/mount",
            "/var/lib/kubelet",
            "/var/lib/kubelet/",
            "/var/lib/kubelet2/mount",
            "/var/lib/kubelet/../mount",
            "/var/lib/kubelet/pods/../../etc",
            "/var/lib/kubelet/./mount",
            "/etc",
        ] {
            assert!(matches!(parse(text), Err(VolumeError::Invalid(_))), "{text}");
        }
    }
}
