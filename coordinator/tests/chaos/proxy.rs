//! A network that can be cut: everything between one worker and the coordinator passes through here, until it does not.
//! Nothing is closed by a cut; bytes simply stay where they are, as behind a dead switch.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const PROXY_POLL_INTERVAL: Duration = Duration::from_millis(20);

pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    cut: AtomicBool,
    over: AtomicBool,
}

impl Proxy {
    /// Forwards to this port of the loopback.
    pub fn to(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
        let accepting = shared.clone();
        std::thread::spawn(move || {
            while let Ok((near, _)) = listener.accept() {
                if accepting.over.load(Ordering::SeqCst) {
                    return;
                }
                let shared = accepting.clone();
                std::thread::spawn(move || shared.connect(near, port));
            }
        });
        Self { address, shared }
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    pub fn set_cut(&self, cut: bool) {
        self.shared.cut.store(cut, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        // Wakes the accepting thread.
        let _ = TcpStream::connect_timeout(&self.address, PROXY_POLL_INTERVAL);
    }
}

impl Shared {
    /// One connection, both ways, until both ends have closed it.
    fn connect(self: Arc<Self>, near: TcpStream, port: u16) {
        self.wait_while_cut();
        let Ok(far) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else {
            return;
        };
        for stream in [&near, &far] {
            let _ = stream.set_nodelay(true);
            let _ = stream.set_read_timeout(Some(PROXY_POLL_INTERVAL));
        }
        let (Ok(near_too), Ok(far_too)) = (near.try_clone(), far.try_clone()) else {
            return;
        };
        let back = self.clone();
        let returning = std::thread::spawn(move || back.pass(&far_too, &near_too));
        self.pass(&near, &far);
        let _ = returning.join();
    }

    fn pass(&self, mut from: &TcpStream, mut to: &TcpStream) {
        let mut buffer = vec![0; 64 << 10];
        while !self.over.load(Ordering::SeqCst) {
            let read = match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    continue;
                }
                Err(_) => break,
            };
            self.wait_while_cut();
            if to.write_all(&buffer[..read]).is_err() {
                break;
            }
        }
        // A close does not pass a cut either.
        self.wait_while_cut();
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
    }

    fn wait_while_cut(&self) {
        while self.cut.load(Ordering::SeqCst) && !self.over.load(Ordering::SeqCst) {
            std::thread::sleep(PROXY_POLL_INTERVAL);
        }
    }
}
