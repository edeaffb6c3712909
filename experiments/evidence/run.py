"""The whole study, cell by cell; what is there is not made again.

python experiments/evidence/run.py --data ../shared/data                 # everything, then the pages
python experiments/evidence/run.py --data ../shared/data --pilot         # one collection, one seed, every method
python experiments/evidence/run.py --data ../shared/data --small         # the whole study at toy size
python experiments/evidence/run.py --pages                               # tables from the committed cells alone
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evidence.protocol import FULL, SMALL, Protocol
from pt_dance.storage.folders import lock_folder

RESULTS = Path(__file__).resolve().parents[1] / "results" / "evidence"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="collections (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="work (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="what is committed (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="the whole study at toy size")
    parser.add_argument("--pilot", action="store_true", help="one collection, one seed, every method and setting")
    parser.add_argument("--pages", action="store_true", help="only the tables and pages, from the committed cells")
    parser.add_argument("--collections", nargs="+", help="only these training collections")
    parser.add_argument("--encoders", nargs="+", help="only these encoders")
    parser.add_argument("--methods", nargs="+", help="only these methods")
    parser.add_argument("--minutes", type=float, help="begin no cell after so many minutes")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each (default: %(default)s)")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def protocol_of(args: argparse.Namespace) -> Protocol:
    """The protocol that the options ask for."""
    protocol = SMALL if args.small else FULL
    if args.pilot:
        budgets = {name: replace(budget, seeds=budget.seeds[:1]) for name, budget in protocol.budgets.items()}
        protocol = replace(protocol, training=protocol.training[:1], encoders=protocol.encoders[:1], budgets=budgets)
    if args.collections:
        protocol = replace(protocol, training=tuple(args.collections))
    if args.encoders:
        protocol = replace(protocol, encoders=tuple(args.encoders))
    return protocol


def work(args: argparse.Namespace, protocol: Protocol) -> None:
    """Make cells until none is left: always the first one whose method no other worker is at."""
    import torch

    from evidence.cells import Study
    from evidence.teacher import TeacherError

    torch.set_float32_matmul_precision("high")  # TF32 on a GPU; nothing on a CPU

    study = Study(protocol, args.data, args.runs)
    ends = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    gc.freeze()  # the trainer collects garbage after every round, and what was imported is none
    without: set[tuple[str, str, str]] = set()  # what has a teacher that knows nothing
    while left := [
        cell
        for cell in study.cells(args.methods)
        if not cell.file(args.runs).exists() and (cell.collection, cell.encoder, cell.method) not in without
    ]:
        if ends is not None and time.monotonic() > ends:
            print(f"no time is left for {len(left)} cells: the same command goes on with them", flush=True)
            return
        for cell in left:
            # All seeds of a method share its tuning: one worker at a time makes them. What methods share is held apart.
            folder = args.runs / "locks" / "cells" / cell.collection / cell.encoder / cell.method
            folder.mkdir(parents=True, exist_ok=True)
            with ExitStack() as held:
                try:
                    held.enter_context(lock_folder(folder, "another worker is at this method"))
                except BlockingIOError:
                    continue
                if not cell.file(args.runs).exists():
                    began = time.monotonic()
                    try:
                        study.run(cell)
                    except TeacherError as error:
                        print(f"{cell}: {error}", flush=True)
                        without.add((cell.collection, cell.encoder, cell.method))
                        break
                    print(f"{cell}: {time.monotonic() - began:.0f} s", flush=True)
                break
        else:
            time.sleep(1)  # others are at every method that has cells left


def main() -> None:
    args = options()
    protocol = protocol_of(args)
    args.runs = args.runs / protocol.name
    if args.worker is not None:
        work(args, protocol)
        return
    results = args.runs / "results" if args.small or args.pilot else args.results
    from evidence.pages import write_pages
    from evidence.tables import collect, unpack

    if not args.pages:
        unpack(protocol, results, args.runs)
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
        threads["TOKENIZERS_PARALLELISM"] = "false"
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--worker", str(number)], env={**os.environ, **threads}
            )
            for number in range(args.jobs)
        ]
        codes = [worker.wait() for worker in workers]
        collect(protocol, args.runs, results)
        if any(codes):
            raise SystemExit("a worker failed; the same command goes on after what was made")
    write_pages(protocol, results, committed=results == RESULTS)


if __name__ == "__main__":
    main()
