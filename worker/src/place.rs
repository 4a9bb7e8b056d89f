//! Where this worker's peers reach its exchange.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::JoinOptions;
use crate::collective::{Collective, CollectiveError};

/// Where to listen, and what to tell others.
pub struct ExchangePlace {
    hosts: Vec<IpAddr>,
    /// Empty: the address that the coordinator sees.
    pub announced: String,
}

impl ExchangePlace {
    /// The loopback where the coordinator is on it, so that nothing is open to a network that needs it not; else all
    /// addresses.
    pub async fn choose(options: &JoinOptions) -> Self {
        let everywhere = vec![Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()];
        let Some(host) = &options.exchange_host else {
            let resolved = tokio::net::lookup_host(&options.address).await;
            let resolved: Vec<_> = resolved.into_iter().flatten().collect();
            let here = |address: &SocketAddr| address.ip().is_loopback();
            if !resolved.is_empty() && resolved.iter().all(here) {
                let host = Ipv4Addr::LOCALHOST;
                return Self {
                    hosts: vec![host.into()],
                    announced: host.to_string(),
                };
            }
            return Self {
                hosts: everywhere,
                announced: String::new(),
            };
        };
        Self {
            hosts: everywhere,
            announced: host.clone(),
        }
    }

    /// Listens on the first of the hosts that this machine has.
    pub fn bind(&self) -> Result<Collective, CollectiveError> {
        let mut bound = Collective::bind(self.hosts[0]);
        for host in &self.hosts[1..] {
            bound = bound.or_else(|_| Collective::bind(*host));
        }
        bound
    }
}
