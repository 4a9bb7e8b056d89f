//! Where the result is, and the commands that go on from there, written so that they can be copied.

use std::path::{Path, PathBuf};

use super::text::{Style, visible};

/// What the commands need to know.
#[derive(Clone, Debug)]
pub struct NextView<'a> {
    pub output_dir: &'a Path,
    pub base_model: &'a Path,
    /// Whether the result is an adapter on the base model, not a model.
    pub is_adapter: bool,
    /// Whether it was trained on a base of 4 bits.
    pub is_four_bits: bool,
    /// Arguments by which the user described the job, word by word, without those about this machine and this output folder.
    pub job_args: &'a [String],
    /// Whether workers must show a token.
    pub has_token: bool,
    pub prompt: Option<&'a str>,
    pub programs: Programs,
}

/// How the two programs are called on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programs {
    pub coordinator: String,
    pub worker: String,
}

impl Programs {
    /// Finds how to call both: by name where they are on the search path, through cargo where this one was built by it and the
    /// other was not built yet, else by their path.
    pub fn find() -> Self {
        let exe = std::env::current_exe().unwrap_or_default();
        let here = std::env::current_dir().unwrap_or_default();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
        Self::beside(&exe, &here, &folders, &|path| path.is_file())
    }

    pub(super) fn beside(
        exe: &Path,
        here: &Path,
        search_path: &[PathBuf],
        exists: &dyn Fn(&Path) -> bool,
    ) -> Self {
        let folder = exe.parent().unwrap_or(Path::new(""));
        let call = |name: &str| {
            let program = folder.join(name);
            let profile = folder.file_name().and_then(|name| name.to_str());
            if search_path.iter().any(|entry| entry == folder) || folder.as_os_str().is_empty() {
                name.to_owned()
            } else if exists(&program) {
                quoted(
                    &program
                        .strip_prefix(here)
                        .unwrap_or(&program)
                        .display()
                        .to_string(),
                )
            } else if profile == Some("debug") {
                format!("cargo run -p {name} --")
            } else if profile == Some("release") {
                format!("cargo run --release -p {name} --")
            } else {
                name.to_owned()
            }
        };
        Self {
            coordinator: call("coordinator"),
            worker: call("worker"),
        }
    }
}

pub(super) fn render(view: &NextView, style: Style) -> String {
    let output = quoted(&view.output_dir.display().to_string());
    let model = match view.is_adapter {
        true => format!(
            "{} --adapter {output}",
            quoted(&view.base_model.display().to_string())
        ),
        false => output,
    };
    let prompt = quoted(view.prompt.unwrap_or("Hello"));
    let Programs {
        coordinator,
        worker,
    } = &view.programs;
    let mut text = format!(
        "\n{}  {}\n",
        style.bold("result"),
        visible(&view.output_dir.display().to_string())
    );
    text += &format!("{}\n", style.bold("go on"));
    let bits = match view.is_four_bits {
        true => " --load-in-4bit",
        false => "",
    };
    text += &format!("  {worker} generate --model {model}{bits} --prompt {prompt}\n");
    let words: Vec<String> = view.job_args.iter().map(|word| quoted(word)).collect();
    let job = words.join(" ");
    // This output folder is done: the same job again would find nothing to do.
    let other = quoted(&format!("{}-2", view.output_dir.display()));
    let why = style.dim("# the same on several machines");
    text += &format!(
        "  {coordinator} start {job} --output-dir {other} --listen 0.0.0.0:7077   {why}\n"
    );
    let why = style.dim("# on each of the others");
    let token = match view.has_token {
        true => " --token-file FILE",
        false => "",
    };
    text += &format!("  {worker} join HOST:7077{token}   {why}\n");
    text
}

/// One word of a command line for a POSIX shell; control characters become spaces.
pub fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    let text: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    format!("'{}'", text.replace('\'', r"'\''"))
}
