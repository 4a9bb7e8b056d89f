"""The parts of `compare.py`: processes that end with it, what it compares, and how it prints that."""

from pathlib import Path

BENCHES = Path(__file__).resolve().parents[1]
REPOSITORY = BENCHES.parents[1]
SHAPES = BENCHES / "shapes"
