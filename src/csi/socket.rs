//! Unix sockets that only root can open, and that replace stale ones in one step.

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

/// A listening socket; dropping it removes its name, if that is still this socket's.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    inode: (u64, u64),
}

impl Socket {
    /// Listens at `path` with mode 0600.
    ///
    /// The socket is made under a hidden name, closed to others, and renamed
    /// over whatever an earlier process left: there is no moment without a
    /// socket and none with an open one. The name goes through an open folder,
    /// since a socket's address is limited to 107 bytes.
    pub fn listen(path: &Path) -> io::Result<(Self, UnixListener)> {
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        std::fs::create_dir_all(folder)?;
        if path.symlink_metadata().is_ok_and(|found| !found.file_type().is_socket()) {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("{} exists and is not a socket: remove it", path.display()),
            ));
        }
        let opened = std::fs::File::open(folder)?;
        let short = PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()));
        let hidden = short.join(format!(".{}.sock", std::process::id()));
        let _ = std::fs::remove_file(&hidden);
        let listener = UnixListener::bind(&hidden)?;
        std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&hidden, short.join(name))?;
        let metadata = path.symlink_metadata()?;
        let inode = (metadata.dev(), metadata.ino());
        Ok((Self { path: path.to_owned(), inode }, listener))
    }

    /// Whether the name is still this socket's.
    #[must_use]
    pub fn is_in_place(&self) -> bool {
        self.path
            .symlink_metadata()
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.inode)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // A newer process may have put its own in place.
        if self.is_in_place() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_newer_one_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(format!("{}.sock", "x".repeat(60)));
        let (first, _) = Socket::listen(&path).expect("a socket");
        let (second, _) = Socket::listen(&path).expect("replaced");
        assert_eq!(path.metadata().expect("there").permissions().mode() & 0o777, 0o600);
        drop(first);
        assert!(second.is_in_place());
        drop(second);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn what_is_not_a_socket_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("csi.sock");
        std::fs::write(&path, "precious").expect("written");
        Socket::listen(&path).expect_err("not replaced");
        assert!(path.exists());
    }
}
