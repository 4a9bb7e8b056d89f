//! How workers reach the coordinator, and how they are cut off: through a proxy on the loopback, or over a cable of their
//! own, from a network namespace to a bridge.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::process::{JOIN, Process};
use super::proxy::Proxy;

const BRIDGE: &str = "muster0";
const NAMESPACE_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Network {
    /// A cut separates a worker from the coordinator only; its peers still reach it.
    Loopback,
    /// A cut separates it from everybody. Only in a process that [`isolated`] started.
    Namespaces,
}

/// What one worker is connected by.
pub enum Wire {
    Proxy(Proxy),
    /// The bridge's end of its cable.
    Cable(String),
}

impl Network {
    /// Where the coordinator listens.
    pub fn host(self) -> &'static str {
        match self {
            Self::Loopback => "127.0.0.1",
            Self::Namespaces => "10.77.0.1",
        }
    }

    /// Starts the `number`th worker. `finish` adds what is not the network's business and starts it.
    pub fn start_worker(
        self,
        number: usize,
        port: u16,
        finish: impl FnOnce(Command) -> Process,
    ) -> (Process, Wire) {
        let worker = std::env::current_exe().unwrap();
        let arguments = ["--exact", "worker_process", "--ignored", "--nocapture"];
        match self {
            Self::Loopback => {
                let proxy = Proxy::to(port);
                let mut command = Command::new(worker);
                command
                    .args(arguments)
                    .env(JOIN, format!("127.0.0.1:{}", proxy.port()));
                (finish(command), Wire::Proxy(proxy))
            }
            Self::Namespaces => {
                let address = format!("10.77.{}.{}/16", 1 + number / 250, 1 + number % 250);
                let script = format!(
                    "until ip link set eth0 up 2>/dev/null; do sleep 0.02; done
                    ip link set lo up; ip addr add {address} dev eth0; exec \"$@\""
                );
                let mut command = Command::new("unshare");
                command
                    .args(["-n", "sh", "-c", &script, "sh"])
                    .arg(worker)
                    .args(arguments);
                command.env(JOIN, format!("{}:{port}", self.host()));
                let process = finish(command);
                let cable = format!("muster-w{number}");
                plug(&process, &cable);
                (process, Wire::Cable(cable))
            }
        }
    }
}

impl Wire {
    pub fn set_cut(&self, cut: bool) {
        match self {
            Self::Proxy(proxy) => proxy.set_cut(cut),
            // Both ends stay up, so that nobody is told.
            Self::Cable(cable) => match cut {
                true => ip(&["link", "set", cable, "nomaster"]),
                false => ip(&["link", "set", cable, "master", BRIDGE]),
            },
        }
    }
}

/// Lays a cable into the namespace of a process, once it has one of its own.
fn plug(process: &Process, cable: &str) {
    let namespace = |id: &str| std::fs::read_link(format!("/proc/{id}/ns/net"));
    let id = process.id().to_string();
    let began = Instant::now();
    while namespace(&id).unwrap() == namespace("self").unwrap() {
        assert!(
            began.elapsed() < NAMESPACE_TIMEOUT,
            "no namespace of its own"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    ip(&[
        "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", &id,
    ]);
    ip(&["link", "set", cable, "master", BRIDGE, "up"]);
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "ip {arguments:?}: {output:?}");
}

/// A command that runs `program` in a network of its own, with a bridge and nothing else in it. None where the system
/// does not allow that.
pub fn isolated(program: &std::path::Path) -> Option<Command> {
    let setup = format!(
        "ip link set lo up && ip link add {BRIDGE} type bridge && ip addr add {}/16 dev {BRIDGE} && \
         ip link set {BRIDGE} up && unshare -n true && exec \"$@\"",
        Network::Namespaces.host()
    );
    let command = |program: &std::path::Path| {
        let mut command = Command::new("unshare");
        command
            .args(["-U", "-r", "-n", "sh", "-c", &setup, "sh"])
            .arg(program);
        command
    };
    let mut probe = command(std::path::Path::new("true"));
    let probe = probe.stdout(Stdio::null()).stderr(Stdio::null()).status();
    probe
        .is_ok_and(|status| status.success())
        .then(|| command(program))
}
