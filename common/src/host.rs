//! What this machine is called, and what memory it has free.

/// The host's name, where the system tells it.
pub fn host_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(name.trim().to_owned())
}

/// Bytes that this process may still take. None where the system does not say.
pub fn available_bytes() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let machine = read("/proc/meminfo").and_then(|text| of_machine(&text));
    let container = || {
        let limit = read("/sys/fs/cgroup/memory.max")?;
        let used = read("/sys/fs/cgroup/memory.current")?;
        of_container(&limit, &used, &read("/sys/fs/cgroup/memory.stat")?)
    };
    match (machine, container()) {
        (Some(machine), Some(container)) => Some(machine.min(container)),
        (machine, container) => machine.or(container),
    }
}

fn of_machine(meminfo: &str) -> Option<u64> {
    word(meminfo, "MemAvailable:")?.checked_mul(1024)
}

/// Bytes left below the container's limit; memory that only holds files makes room.
fn of_container(limit: &str, used: &str, stat: &str) -> Option<u64> {
    // "max" is no limit.
    let limit: u64 = limit.trim().parse().ok()?;
    let used: u64 = used.trim().parse().ok()?;
    let files = word(stat, "inactive_file").unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(files)))
}

/// The number behind `name` at the beginning of a line.
fn word(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::split_whitespace);
    let mut line = lines.find_map(|mut line| (line.next() == Some(name)).then_some(line))?;
    line.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_is_the_machine_s_or_the_container_s() {
        let meminfo = "MemTotal:  24000 kB\nMemFree:  10 kB\nMemAvailable:  2000 kB\n";
        assert_eq!(of_machine(meminfo), Some(2_048_000));
        assert_eq!(of_machine("MemTotal: 24000 kB\n"), None);
        let stat = "anon 400\nfile 90\ninactive_file 70\n";
        assert_eq!(of_container("1000\n", "600\n", stat), Some(470));
        assert_eq!(of_container("500\n", "600\n", ""), Some(0));
        assert_eq!(of_container("max\n", "600\n", stat), None);
    }
}
