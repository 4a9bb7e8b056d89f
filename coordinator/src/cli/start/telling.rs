//! What the user is told before a run begins and after it has ended. Plain facts enter, lines leave; nothing is decided here.

use common::job::{JobSpec, Method};

use crate::cli::arguments::StartArguments;
use crate::cli::replay::{job_args, resume_args};
use crate::cluster::run_event::RunEvent;
use crate::prepare::Prepared;
use crate::report::terminal::{NextView, PlanView, Programs, Terminal, quoted};
use crate::rpc::addresses::join_command;
use crate::rpc::server::Server;
use crate::run::resume::{Past, Start};

pub(super) fn show(terminal: &mut Terminal, prepared: &Prepared, start: &Start, past: &Past) {
    terminal.show_plan(&PlanView::of(prepared));
    if let Some(sample) = prepared.data.samples.first() {
        terminal.show_sample(sample);
    }
    for notice in start.notices.iter().chain(&past.notices) {
        terminal.say(notice);
    }
}

/// Where workers can join, and where the run goes on from.
pub(super) fn announce(
    terminal: &mut Terminal,
    arguments: &StartArguments,
    server: &Server,
    start: &Start,
) {
    if let Some(path) = start.state.folder.clone().filter(|_| start.state.step > 0) {
        let step = start.state.step;
        terminal.observe(&RunEvent::Resumed { step, path });
    }
    if !arguments.single_node || arguments.listen.is_some() {
        terminal.say(&format!(
            "workers join with: {}",
            join_command(server.address(), server.token().is_some())
        ));
    }
    if !server.address().ip().is_loopback() && server.token().is_none() {
        terminal.say("anyone who reaches this port can join and read the data; use --token-file to prevent that");
    }
}

pub(super) fn show_next(terminal: &mut Terminal, arguments: &StartArguments, job: &JobSpec) {
    terminal.show_next(&NextView {
        output_dir: &job.output_dir,
        base_model: &job.base_model,
        is_adapter: matches!(job.method, Method::Lora(_)),
        is_four_bits: job.quantization.is_some(),
        job_args: &job_args(std::env::args_os()),
        has_token: arguments.token_file.is_some(),
        prompt: job.test_prompts.first().map(String::as_str),
        programs: Programs::find(),
    });
}

/// The command that goes on where this process stopped.
pub(super) fn resume_command(begins_anew: bool) -> String {
    let words = resume_args(std::env::args_os(), begins_anew);
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    words.join(" ")
}
