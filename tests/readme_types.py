"""Check that a type checker accepts README's code, as it would in an editor.

One wrong word among it has to be found, so that the code is not merely unknown.

    python tests/readme_types.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
WRONG = ("recipe=", "recipes=")
FOUND = 'Unexpected keyword argument "recipes" for "DanceRetriever"'


def main() -> str | None:
    """Return what is wrong."""
    code = "\n".join(BLOCKS)
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--follow-imports", "silent", "right.py", "wrong.py"]
    environment = os.environ | {"MYPYPATH": str(ROOT), "MYPY_CACHE_DIR": str(ROOT / ".mypy_cache")}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "right.py").write_text(code)
        (Path(folder) / "wrong.py").write_text(code.replace(*WRONG))
        command = [sys.executable, "-m", "mypy", *options]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=folder
        )
    if "right.py:" in done.stdout or FOUND not in done.stdout:
        return f"README's code, and the same with {WRONG[1]!r} for {WRONG[0]!r}: {done.stdout}"
    return None


if __name__ == "__main__":
    sys.exit(main())
