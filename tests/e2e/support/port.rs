//! Ports of the loopback that stay reserved for a test.

use std::{
    net::{Shutdown, SocketAddr, TcpStream},
    os::fd::OwnedFd,
};

use tokio::net::TcpSocket;

/// A port that is bound and that nothing listens on, until the test starts a server there.
///
/// While this value lives, connections to the port are refused: the kernel gives it to no socket that asks for any
/// port, and uses it for no connection's own end. A port that is found by binding and is then released has none of
/// this. Servers can listen on it nevertheless, since they set `SO_REUSEADDR`.
pub struct Port {
    address: SocketAddr,
    _held: TcpSocket,
}

impl Port {
    #[track_caller]
    pub fn new() -> Self {
        let held = TcpSocket::new_v4().expect("a socket");
        // Lets a server listen on the same port. Linux lets no other socket share it before a server listens.
        held.set_reuseaddr(true).expect("an option of a socket");
        held.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a port");
        let address = held.local_addr().expect("its address");
        Self { address, _held: held }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Ends a listening socket, also where a process that another thread has just forked still holds a copy of it.
#[track_caller]
pub fn stop_listening(listener: impl Into<OwnedFd>) {
    // The standard library shuts down streams only; to the system call a socket is a socket.
    TcpStream::from(listener.into()).shutdown(Shutdown::Both).expect("a listening socket");
}
