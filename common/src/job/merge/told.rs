//! What is told of keys and variables that a job gives and that are not done as they say.

use super::Merged;

impl Merged {
    /// Lines for the user on what of the job was passed over, one of each kind.
    pub fn notices(&self) -> Vec<String> {
        let mut told: Vec<(&str, Vec<&str>)> = Vec::new();
        for (key, instead) in &self.done_otherwise {
            match told.iter_mut().find(|(text, _)| text == instead) {
                Some((_, keys)) if keys.contains(&key.as_str()) => {}
                Some((_, keys)) => keys.push(key),
                None => told.push((instead, vec![key])),
            }
        }
        let line = |(text, keys): (&str, Vec<&str>)| format!("{}: {text}", keys.join(", "));
        let mut notices = self.not_done();
        notices.extend(told.into_iter().map(line));
        notices
    }

    /// Keys and variables that nothing is done with.
    fn not_done(&self) -> Vec<String> {
        [
            ("not needed here", &self.passed_over, ""),
            ("unknown, but empty", &self.empty, ""),
            (
                "env: not set, because a job changes no variables",
                &self.variables,
                " (set them where the command is given)",
            ),
            (
                "passed over, made by Kubernetes for a Service",
                &self.service_variables,
                " (enableServiceLinks: false in the pod leaves them out)",
            ),
        ]
        .into_iter()
        .filter(|(_, names, _)| !names.is_empty())
        .map(|(what, names, hint)| {
            let mut told: Vec<&str> = Vec::new();
            for name in names {
                if !told.contains(&name.as_str()) {
                    told.push(name);
                }
            }
            format!("{what}: {}{hint}", told.join(", "))
        })
        .collect()
    }
}
