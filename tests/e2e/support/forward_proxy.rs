//! A proxy for HTTP as companies have them: forwards, makes tunnels, and remembers for whom.

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

/// Larger than any head of a request here.
const MAXIMUM_HEAD: usize = 64 << 10;

/// Listens on the loopback until it is dropped.
pub struct ForwardProxy {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    ended: Arc<AtomicBool>,
}

impl ForwardProxy {
    /// Knows where these names, written with a port, really are; others it refuses.
    pub fn start<const N: usize>(names: [(&str, SocketAddr); N]) -> Self {
        let names: Arc<BTreeMap<String, SocketAddr>> =
            Arc::new(names.into_iter().map(|(name, to)| (name.to_owned(), to)).collect());
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let (asked, ended) = (Arc::new(Mutex::default()), Arc::new(AtomicBool::new(false)));
        let (remember, end) = (Arc::clone(&asked), Arc::clone(&ended));
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if end.load(Ordering::SeqCst) {
                    break;
                }
                let (names, asked) = (Arc::clone(&names), Arc::clone(&remember));
                // Who hangs up in the middle has his reasons.
                thread::spawn(move || serve(client, &names, &asked).ok());
            }
        });
        Self { address, asked, ended }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Method and `host:port` of every request so far.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().expect("the requests").clone()
    }
}

impl Drop for ForwardProxy {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        // Wakes the listener, which then sees that it is over.
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(
    mut client: TcpStream,
    names: &BTreeMap<String, SocketAddr>,
    asked: &Mutex<Vec<String>>,
) -> io::Result<()> {
    let head = read_head(&mut client)?;
    let (first, rest) = head.split_once("\r\n").unwrap_or_default();
    let mut words = first.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let is_tunnel = method == "CONNECT";
    let (host, path) = if is_tunnel {
        (target.to_owned(), "")
    } else {
        let target = target.strip_prefix("http://").unwrap_or_default();
        let (host, path) = target.split_once('/').unwrap_or((target, ""));
        (if host.contains(':') { host.to_owned() } else { format!("{host}:80") }, path)
    };
    asked.lock().expect("the requests").push(format!("{method} {host}"));
    let Some(upstream) = names.get(&host) else {
        return client.write_all(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n");
    };
    let mut upstream = TcpStream::connect(upstream)?;
    if is_tunnel {
        client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")?;
    } else {
        // One request a connection: the next one may be for another host.
        let head = format!("{method} /{path} HTTP/1.1\r\nConnection: close\r\n{rest}");
        upstream.write_all(head.as_bytes())?;
    }
    let (mut from, mut to) = (client.try_clone()?, upstream.try_clone()?);
    let upwards = thread::spawn(move || {
        let _ = io::copy(&mut from, &mut to);
        to.shutdown(Shutdown::Write)
    });
    io::copy(&mut upstream, &mut client)?;
    client.shutdown(Shutdown::Both)?;
    let _ = upwards.join();
    Ok(())
}

fn read_head(client: &mut TcpStream) -> io::Result<String> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") && head.len() < MAXIMUM_HEAD {
        client.read_exact(&mut byte)?;
        head.extend(byte);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}
