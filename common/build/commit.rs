// Of build scripts: which commit a program is built from. Reads the repository with git where both are there; asks nobody else.

use std::process::Command;

/// Sets MUSTER_COMMIT for the program. `sources`: folders whose changes are told as such.
///
/// The variable of the same name wins, for builds without a repository, such as those of container images. Only release
/// builds look: to look is to be built anew after each commit.
pub fn tell(sources: &[&str]) {
    println!("cargo::rerun-if-env-changed=MUSTER_COMMIT");
    let given = std::env::var("MUSTER_COMMIT").unwrap_or_default();
    let is_release = std::env::var("PROFILE").is_ok_and(|profile| profile == "release");
    let commit = match given.trim() {
        "" if is_release => found(sources),
        "" => None,
        given => Some(given.to_owned()),
    };
    let commit = commit.unwrap_or_else(|| "unknown".to_owned());
    println!("cargo::rustc-env=MUSTER_COMMIT={commit}");
}

fn found(sources: &[&str]) -> Option<String> {
    // A copy of the sources within another repository is not of its commit.
    git(&["ls-files", "--error-unmatch", "build.rs"])?;
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    for name in ["HEAD", "logs/HEAD"] {
        let path = git(&["rev-parse", "--git-path", name])?;
        if std::path::Path::new(&path).exists() {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    for source in sources {
        println!("cargo::rerun-if-changed={source}");
    }
    let changed = git(&[&["status", "--porcelain", "--"], sources].concat())?;
    Some(match changed.is_empty() {
        true => commit,
        false => format!("{commit} with changes"),
    })
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
