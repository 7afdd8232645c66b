//! Proxies for HTTP and SOCKS, as in company networks: they forward requests, make tunnels, and record their hosts.

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

/// Larger than any request head here.
const MAXIMUM_HEAD: usize = 64 << 10;

/// Serves one client, with the real addresses of names, and the requests so far.
type Serve = fn(TcpStream, &BTreeMap<String, SocketAddr>, &Mutex<Vec<String>>) -> io::Result<()>;

/// A proxy on the loopback until it is dropped.
pub struct ForwardProxy {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    ended: Arc<AtomicBool>,
}

impl ForwardProxy {
    /// Starts a proxy with the real addresses of these names, written with a port. Other names are refused.
    pub fn start<const N: usize>(names: [(&str, SocketAddr); N]) -> Self {
        Self::start_serving(names, serve)
    }

    /// Starts a SOCKS 5 proxy, which makes tunnels for everything.
    pub fn start_socks<const N: usize>(names: [(&str, SocketAddr); N]) -> Self {
        Self::start_serving(names, serve_socks)
    }

    fn start_serving<const N: usize>(names: [(&str, SocketAddr); N], serve: Serve) -> Self {
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
                // A client may hang up at any time.
                thread::spawn(move || serve(client, &names, &asked).ok());
            }
        });
        Self { address, asked, ended }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns its URL as a SOCKS 5 proxy.
    pub fn socks_url(&self) -> String {
        format!("socks5://{}", self.address)
    }

    /// Returns method and `host:port` of every request so far.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().expect("the requests").clone()
    }
}

impl Drop for ForwardProxy {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        // Wakes the listener, which then ends.
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
        // One request for each connection: the next one may be for another host.
        let head = format!("{method} /{path} HTTP/1.1\r\nConnection: close\r\n{rest}");
        upstream.write_all(head.as_bytes())?;
    }
    pass_on(client, upstream)
}

/// Serves SOCKS 5 (RFC 1928) without authentication, for names alone.
fn serve_socks(
    mut client: TcpStream,
    names: &BTreeMap<String, SocketAddr>,
    asked: &Mutex<Vec<String>>,
) -> io::Result<()> {
    let mut read = |length: usize| {
        let mut bytes = vec![0; length];
        client.read_exact(&mut bytes).map(|()| bytes)
    };
    let methods = read(2)?[1];
    read(methods.into())?;
    client.write_all(&[5, 0])?;
    let mut read = |length: usize| {
        let mut bytes = vec![0; length];
        client.read_exact(&mut bytes).map(|()| bytes)
    };
    let kind = read(4)?[3];
    let host = if kind == 3 {
        let length = read(1)?[0];
        String::from_utf8_lossy(&read(length.into())?).into_owned()
    } else {
        "an address".to_owned()
    };
    let port = if kind == 3 { read(2)? } else { vec![0, 0] };
    let host = format!("{host}:{}", u16::from_be_bytes([port[0], port[1]]));
    asked.lock().expect("the requests").push(format!("SOCKS {host}"));
    let Some(upstream) = names.get(&host) else {
        return client.write_all(&[5, 4, 0, 1, 0, 0, 0, 0, 0, 0]);
    };
    let upstream = TcpStream::connect(upstream)?;
    client.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0])?;
    pass_on(client, upstream)
}

fn pass_on(mut client: TcpStream, mut upstream: TcpStream) -> io::Result<()> {
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
