"""The files of bench/results/: what was measured, on what, when; and which of them are committed."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .. import machine
from . import files
from .files import Result, git

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def stamp() -> dict[str, str]:
    """When, which sources, and on what; nothing that says where or whose the machine is."""
    return files.stamp(ROOT) | machine.describe()


def slug(stamp: dict[str, str]) -> str:
    """Processor and instruction set, as part of a file's name.

    >>> slug({"CPU": "AMD EPYC, 2 cores", "instruction set": "avx512 of avx512, avx2"})
    'amd-epyc-avx512'
    """
    processor, isa = stamp["CPU"].rpartition(",")[0], stamp["instruction set"].split()[0]
    return files.slug(f"{processor} {isa}")


def save(result: Result, folder: Path, kind: str, ending: str = "") -> Path:
    """<date>-<kind>-<slug><-ending>.json, a row a line; the same machine on the same day writes over."""
    parts = result["stamp"]["date"], kind, slug(result["stamp"]), ending
    return files.write(folder / f"{'-'.join(filter(None, parts))}.json", files.as_json(result))


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
