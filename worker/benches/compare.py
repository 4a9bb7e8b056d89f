"""Muster beside PyTorch + Transformers + PEFT on this machine, in turn (A B A B), as a table of ratios.

    cargo build --release -p worker
    python worker/benches/compare.py --python PYTHON [--threads 2] [--rounds 2] [--only TEXT] [--compile]

PYTHON has torch, transformers and peft. Run it on a machine that does nothing else: the share of the processors that other
processes took is printed with each row, and a row above 5% means nothing.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHAPES = HERE / "shapes"

# Name, shape, options of both programs, goal for tokens/s, goal for memory.
ROWS = [
    ("LoRA bfloat16, 4 x 128", "qwen3-0.6b", "--mode lora --dtype bfloat16 --batch 4 --seq 128", 1.75, 0.5),
    ("LoRA bfloat16, 1 x 512", "qwen3-0.6b", "--mode lora --dtype bfloat16 --batch 1 --seq 512", 1.75, 0.5),
    ("LoRA float32, 4 x 128", "qwen3-0.6b", "--mode lora --dtype float32 --batch 4 --seq 128", 1.4, 0.5),
    ("LoRA float32, 1 x 512", "qwen3-0.6b", "--mode lora --dtype float32 --batch 1 --seq 512", 1.4, 0.5),
    ("full float32, 2 x 128", "qwen3-0.6b", "--mode full --dtype float32 --batch 2 --seq 128", 1.3, 1.0),
    (
        "LoRA bfloat16, 4 x 128, checkpointing",
        "qwen3-0.6b",
        "--mode lora --dtype bfloat16 --batch 4 --seq 128 --gradient-checkpointing",
        1.75,
        0.5,
    ),
    (
        "LoRA float32, 4 x 128, checkpointing",
        "qwen3-0.6b",
        "--mode lora --dtype float32 --batch 4 --seq 128 --gradient-checkpointing",
        1.4,
        0.5,
    ),
    (
        "full float32, 2 x 128, checkpointing",
        "qwen3-0.6b",
        "--mode full --dtype float32 --batch 2 --seq 128 --gradient-checkpointing",
        1.3,
        1.0,
    ),
    ("small, LoRA float32, 8 x 128", "small", "--mode lora --dtype float32 --batch 8 --seq 128", 2.5, None),
    ("small, full float32, 8 x 128", "small", "--mode full --dtype float32 --batch 8 --seq 128", 2.5, None),
]
# A step of the small model takes a tenth of a second.
MORE_STEPS = {"small": 10}
COMPILED = "LoRA bfloat16, 4 x 128"
COMPILED_GOAL = 1.2


def processor_seconds():
    """(all processes, this process's finished children), in seconds."""
    with open("/proc/stat") as stat:
        user, nice, system, _, _, irq, softirq = map(int, stat.readline().split()[1:8])
    busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    times = os.times()
    return busy, times.children_user + times.children_system


def measure(command):
    """Runs one program. Its report, with the share of the processors that others took."""
    busy, own, started = *processor_seconds(), time.monotonic()
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    busy_after, own_after = processor_seconds()
    others = (busy_after - busy) - (own_after - own)
    report = json.loads(done.stdout.strip().splitlines()[-1])
    report["others"] = max(0.0, others / (time.monotonic() - started) / os.cpu_count())
    return report


def alternate(ours, theirs, rounds):
    reports = ([], [])
    for _ in range(rounds):
        for command, into in zip((ours, theirs), reports):
            into.append(measure(command))
    return reports


def summary(reports):
    speed = statistics.median(report["tokens_per_second_median"] for report in reports)
    memory = max(report["peak_memory_bytes"] for report in reports) / 1e9
    return speed, memory


def row_of(name, reports, goal, memory_goal):
    (our_speed, our_memory), (their_speed, their_memory) = map(summary, reports)
    others = max(report["others"] for side in reports for report in side)
    share = statistics.median(report["share_of_gemm_peak"] for report in reports[0])
    speed, memory = our_speed / their_speed, our_memory / their_memory
    wanted = f"{goal:.2f}x" + (f", {memory_goal:.1f}x" if memory_goal else "")
    return (
        f"| {name} | {our_speed:,.1f} | {their_speed:,.1f} | **{speed:.2f}x** | {our_memory:.2f} | {their_memory:.2f} "
        f"| {memory:.2f}x | {wanted} | {share:.0%} | {others:.0%} |"
    )


def processor():
    with open("/proc/cpuinfo") as cpus:
        names = [line.split(":", 1)[1].strip() for line in cpus if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="a Python with torch, transformers and peft")
    parser.add_argument("--worker", default=str(HERE.parents[1] / "target/release/worker"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (minutes)")
    args = parser.parse_args()

    cores = f"{args.threads} threads on {processor()}"
    print(f"{datetime.date.today()}, {cores}; medians of {args.steps} steps, {args.rounds} rounds in turn\n")
    print("| work | Muster tokens/s | PyTorch tokens/s | ratio | Muster GB | PyTorch GB | ratio | goal | of GEMM peak | others |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    rows = [(*row, []) for row in ROWS]
    if args.compile:
        name, shape, options, _, memory_goal = next(row for row in ROWS if row[0] == COMPILED)
        rows.append((f"{name}, torch.compile", shape, options, COMPILED_GOAL, memory_goal, ["--compile"]))
    for name, shape, options, goal, memory_goal, extra in rows:
        if args.only not in name:
            continue
        steps = args.steps * MORE_STEPS.get(shape, 1)
        common = ["--config", str(SHAPES / f"{shape}.json"), *options.split()]
        common += ["--threads", str(args.threads), "--steps", str(steps), "--warmup", "1"]
        ours = [args.worker, "bench", *common, "--json"]
        theirs = [args.python, str(HERE / "peer.py"), *common, *extra]
        reports = alternate(ours, theirs, args.rounds)
        print(row_of(name, reports, goal, memory_goal), flush=True)


if __name__ == "__main__":
    main()
