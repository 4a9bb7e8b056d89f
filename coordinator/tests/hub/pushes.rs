//! What is pushed while a run goes on (`hub_strategy`), and what a hub that fails costs the run: nothing.

use std::path::Path;

use common::files::checkpoint;
use serde_json::Value;

use super::*;

const REPO: &str = "models/me/result";
const RESULT: &str = "Upload the result of a run";

impl Fixture {
    /// A job of the local model that pushes by this strategy, with more lines.
    fn write_job(&self, strategy: &str, more: &str) {
        self.hub.require_token(TOKEN);
        let job = format!(
            "base_model: {}\nadapter: lora\nlora_r: 4\nsequence_len: 32\nwarmup_steps: 0\nlearning_rate: 0.01\n\
             global_batch_size: 2\nlogging_steps: 1\ndatasets: data.jsonl\nhub_model_id: me/result\nhub_strategy: {strategy}\n{more}",
            self.site.path("put-away").display()
        );
        std::fs::write(self.site.path("job.yaml"), job).unwrap();
    }

    fn start(&self, more: &[&str]) -> Run {
        let arguments = [&["start", "job.yaml", "--single-node"], more].concat();
        Run::of(self.command(&arguments).env("HF_TOKEN", TOKEN))
    }

    /// The summaries of the commits that were asked for since the last call.
    fn commits(&self) -> Vec<String> {
        let requests = self.hub.requests();
        let commits = requests
            .iter()
            .filter(|request| request.target.contains("/commit/"));
        let summary = |request: &stand_in::Request| {
            let body = String::from_utf8(request.body.clone()).unwrap();
            let header: Value = serde_json::from_str(body.lines().next().unwrap()).unwrap();
            header["value"]["summary"].as_str().unwrap().to_owned()
        };
        commits.map(summary).collect()
    }

    /// The files of a folder of the repository, in a folder here.
    fn fetched(&self, folder: &str, to: &str) -> PathBuf {
        let files = self.hub.files(REPO, "main").unwrap();
        let to = self.site.path(to);
        std::fs::create_dir_all(&to).unwrap();
        for (path, bytes) in &files {
            if let Some(name) = path.strip_prefix(&format!("{folder}/")) {
                std::fs::write(to.join(name), bytes).unwrap();
            }
        }
        to
    }
}

/// Steps of the commits that were made in training; an error where one of them follows a newer one.
fn steps(commits: &[String]) -> Vec<u64> {
    let of_step = |summary: &String| {
        let step = summary.strip_prefix("Training in progress, step ")?;
        step.parse().ok()
    };
    let steps: Vec<u64> = commits.iter().filter_map(of_step).collect();
    assert!(steps.is_sorted(), "{commits:?}");
    steps
}

fn checkpoints(folder: &Path) -> Vec<u64> {
    let found = checkpoint::list(folder).unwrap();
    found.into_iter().map(|(step, _)| step).collect()
}

#[test]
fn each_checkpoint_is_pushed_whole_and_training_goes_on_from_it() {
    let fixture = Fixture::new();
    fixture.write_job(
        "all_checkpoints",
        "max_steps: 12\nsave_steps: 4\noutput_dir: out\n",
    );
    // The first push fails, and is made up for.
    fixture.hub.play("/commit/", Fault::Status(403, Vec::new()));
    let run = fixture.start(&[]).end();
    assert!(run.status.success(), "{run:?}");
    assert!(
        run.stdout
            .contains("checkpoint-4 was not pushed to me/result")
            && run.stdout.contains("the run goes on"),
        "{run:?}"
    );
    let commits = fixture.commits();
    let saved = checkpoints(&fixture.site.path("out"));
    assert!(saved.starts_with(&[4, 8]), "{saved:?}");
    let pushed = steps(&commits);
    assert_eq!(pushed, [&[4], &saved[..]].concat(), "{commits:?}");
    assert_eq!(commits.last().unwrap(), RESULT);
    let files = fixture.hub.files(REPO, "main").unwrap();
    for step in &saved {
        assert!(
            run.stdout
                .contains(&format!("pushed checkpoint-{step} to me/result")),
            "{run:?}"
        );
        let folder = fixture.site.path(&format!("out/checkpoint-{step}"));
        for name in ["adapter_model.safetensors", "optimizer.safetensors"] {
            let pushed = &files[&format!("checkpoint-{step}/{name}")];
            assert_eq!(*pushed, std::fs::read(folder.join(name)).unwrap(), "{name}");
        }
        // Nobody has to know where the model was here.
        let config = &files[&format!("checkpoint-{step}/adapter_config.json")];
        let config = String::from_utf8(config.clone()).unwrap();
        assert!(config.contains("\"put-away\""), "{config}");
    }
    let result = std::fs::read(fixture.site.path("out/adapter_model.safetensors")).unwrap();
    assert_eq!(files["adapter_model.safetensors"], result);
    // Elsewhere the run goes on from it, to the same weights.
    let from = fixture.fetched("checkpoint-8", "elsewhere/checkpoint-8");
    let again = fixture
        .start(&[
            "--resume",
            from.to_str().unwrap(),
            "--output-dir",
            "again",
            "--push-to-hub",
            "false",
        ])
        .end();
    assert!(again.status.success(), "{again:?}");
    assert_eq!(fixture.site.digest("again"), fixture.site.digest("out"));
    assert_eq!(fixture.site.steps("again").len(), 4);
}

#[test]
fn the_newest_checkpoint_is_there_after_a_crash_and_no_older_state_follows_a_newer_one() {
    let fixture = Fixture::new();
    fixture.write_job(
        "checkpoint",
        "max_steps: 24\nsave_steps: 2\nsave_total_limit: 1\noutput_dir: out\n",
    );
    let arguments = ["start", "job.yaml", "--single-node"];
    let mut command = fixture.command(&arguments);
    let killed = Run::of(
        command
            .env("HF_TOKEN", TOKEN)
            .env("MUSTER_FAILPOINT", "commit:13=kill"),
    )
    .end();
    assert!(!killed.status.success(), "{killed:?}");
    let run = fixture.start(&[]).end();
    assert!(run.status.success(), "{run:?}");
    let commits = fixture.commits();
    let pushed = steps(&commits);
    assert_eq!(commits.last().unwrap(), RESULT);
    let newest = *checkpoints(&fixture.site.path("out")).last().unwrap();
    assert_eq!(pushed.last(), Some(&newest), "{commits:?}");
    let fetched = fixture.fetched("last-checkpoint", "last-checkpoint");
    let manifest = checkpoint::verify(&fetched).unwrap();
    assert_eq!(manifest.step, newest);
    let files = fixture.hub.files(REPO, "main").unwrap();
    assert!(!files.keys().any(|path| path.starts_with("checkpoint-")));
    assert!(!fixture.site.path("out/.muster/push").exists());
    // The result is made again from a checkpoint, which is older than the result that is on the hub.
    std::fs::remove_file(fixture.site.path("out/adapter_model.safetensors")).unwrap();
    let again = fixture.start(&[]).end();
    assert!(again.status.success(), "{again:?}");
    assert_eq!(steps(&fixture.commits()), [0; 0]);
}

#[test]
fn the_weights_of_checkpoints_stand_in_the_place_of_the_result() {
    let fixture = Fixture::new();
    fixture.write_job(
        "every_save",
        "max_steps: 40\nsave_steps: 1\nsave_total_limit: 2\noutput_dir: out\n",
    );
    let run = fixture.start(&[]).end();
    assert!(run.status.success(), "{run:?}");
    assert!(!run.stdout.contains("not pushed"), "{run:?}");
    let commits = fixture.commits();
    assert!(!steps(&commits).is_empty(), "{commits:?}");
    assert_eq!(commits.last().unwrap(), RESULT);
    let files = fixture.hub.files(REPO, "main").unwrap();
    assert!(files.keys().all(|path| !path.contains('/')), "{files:?}");
    let weights = std::fs::read(fixture.site.path("out/adapter_model.safetensors")).unwrap();
    assert_eq!(files["adapter_model.safetensors"], weights);
}

#[test]
fn a_hub_that_does_not_answer_holds_no_end_up_and_the_next_start_makes_up_for_it() {
    let fixture = Fixture::new();
    fixture.write_job(
        "checkpoint",
        "max_steps: 200\nsave_steps: 2\noutput_dir: out\n",
    );
    fixture.hub.play_always("/commit/", Fault::Stall);
    let mut run = fixture.start(&[]);
    run.until("saved out/checkpoint-2");
    run.process.signal("-TERM");
    let stopped = run.end();
    assert_eq!(stopped.status.code(), Some(75), "{stopped:?}");
    assert!(
        stopped
            .stdout
            .contains("is not pushed any more: the next start of the run does it"),
        "{stopped:?}"
    );
    let files = fixture.hub.files(REPO, "main").unwrap_or_default();
    assert!(!files.contains_key("adapter_model.safetensors"));
    fixture.hub.stop_playing();
    fixture.commits();
    let run = fixture.start(&[]).end();
    assert!(run.status.success(), "{run:?}");
    let commits = fixture.commits();
    assert!(!steps(&commits).is_empty(), "{commits:?}");
    assert_eq!(commits.last().unwrap(), RESULT);
}
