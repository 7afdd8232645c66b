//! One process at a time: an flock on `<state>/lock`, which the kernel releases
//! however the process ends.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::error::{IoContext as _, StoreError};

/// The right to use a state directory; dropping it gives the right up.
#[derive(Debug)]
pub struct Lock {
    _file: Flock<File>,
}

impl Lock {
    /// Takes the lock without waiting.
    ///
    /// # Errors
    ///
    /// [`StoreError::Locked`] with what the holder wrote of itself.
    pub fn try_acquire(root: &Path) -> Result<Self, StoreError> {
        std::fs::create_dir_all(root).io_context("create", root)?;
        let path = root.join("lock");
        let mut made = OpenOptions::new();
        let made = made.write(true).create_new(true).open(&path);
        if let Err(error) = made
            && error.kind() != std::io::ErrorKind::AlreadyExists
        {
            return Err(StoreError::io("create", &path, error));
        }
        // Never through a link: what it leads to is not the driver's to write to. And not for writing:
        // an open writer would keep an administrator from remounting read-only.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&path);
        let file = file.io_context("open", &path)?;
        let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err((file, Errno::EWOULDBLOCK)) => {
                let mut holder = String::new();
                let _ = Read::take(&file, 500).read_to_string(&mut holder);
                let holder = holder.trim();
                let holder = if holder.is_empty() { "another process" } else { holder };
                return Err(StoreError::Locked { path: root.to_owned(), holder: holder.into() });
            }
            Err((_, error)) => return Err(StoreError::io("lock", &path, error.into())),
        };
        // Who holds it is for people; that it is held is the kernel's word.
        let note = format!("process {} ({})\n", std::process::id(), command_line());
        let mut note_file = OpenOptions::new();
        note_file.write(true).truncate(true).custom_flags(libc::O_NOFOLLOW);
        let note_file = note_file.open(&path);
        let _ = note_file.and_then(|mut file| file.write_all(note.as_bytes()));
        Ok(Self { _file: file })
    }
}

fn command_line() -> String {
    // The command's name only: arguments are not for a file.
    let mut arguments = std::env::args();
    let program = arguments.next().unwrap_or_default();
    let program = program.rsplit('/').next().unwrap_or_default().to_owned();
    arguments.next().map_or(program.clone(), |command| format!("{program} {command}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_process_gets_the_name_of_the_holder() {
        let folder = tempfile::tempdir().expect("a folder");
        let first = Lock::try_acquire(folder.path()).expect("the lock");
        let refused = Lock::try_acquire(folder.path()).expect_err("held");
        assert!(refused.to_string().contains(&format!("process {}", std::process::id())));
        drop(first);
        Lock::try_acquire(folder.path()).expect("free again");
    }

    #[test]
    fn a_link_in_place_of_the_lock_is_not_followed() {
        let folder = tempfile::tempdir().expect("a folder");
        let precious = folder.path().join("precious");
        std::fs::write(&precious, "data").expect("a file");
        std::os::unix::fs::symlink(&precious, folder.path().join("lock")).expect("a link");
        let refused = Lock::try_acquire(folder.path()).expect_err("a link").to_string();
        assert!(refused.contains("lock"), "{refused}");
        assert_eq!(std::fs::read_to_string(precious).expect("kept"), "data");
    }
}
