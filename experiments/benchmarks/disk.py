"""What an installation takes on disk: the package with all that it requires, and CUDA's libraries among that.

    python experiments/benchmarks/disk.py --out experiments/results/disk.json

Sizes are those of the files that installers have written down; compiled caches are left out.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CUDA = ("nvidia-", "cuda-", "triton")


def required(name: str, extras: frozenset[str] = frozenset()) -> dict[str, Distribution]:
    """Return a distribution with all that it requires, by name; what is not installed here is left out."""
    found: dict[str, Distribution] = {}
    seen, waiting = set(), [(name, extras)]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        name, extras = one
        try:
            found[canonicalize_name(name)] = here = distribution(name)
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, here.requires or []):
            if requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}
            ):
                waiting.append((requirement.name, frozenset(requirement.extras)))
    return found


def size(installed: Distribution) -> int:
    """Return the bytes of a distribution's files."""
    paths = (Path(str(installed.locate_file(file))) for file in installed.files or [] if file.suffix != ".pyc")
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the sizes to this file, as .json")
    args = parser.parse_args()
    sizes = {name: size(installed) for name, installed in required("pt_dance").items()}
    of_cuda = sum(taken for name, taken in sizes.items() if name.startswith(CUDA))
    largest = dict(sorted(sizes.items(), key=lambda item: -item[1])[:12])
    report = {
        "torch": distribution("torch").version,
        "GB": round(sum(sizes.values()) / 1e9, 2),
        "GB of CUDA's libraries": round(of_cuda / 1e9, 2),
        "MB of the largest": {name: round(taken / 1e6) for name, taken in largest.items()},
    }
    print(json.dumps(report, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
