"""Makes schedules.json: learning rates at every step of short runs, by the functions of Transformers and Axolotl.

    python common/tests/make_schedules.py SCHEDULERS_OF_AXOLOTL > common/tests/schedules.json

SCHEDULERS_OF_AXOLOTL is `src/axolotl/utils/schedulers.py` of a checkout of Axolotl. Transformers has to be installed; PyTorch need not be:
the functions compute with plain numbers, so that empty modules stand in its place where they are imported. PyTorch's OneCycleLR is
the one curve that is not called but written out, from its documentation (torch.optim.lr_scheduler.OneCycleLR).
"""

import importlib.util
import json
import math
import pathlib
import sys
import types

PEAK = 2e-4
# (steps of the run, steps of the warm-up)
RUNS = [(1, 0), (2, 2), (10, 3), (37, 0), (60, 6), (6, 9)]


class LRScheduler:
    """What RexLR needs of PyTorch's class: the first rate is the one after one call of step()."""

    def __init__(self, optimizer, last_epoch=-1):
        self.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        self.last_epoch = last_epoch + 1


class LambdaLR:
    def __init__(self, optimizer, lr_lambda, last_epoch=-1):
        self.rate = lambda step: optimizer.defaults["lr"] * lr_lambda(step)


class Optimizer:
    def __init__(self):
        self.defaults = {"lr": PEAK}
        self.param_groups = [{"lr": PEAK}]


def stand_in(name, **members):
    module = types.ModuleType(name)
    module.__dict__.update(members)
    module.__spec__ = importlib.util.spec_from_loader(name, None)
    sys.modules[name] = module
    return module


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def modules(axolotl):
    # Imported first, while it can see that there is no PyTorch.
    import transformers
    import transformers.trainer_utils
    import transformers.utils

    no_grad = lambda: (lambda function: function)
    scheduler = stand_in(
        "torch.optim.lr_scheduler", LambdaLR=LambdaLR, LRScheduler=LRScheduler, ReduceLROnPlateau=object
    )
    optim = stand_in("torch.optim", Optimizer=Optimizer, lr_scheduler=scheduler)
    stand_in("torch", Tensor=type("Tensor", (), {}), optim=optim, no_grad=no_grad)
    stand_in("transformers.trainer_pt_utils", LayerWiseDummyOptimizer=object, LayerWiseDummyScheduler=object)
    folder = pathlib.Path(transformers.__file__).parent
    return (
        load("transformers.optimization", folder / "optimization.py"),
        load("schedulers_of_axolotl", axolotl),
        transformers.__version__,
    )


def one_cycle(total, warmup, pct_start=None, anneal_strategy="cos", div_factor=25.0, final_div_factor=1e4, three_phase=False):
    """PyTorch's OneCycleLR, with what Axolotl gives it: the share of the warm-up as pct_start."""
    share = warmup / total if pct_start is None else pct_start
    first = PEAK / div_factor
    last = first / final_div_factor
    if three_phase:
        phases = [
            (share * total - 1, first, PEAK),
            (2 * share * total - 2, PEAK, first),
            (total - 1, first, last),
        ]
    else:
        phases = [(share * total - 1, first, PEAK), (total - 1, PEAK, last)]

    def rate(step):
        start = 0
        for index, (end, at_start, at_end) in enumerate(phases):
            if step <= end or index == len(phases) - 1:
                progress = (step - start) / (end - start)
                if anneal_strategy == "cos":
                    return at_end + (at_start - at_end) / 2 * (1 + math.cos(math.pi * progress))
                return (at_end - at_start) * progress + at_start
            start = end

    return rate


def rex(axolotl, total, warmup, min_lr):
    schedule = axolotl.RexLR(Optimizer(), max_lr=PEAK, min_lr=min_lr, total_steps=total, num_warmup_steps=warmup)
    first = schedule.last_epoch

    def rate(step):
        schedule.last_epoch = first + step
        return schedule.get_lr()[0]

    return rate


def cases(transformers, axolotl):
    """(lines of the job, the rate as a function of steps and warm-up). A function raises where there is no such curve."""

    def named(name, function, settings_list):
        for settings in settings_list:
            lines = {"lr_scheduler": name}
            if settings:
                lines["lr_scheduler_kwargs"] = settings
            yield lines, lambda total, warmup, settings=settings: function(
                Optimizer(), num_warmup_steps=warmup, num_training_steps=total, **settings
            ).rate

    yield from named("linear", transformers.get_linear_schedule_with_warmup, [{}])
    yield {"lr_scheduler": "constant_with_warmup"}, lambda total, warmup: (
        transformers.get_constant_schedule_with_warmup(Optimizer(), warmup).rate
    )
    yield from named("cosine", transformers.get_cosine_schedule_with_warmup, [{}, {"num_cycles": 1.25}])
    yield from named(
        "cosine_with_restarts",
        transformers.get_cosine_with_hard_restarts_schedule_with_warmup,
        [{}, {"num_cycles": 3}],
    )
    yield from named(
        "polynomial",
        transformers.get_polynomial_decay_schedule_with_warmup,
        [{}, {"lr_end": 1e-5, "power": 2.0}, {"power": 0.5}],
    )
    for settings in [{}, {"timescale": 7}]:
        lines = {"lr_scheduler": "inverse_sqrt"} | ({"lr_scheduler_kwargs": settings} if settings else {})
        yield lines, lambda total, warmup, settings=settings: (
            transformers.get_inverse_sqrt_schedule(Optimizer(), warmup, **settings).rate
        )
    yield from named(
        "cosine_with_min_lr",
        transformers.get_cosine_with_min_lr_schedule_with_warmup,
        [{"min_lr": 1e-5}, {"min_lr_rate": 0.1, "num_cycles": 1.5}],
    )
    yield from named(
        "cosine_warmup_with_min_lr",
        transformers.get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
        [{"min_lr_rate": 0.1}, {"min_lr": 3e-5, "warmup_lr_rate": 0.2}],
    )
    yield from named(
        "warmup_stable_decay",
        transformers.get_wsd_schedule,
        [
            {"num_decay_steps": 4},
            {"num_decay_steps": 3, "num_stable_steps": 2, "decay_type": "linear", "min_lr_ratio": 0.1},
            {"num_decay_steps": 5, "warmup_type": "cosine", "decay_type": "1-sqrt"},
            {"num_decay_steps": 20, "warmup_type": "1-sqrt", "num_cycles": 1.5, "min_lr_ratio": 0.25},
        ],
    )
    # LLaMA-Factory's numbers of steps, where none are given.
    yield {"lr_scheduler": "warmup_stable_decay"}, lambda total, warmup: transformers.get_wsd_schedule(
        Optimizer(),
        num_warmup_steps=warmup,
        num_training_steps=total,
        num_stable_steps=(total - warmup) // 3,
        num_decay_steps=(total - warmup) - (total - warmup) // 3,
    ).rate

    for ratio in [0.1, 1.0]:
        lines = {"lr_scheduler": "cosine", "cosine_min_lr_ratio": ratio}
        yield lines, lambda total, warmup, ratio=ratio: (
            axolotl.get_cosine_schedule_with_min_lr(Optimizer(), warmup, total, ratio).rate
        )
    for share in [0.8, 0.1]:
        lines = {"lr_scheduler": "cosine", "cosine_min_lr_ratio": 0.1, "cosine_constant_lr_ratio": share}
        yield lines, lambda total, warmup, share=share: (
            axolotl.get_cosine_schedule_with_warmup_decay_constant(Optimizer(), warmup, total, share, 0.1).rate
        )
    yield {"lr_scheduler": "cosine", "lr_quadratic_warmup": True}, lambda total, warmup: (
        axolotl.get_cosine_schedule_with_quadratic_warmup(Optimizer(), warmup, total).rate
    )
    yield {"lr_scheduler": "rex"}, lambda total, warmup: rex(axolotl, total, warmup, 0)
    yield {"lr_scheduler": "rex", "cosine_min_lr_ratio": 0.2}, lambda total, warmup: (
        rex(axolotl, total, warmup, PEAK * 0.2)
    )
    for settings in [{}, {"three_phase": True, "div_factor": 10}, {"anneal_strategy": "linear", "final_div_factor": 100}]:
        lines = {"lr_scheduler": "one_cycle", "lr_scheduler_kwargs": settings | {"cycle_momentum": False}}
        yield lines, lambda total, warmup, settings=settings: one_cycle(total, warmup, **settings)
    lines = {"lr_scheduler": "one_cycle", "lr_scheduler_kwargs": {"pct_start": 0.3, "cycle_momentum": False}}
    yield lines, lambda total, warmup: one_cycle(total, None, pct_start=0.3)


def main():
    transformers, axolotl, version = modules(sys.argv[1])
    rows = []
    for lines, curve in cases(transformers, axolotl):
        has_warmup = "pct_start" not in lines.get("lr_scheduler_kwargs", {})
        for total, warmup in RUNS:
            job = {"learning_rate": PEAK} | lines
            if has_warmup:
                job["warmup_steps"] = warmup
            try:
                rate = curve(total, warmup)
                rates = [rate(step) for step in range(total)]
            except (ZeroDivisionError, ValueError):
                continue  # No such curve: the warm-up is longer than the run.
            rows.append({"job": job, "rates": rates})
    print('{"made_with": ' + json.dumps({"transformers": version}) + ', "cases": [')
    print(",\n".join(json.dumps(row) for row in rows))
    print("]}")


main()
