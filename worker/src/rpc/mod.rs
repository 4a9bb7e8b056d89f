//! The connection to the coordinator ([`connect`]), and what goes over it beside the session: [`blocks`], folders to [`fetch`], and
//! states to [`upload`].

pub mod blocks;
pub mod connect;
pub mod fetch;
pub mod temporary;
pub mod upload;
