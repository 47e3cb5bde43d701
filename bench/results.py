"""The files of a run, of one schema for all commands: stamped, written whole or not at all, a row a line.

What was measured is on disk after every workload; a run that is not whole never takes the place of one that is.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import machine
from ..cli_common import UsageError
from . import backends, stats, workloads
from .workloads import Workload

SCHEMA = 1
BENCH, CPU_RATIO, GPU_REPORT, CPU_PATHS = "bench", "cpu-ratio", "gpu-report", "cpu-paths"
UNFINISHED = "unfinished"
COMMIT = "MATMUL_GRAD_COMMIT"  # in the environment, where the sources lie without their repository
PROTOCOL = (
    "right against float64 first; normal operands, rotated past the last cache; batches of ≥ 5 ms in turning order; "
    "medians and quartiles of a call"
)
KEYS = ("schema", "stamp", "settings", "roofs", "rows")
SAME = ("CPU", "instruction set", "GPU", "versions", "rivals", "commit")  # of a run that goes on
COLUMNS = (
    "product", "dtype", "layout", "m", "n", "k", "threads", "device", "precision", "batch", "mode", "contender",
    "seconds low", "seconds median", "seconds high", "device seconds median", "ratio", "GFLOP/s", "share of peak",
    "share of bandwidth", "first seconds", "peak bytes", "rounds", "copies", "share of core", "verdict",
)  # fmt: skip

Result = dict[str, Any]


def begin(kind: str, stamp: dict[str, str], settings: dict[str, Any], planned: int, larger: int = 0) -> Result:
    """A run of which nothing is measured yet."""
    return {
        "schema": SCHEMA, "kind": kind, "stamp": stamp, "settings": settings, "whole": False, "protocol": PROTOCOL,
        "planned": planned, "larger": larger, "roofs": [], "rows": [],
    }  # fmt: skip


def stamp(device: str, selected: Sequence[backends.Backend]) -> dict[str, str]:
    """When, which sources, and on what; nothing that says where or whose the machine is."""
    versions = {backend.package: machine.version(backend.package) for backend in selected}
    versions.pop("matmul_grad", None)
    found = now(checkout()) | machine.describe()
    found.pop("threads")  # those of this process, which multiplies nothing
    return found | {"device": device, "rivals": ", ".join(f"{name} {version}" for name, version in versions.items())}


def now(root: Path | None = None) -> dict[str, str]:
    """When, and from which sources if ``root`` is a repository.

    >>> list(now())
    ['date', 'time']
    """
    moment = datetime.now(timezone.utc)
    facts = {"date": moment.date().isoformat(), "time": moment.time().isoformat("seconds")}
    commit = git(root, "describe", "--always", "--dirty", "--exclude=*") if root else None
    commit = commit or os.environ.get(COMMIT)
    return facts | ({"commit": commit.strip()} if commit else {})


def checkout() -> Path | None:
    """The repository that this file lies in, if it is one."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "bench").is_dir() else None


def git(folder: Path, *arguments: str) -> str | None:
    """What git says; None where there is no git, no repository or no such thing in it."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, encoding="utf-8")
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def slug(result_stamp: dict[str, str]) -> str:
    """The machine, as part of a file's name.

    >>> slug({"device": "cpu", "CPU": "AMD EPYC, 2 cores", "instruction set": "avx512 of avx512, avx2"})
    'amd-epyc-avx512'
    """
    if result_stamp.get("device", "cpu") != "cpu":
        text = result_stamp.get("GPU", "unknown gpu")
    else:
        text = f"{result_stamp['CPU'].rpartition(',')[0]} {result_stamp['instruction set'].split()[0]}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def stem(kind: str, result_stamp: dict[str, str]) -> str:
    """The name of a run's files: those of the bench have a folder of their own, others the date."""
    return BENCH if kind == BENCH else f"{result_stamp['date']}-{kind}-{slug(result_stamp)}"


def folder(wanted: Path | None) -> Path:
    """Where files go: found out, and made, before anything is measured."""
    here = checkout()
    return writable(wanted or (here / "bench" / "results" if here else Path.cwd()))


def writable(path: Path) -> Path:
    """A folder; UsageError where it cannot be one."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise UsageError(f"--out {path}: {reason.strerror}") from reason
    if not os.access(path, os.W_OK):
        raise UsageError(f"--out {path}: cannot be written")
    return path


class Record:
    """A run on disk; without a folder it is kept nowhere."""

    def __init__(self, place: Path | None, result: Result) -> None:
        self.place, self.result = place, result

    @classmethod
    def begin(cls, place: Path | None, result: Result, resume: bool) -> Record:
        """A new run, or with ``resume`` the unfinished one of this folder, if it was begun in the same way."""
        pattern = stem(result["kind"], result["stamp"] | {"date": "????-??-??"})
        found = sorted(place.glob(f"{pattern}-{UNFINISHED}.json")) if place else []
        if not found:
            return cls(place, result)
        if not resume:
            raise UsageError(f"{found[-1]} is an unfinished run: --resume goes on with it; remove it to begin anew")
        known = load(found[-1], result["kind"])
        for name in SAME:
            if known["stamp"].get(name) != result["stamp"].get(name):
                raise UsageError(f"--resume: {found[-1]} has another {name}: {known['stamp'].get(name)}")
        if known["settings"] != result["settings"]:
            other = [name for name, value in result["settings"].items() if known["settings"].get(name) != value]
            raise UsageError(f"--resume: {found[-1]} was begun with another {', '.join(other)}")
        return cls(place, known)

    def left(self, planned: Sequence[Workload], step: str | None = None) -> list[Workload]:
        """Those that have no row yet, of this step where a run has several."""
        done = {workloads.of_row(row) for row in self.result["rows"] if row.get("step") == step and "product" in row}
        return [workload for workload in planned if workload not in done]

    def path(self, ending: str = "", suffix: str = ".json") -> Path:
        name = "-".join(filter(None, (stem(self.result["kind"], self.result["stamp"]), ending)))
        return (self.place or Path()) / f"{name}{suffix}"

    def keep(self, row: stats.Row) -> None:
        self.result["rows"].append(row)
        self.write()

    def write(self, ending: str = UNFINISHED) -> Path:
        path = self.path(ending)
        try:
            return write(path, as_json(self.result)) if self.place else path
        except OSError as reason:
            raise UsageError(f"{self.place}: {reason.strerror}; --resume goes on with what is there") from reason

    def finish(self, ended: bool, ending: str = "", left: int = 0) -> Path:
        """Where the rows are now: a run that has not ended stays unfinished; ``ending`` marks a part, and one that
        ended with comparisons ``left`` is not whole."""
        self.result["whole"] = ended and not ending and not left
        path = self.write(ending if ended else UNFINISHED)
        if ended and self.place:
            self.path(UNFINISHED).unlink(missing_ok=True)
        return path


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


def load(path: Path, kind: str | None = None) -> Result:
    """A file of results, of ``kind`` where that is given; UsageError where it is none, or of another schema."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as reason:
        raise UsageError(f"{path}: {reason.strerror}") from reason
    except ValueError as reason:
        raise UsageError(f"{path}: broken JSON: {reason}") from reason
    if not isinstance(result, dict) or "rows" not in result:
        raise UsageError(f"{path}: these are not results of {kind or BENCH}")
    if result.get("schema", SCHEMA) != SCHEMA:
        raise UsageError(f"{path}: schema {result.get('schema')}, this version reads {SCHEMA}")
    try:
        result = upgraded(result)
        missing = [name for name in KEYS if name not in result]
        for row in result["rows"]:
            if "product" in row and not {"flops", "bytes", "device", "threads"} <= set(row):
                raise KeyError("flops")
            if "product" in row or "step" not in row:
                workloads.of_row(row)
    except (KeyError, TypeError) as reason:
        raise UsageError(f"{path}: these are not rows of {kind or BENCH}: {reason}") from reason
    if missing:
        raise UsageError(f"{path}: there is no {missing[0]} in it")
    if kind and result["kind"] != kind:
        raise UsageError(f"{path}: these are results of {result['kind']}, not of {kind}")
    return result


def upgraded(result: Result) -> Result:
    """Files of `cpu-ratio` from before schema 1: a row for each pair of backends, whose ratio was one of medians."""
    if "schema" in result:
        return result
    if not all("part" in row for row in result["rows"]):
        raise KeyError("schema")
    settings = {"quick": result.get("quick", False)}
    return begin(CPU_RATIO, result["stamp"] | {"device": "cpu"}, settings, len(result["rows"])) | {
        "whole": result.get("whole", False), "protocol": result["protocol"],
        "rows": [upgraded_row(row) for row in result["rows"]],
    }  # fmt: skip


def upgraded_row(row: stats.Row) -> stats.Row:
    part, theirs = row["part"], next(name for name in row["seconds"] if name != workloads.OURS)
    kept = {name: value for name, value in row.items() if name not in ("part", "ratio")}
    product, mode = workloads.STEP if part == "step" else "forward", workloads.OPERATOR if part == "overhead" else ""
    new = kept | {"product": product, "device": "cpu", "mode": mode}
    ratio = dict.fromkeys(("low", "median", "high"), row["ratio"])
    return new | {"bytes": workloads.of_row(new).moved, "ratio": {theirs: ratio}}


def committed(before: dict[str, str], kind: str, place: Path | None = None) -> Result | None:
    """The newest whole run of this kind and machine that is committed and older than the stamp ``before``.

    As it was committed: a run of the same day writes over the file, not over what it is compared with.
    """
    here = checkout()
    place = place or (here / "bench" / "results" if here else Path.cwd())
    names = (git(place, "ls-tree", "--name-only", "HEAD", "./") or "").splitlines()
    pattern = re.compile(rf"\d{{4}}-\d\d-\d\d-{re.escape(kind)}-{re.escape(slug(before))}.*\.json")
    found = []
    for name in filter(pattern.fullmatch, names):
        result = json.loads(git(place, "show", f"HEAD:./{name}") or "{}")
        if result.get("whole") and slug(result["stamp"]) == slug(before) and moment(result["stamp"]) < moment(before):
            found.append(result)
    newest = max(found, key=lambda result: moment(result["stamp"]), default=None)
    return newest and upgraded(newest)


def moment(stamp: dict[str, str]) -> tuple[str, str]:
    return stamp["date"], stamp["time"]


def as_csv(result: Result) -> str:
    """A line for each backend of each workload, the stamp in lines above that begin with #."""
    text = io.StringIO()
    for name, value in result["stamp"].items():
        text.write(f"# {name}: {value}\n")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in result["rows"]:
        verdicts = {name: kind for kind in ("skipped", "failed", "wrong") for name in row.get(kind, {})}
        for name in dict.fromkeys([*row.get("seconds", {}), *verdicts]):
            writer.writerow(line(result, row, name, verdicts.get(name, "right")))
    return text.getvalue()


def line(result: Result, row: stats.Row, name: str, verdict: str) -> dict[str, Any]:
    times = row.get("seconds", {}).get(name, {})
    ratio = stats.ratio(row, name)
    found = {
        "contender": name,
        **{f"seconds {part}": times.get(part) for part in ("low", "median", "high")},
        "device seconds median": row.get("device seconds", {}).get(name, {}).get("median"),
        "ratio": ratio and ratio.median,
        "GFLOP/s": stats.rate(row, name),
        "share of peak": stats.share_of_peak(row, name),
        "share of bandwidth": stats.share_of_bandwidth(result, row, name),
        "first seconds": row.get("first", {}).get(name),
        "peak bytes": row.get("peak bytes", {}).get(name),
        "verdict": verdict,
    }
    rounded = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in found.items()}
    return {key: row[key] for key in COLUMNS if key in row and not isinstance(row[key], dict)} | rounded
