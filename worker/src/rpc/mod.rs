//! The connection to the coordinator ([`connect`]), and what goes over it beside the session: [`blocks`], folders to [`fetch`]
//! unless they are in the [`hub_cache`], from other workers ([`peers`]) too, and states to [`upload`].

pub mod blocks;
pub mod connect;
pub mod fetch;
pub mod hub_cache;
pub mod peers;
mod tally;
pub mod temporary;
pub mod upload;
