//! Write leases on files, as a hostile pod holds them.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Holds write leases on files. Releases each at once when another process opens the file, and takes it again.
pub struct HostileLeases {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl HostileLeases {
    pub fn on(paths: &[PathBuf]) -> Self {
        ignore_signals();
        let open = |path: &PathBuf| File::open(path).expect("a file");
        let files: Vec<_> = paths.iter().map(open).collect();
        for file in &files {
            assert!(set_lease(file, libc::F_WRLCK), "no lease");
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for file in &files {
                    set_lease(file, libc::F_UNLCK);
                    set_lease(file, libc::F_WRLCK);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for HostileLeases {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Ignores SIGIO, which tells the holder of a lease that another process opens the file.
fn ignore_signals() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    #[allow(unsafe_code, reason = "the signal is ignored, nothing is run")]
    // SAFETY: ignoring a signal runs no code.
    unsafe { signal(Signal::SIGIO, SigHandler::SigIgn) }.expect("SIGIO");
}

fn set_lease(file: &File, kind: i32) -> bool {
    #[allow(unsafe_code, reason = "nix has no wrapper")]
    // SAFETY: the descriptor is open and the other arguments are numbers.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) };
    done == 0
}
