"""Muster beside PyTorch + Transformers + PEFT on this machine, in turn (A B A B), as a table of ratios and goals.

    cargo build --release --workspace
    python worker/benches/compare.py --python PYTHON [--threads 2] [--rounds 2] [--only TEXT] [--list] [--compile]

PYTHON has torch, transformers and peft (`pip install torch transformers peft accelerate`, and bitsandbytes for the row on 4 bits); nothing is downloaded. All weights are random. Run it
on a machine that does nothing else: the last column is the share of the processors that other processes took meanwhile, and a
row above 5% means nothing. Ctrl-C ends it and all that it started. A row that cannot be measured says why, the others go on, and
the exit code is 1; it is 0 however many goals were missed.

Rows: training steps (`worker bench` against peer/train.py), chats packed against padded (a real `coordinator start
--single-node` against peer/padded.py), chats made ready for training (`coordinator check` against `datasets` and
`apply_chat_template`, peer/prepare.py; --chat-model names a model whose tokenizer and template are meant), start-up (against a Transformers Trainer, peer/startup.py), two workers against one
(real coordinator and workers), and the exchange (`worker bench-exchange` against gloo, peer/exchange.py).
"""

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from compared import BENCHES, REPOSITORY, exchange, jobs, steps
from compared.processes import Failed, end_with_us, run
from compared.table import RULE, TITLE

FREE_DISK_BYTES = 6e9


class Settings:
    """What every row needs to know."""

    def __init__(self, args, folder):
        self.python, self.threads = args.python, args.threads
        self.rounds, self.steps = args.rounds, args.steps
        self.worker, self.coordinator = args.binaries / "worker", args.binaries / "coordinator"
        self.peers, self.folder = BENCHES / "peer", folder
        self.chat_model = args.chat_model
        self.outputs = 0

    def model(self, shape):
        """The folder with that model, made on first use."""
        folder = self.folder / shape
        return folder if folder.exists() else jobs.write_model(self, shape, folder)

    def fresh(self, name):
        """A name for an output folder that is not there yet."""
        self.outputs += 1
        return self.folder / f"{name}-{self.outputs}"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="a Python with torch, transformers and peft")
    parser.add_argument("--binaries", type=Path, default=REPOSITORY / "target/release", help="where worker and coordinator are")
    parser.add_argument("--chat-model", type=Path, help="folder of a chat model, for the row on preparing data")
    parser.add_argument("--threads", type=int, default=2, help="of each side; even, for the row with two workers")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="measured in each round of the training rows")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (minutes)")
    args = parser.parse_args()
    if min(args.threads, args.rounds, args.steps) < 1:
        parser.error("threads, rounds and steps are at least 1")
    return args


def missing(args):
    """What has to be there before anything is measured."""
    for name in ("worker", "coordinator"):
        if not os.access(args.binaries / name, os.X_OK):
            yield f"{args.binaries / name} is not there: run `cargo build --release --workspace` first"
    try:
        subprocess.run([args.python, "-c", "import torch, transformers, peft"], check=True, capture_output=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield f"{args.python} cannot be run: {error}"
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
        yield f"{args.python} lacks something: {' '.join(last)}; give one with torch, transformers and peft by --python"
    if shutil.disk_usage(tempfile.gettempdir()).free < FREE_DISK_BYTES:
        yield f"less than {FREE_DISK_BYTES / 1e9:.0f} GB are free in {tempfile.gettempdir()} (TMPDIR)"


def processor():
    try:
        with open("/proc/cpuinfo") as cpus:
            names = [line.split(":", 1)[1].strip() for line in cpus if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def heading(args):
    code = "import torch, transformers, peft; print(f'torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}')"
    versions = run([args.python, "-c", code]).strip()
    cores = f"{args.threads} of {os.cpu_count()} threads on {processor()}"
    return f"{datetime.date.today()}, {cores}; {versions}; {args.rounds} rounds in turn"


def main():
    args = arguments()
    rows = [*steps.rows(args.compile), *jobs.rows(), *exchange.rows()]
    rows = [(name, lines) for name, lines in rows if args.only in name]
    if args.list:
        print("\n".join(name for name, _ in rows))
        return 0
    if not rows:
        sys.exit(f"no row has {args.only!r} in its name; --list prints them")
    faults = list(missing(args))
    if faults:
        sys.exit("\n".join(faults))
    end_with_us()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="muster-compare-") as folder:
        settings = Settings(args, Path(folder))
        print(f"{heading(args)}\n\n{TITLE}\n{RULE}", flush=True)
        for name, lines in rows:
            try:
                for line in lines(settings):
                    print(line, flush=True)
            except Failed as failure:
                failed += 1
                print(f"| {name} | | | | | | not measured | |", flush=True)
                print(f"{name}: {failure}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
