//! The memory limit of this process's container.

use std::path::Path;

/// Returns the memory limit of the container in bytes, if it has one.
pub fn container_limit() -> Option<u64> {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    limit_below(Path::new("/sys/fs/cgroup"), &own)
}

/// Returns the lowest limit of a control group and its ancestors. `own` is `/proc/self/cgroup`.
///
/// In a container the root of the mounted hierarchy usually is the container's own group, and the
/// path in `own` may not exist. Each level that can be read counts.
fn limit_below(root: &Path, own: &str) -> Option<u64> {
    let mut least = None;
    for line in own.lines().chain(["0::/", "0:memory:/"]) {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (root, file) = match controllers {
            "" => (root.to_owned(), "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                (root.join("memory"), "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let group = root.join(path.trim_start_matches('/'));
        for level in group.ancestors().take_while(|level| level.starts_with(&root)) {
            // Without a limit, version 2 has "max", and version 1 a number near the largest.
            let text = std::fs::read_to_string(level.join(file)).unwrap_or_default();
            let limit = text.trim().parse().ok().filter(|&limit: &u64| limit < 1 << 60);
            least = [least, limit].into_iter().flatten().min();
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_limit_on_the_way_to_the_root_counts() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            std::fs::write(path, text).expect("a file");
        };
        let limit = |own: &str| limit_below(folder.path(), own);
        assert_eq!(limit("0::/\n"), None);
        write("pod/container/memory.max", "max\n");
        write("pod/memory.max", "536870912\n");
        assert_eq!(limit("0::/pod/container\n"), Some(512 << 20));
        // The path is that of the node, in the hierarchy of the container.
        write("memory.max", "1073741824\n");
        assert_eq!(limit("0::/../../kubepods/gone\n"), Some(1 << 30));
    }

    #[test]
    fn the_first_version_of_control_groups_is_understood() {
        let folder = tempfile::tempdir().expect("a folder");
        let memory = folder.path().join("memory/pod");
        std::fs::create_dir_all(&memory).expect("a folder");
        let own = "5:cpu,cpuacct:/pod\n4:memory:/pod\n";
        std::fs::write(memory.join("memory.limit_in_bytes"), "9223372036854771712\n").expect("set");
        assert_eq!(limit_below(folder.path(), own), None);
        std::fs::write(memory.join("memory.limit_in_bytes"), "134217728\n").expect("set");
        assert_eq!(limit_below(folder.path(), own), Some(128 << 20));
    }
}
