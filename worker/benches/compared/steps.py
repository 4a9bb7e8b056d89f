"""Training steps alone: `worker bench` against `peer/train.py`, the same shape, batch and threads."""

import statistics

from . import SHAPES
from .processes import Load, report
from .table import Line

# Name, shape, options of both programs, goal for tokens/s, goal for memory.
STEPS = [
    ("LoRA bfloat16, 4 x 128", "qwen3-0.6b", "--mode lora --dtype bfloat16 --batch 4 --seq 128", 1.75, 0.5),
    ("LoRA bfloat16, 1 x 512", "qwen3-0.6b", "--mode lora --dtype bfloat16 --batch 1 --seq 512", 1.75, 0.5),
    ("LoRA float32, 4 x 128", "qwen3-0.6b", "--mode lora --dtype float32 --batch 4 --seq 128", 1.4, 0.5),
    ("LoRA float32, 1 x 512", "qwen3-0.6b", "--mode lora --dtype float32 --batch 1 --seq 512", 1.4, 0.5),
    ("LoRA on 4 bits, bfloat16, 4 x 128", "qwen3-0.6b", "--mode lora --dtype bfloat16 --load-in-4bit --batch 4 --seq 128", 1.2, 0.5),
    ("full float32, 2 x 128", "qwen3-0.6b", "--mode full --dtype float32 --batch 2 --seq 128", 1.3, 1.0),
    ("full bfloat16, 2 x 128", "qwen3-0.6b", "--mode full --dtype bfloat16 --batch 2 --seq 128", 1.3, 1.0),
    ("small, LoRA float32, 8 x 128", "small", "--mode lora --dtype float32 --batch 8 --seq 128", 2.5, None),
    ("small, full float32, 8 x 128", "small", "--mode full --dtype float32 --batch 8 --seq 128", 2.5, None),
]
# What ours is told beside, for what the peer does without being asked.
OURS = {"full bfloat16, 2 x 128": ["--pure-bf16"]}
CHECKPOINTED = ["LoRA bfloat16, 4 x 128", "LoRA float32, 4 x 128", "full float32, 2 x 128"]
COMPILED = "LoRA bfloat16, 4 x 128"
COMPILED_GOAL = 1.2
# A step of the small model takes a tenth of a second.
MORE_STEPS = {"small": 10}


def rows(compiled):
    """(name, function of the settings that gives the lines)"""
    cases = [(*row, OURS.get(row[0], []), []) for row in STEPS]
    for name, shape, options, goal, memory_goal in STEPS:
        if name in CHECKPOINTED:
            cases.append((f"{name}, checkpointing", shape, f"{options} --gradient-checkpointing", goal, memory_goal, [], []))
        if name == COMPILED and compiled:
            compiled_row = (shape, options, COMPILED_GOAL, memory_goal)
            cases.append((f"{name}, torch.compile", *compiled_row, [], ["--compile"]))
            # What compiling saves in memory, checkpointing saves here: is it still faster then?
            name = f"{name}, checkpointing against torch.compile without"
            cases.append((name, *compiled_row, ["--gradient-checkpointing"], ["--compile"]))
    return [(case[0], lambda settings, case=case: lines(settings, *case)) for case in cases]


def lines(settings, name, shape, options, goal, memory_goal, ours, peers):
    steps = settings.steps * MORE_STEPS.get(shape, 1)
    common = ["--config", SHAPES / f"{shape}.json", *options.split()]
    common += ["--threads", settings.threads, "--steps", steps, "--warmup", 1]
    programs = (
        [settings.worker, "bench", *common, *ours, "--json"],
        [settings.python, settings.peers / "train.py", *common, *peers],
    )
    load = Load()
    reports = ([], [])
    for _ in range(settings.rounds):
        for program, into in zip(programs, reports):
            into.append(report(program))
    others = load.of_others()
    speeds = [statistics.median(run["tokens_per_second_median"] for run in side) for side in reports]
    memory = [max(run["peak_memory_bytes"] for run in side) / 1e9 for side in reports]
    share = statistics.median(run["share_of_gemm_peak"] for run in reports[0])
    yield Line(name, "tokens/s", *speeds, goal, others, remark=f"{share:.0%} of the GEMM peak")
    if memory_goal:
        yield Line(name, "GB", *memory, memory_goal, others, at_most=True)
