//! What workers see: the port ([`listener`]), the gRPC [`server`] with its [`connections`], what callers hear before there is a run
//! ([`reception`]), and the calls of a run ([`service`]; those for [`files`]).

pub mod addresses;
pub mod connections;
pub mod files;
pub mod listener;
pub mod reception;
pub mod server;
pub mod service;
