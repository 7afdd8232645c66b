//! Unix sockets that only root can open, and that replace those of processes that have ended.

use std::fs::{DirBuilder, File, Permissions, TryLockError};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixSocket, UnixStream};

use sys::fault;

/// The length of the queue of connections that wait to be accepted.
const BACKLOG: u32 = 1024;

/// A listening socket. Dropping it removes its name, if the name is still this socket's.
#[derive(Debug)]
pub struct ListeningSocket {
    path: PathBuf,
    inode: (u64, u64),
}

impl ListeningSocket {
    /// Listens at `path` with mode 0600.
    ///
    /// Creates the socket under a hidden name, sets its mode before it accepts connections, and renames it over a
    /// leftover of an ended process. So there is no moment without a socket, and none with a socket that others can
    /// open. The name goes through an open directory, since the address of a socket is limited to 107 bytes.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::AddrInUse`] while another process listens there, or is about to.
    pub async fn listen(path: &Path) -> io::Result<(Self, UnixListener)> {
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
        if path.symlink_metadata().is_ok_and(|found| !found.file_type().is_socket()) {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("{} exists and is not a socket: remove it", path.display()),
            ));
        }
        let opened = File::open(folder)?;
        // Held until the name is taken: of two processes that start at once, only one finds it free.
        match opened.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(in_use("another process locks its folder"));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
        let short = PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()));
        let named = short.join(name);
        if is_served(&named).await? {
            return Err(in_use("another process listens there"));
        }
        let hidden = short.join(format!(".{}.sock", std::process::id()));
        let _ = std::fs::remove_file(&hidden);
        let socket = UnixSocket::new_stream()?;
        socket.bind(&hidden)?;
        fault::point("socket.bound")?;
        std::fs::set_permissions(&hidden, Permissions::from_mode(0o600))?;
        // Connections were refused until here.
        let listener = socket.listen(BACKLOG)?;
        std::fs::rename(&hidden, &named)?;
        let metadata = path.symlink_metadata()?;
        let inode = (metadata.dev(), metadata.ino());
        Ok((Self { path: path.to_owned(), inode }, listener))
    }

    /// Returns whether the name is still this socket's.
    pub fn is_in_place(&self) -> bool {
        self.path
            .symlink_metadata()
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.inode)
    }
}

impl Drop for ListeningSocket {
    fn drop(&mut self) {
        // A newer process may have put its own socket in place.
        if self.is_in_place() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Returns whether a process of any program listens on this socket.
async fn is_served(socket: &Path) -> io::Result<bool> {
    match UnixStream::connect(socket).await {
        Ok(_) => Ok(true),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(false),
            // A process that does not accept connections is alive as well.
            io::ErrorKind::WouldBlock => Ok(true),
            _ => Err(error),
        },
    }
}

fn in_use(reason: &str) -> io::Error {
    let text = format!("{reason}: end it, or choose another endpoint");
    io::Error::new(io::ErrorKind::AddrInUse, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        path.metadata().expect("there").permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_newer_one_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(format!("{}.sock", "x".repeat(60)));
        let (first, _) = ListeningSocket::listen(&path).await.expect("a socket");
        let (second, _listener) = ListeningSocket::listen(&path).await.expect("replaced");
        assert_eq!(mode(&path), 0o600);
        drop(first);
        assert!(second.is_in_place());
        UnixStream::connect(&path).await.expect("the renamed socket accepts connections");
        drop(second);
        assert!(!path.exists());
        assert_eq!(folder.path().read_dir().expect("a folder").count(), 0);
    }

    #[tokio::test]
    async fn the_socket_of_a_living_process_is_not_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("admin.sock");
        let (first, listener) = ListeningSocket::listen(&path).await.expect("a socket");
        let refused = ListeningSocket::listen(&path).await.expect_err("in use");
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse, "{refused}");
        assert!(first.is_in_place());
        drop(listener);
        ListeningSocket::listen(&path).await.expect("replaced once nothing listens");
    }

    #[tokio::test]
    async fn a_process_that_accepts_nothing_is_alive() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("stuck.sock");
        let socket = UnixSocket::new_stream().expect("a socket");
        socket.bind(&path).expect("a name");
        let _stuck = socket.listen(1).expect("listens");
        let mut waiting = Vec::new();
        let full = loop {
            match UnixStream::connect(&path).await {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        let refused = ListeningSocket::listen(&path).await.expect_err("in use");
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse, "{refused}");
    }

    #[tokio::test]
    async fn only_one_of_two_that_start_at_once_takes_the_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("admin.sock");
        let starting = File::open(folder.path()).expect("a folder");
        starting.try_lock().expect("the lock");
        let refused = ListeningSocket::listen(&path).await.expect_err("in use");
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse, "{refused}");
        drop(starting);
        ListeningSocket::listen(&path).await.expect("free again");
    }

    #[tokio::test]
    async fn what_is_not_a_socket_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("csi.sock");
        std::fs::write(&path, "precious").expect("written");
        ListeningSocket::listen(&path).await.expect_err("not replaced");
        assert!(path.exists());
    }
}
