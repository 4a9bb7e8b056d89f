//! The connection to the coordinator ([`connect`]), and what goes over it beside the session: [`blocks`], folders to [`fetch`]
//! unless they are in the [`hub_cache`], and states to [`upload`].

pub mod blocks;
pub mod connect;
pub mod fetch;
pub mod hub_cache;
mod tally;
pub mod temporary;
pub mod upload;
