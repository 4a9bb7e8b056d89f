//! Documents and example jobs against the code: the fields in docs/job.md, the files that the documents point to, and
//! every job that is shipped.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use common::job::{Field, JobSources, fields, load};

const TABLE_STARTS: &str = "<!-- made from common/src/job/fields.rs: MUSTER_BLESS=1 cargo test -p common --test documents -->\n";

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

fn table() -> String {
    let mut table = String::from("| field | values | default | meaning |\n|---|---|---|---|\n");
    for field in fields() {
        table += &row(field);
    }
    table
}

fn row(field: &Field) -> String {
    let cell = |text: &str| text.replace('|', "\\|");
    let aliases: Vec<String> = field
        .aliases
        .iter()
        .map(|name| format!("`{name}`"))
        .collect();
    let also = match aliases.is_empty() {
        true => String::new(),
        false => format!(" Also: {}.", aliases.join(", ")),
    };
    let [values, default, help] = [field.values, field.default, field.help].map(cell);
    format!(
        "| `{}` | {values} | {default} | {help}{also} |\n",
        field.name
    )
}

#[test]
fn the_reference_lists_every_field() {
    let text = read("docs/job.md");
    let (introduction, found) = text.split_once(TABLE_STARTS).unwrap();
    let expected = table();
    if std::env::var_os("MUSTER_BLESS").is_some() {
        let whole = format!("{introduction}{TABLE_STARTS}{expected}");
        fs::write(root().join("docs/job.md"), whole).unwrap();
    } else {
        assert!(
            found == expected,
            "docs/job.md is out of date: MUSTER_BLESS=1 cargo test -p common --test documents"
        );
    }
}

#[test]
fn every_shipped_job_is_valid() {
    let examples = fs::read_dir(root().join("examples")).unwrap();
    let mut jobs: Vec<PathBuf> = examples
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "yaml")
        })
        .collect();
    assert!(jobs.len() >= 4, "{jobs:?}");
    jobs.push(root().join("deploy/kustomize/base/job.yaml"));
    for file in jobs {
        let sources = JobSources {
            file: Some(file.clone()),
            ..JobSources::default()
        };
        let job = load(sources).unwrap_or_else(|errors| panic!("{}:\n{errors}", file.display()));
        for path in job.datasets.iter().map(|dataset| &dataset.path) {
            let shipped = path.starts_with("examples");
            assert!(
                !shipped || root().join(path).is_file(),
                "{}",
                path.display()
            );
        }
    }
}

#[test]
fn documents_point_to_files_that_exist() {
    for document in [
        "README.md",
        "CONTRIBUTING.md",
        "docs/architecture.md",
        "docs/recovery.md",
        "docs/exchange.md",
        "docs/performance.md",
        "docs/cuda.md",
        "docs/job.md",
        "deploy/README.md",
    ] {
        let text = read(document);
        let quoted = text.split('`').skip(1).step_by(2);
        let paths = quoted.filter(|quoted| {
            let folders = ["proto/", "common/", "coordinator/", "worker/"];
            !quoted.contains(' ') && folders.iter().any(|folder| quoted.starts_with(folder))
        });
        for path in paths {
            assert!(root().join(path).exists(), "{document}: {path}");
        }
        let folder = root().join(Path::new(document).parent().unwrap());
        let links = text
            .split("](")
            .skip(1)
            .map(|rest| rest.split_once(')').unwrap().0);
        for link in links.filter(|link| !link.contains("://")) {
            let file = link.split('#').next().unwrap();
            assert!(folder.join(file).exists(), "{document}: {link}");
        }
    }
}

/// Names of modules and of the files that hold them, in the rows of a table that begins with the crate's folder.
#[test]
fn the_map_names_only_what_is_there() {
    let text = read("docs/architecture.md");
    for crate_folder in ["coordinator/src/", "worker/src/", "common/src/"] {
        let start = format!("| `{crate_folder}` | what |\n|---|---|\n");
        let (_, rest) = text.split_once(&start).unwrap();
        let rows: Vec<&str> = rest
            .lines()
            .take_while(|line| line.starts_with("| "))
            .collect();
        assert!(rows.len() >= 5, "{crate_folder}");
        for row in rows {
            let cell = row.split('|').nth(1).unwrap();
            for room in cell.split('`').skip(1).step_by(2) {
                let place = root().join(crate_folder).join(room);
                let is_there = place.exists() || place.with_extension("rs").is_file();
                assert!(is_there, "docs/architecture.md: {crate_folder}{room}");
            }
        }
    }
}

#[test]
fn the_time_outs_stand_where_the_documents_say() {
    let text = read("docs/recovery.md");
    let (_, table) = text.split_once("| what | how long | constant |").unwrap();
    let mut checked = 0;
    for row in table.lines().filter(|line| line.starts_with("| ")) {
        let cell = row.split('|').nth(3).unwrap();
        let mut names = Vec::new();
        for quoted in cell.split('`').skip(1).step_by(2) {
            if !quoted.contains('/') {
                names.push(quoted);
                continue;
            }
            let own = root().join("coordinator/src").join(quoted);
            let file = match own.exists() {
                true => own,
                false => root().join(quoted),
            };
            assert!(file.exists(), "docs/recovery.md: {quoted}");
            if file.is_dir() {
                continue;
            }
            let code = fs::read_to_string(&file).unwrap();
            for name in names.drain(..) {
                let defined = format!("const {name}: Duration");
                assert!(
                    code.contains(&defined),
                    "docs/recovery.md: {name} is not in {quoted}"
                );
                checked += 1;
            }
        }
    }
    assert!(checked >= 20, "{checked}");
}
