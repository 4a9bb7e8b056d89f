//! Whether this process was told to outlive its terminal, as `nohup` does. In: the process's own signal settings. Out: a
//! yes or no. It never changes them.

/// SIGHUP is ignored: whoever listens for it would undo that.
#[cfg(unix)]
pub fn is_ignored() -> bool {
    // SAFETY: all zeroes is a valid `sigaction`, it outlives the call, and no new action is given.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let asked = libc::sigaction(libc::SIGHUP, std::ptr::null(), &mut action);
        asked == 0 && action.sa_sigaction == libc::SIG_IGN
    }
}
