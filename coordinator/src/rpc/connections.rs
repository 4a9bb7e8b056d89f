//! Incoming connections, at most so many at a time; further ones wait in the system's queue, as all do while the process has no
//! file descriptor left.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tonic::transport::server::{Connected, TcpConnectInfo};

/// A TCP connection that makes room for the next when it is dropped.
pub struct Connection {
    stream: TcpStream,
    _room: OwnedSemaphorePermit,
}

/// Pause between two attempts to accept a connection where that fails: without a free file descriptor it fails at once, each
/// time.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Time between two warnings that no connection can be accepted.
const ACCEPT_LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Accepts connections as long as fewer than `limit` are open. What fails is tried again, and said.
pub fn accept(
    listener: TcpListener,
    limit: usize,
) -> impl Stream<Item = io::Result<Connection>> + Send {
    let rooms = Arc::new(Semaphore::new(limit));
    let state = (listener, rooms, None);
    futures::stream::unfold(state, |(listener, rooms, mut told)| async move {
        let _room = rooms.clone().acquire_owned().await.ok()?;
        let (stream, _) = until_accepted(|| listener.accept(), &mut told).await;
        // Where that fails, the connection is only slower.
        let _ = stream.set_nodelay(true);
        let connection = Connection { stream, _room };
        Some((Ok(connection), (listener, rooms, told)))
    })
}

/// The next connection, however many attempts it takes. `told`: when the user was last warned that they fail.
async fn until_accepted<T, F: Future<Output = io::Result<T>>>(
    mut attempt: impl FnMut() -> F,
    told: &mut Option<Instant>,
) -> T {
    loop {
        match attempt().await {
            Ok(accepted) => return accepted,
            // Whoever called is gone already. The next call may be a good one.
            Err(error) if is_of_the_caller(&error) => {}
            Err(error) => {
                if told.is_none_or(|told| told.elapsed() >= ACCEPT_LOG_INTERVAL) {
                    *told = Some(Instant::now());
                    tracing::warn!(
                        "no connection can be accepted ({error}): trying on; where too many files are open, raise the limit \
                         (`ulimit -n`) or close connections"
                    );
                }
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

fn is_of_the_caller(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn without_a_file_descriptor_it_is_tried_again_after_a_pause() {
        let mut answers: VecDeque<io::Result<u8>> = VecDeque::new();
        // EMFILE.
        answers.extend((0..20).map(|_| Err(io::Error::from_raw_os_error(24))));
        answers.push_back(Err(io::ErrorKind::ConnectionAborted.into()));
        answers.push_back(Ok(7));
        let (began, mut told) = (Instant::now(), None);
        let accepted = until_accepted(
            || std::future::ready(answers.pop_front().unwrap()),
            &mut told,
        )
        .await;
        assert_eq!(accepted, 7);
        assert_eq!(
            began.elapsed(),
            20 * ACCEPT_RETRY,
            "a caller that is gone costs no pause"
        );
        assert_eq!(told, Some(began), "it is said once");
    }
}
