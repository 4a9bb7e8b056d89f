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
    assert_eq!(
        missing,
        ["file: cannot read the job file: No such file or directory (os error 2)"]
    );
    let folder = problems(load(JobSources {
        file: Some(dir.path().to_owned()),
        ..JobSources::default()
    }));
    assert!(
        folder[0].starts_with("file: cannot read the job file:"),
        "{folder:?}"
    );
}

#[test]
fn random_text_never_panics() {
    let words = [
        "base_model",
        "datasets",
        "path",
        "lora_r",
        "cluster",
        "min_workers",
        ": ",
        ":",
        "\n",
        "\n  ",
        "\n- ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        ", ",
        "&a ",
        "*a",
        "!!str ",
        "!x ",
        "'",
        "\"",
        "|\n",
        ">\n",
        "#",
        "---\n",
        "...\n",
        "? ",
        "%YAML 1.2\n",
        "\t",
        "~",
        "null",
        "true",
        "1e9",
        "-1",
        "9999999999999999999999",
        "0x10",
        ".nan",
        "é",
        "\u{feff}",
        "\u{2028}",
        "\0",
        "\\",
        "<<: *a",
        "lora_target_modules",
        "resume",
        "seed",
    ];
    let mut random = crate::rng::CounterRng::new(7, &[]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.yaml");
    for _ in 0..20_000 {
        let length = random.below(60);
        let text: String = (0..length)
            .map(|_| words[random.below(words.len() as u64) as usize])
            .collect();
        fs::write(&path, &text).unwrap();
        let flags = (0..random.below(3)).map(|_| {
            let mut word = || words[random.below(words.len() as u64) as usize].to_owned();
            (
                format!("{}.{}{}", word(), word(), word()),
                format!("{}{}", word(), word()),
            )
        });
        let flags = flags.collect::<Vec<_>>();
        if let Err(errors) = load(JobSources {
            file: Some(path.clone()),
            environment: flags
                .iter()
                .map(|(n, v)| (format!("MUSTER_{n}"), v.clone()))
                .collect(),
            flags,
        }) {
            assert_eq!(
                errors.to_string().lines().count(),
                errors.problems.len(),
                "{text:?}"
            );
        }
    }
}
