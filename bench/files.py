"""Files of results: stamped, written whole or not at all, a row a line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def checkout() -> Path | None:
    """The repository that this file lies in, if it is one."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "bench").is_dir() else None


def stamp(root: Path | None = None) -> dict[str, str]:
    """When, and from which sources if ``root`` is a repository; nothing that says where or whose the machine is.

    >>> list(stamp())
    ['date', 'time']
    """
    now = datetime.now(timezone.utc)
    facts = {"date": now.date().isoformat(), "time": now.time().isoformat("seconds")}
    commit = git(root, "describe", "--always", "--dirty", "--exclude=*") if root else None
    return facts | ({"commit": commit.strip()} if commit else {})


def slug(text: str) -> str:
    """Words as part of a file's name.

    >>> slug("NVIDIA H200 (sm_90)")
    'nvidia-h200-sm-90'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def as_json(result: Result) -> str:
    """JSON with each of the rows in a line of its own, so that two runs can be compared line by line.

    >>> print(as_json({"schema": 1, "rows": [{"n": 8}, {"n": 16}]}), end="")
    {
     "schema": 1,
     "rows": [
      {"n": 8},
      {"n": 16}
     ]
    }
    """
    head = json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def write(path: Path, text: str) -> Path:
    """Under another name first: whoever reads ``path``, and whenever this stops, it is the old text or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    return path


def git(folder: Path, *arguments: str) -> str | None:
    """What git says; None where there is no git, no repository or no such thing in it."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, encoding="utf-8")
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
