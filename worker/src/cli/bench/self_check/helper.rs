//! Another process of this program. In: its options. Out: the lines that it prints, or why none came in time. It ends with
//! whoever started it, at the latest.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use worker::{ComputeDevice, Device};

/// How long a killed process may take to end. One that hangs in the driver may not even end then.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);
const EXIT_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Another process of this program, which computes rows of the table.
pub struct Helper {
    child: Child,
    lines: Receiver<String>,
}

impl Helper {
    /// Starts `self-check` with these options. What goes wrong there is printed where this one's errors are.
    pub fn start(options: &[&str]) -> std::io::Result<Self> {
        let program = this_program()?;
        let mut command = Command::new(&program);
        command
            .arg("self-check")
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        end_with_this_one(&mut command);
        let mut child = command.spawn().map_err(|error| {
            let reason = format!("cannot start {}: {error}", program.display());
            std::io::Error::new(error.kind(), reason)
        })?;
        let stdout = child.stdout.take();
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            let lines = stdout
                .into_iter()
                .flat_map(|stdout| BufReader::new(stdout).lines());
            for line in lines.map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, lines })
    }

    /// The process's next line, or what became of the process.
    pub fn answer(&mut self, timeout: Duration) -> Result<String, String> {
        match self.lines.recv_timeout(timeout) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => Err(format!(
                "did not answer within {:.0} s",
                timeout.as_secs_f64()
            )),
            Err(RecvTimeoutError::Disconnected) => Err(match self.wait() {
                Some(status) => format!("ended before it answered: {status}"),
                None => "closed its output before it answered".to_owned(),
            }),
        }
    }

    /// Waits for a process that ends.
    fn wait(&mut self) -> Option<std::process::ExitStatus> {
        let deadline = Instant::now() + EXIT_TIMEOUT;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => std::thread::sleep(EXIT_POLL_INTERVAL),
                _ => return None,
            }
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        self.wait();
    }
}

/// The program file as it was when this process began, though another may have been put in its place since.
#[cfg(target_os = "linux")]
fn this_program() -> std::io::Result<PathBuf> {
    Ok("/proc/self/exe".into())
}

#[cfg(not(target_os = "linux"))]
fn this_program() -> std::io::Result<PathBuf> {
    std::env::current_exe()
}

/// Has the process end with this one: one that hangs would hold the device when whoever waited for it is no more.
#[cfg(target_os = "linux")]
fn end_with_this_one(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: between fork and exec it makes one call, which takes no lock and no memory.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
}

#[cfg(not(target_os = "linux"))]
fn end_with_this_one(_: &mut Command) {}

/// The device as it is asked for on the command line.
pub fn asked(device: &ComputeDevice) -> Device {
    match device {
        ComputeDevice::Cpu => Device::Cpu,
        #[cfg(feature = "cuda")]
        ComputeDevice::Cuda { ordinal, .. } => Device::Cuda(*ordinal),
    }
}
