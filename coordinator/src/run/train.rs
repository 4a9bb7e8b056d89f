//! A run from the beginning of training to the outcome: the driver, and the workers inside this process.
//!
//! Everything was checked before; what fails here fails because of machines, not because of the job.

use std::sync::Arc;
use std::time::Duration;

use common::data::origins;
use common::data::template::ChatTemplate;
use common::data::tokenize::Tokenizer;
use common::failpoint;
use common::job::JobSpec;
use common::model::frozen_bytes;
use tokio::sync::mpsc;
#[cfg(feature = "single-node")]
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cluster::run_event::RunEvent;
use crate::cluster::{BlockTokens, Cluster, Event, Outcome, PreviousTerms, RunSchedule, Settings};
use crate::driver::control_loop::{Driver, Input, WelcomeTemplate};
use crate::driver::transfers::Transfers;
use crate::prepare::Prepared;
use crate::report::recorder::Recorder;
use crate::rpc::server::Server;
use crate::rpc::service::Service;
#[cfg(feature = "single-node")]
use crate::run::local_workers::LocalWorkers;
use crate::run::resume::{Start, best_is_gone, best_on_disk};
use crate::run::signals::Signals;
use crate::store::checkpoints::{Saved, Store};
use crate::store::journal::{Journal, Term};

/// Most inputs that may wait for the driver.
const INPUTS: usize = 1024;
/// How long the workers of this process may take to leave.
#[cfg(feature = "single-node")]
const LOCAL_WORKERS_END_TIMEOUT: Duration = Duration::from_secs(5);
/// How long workers may take to come before the user is told how to start some.
const JOIN_HINT_DELAY: Duration = Duration::from_secs(5);
/// Most dataset rows that a failure names.
const MAX_NAMED_ROWS: usize = 20;

/// A prepared run that can begin.
pub struct Training {
    pub prepared: Prepared,
    pub start: Start,
    /// The term that begins; its record is in the journal.
    pub term: Term,
    /// What the journal says of the terms before this one.
    pub earlier: PreviousTerms,
    pub journal: Journal,
    /// The server, which has told workers to wait until now.
    pub server: Server,
    pub signals: Signals,
    #[cfg(feature = "single-node")]
    pub local: Option<LocalWorkers>,
    pub recorder: Recorder,
    pub observer: mpsc::Sender<RunEvent>,
    /// Is told of each checkpoint that is on disk.
    pub saved: Saved,
    /// What the user is told where no worker comes, if anything.
    pub how_to_join: Option<String>,
}

/// A run that has ended, before its connections and local workers are waited for.
pub struct Ended {
    pub outcome: Outcome,
    server: Server,
    signals: Signals,
    data: Data,
    #[cfg(feature = "single-node")]
    local: Option<(CancellationToken, JoinHandle<()>)>,
}

/// A run that has ended and has let its workers go.
pub struct Parted {
    pub outcome: Outcome,
    /// The exit code of the signal that stopped it, if one did.
    pub stopped_by: Option<u8>,
}

impl Training {
    /// Serves, trains and stores until the run ends. Nothing is waited for after that.
    pub async fn run(self) -> std::io::Result<Ended> {
        let (inputs, arrivals) = mpsc::channel(INPUTS);
        self.signals.begin(inputs.clone(), self.recorder.clone());
        let greeting = greeting(&self.prepared, &self.term)?;
        let best = self.recorder.best();
        let best_saved = best_on_disk(&self.prepared, &self.start, best.as_ref());
        if let Some(notice) = best_is_gone(&self.start, best.as_ref(), best_saved) {
            let _ = self.observer.send(RunEvent::Notice(notice)).await;
        }
        let settings = Settings {
            best_saved,
            best,
            run: self.term.run,
            earlier: self.earlier,
            last_evaluated: self.recorder.last_evaluated(),
            ..settings(&self.prepared, &self.start)
        };
        let cluster = cluster(&self.prepared, settings);
        tokio::spawn(stop_where_removed(self.recorder.removed(), inputs.clone()));
        if let Some(hint) = self.how_to_join {
            let recorder = self.recorder.clone();
            tokio::spawn(tell_if_nobody_joins(
                hint,
                recorder,
                self.observer.downgrade(),
            ));
        }
        let store = Arc::new(store(&self.prepared, self.recorder, self.saved));
        let shelf = Arc::new(Transfers::new(self.prepared.data.file));
        shelf.offer(&greeting.model_dir, &greeting.model_files);
        if let Some(folder) = &self.start.state.folder {
            shelf.offer(folder, &self.start.state.files);
        }
        let token = self.server.token().map(str::to_owned);
        let service = Service::new(inputs.clone(), shelf.clone(), token.clone());
        self.server.open(service);
        let driver = Driver::new(
            cluster,
            greeting,
            self.start.state,
            store,
            shelf.clone(),
            self.observer,
            inputs.clone(),
        )
        .with_journal(self.journal);
        #[cfg(feature = "single-node")]
        let local = self.local.map(|local| {
            let shutdown = CancellationToken::new();
            let workers = local.join(self.server.address(), token.as_deref(), &shutdown);
            let watching = tokio::spawn(watch_workers(workers, inputs.clone()));
            (shutdown, watching)
        });
        Ok(Ended {
            outcome: driver.drive(arrivals).await,
            server: self.server,
            signals: self.signals,
            data: Data {
                job: self.prepared.job,
                tokenizer: self.prepared.tokenizer,
                template: self.prepared.template,
                blocks: shelf,
            },
            #[cfg(feature = "single-node")]
            local,
        })
    }
}

impl Ended {
    /// Lets the workers go, and names the rows at fault where there are any. The end must be on record by now, because a
    /// second signal ends the process here.
    pub async fn part(self) -> std::io::Result<Parted> {
        failpoint::reached("farewell");
        #[cfg(feature = "single-node")]
        if let Some((shutdown, watching)) = self.local {
            // Those that wait for the next coordinator would wait in vain.
            shutdown.cancel();
            let _ = tokio::time::timeout(LOCAL_WORKERS_END_TIMEOUT, watching).await;
        }
        if !self.server.close("the run is over").await {
            tracing::debug!("ended without waiting for the last connections");
        }
        // From here on nobody is left to ask for an end.
        self.signals
            .finish(matches!(self.outcome, Outcome::Finished { .. }));
        let data = self.data;
        let outcome = match self.outcome {
            Outcome::Failed { reason, blocks } if !blocks.is_empty() => {
                let named = tokio::task::spawn_blocking(move || data.name_rows(reason, &blocks));
                named.await.map_err(std::io::Error::other)?
            }
            outcome => outcome,
        };
        Ok(Parted {
            outcome,
            stopped_by: self.signals.first().map(|signal| signal.code),
        })
    }
}

/// What it takes to find the dataset rows of a block.
struct Data {
    job: Arc<JobSpec>,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    blocks: Arc<Transfers>,
}

impl Data {
    /// Adds to the reason of a failure which rows of the datasets are in the blocks at fault.
    fn name_rows(&self, reason: String, blocks: &[u64]) -> Outcome {
        let file = &self.blocks.blocks;
        let template = self.template.as_ref();
        let rows = match origins(&self.job, &self.tokenizer, template, file, blocks) {
            Ok(rows) if rows.is_empty() => "its rows cannot be found again".to_owned(),
            Ok(rows) => {
                let named = rows.iter().take(MAX_NAMED_ROWS);
                let named = named.map(ToString::to_string);
                let named = named.collect::<Vec<_>>().join(", ");
                let more = match rows.len().saturating_sub(MAX_NAMED_ROWS) {
                    0 => String::new(),
                    more => format!(" and {more} more"),
                };
                format!("the rows are {named}{more}")
            }
            Err(errors) => format!("its rows cannot be read again: {errors}"),
        };
        Outcome::Failed {
            reason: format!("{reason}; {rows}"),
            blocks: blocks.to_vec(),
        }
    }
}

fn greeting(prepared: &Prepared, term: &Term) -> std::io::Result<WelcomeTemplate> {
    Ok(WelcomeTemplate {
        term: term.term,
        run: term.run.clone(),
        job: serde_json::to_vec(&*prepared.job)?,
        job_digest: prepared.job_digest.clone(),
        model_dir: std::path::absolute(prepared.model.dir())?,
        model_files: prepared.model.computed_with(&prepared.model_files),
        total_steps: prepared.total_steps(),
    })
}

fn settings(prepared: &Prepared, start: &Start) -> Settings {
    let job = &prepared.job;
    Settings {
        version: crate::VERSION.to_owned(),
        job_digest: prepared.job_digest.clone(),
        run: String::new(),
        earlier: PreviousTerms::default(),
        start_step: start.state.step,
        start_weights_digest: start.state.weights_digest.clone(),
        start_numerics_class: start.numerics_class.clone(),
        last_evaluated: None,
        best: None,
        best_saved: None,
        min_workers: job.cluster.min_workers,
        max_workers: job.cluster.max_workers,
        max_skipped_steps: job.max_skipped_steps,
        frozen_bytes: frozen_bytes(job, &prepared.model_config),
        flop_per_token: prepared
            .estimate
            .flop_per_token
            .map(|flop| flop.in_context(prepared.data.counts.mean_context())),
    }
}

fn cluster(prepared: &Prepared, settings: Settings) -> Cluster {
    let file = &prepared.data.file;
    let tokens = |block| BlockTokens {
        used: file.used_tokens(block) as u32,
        trained: file.trained_tokens(block) as u32,
    };
    let blocks = (0..file.total_blocks()).map(tokens).collect();
    let course = RunSchedule::new(prepared.job.clone(), file.train_blocks(), blocks);
    Cluster::new(settings, course)
}

fn store(prepared: &Prepared, recorder: Recorder, saved: Saved) -> Store {
    let results = recorder.clone();
    Store {
        output_dir: prepared.job.output_dir.clone(),
        model: prepared.model.clone(),
        job_digest: prepared.job_digest.clone(),
        base_model_digest: prepared.model_digest.clone(),
        save_total_limit: prepared.job.save_total_limit,
        write_trainer_state: Box::new(move |folder, step| {
            recorder.write_trainer_state(folder, step)
        }),
        template: prepared
            .template
            .as_ref()
            .and_then(|template| template.brought().map(str::to_owned)),
        eos_token: prepared.job.eos_token.clone(),
        tokens: prepared.job.tokens.clone(),
        renamed_tokens: prepared.job.added_tokens_overrides.clone(),
        end_tokens: match prepared.job.eot_tokens.is_empty() && prepared.job.eos_token.is_none() {
            true => Vec::new(),
            false => prepared.tokenizer.eos_ids().to_vec(),
        },
        record_result: Box::new(move |step, digest| results.record_result(step, digest)),
        saved,
    }
}

/// Tells the user once, after a while, how to start workers where none has joined. Does not keep the observer from ending.
async fn tell_if_nobody_joins(
    hint: String,
    recorder: Recorder,
    observer: mpsc::WeakSender<RunEvent>,
) {
    tokio::time::sleep(JOIN_HINT_DELAY).await;
    if let Some(observer) = observer.upgrade().filter(|_| !recorder.somebody_joined()) {
        let _ = observer.send(RunEvent::Notice(hint)).await;
    }
}

/// Stops the run once its output folder is gone, as it would have nothing to go on from, should it die: it makes the folder
/// anew, with a checkpoint in it, and goes on with the next start.
async fn stop_where_removed(removed: CancellationToken, inputs: mpsc::Sender<Input>) {
    removed.cancelled().await;
    let event = Event::StopRequested {
        reason: "its output_dir was removed".to_owned(),
        resumable: true,
    };
    let _ = inputs.send(Input::Happened(event)).await;
}

/// Gives the run up when all workers of this process have ended and one of them failed: nobody else was promised.
#[cfg(feature = "single-node")]
async fn watch_workers(
    mut workers: tokio::task::JoinSet<Result<worker::Finished, worker::WorkerError>>,
    inputs: mpsc::Sender<Input>,
) {
    let mut reason = None;
    while let Some(ended) = workers.join_next().await {
        match ended {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => reason = Some(error.to_string()),
            Err(error) => reason = Some(error.to_string()),
        }
    }
    if let Some(reason) = reason {
        let event = Event::GaveUp { reason };
        let _ = inputs.send(Input::Happened(event)).await;
    }
}
