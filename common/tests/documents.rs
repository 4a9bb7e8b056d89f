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
    let code_map = read("docs/architecture.md");
    let in_code_map = code_map.split('`').skip(1).step_by(2).filter(|quoted| {
        ["proto/", "common/", "coordinator/", "worker/"]
            .iter()
            .any(|crate_folder| quoted.starts_with(crate_folder))
    });
    for path in in_code_map {
        assert!(root().join(path).exists(), "docs/architecture.md: {path}");
    }
    for document in [
        "README.md",
        "docs/architecture.md",
        "docs/job.md",
        "deploy/README.md",
    ] {
        let text = read(document);
        let folder = root().join(Path::new(document).parent().unwrap());
        let links = text
            .split("](")
            .skip(1)
            .map(|rest| rest.split_once(')').unwrap().0);
        for link in links.filter(|link| !link.contains("://")) {
            assert!(folder.join(link).exists(), "{document}: {link}");
        }
    }
}
