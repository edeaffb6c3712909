"""The whole study, cell by cell; what is there is not made again.

python experiments/evidence/run.py --data ../shared/data                 # everything, then the pages
python experiments/evidence/run.py --data ../shared/data --pilot         # one collection, one seed, every method
python experiments/evidence/run.py --data ../shared/data --small         # the whole study at toy size
python experiments/evidence/run.py --pages                               # tables from the committed cells alone
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evidence.protocol import FULL, SMALL, Protocol

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
    """Make this worker's cells, one after the other; every worker takes whatever nobody has begun."""
    from evidence.cells import Study

    study = Study(protocol, args.data, args.runs)
    ends = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    for cell in study.cells(args.methods):
        if ends is not None and time.monotonic() > ends:
            print("no time is left for the other cells: the same command goes on with them", flush=True)
            return
        # All methods and seeds of a collection and encoder share tuning and checkpoints: one worker makes them.
        turn = protocol.training.index(cell.collection)
        if turn % args.jobs != args.worker % args.jobs or cell.file(args.runs).exists():
            continue
        began = time.monotonic()
        study.run(cell)
        print(f"{cell}: {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    args = options()
    protocol = protocol_of(args)
    args.runs = args.runs / protocol.name
    if args.worker is not None:
        work(args, protocol)
        return
    if not args.pages:
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
        threads["TOKENIZERS_PARALLELISM"] = "false"
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--worker", str(number)], env={**os.environ, **threads}
            )
            for number in range(args.jobs)
        ]
        codes = [worker.wait() for worker in workers]
        if any(codes):
            raise SystemExit("a worker failed; the same command goes on after what was made")
    from evidence.pages import collect, write_pages

    if not args.pages:
        collect(protocol, args.runs, args.results if not (args.small or args.pilot) else args.runs / "results")
    write_pages(protocol, args.results if not (args.small or args.pilot) else args.runs / "results")


if __name__ == "__main__":
    main()
