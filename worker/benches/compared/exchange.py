"""The exact sum of gradients against gloo's float32 all-reduce of as many scalars, over the loopback."""

import statistics

from .processes import Load, report
from .table import Line

SIZES = [250_000, 1_000_000, 10_000_000, 100_000_000]
RANKS = [2, 4]
GOAL = 1.0
STEPS = 9


def rows():
    cases = [(ranks, scalars) for ranks in RANKS for scalars in SIZES]
    return [
        (f"exchange, {ranks} ranks, {scalars / 1e6:g} million scalars", lambda settings, case=(ranks, scalars): lines(settings, *case))
        for ranks, scalars in cases
    ]


def lines(settings, ranks, scalars):
    common = ["--ranks", ranks, "--scalars", scalars, "--steps", STEPS]
    programs = (
        [settings.worker, "bench-exchange", *common, "--json"],
        [settings.python, settings.peers / "exchange.py", *common],
    )
    load = Load()
    seconds = ([], [])
    for _ in range(settings.rounds):
        for program, into in zip(programs, seconds):
            into.append(report(program)["seconds_median"])
    ours, theirs = (1e3 * statistics.median(side) for side in seconds)
    name = f"exchange, {ranks} ranks, {scalars / 1e6:g} million scalars"
    yield Line(name, "ms", ours, theirs, GOAL, load.of_others(), inverse=True)
