#!/usr/bin/env python3
"""Makes golden.json: where Transformers stops a run of given evaluation losses, and which of its weights are the best.

    pip install transformers numpy
    python make_golden.py > golden.json

The callback is Transformers' own object. `Trainer._determine_best_metric` is taken out of its source, because importing the
Trainer needs PyTorch. Order of the two as in `Trainer._maybe_log_save_evaluate`: the callback hears of an evaluation first.
"""
import ast
import json
import math
import pathlib
import random
import textwrap
from types import SimpleNamespace

import numpy as np
import transformers
from transformers.trainer_callback import EarlyStoppingCallback, TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy


def determine_best_metric():
    path = pathlib.Path(transformers.__file__).parent / "trainer.py"
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == "_determine_best_metric":
            names = {"np": np, "SaveStrategy": SaveStrategy}
            text = textwrap.dedent(ast.get_source_segment(source, node, padded=True))
            exec("from __future__ import annotations\n" + text, names)
            return names["_determine_best_metric"]
    raise SystemExit("this version of Transformers has no _determine_best_metric")


DETERMINE = determine_best_metric()


def run(losses, patience, threshold, greater):
    args = SimpleNamespace(
        metric_for_best_model="loss",
        greater_is_better=greater,
        save_strategy=SaveStrategy.STEPS,
        load_best_model_at_end=True,
        eval_strategy="steps",
    )
    state, control = TrainerState(), TrainerControl()
    callback = EarlyStoppingCallback(patience, threshold)
    trainer = SimpleNamespace(args=args, state=state)
    stops_at = None
    for number, loss in enumerate(losses, 1):
        state.global_step = 10 * number
        metrics = {"eval_loss": loss}
        callback.on_evaluate(args, state, control, metrics)
        DETERMINE(trainer, metrics, None)
        if control.should_training_stop:
            stops_at = state.global_step
            break
    return {
        "losses": [None if math.isnan(loss) else loss for loss in losses],
        "patience": patience,
        "threshold": threshold,
        "greater_is_better": greater,
        "stops_at": stops_at,
        "best_step": state.best_global_step or None,
    }


def main():
    draw = random.Random(7)
    cases = []
    for _ in range(150):
        count = draw.randint(1, 9)
        losses = [draw.choice([0.5, 1.0, 1.25, 1.5, round(draw.random() * 2, 3)]) for _ in range(count)]
        if draw.random() < 0.15:
            losses[: draw.randint(1, 3)] = [math.nan] * draw.randint(1, 3)
        if draw.random() < 0.15:
            losses[draw.randrange(len(losses))] = math.nan
        threshold = draw.choice([0.0, 0.0, 0.1, 0.5])
        cases.append(run(losses, draw.randint(1, 3), threshold, draw.random() < 0.2))
    print(json.dumps(cases, indent=None, separators=(",", ":")).replace("},{", "},\n{"))


main()
