"""Writes golden.json: what `interleave_datasets` (datasets 5.2) makes of sets of some lengths, with the draws of numpy that
it made, and which rows TRL's `get_dataset` keeps for some fractions.

    python make.py > golden.json
"""

import json

import numpy
from datasets import Dataset, interleave_datasets

STRATEGIES = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}

LENGTHS = [[3, 4, 5], [1, 7], [6, 2, 2, 9], [4, 4], [12]]
PROBABILITIES = [[0.2, 0.3, 0.5], [0.9, 0.1], [0.1, 0.2, 0.3, 0.4], [0.5, 0.5]]
FRACTIONS = [([10, 40], [1, 1]), ([100, 30, 7], [0.5, 0.3, 0.2]), ([5, 5], [3, 1]), ([9], [0.1])]


def indices(lengths, probabilities, seed, strategy):
    sets, first = [], 0
    for length in lengths:
        sets.append(Dataset.from_dict({"row": list(range(first, first + length))}))
        first += length
    mixed = interleave_datasets(sets, probabilities=probabilities, seed=seed, stopping_strategy=strategy)
    return list(mixed["row"])


def draws(count, probabilities, seed):
    generator = numpy.random.default_rng(seed)
    return [int(draw) for draw in generator.choice(count, size=1000, p=probabilities)]


def trl(lengths, fractions):
    weights = [fraction / sum(fractions) for fraction in fractions]
    total = min(length / weight for length, weight in zip(lengths, weights) if weight > 0)
    return [round(weight * total) for weight in weights]


cases = []
for ours, theirs in STRATEGIES.items():
    for lengths in LENGTHS:
        cases.append({"lengths": lengths, "strategy": ours, "rows": indices(lengths, None, None, theirs)})
    for lengths, probabilities in zip(LENGTHS, PROBABILITIES):
        for seed in [0, 42]:
            rows = indices(lengths, probabilities, seed, theirs)
            # What was drawn, behind the last row that it took as well.
            drawn = draws(len(lengths), probabilities, seed)
            cases.append({"lengths": lengths, "strategy": ours, "draws": drawn[:300], "rows": rows})
fractions = [{"lengths": l, "fractions": f, "taken": trl(l, f)} for l, f in FRACTIONS]
print(json.dumps({"interleaved": cases, "fractions": fractions}, separators=(",", ":")))
