//! Probing: tries out who reaches whom, and keeps those out of generations who would break every exchange.
//!
//! In: who came, what probes found, and which exchanges broke. Out: probes of newcomers as they join and of pairs whose exchange
//! broke; members that do not fit are sent away, newcomers that do not fit wait and are tried again, with growing pauses, until
//! they fit or it is clear that their own address is at fault. Which group goes on is
//! [`crate::cluster::parts::reachability`]'s to say.
//!
//! `probes` says who is asked, `broken_exchanges` what becomes of an exchange that broke, `decisions` who takes part, and
//! `notices` what the user is told.

mod broken_exchanges;
mod decisions;
mod notices;
mod probes;
