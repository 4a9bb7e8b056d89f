//! `coordinator preprocess`: what it prepares is found again, and nothing that is stale or damaged is used.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value as Json, json};

struct Setup {
    folder: tempfile::TempDir,
    job: Json,
}

impl Setup {
    /// A job on a copy of the shipped model's configuration and tokenizer, with random weights and 20 rows.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tiny-qwen3");
        let model = folder.path().join("model");
        fs::create_dir(&model).unwrap();
        for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
            fs::copy(shipped.join(name), model.join(name)).unwrap();
        }
        let job = json!({
            "base_model": "model", "init_weights": "random", "datasets": "data.jsonl", "output_dir": "out",
        });
        let setup = Self { folder, job };
        setup.write_rows("Ahoy", 20);
        setup.write_job();
        setup
    }

    fn write_rows(&self, word: &str, count: usize) {
        let rows = (0..count).map(|row| format!("{{\"text\": \"{word} {row}\"}}\n"));
        fs::write(self.path("data.jsonl"), rows.collect::<String>()).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write_job(&self) {
        fs::write(self.path("job.yaml"), self.job.to_string()).unwrap();
    }

    /// The same job with another value of a field.
    fn set(&mut self, field: &str, value: Json) {
        self.job[field] = value;
        self.write_job();
    }

    fn command(&self, command: &str, options: &[&str]) -> Command {
        let mut run = Command::new(env!("CARGO_BIN_EXE_coordinator"));
        run.current_dir(self.folder.path())
            .args([command, "job.yaml"])
            .args(options);
        run
    }

    fn run(&self, command: &str, options: &[&str]) -> Output {
        self.command(command, options).output().unwrap()
    }

    /// What the command printed, which must have gone well.
    fn told(&self, command: &str, options: &[&str]) -> String {
        let output = self.run(command, options);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs the command with these rows as its standard input.
    fn give(&self, command: &str, options: &[&str], rows: &str) -> Output {
        let mut child = self
            .command(command, options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        // Who does not read them has said why.
        let _ = input.write_all(rows.as_bytes());
        drop(input);
        child.wait_with_output().unwrap()
    }

    /// The block files in a folder.
    fn prepared(&self, folder: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.path(folder)).into_iter().flatten();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

#[test]
fn what_is_prepared_is_found_again_with_the_same_data() {
    let setup = Setup::new();
    let told = setup.told("preprocess", &[]);
    assert!(
        told.contains("20 rows") && told.contains("written)"),
        "{told}"
    );
    assert!(
        told.contains("delete that file, or all of last_run_prepared"),
        "{told}"
    );
    let files = setup.prepared("last_run_prepared");
    assert_eq!(files.len(), 1);
    assert!(!setup.path("out").exists(), "nothing is trained");
    let told = setup.told("preprocess", &[]);
    assert!(told.contains("was there already)"), "{told}");
    let told = setup.told("check", &["--show", "0"]);
    assert!(
        told.contains("the data was prepared before, in last_run_prepared/"),
        "{told}"
    );
    // Other blocks are other data.
    let told = setup.told("check", &["--show", "0", "--sequence-len", "32"]);
    assert!(!told.contains("prepared before"), "{told}");
}

#[test]
fn the_job_names_the_folder_and_jobs_share_it() {
    let mut setup = Setup::new();
    setup.set("dataset_prepared_path", json!("shared"));
    setup.told("preprocess", &[]);
    setup.told("preprocess", &["--sequence-len", "32"]);
    assert_eq!(setup.prepared("shared").len(), 2);
    assert!(!setup.path("last_run_prepared").exists());
    // What decides nothing of the data may be otherwise.
    let options = [
        "--show",
        "0",
        "--learning-rate",
        "0.01",
        "--output-dir",
        "other",
    ];
    let told = setup.told("check", &options);
    assert!(
        told.contains("the data was prepared before, in shared/"),
        "{told}"
    );
}

#[cfg(feature = "single-node")]
#[test]
fn a_run_trains_on_prepared_data_and_leaves_that_of_others_alone() {
    let setup = Setup::new();
    let options = ["--single-node", "--max-steps", "2"];
    setup.told(
        "start",
        &[&options[..], &["--output-dir", "alone"]].concat(),
    );
    setup.told("preprocess", &[]);
    setup.told("preprocess", &["--sequence-len", "32"]);
    let told = setup.told("start", &options);
    assert!(
        told.contains("the data was prepared before, in last_run_prepared/"),
        "{told}"
    );
    assert_eq!(setup.prepared("last_run_prepared").len(), 2);
    let digest = |folder: &str| {
        let text = fs::read(setup.path(folder).join("run.json")).unwrap();
        let record: Json = serde_json::from_slice(&text).unwrap();
        record["weights_digest"].as_str().unwrap().to_owned()
    };
    assert_eq!(digest("out"), digest("alone"));
}

#[test]
fn damaged_and_stale_data_is_noticed_and_made_anew() {
    let setup = Setup::new();
    setup.told("preprocess", &[]);
    let files = setup.prepared("last_run_prepared");
    let whole = fs::read(&files[0]).unwrap();
    for damaged in [&whole[..whole.len() / 2], &whole[..10], b"MUSTERBK"] {
        fs::write(&files[0], damaged).unwrap();
        let told = setup.told("preprocess", &[]);
        assert!(told.contains("not a usable block file"), "{told}");
        assert!(told.contains("the data is prepared anew"), "{told}");
        assert_eq!(fs::read(&files[0]).unwrap(), whole);
    }
    setup.write_rows("Avast", 20);
    let told = setup.told("preprocess", &[]);
    assert!(
        told.contains("written)") && !told.contains("anew"),
        "{told}"
    );
    assert_eq!(setup.prepared("last_run_prepared").len(), 2);
}

#[test]
fn two_programs_at_once_leave_one_whole_file() {
    let setup = Setup::new();
    setup.write_rows("Ahoy", 2000);
    let start = |_| {
        let mut command = setup.command("preprocess", &[]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let running: Vec<_> = (0..4).map(start).collect();
    for child in running {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    assert_eq!(setup.prepared("last_run_prepared").len(), 1);
    let told = setup.told("preprocess", &[]);
    assert!(told.contains("was there already)"), "{told}");
}

#[test]
fn a_folder_that_cannot_be_made_and_bad_data_are_one_line_with_the_right_code() {
    let mut setup = Setup::new();
    setup.set("dataset_prepared_path", json!("data.jsonl"));
    let output = setup.run("preprocess", &[]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(
        text.contains("data.jsonl") && text.lines().count() == 1,
        "{text}"
    );
    setup.set("dataset_prepared_path", json!("shared"));
    fs::write(setup.path("data.jsonl"), "{\"text\": 1}\n").unwrap();
    let output = setup.run("preprocess", &[]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(text.contains("data.jsonl:1"), "{text}");
    assert!(setup.prepared("shared").is_empty());
    setup.set("dataset_prepared_path", json!(["a", "b"]));
    assert_eq!(setup.run("preprocess", &[]).status.code(), Some(2));
}

#[test]
fn files_by_split_are_read_as_the_split_says() {
    let mut setup = Setup::new();
    for (name, rows) in [("a", 3), ("b", 2), ("c", 4)] {
        let rows = (0..rows).map(|row| format!("{{\"text\": \"{name} {row}\"}}\n"));
        fs::write(
            setup.path(&format!("{name}.jsonl")),
            rows.collect::<String>(),
        )
        .unwrap();
    }
    for (split, rows) in [
        ("train", "5 rows"),
        ("test", "4 rows"),
        ("all", "9 rows"),
        ("train[:0]+test[:1]", "1 row"),
        ("train[:1%]+test", "4 rows"),
    ] {
        let files = json!({"train": ["a.jsonl", "b.jsonl"], "test": "c.jsonl"});
        setup.set(
            "datasets",
            json!([{"path": "json", "data_files": files, "split": split}]),
        );
        let told = setup.told("check", &["--show", "0"]);
        assert!(told.contains(&format!(" {rows},")), "{split}: {told}");
    }
    setup.set(
        "datasets",
        json!([{"path": "json", "data_files": {"test": "c.jsonl"}}]),
    );
    let output = setup.run("check", &[]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains("split train is not there; it has test"),
        "{text}"
    );
}

const ROWS: &str = "{\"text\": \"Ahoy\"}\n{\"text\": \"Avast\"}\n";

#[cfg(feature = "single-node")]
#[test]
fn a_run_on_standard_input_goes_on_from_its_copy_and_refuses_other_rows() {
    let setup = Setup::new();
    let options = ["--single-node", "--max-steps", "2", "--dataset", "-"];
    let output = setup.give("start", &options, ROWS);
    assert!(output.status.success(), "{output:?}");
    // The same rows, and none at all.
    for rows in [ROWS, ""] {
        let output = setup.give("start", &options, rows);
        assert!(output.status.success(), "{output:?}");
    }
    let other = ROWS.replace("Ahoy", "Belay");
    let output = setup.give("start", &options, &other);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(
        text.contains("other rows than those that the run in output_dir began with"),
        "{text}"
    );
    let text = fs::read(setup.path("out/run.json")).unwrap();
    let record: Json = serde_json::from_slice(&text).unwrap();
    let digest = blake3::hash(ROWS.as_bytes()).to_hex().to_string();
    assert_eq!(
        record["job"]["datasets"][0]["pinned"],
        json!([["-", digest]])
    );
}

#[test]
fn standard_input_can_be_checked_and_prepared_and_has_to_hold_something() {
    let setup = Setup::new();
    let output = setup.give("check", &["--show", "0", "--dataset", "-"], ROWS);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("2 rows") && !setup.path("out").exists(),
        "{text}"
    );
    let output = setup.give("preprocess", &["--dataset", "-"], ROWS);
    assert!(output.status.success(), "{output:?}");
    let output = setup.give("check", &["--dataset", "-"], "");
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(
        text.contains("standard input is empty: give it the rows")
            && !text.contains("standard input: "),
        "{text}"
    );
}

#[test]
fn rows_of_standard_input_are_named_by_its_lines_and_not_by_those_of_the_copy() {
    let setup = Setup::new();
    let broken = format!("{ROWS}{{\"text\": \n");
    let output = setup.give("check", &["--dataset", "-"], &broken);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains("standard input, line 3: broken JSON") && !text.contains("stdin-"),
        "{text}"
    );
    let noted = ROWS.replace("}", ", \"id\": 1}");
    let output = setup.give("check", &["--show", "0", "--dataset", "-"], &noted);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("standard input, line 1: columns that are not read: `id` (2 rows)"),
        "{text}"
    );
}

#[test]
fn a_file_on_the_web_is_fetched_by_its_address() {
    let mut setup = Setup::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/rows.jsonl", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 4096];
        let _ = stream.read(&mut request);
        let length = ROWS.len();
        let head = "HTTP/1.1 200 OK\r\nETag: \"1\"\r\nConnection: close\r\n";
        let _ = write!(stream, "{head}Content-Length: {length}\r\n\r\n{ROWS}");
    });
    setup.set("datasets", json!([{ "path": url }]));
    let check = || {
        let mut command = setup.command("check", &["--show", "0"]);
        command
            .env("HF_HOME", setup.path("cache"))
            .env("NO_PROXY", "127.0.0.1");
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let told = check();
    assert!(
        told.contains("2 rows") && !told.contains("could not be asked"),
        "{told}"
    );
    // Nobody is there any more.
    let told = check();
    assert!(
        told.contains("2 rows") && told.contains("its server could not be asked"),
        "{told}"
    );
}

#[test]
fn addresses_that_are_not_read_say_what_to_do() {
    let mut setup = Setup::new();
    for (path, expected) in [
        (
            "ftp://host/rows.jsonl",
            "ftp:// is not read: download the data, and name",
        ),
        ("hf://datasets/a/b/c.jsonl", "write the id of the dataset"),
    ] {
        setup.set("datasets", json!(path));
        let output = setup.run("check", &[]);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(3), "{text}");
        assert!(
            text.contains(expected) && text.lines().count() == 1,
            "{text}"
        );
    }
}

#[cfg(unix)]
#[test]
fn a_check_that_is_ended_leaves_nothing_in_the_temporary_folder() {
    let setup = Setup::new();
    let temporary = setup.path("tmp");
    fs::create_dir(&temporary).unwrap();
    let left = || -> Vec<PathBuf> {
        let entries = fs::read_dir(&temporary).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    // It waits for rows that do not come.
    let waiting = || {
        let mut child = setup
            .command("check", &["--dataset", "-"])
            .env("TMPDIR", &temporary)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !left().iter().any(|path| path.join("lock").exists()) {
            assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none());
            std::thread::yield_now();
        }
        child
    };
    let mut child = waiting();
    let kill = |child: &Child, signal: &str| {
        let mut kill = Command::new("kill");
        let done = kill.args([signal, &child.id().to_string()]).status();
        assert!(done.unwrap().success());
    };
    // Waiting for it would close its input, which ends it too.
    let input = child.stdin.take();
    kill(&child, "-TERM");
    assert_eq!(child.wait().unwrap().code(), Some(75));
    drop(input);
    assert_eq!(left(), Vec::<PathBuf>::new());
    // Nobody can do anything about that one, but the next start.
    let mut child = waiting();
    kill(&child, "-KILL");
    child.wait().unwrap();
    let [folder] = left().try_into().unwrap();
    let long_ago = SystemTime::now() - Duration::from_secs(3600);
    let folder = fs::File::open(folder).unwrap();
    folder.set_modified(long_ago).unwrap();
    let mut check = setup.command("check", &["--show", "0"]);
    let output = check.env("TMPDIR", &temporary).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(left(), Vec::<PathBuf>::new());
}
