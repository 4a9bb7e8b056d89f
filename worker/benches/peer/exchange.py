"""gloo's float32 all-reduce over the loopback, as `worker bench-exchange` is Muster's exact sum.

In: a number of ranks and of scalars. Out: one JSON line with the seconds of an all-reduce, the slowest rank's, in medians.
Each rank is a process of one thread; this one starts them and ends them.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time

# For starting, connecting and all rounds together.
LIMIT_S = 300


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--scalars", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=7)
    return parser.parse_args()


def work(rank, args, meeting_point, results):
    # Ctrl-C is for the parent, which ends all ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=args.ranks)
    gradient = torch.full((args.scalars,), 1e-4)
    seconds = []
    for _ in range(args.steps + 1):
        gradient.fill_(1e-4)
        distributed.barrier()
        started = time.perf_counter()
        distributed.all_reduce(gradient)
        slowest = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
        distributed.all_reduce(slowest, op=distributed.ReduceOp.MAX)
        seconds.append(float(slowest))
    if abs(float(gradient[-1]) - 1e-4 * args.ranks) > 1e-8:
        raise SystemExit("gloo's sum is wrong")
    if rank == 0:
        # The first one is not measured.
        results.put((seconds[1:], torch.__version__))
    distributed.destroy_process_group()


def main():
    args = arguments()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.Queue()
        meeting_point = os.path.join(folder, "meeting-point")
        ranks = [
            context.Process(target=work, args=(rank, args, meeting_point, results), daemon=True)
            for rank in range(args.ranks)
        ]
        try:
            for process in ranks:
                process.start()
            deadline = time.monotonic() + LIMIT_S
            for process in ranks:
                process.join(max(0.0, deadline - time.monotonic()))
                if process.exitcode != 0:
                    sys.exit(f"a rank of gloo did not finish (exit code {process.exitcode})")
            seconds, version = results.get(timeout=10)
        finally:
            for process in ranks:
                with contextlib.suppress(AttributeError, ValueError):
                    process.kill()
    report = {
        "ranks": args.ranks,
        "scalars": args.scalars,
        "seconds_median": statistics.median(seconds),
        "seconds_best": min(seconds),
        "torch": version,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
