"""Child processes that never outlive the comparison, each with a bound, and the load that others put on the machine.

In: command lines. Out: what they print, or one sentence that says why there is nothing. Every child is the leader of its
own process group, and all groups are killed when the comparison ends, however it ends.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# Of one program, unless its row says otherwise.
LIMIT_S = 1200
ENDING_S = 10
POLL_S = 0.001


class Failed(Exception):
    """A program did not do what was asked; the message is for people."""


_running = set()


def start(command, **options):
    """Starts a program. Its output goes to `options`, or is read by the caller."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment.update(options.pop("env", {}))
    child = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
        **options,
    )
    _running.add(child)
    return child


def end(child):
    """Asks the program and its children to stop, and then makes them. Does nothing where they are gone."""
    if child.poll() is None:
        _signal(child, signal.SIGTERM)
        try:
            child.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            pass
    # Its children too, and whether or not it went in peace.
    _signal(child, signal.SIGKILL)
    child.wait()
    for stream in (child.stdout, child.stderr):
        if stream:
            stream.close()
    _running.discard(child)


def _signal(child, number):
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        pass


def end_all():
    for child in list(_running):
        _signal(child, signal.SIGKILL)
    for child in list(_running):
        child.wait()
        _running.discard(child)


def end_with_us():
    """Ctrl-C, SIGTERM and a closed terminal all end this program by way of its clean-up."""
    atexit.register(end_all)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def run(command, limit_s=LIMIT_S):
    """Runs a program to its end. What it printed."""
    child = start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise Failed(f"{_named(command)} took longer than {limit_s} s") from None
    finally:
        end(child)
    if child.returncode != 0:
        raise Failed(f"{_named(command)} failed with exit code {child.returncode}:\n{_last_lines(err)}")
    return out


def report(command, limit_s=LIMIT_S):
    """Runs a program that prints a line of JSON at its end."""
    out = run(command, limit_s)
    try:
        return json.loads(out.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise Failed(f"{_named(command)} printed no report:\n{_last_lines(out)}") from None


def wait_until(ready, child, what, limit_s=LIMIT_S):
    """Waits until `ready()` gives something, while `child` runs."""
    deadline = time.monotonic() + limit_s
    while True:
        result = ready()
        if result:
            return result
        code = child.poll()
        if code is not None:
            # It may have become ready with its last breath.
            result = ready()
            if result:
                return result
            raise Failed(f"{_named(child.args)} ended with exit code {code} before {what}")
        if time.monotonic() > deadline:
            raise Failed(f"{_named(child.args)}: {what} did not come within {limit_s} s")
        time.sleep(POLL_S)


def _named(command):
    return " ".join([Path(str(command[0])).name, *map(str, command[1:])])


def _last_lines(text, count=15):
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-count:])


class Load:
    """Share of the machine's processors that others took since it was made."""

    def __init__(self):
        self.busy, self.own, self.started = *_processor_seconds(), time.monotonic()

    def of_others(self):
        busy, own = _processor_seconds()
        others = (busy - self.busy) - (own - self.own)
        return max(0.0, others / (time.monotonic() - self.started) / os.cpu_count())


def _processor_seconds():
    """(all processes, this one and its finished children), in seconds."""
    with open("/proc/stat") as stat:
        user, nice, system, _, _, irq, softirq = map(int, stat.readline().split()[1:8])
    times = os.times()
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), sum(times[:4])
