//! Files that mean harm, or are no jobs at all.

use super::*;

#[test]
fn a_file_that_is_no_yaml_names_its_line() {
    for (lines, line) in [
        ("a: [1, 2\n", 4),
        ("a: 'x\n", 3),
        ("\tb: 1\n", 3),
        ("a: b: c\n", 3),
        ("*x : 1\n", 3),
        ("a: &a [*a]\n", 3),
        ("a: !secret x\n", 3),
        ("---\nb: 1\n", 3),
    ] {
        let found = problems_of(lines);
        assert_eq!(found.len(), 1, "{lines:?}: {found:?}");
        let place: usize = found[0].split(':').next().unwrap().parse().unwrap();
        assert!(place.abs_diff(line) <= 1, "{lines:?}: {found:?}");
    }
}

#[test]
fn an_alias_bomb_is_refused_at_once() {
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x]\n");
    for level in 1..30 {
        let below = format!("*a{}", level - 1);
        bomb += &format!("a{level}: &a{level} [{}]\n", vec![below; 9].join(", "));
    }
    let started = std::time::Instant::now();
    let found = problems_of(&bomb);
    assert!(found[0].contains("too much for a job file"), "{found:?}");
    assert!(started.elapsed().as_secs() < 5);
    let long_text = format!(
        "a: &a {}\nb: [{}]\n",
        "x".repeat(500_000),
        vec!["*a"; 1000].join(", ")
    );
    assert!(problems_of(&long_text)[0].contains("too much for a job file"));
}

#[test]
fn deep_nesting_is_refused() {
    for (open, close) in [("[", "]"), ("{a: ", "}"), ("- ", "")] {
        let deep = format!("a:\n  {}x{}\n", open.repeat(100_000), close.repeat(100_000));
        let found = problems_of(&deep);
        assert_eq!(found.len(), 1, "{found:?}");
    }
}

#[test]
fn a_huge_or_binary_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.yaml");
    let load_bytes = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        problems(load(JobSources {
            file: Some(path.clone()),
            ..JobSources::default()
        }))
    };
    assert_eq!(
        load_bytes(&vec![b'#'; 3 << 20]),
        ["file: too big for a job file (more than 1048576 bytes)"]
    );
    assert_eq!(load_bytes(b"a: 1\nb: \xff\n"), ["2: not UTF-8 text"]);
    assert!(!load_bytes(b"\0\0\0\0").is_empty());
    let missing = problems(load(JobSources {
        file: Some(dir.path().join("no.yaml")),
        ..JobSources::default()
    }));
    assert_eq!(missing, ["file: there is no such job file"]);
    let folder = problems(load(JobSources {
        file: Some(dir.path().to_owned()),
        ..JobSources::default()
    }));
    assert!(
        folder[0].starts_with("file: is a folder: name the job file in it"),
        "{folder:?}"
    );
}

/// Pieces of which YAML and jobs are made.
const WORDS: &str = "base_model|datasets|path|type|lora_r|adapter|lora|cluster|min_workers|lora_target_modules|warmup_steps|resume|seed|val_set_size|: |:|\
                     \n|\n  |\n- |- |[|]|{|}|, |&a |*a|!!str |!x |'|\"| \\|\n| >\n|#|---\n|...\n|? |%YAML 1.2\n|\t|~|null|true|1e9|-1|0.5|8|9999999999999999999999|\
                     0x10|.nan|é|\u{feff}|\u{2028}|\0|\\|<<: *a";

struct Random {
    rng: crate::rng::CounterRng,
    words: Vec<&'static str>,
}

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.rng.below(bound as u64) as usize
    }

    fn word(&mut self) -> &'static str {
        let index = self.below(self.words.len());
        self.words[index]
    }

    fn text(&mut self) -> String {
        let length = self.below(60);
        (0..length).map(|_| self.word()).collect()
    }

    /// A good job with a few places spoiled.
    fn spoiled_job(&mut self) -> String {
        let job = format!(
            "{SMALL}adapter: lora\nlora_r: 8\nlora_target_modules: [q_proj, v_proj]\ncluster:\n  min_workers: 2\nwarmup_steps: 3\nmax_steps: 9\nval_set_size: 0.1\neval_steps: 3\n"
        );
        let mut chars: Vec<char> = job.chars().collect();
        for _ in 0..self.below(4) {
            let at = self.below(chars.len());
            let until = (at + self.below(6)).min(chars.len());
            let word = self.word();
            chars.splice(at..until, word.chars());
        }
        chars.into_iter().collect()
    }

    fn overrides(&mut self) -> Vec<(String, String)> {
        (0..self.below(8) / 6)
            .map(|_| {
                let name = match self.below(2) {
                    0 => format!("{}.{}{}", self.word(), self.word(), self.word()),
                    _ => self.word().to_owned(),
                };
                (name, format!("{}{}", self.word(), self.word()))
            })
            .collect()
    }
}

#[test]
fn data_in_place_of_a_job_is_told() {
    for text in [
        "{\"messages\": []}\n",
        "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"a\"}\n",
    ] {
        let found = problems(load_text(text));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(
            found[0].contains("name the file with --dataset"),
            "{found:?}"
        );
    }
    let tabs = problems(load_text("base_model: m\n\tdatasets: d\n"));
    assert!(
        tabs[0].ends_with("line 2: tabs cannot indent: use spaces"),
        "{tabs:?}"
    );
}

#[test]
fn random_jobs_never_panic_and_every_problem_is_one_line() {
    let rng = crate::rng::CounterRng::new(7, &[]);
    let words = WORDS.split('|').collect();
    let mut random = Random { rng, words };
    let path = Arc::new(PathBuf::from("job.yaml"));
    let (mut good, mut bad) = (0, 0);
    for round in 0..20_000 {
        let text = match round % 2 {
            0 => random.text(),
            _ => random.spoiled_job(),
        };
        let (variables, flags) = (random.overrides(), random.overrides());
        let environment = variables
            .into_iter()
            .map(|(name, value)| (format!("MUSTER_{name}"), value));
        match check_merged(
            Some((path.clone(), text.clone())),
            environment.collect(),
            &flags,
            &find_no_adapter,
        ) {
            Ok((job, _)) => {
                assert_eq!(job.global_batch_size % job.micro_batch_size, 0);
                assert!(!job.datasets.is_empty() && job.learning_rate > 0.0);
                job.digest();
                good += 1;
            }
            Err(errors) => {
                assert!(!errors.problems.is_empty(), "{text:?}");
                assert_eq!(
                    errors.to_string().lines().count(),
                    errors.problems.len(),
                    "{text:?}"
                );
                bad += 1;
            }
        }
    }
    assert!(
        good > 500 && bad > 5000,
        "both ends are reached: {good} good, {bad} bad"
    );
}
