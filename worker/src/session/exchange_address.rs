//! Where this worker's peers reach its exchange.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::JoinOptions;
use crate::collective::{Collective, CollectiveError};
use crate::net::resolve::resolve_async;
use crate::rpc::connect::ATTEMPT_TIMEOUT;

/// Where this worker's exchange listens, and the host that its peers are told.
pub struct ExchangeEndpoint {
    hosts: Vec<IpAddr>,
    /// Port to listen on; 0 for any that is free.
    port: u16,
    /// Host that peers are told; empty for the address that the coordinator sees.
    pub announced: String,
}

impl ExchangeEndpoint {
    /// Chooses where to listen: all addresses where the user names a host for peers; else the loopback where the coordinator is
    /// on it, so that nothing is open to a network that needs it not; else all addresses.
    pub async fn choose(options: &JoinOptions) -> Self {
        let everywhere = vec![Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()];
        let place = |hosts, announced| Self {
            hosts,
            port: options.exchange_port.unwrap_or(0),
            announced,
        };
        if let Some(host) = &options.exchange_host {
            return place(everywhere, host.clone());
        }
        let resolved = resolve_async(options.address.clone(), ATTEMPT_TIMEOUT).await;
        let resolved = resolved.unwrap_or_default();
        let here = |address: &SocketAddr| address.ip().is_loopback();
        if !resolved.is_empty() && resolved.iter().all(here) {
            let host = Ipv4Addr::LOCALHOST;
            return place(vec![host.into()], host.to_string());
        }
        place(everywhere, String::new())
    }

    /// Listens on the first of the hosts that this machine has.
    pub fn bind(&self) -> Result<Collective, CollectiveError> {
        let mut bound = Collective::bind_at(self.hosts[0], self.port);
        for host in &self.hosts[1..] {
            // A port that another has would be shared with it by kind of address, to nobody's use.
            if matches!(bound, Err(CollectiveError::PortInUse { .. })) {
                break;
            }
            bound = bound.or_else(|_| Collective::bind_at(*host, self.port));
        }
        bound
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn two_workers_of_a_machine_cannot_have_one_port() {
        let mut options = JoinOptions::new("127.0.0.1:7077");
        let any = ExchangeEndpoint::choose(&options).await.bind().unwrap();
        options.exchange_port = Some(any.port());
        let error = ExchangeEndpoint::choose(&options)
            .await
            .bind()
            .err()
            .unwrap();
        let said = error.to_string();
        assert!(said.contains(&format!("port {}", any.port())), "{said}");
        assert!(said.contains("--exchange-port"), "{said}");
        drop(any);
        // Once the first has gone, the port is to be had.
        let again = loop {
            match ExchangeEndpoint::choose(&options).await.bind() {
                Ok(bound) => break bound,
                Err(_) => tokio::task::yield_now().await,
            }
        };
        assert_eq!(Some(again.port()), options.exchange_port);
    }
}
