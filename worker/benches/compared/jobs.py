"""Real jobs of Muster: chat data packed, start-up, and two workers beside one.

In: settings, and a folder for what they need (a random model in the shape that is compared, and generated chats). Out: lines
of the table. Coordinator and workers are the programs that a user runs.
"""

import json
import random
import shutil
import socket
import statistics
import subprocess
import time
from pathlib import Path

from . import REPOSITORY, SHAPES
from .processes import Failed, Load, end, report, run, start, wait_until
from .table import Line

WORDS = REPOSITORY / "examples/data/willowmere-stories.jsonl"
TOKENIZER = REPOSITORY / "examples/tiny-qwen3"

CHAT = "chat data, 40% trained: packed against padded"
CHAT_GOAL = 2.0
CHAT_ROWS = 32
CHAT_TOKENS = 512
# The peer's rows in a batch: about as many as a block of Muster holds.
CHAT_BATCH = 4

PREPARED = "chats read, rendered and tokenised"
PREPARED_GOAL = 4.0
PREPARED_ROWS = 50_000

STARTUP = "start of the process to the first finished step, small model"
STARTUP_GOAL = 0.1
STARTUP_ROWS = 100

SCALING = "two workers of one thread against one of two"
SCALING_GOAL = 0.95
SCALING_STEPS = 8
# Steps before those: connections, memory, caches.
WARM_STEPS = 2


def rows():
    return [(CHAT, chat), (PREPARED, prepared), (STARTUP, startup), (SCALING, scaling)]


def chat(settings):
    model, data = settings.model("qwen3-0.6b"), settings.folder / "chat.jsonl"
    write_chats(data, CHAT_ROWS)
    job = ["--set", "base_dtype=bfloat16", "--sequence-len", CHAT_TOKENS, "--num-epochs", 2]
    job += ["--micro-batch-size", 1, "--global-batch-size", 1]
    job = lora_job(model, data, job)
    checked = json.loads(run([settings.coordinator, "check", *job, "--json"]))
    trained = checked["dataset"]["trained_tokens"]
    share = trained / checked["dataset"]["tokens"]
    steps = checked["plan"]["steps"] // 2
    peer = [settings.python, settings.peers / "padded.py", "--model", model, "--data", data, "--batch", CHAT_BATCH]
    peer += ["--longest", CHAT_TOKENS, "--threads", settings.threads]
    speeds = ([], [])
    load = Load()
    for _ in range(settings.rounds):
        output = settings.fresh("chat")
        options = ["--single-node", "--threads", settings.threads, "--output-dir", output]
        coordinator = begin(settings, [*job, *options], output)
        try:
            times = arrivals(coordinator, output, 2 * steps)
        finally:
            end(coordinator)
        # The second epoch: the first one warmed up.
        speeds[0].append(trained / (times[-1][0] - times[steps - 1][0]))
        theirs = report(peer)
        if theirs["trained_tokens"] != trained:
            raise Failed(f"the peer trains {theirs['trained_tokens']} tokens of the same data, Muster {trained}")
        speeds[1].append(theirs["trained_tokens_per_second"])
    ours, theirs = map(statistics.median, speeds)
    yield Line(CHAT, "trained tokens/s", ours, theirs, CHAT_GOAL, load.of_others(), remark=f"{share:.0%} of the tokens are trained")


def prepared(settings):
    model, data = settings.chat_model or settings.model("small"), settings.folder / "prepared.jsonl"
    write_chats(data, PREPARED_ROWS)
    peer = [settings.python, settings.peers / "prepare.py", "--model", model, "--data", data, "--processes", settings.threads]
    speeds = ([], [])
    load = Load()
    for _ in range(settings.rounds):
        started = time.monotonic()
        # With the masks of what is learned and the packing, which the peer does not make.
        run([settings.coordinator, "check", *lora_job(model, data, ["--output-dir", settings.fresh("prepared")])])
        speeds[0].append(PREPARED_ROWS / (time.monotonic() - started))
        speeds[1].append(report(peer)["rows_per_second"])
    ours, theirs = map(statistics.median, speeds)
    yield Line(PREPARED, "rows/s", ours, theirs, PREPARED_GOAL, load.of_others())


def startup(settings):
    model, data = settings.model("small"), settings.folder / "startup.jsonl"
    write_chats(data, STARTUP_ROWS)
    job = lora_job(model, data, ["--sequence-len", 128, "--micro-batch-size", 8, "--global-batch-size", 8])
    peer = [settings.python, settings.peers / "startup.py", "--model", model, "--data", data]
    peer += ["--batch", 8, "--longest", 128, "--threads", settings.threads]
    seconds = ([], [])
    load = Load()
    for _ in range(max(3, settings.rounds)):
        output = settings.fresh("startup")
        options = ["--single-node", "--threads", settings.threads, "--output-dir", output]
        coordinator, started = begin(settings, [*job, *options], output), time.monotonic()
        try:
            seconds[0].append(arrivals(coordinator, output, 1)[0][0] - started)
        finally:
            end(coordinator)
        seconds[1].append(report(peer)["first_step_seconds"])
    ours, theirs = map(statistics.median, seconds)
    yield Line(STARTUP, "s", ours, theirs, STARTUP_GOAL, load.of_others(), at_most=True)


def scaling(settings):
    model, data = settings.model("qwen3-0.6b"), settings.folder / "scaling.jsonl"
    write_chats(data, 4 * (WARM_STEPS + SCALING_STEPS))
    job = ["--set", "base_dtype=bfloat16", "--sequence-len", 128, "--max-steps", WARM_STEPS + SCALING_STEPS]
    job += ["--micro-batch-size", 2, "--global-batch-size", 4, "--save-steps", 0]
    job = lora_job(model, data, job)
    speeds, weights = {1: [], 2: []}, set()
    load = Load()
    for _ in range(settings.rounds):
        for workers in (2, 1):
            speed, digest = distributed_run(settings, job, workers, settings.threads // workers)
            speeds[workers].append(speed)
            weights.add(digest)
    if len(weights) != 1:
        raise Failed(f"one worker and two ended with different weights: {weights}")
    ours, alone = statistics.median(speeds[2]), statistics.median(speeds[1])
    remark = "the column of the peer is Muster with one worker; the weights are equal"
    yield Line(SCALING, "tokens/s", ours, alone, SCALING_GOAL, load.of_others(), remark=remark)


def distributed_run(settings, job, workers, threads):
    """Tokens a second after the first steps, and the digest of the final weights."""
    output, port = settings.fresh("scaling"), free_port()
    options = ["--listen", f"127.0.0.1:{port}", "--min-workers", workers, "--output-dir", output]
    children = [begin(settings, [*job, *options], output)]
    try:
        for _ in range(workers):
            join = [settings.worker, "join", f"127.0.0.1:{port}", "--threads", threads]
            join += ["--cache-dir", settings.folder / "cache"]
            children.append(start(join, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        times = arrivals(children[0], output, WARM_STEPS + SCALING_STEPS)
        summary = output / "run.json"
        final = wait_until(lambda: final_digest(summary), children[0], "the digest of the final weights", 120)
    finally:
        # Workers first: they would wait for their coordinator.
        for child in reversed(children):
            end(child)
    (begun, first), (ended, last) = times[WARM_STEPS - 1], times[-1]
    return (last["num_tokens"] - first["num_tokens"]) / (ended - begun), final


def final_digest(summary):
    try:
        return json.loads(summary.read_text()).get("weights_digest")
    except (OSError, ValueError):
        return None


def lora_job(model, data, more):
    return ["--base-model", model, "--dataset", data, "--adapter", "lora", "--logging-steps", 1, *more]


def begin(settings, options, output):
    """Starts a coordinator whose words go to a file beside its output."""
    with open(output.with_suffix(".log"), "w") as log:
        return start([settings.coordinator, "start", *options], stdout=log, stderr=subprocess.STDOUT)


def arrivals(coordinator, output, count):
    """When each of the first `count` steps was recorded, and its record."""
    seen, metrics = [], output / "metrics.jsonl"

    def look():
        try:
            lines = metrics.read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return None
        now = time.monotonic()
        whole = [line for line in lines if line.endswith("\n") and '"loss"' in line]
        seen.extend((now, json.loads(line)) for line in whole[len(seen) :])
        return len(seen) >= count

    try:
        wait_until(look, coordinator, f"step {count}")
    except Failed as failure:
        log = output.with_suffix(".log").read_text().strip().splitlines()[-15:]
        raise Failed("\n    ".join([str(failure), *log])) from None
    return seen[:count]


def write_chats(path, count):
    """Chats as people have them: mostly short, some long; two fifths of the tokens are the assistant's."""
    rng = random.Random(0)
    with open(WORDS) as rows:
        words = " ".join(json.loads(row)["text"] for row in rows).split()

    def text(length):
        begin = rng.randrange(len(words) - length)
        return " ".join(words[begin : begin + length])

    with open(path, "w") as chats:
        for _ in range(count):
            length = min(220, max(12, round(rng.lognormvariate(4.2, 0.7))))
            answer = max(2, round(length * rng.uniform(0.25, 0.6)))
            turns = [("user", text(length - answer)), ("assistant", text(answer))]
            messages = [{"role": role, "content": content} for role, content in turns]
            chats.write(json.dumps({"messages": messages}) + "\n")


def write_model(settings, shape, folder):
    """Random weights in a shape, with a small tokenizer: a folder that both sides load."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    run([settings.python, settings.peers / "model.py", "--config", SHAPES / f"{shape}.json", "--out", folder])
    # As it was given: what is written beside the weights has newer names in it.
    shutil.copy(SHAPES / f"{shape}.json", folder / "config.json")
    return Path(folder)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
