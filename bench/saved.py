"""The files of bench/results/: what was measured, on what, when; and which of them are committed."""

from __future__ import annotations

import json
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from matmul_grad import machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"

Result = dict[str, Any]


def stamp() -> dict[str, str]:
    """When, which sources, and on what; nothing that says where or whose the machine is."""
    now = datetime.now(timezone.utc)
    facts = {"date": now.date().isoformat(), "time": now.time().isoformat("seconds")}
    commit = git(ROOT, "describe", "--always", "--dirty", "--exclude=*")
    return facts | ({"commit": commit.strip()} if commit else {}) | machine.describe()


def slug(stamp: dict[str, str]) -> str:
    """Processor and instruction set, as part of a file's name.

    >>> slug({"CPU": "AMD EPYC, 2 cores", "instruction set": "avx512 of avx512, avx2"})
    'amd-epyc-avx512'
    """
    processor, isa = stamp["CPU"].rpartition(",")[0], stamp["instruction set"].split()[0]
    return re.sub(r"[^a-z0-9]+", "-", f"{processor} {isa}".lower()).strip("-")


def save(result: Result, folder: Path, kind: str, ending: str = "") -> Path:
    """<date>-<kind>-<slug><-ending>.json, a row a line; the same machine on the same day writes over."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = result["stamp"]["date"], kind, slug(result["stamp"]), ending
    path = folder / f"{'-'.join(filter(None, parts))}.json"
    head = json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    path.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")
    return path


def committed(before: dict[str, str], kind: str, folder: Path | None = None) -> Result | None:
    """The newest whole run of this kind and machine that is committed and older than the stamp ``before``.

    As it was committed: a run of the same day writes over the file, not over what it is compared with.
    """
    folder = folder or RESULTS
    names = (git(folder, "ls-tree", "--name-only", "HEAD", "./") or "").splitlines()
    pattern = re.compile(rf"\d{{4}}-\d\d-\d\d-{re.escape(kind)}-{re.escape(slug(before))}.*\.json")
    found = []
    for name in filter(pattern.fullmatch, names):
        result = json.loads(git(folder, "show", f"HEAD:./{name}") or "{}")
        if result.get("whole") and slug(result["stamp"]) == slug(before) and moment(result["stamp"]) < moment(before):
            found.append(result)
    return max(found, key=lambda result: moment(result["stamp"]), default=None)


def moment(stamp: dict[str, str]) -> tuple[str, str]:
    return stamp["date"], stamp["time"]


def git(folder: Path, *arguments: str) -> str | None:
    """What git says; None where there is no git, no repository or no such thing in it."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, encoding="utf-8")
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
