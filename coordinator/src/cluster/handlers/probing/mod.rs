//! Probing: tries out who reaches whom, and keeps those out of generations who would break every exchange.
//!
//! In: who came, what probes found, and which exchanges broke. Out: probes of newcomers as they join and of pairs whose exchange
//! broke; members that do not fit are sent away, newcomers that do not fit wait and are tried again, with growing pauses, until
//! they fit or it is clear that their own address is at fault. Which group goes on is [`crate::cluster::parts::reachability`]'s to say.
//!
//! Here is the state; what is done with it is in `probes` (who is asked), `broken` (exchanges that broke), `decisions` (who takes
//! part) and `words`.

mod broken_exchanges;
mod decisions;
mod notices;
mod probes;
