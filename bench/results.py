"""The files of a run. What was measured is on disk after every workload; a run that is not whole never takes the place
of one that is."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from .. import machine
from ..cli_common import UsageError
from . import backends, files, stats, workloads
from .files import checkout

SCHEMA = 1
KIND = "bench"
WHOLE, UNFINISHED = "bench.json", "bench-unfinished.json"
PROTOCOL = (
    "right against float64 first; normal operands, rotated past the last cache; batches of ≥ 5 ms in turning order; "
    "medians and quartiles of a call"
)
KEYS = ("schema", "stamp", "settings", "roofs", "rows")
SAME = ("CPU", "instruction set", "GPU", "versions", "rivals", "commit")  # of a run that goes on
COLUMNS = (
    "product", "dtype", "layout", "m", "n", "k", "threads", "device", "contender", "seconds low", "seconds median",
    "seconds high", "device seconds median", "ratio", "GFLOP/s", "share of peak", "share of bandwidth", "first seconds",
    "peak bytes", "rounds", "copies", "share of core", "verdict",
)  # fmt: skip

Result = dict[str, Any]


def stamp(device: str, selected: list[backends.Backend]) -> dict[str, str]:
    """When, which sources, and on what; nothing that says where or whose the machine is."""
    versions = {backend.package: machine.version(backend.package) for backend in selected}
    del versions["matmul_grad"]
    found = files.stamp(checkout()) | machine.describe()
    found.pop("threads")  # those of this process, which multiplies nothing
    return found | {"device": device, "rivals": ", ".join(f"{name} {version}" for name, version in versions.items())}


def slug(result_stamp: dict[str, str]) -> str:
    """Of the machine.

    >>> slug({"device": "cpu", "CPU": "AMD EPYC, 2 cores", "instruction set": "avx512 of avx512, avx2"})
    'cpu-amd-epyc-avx512'
    """
    if result_stamp["device"] != "cpu":
        return files.slug(f"{result_stamp['device']} {result_stamp['GPU']}")
    processor, isa = result_stamp["CPU"].rpartition(",")[0], result_stamp["instruction set"].split()[0]
    return files.slug(f"cpu {processor} {isa}")


def folder(wanted: Path | None, result_stamp: dict[str, str]) -> Path:
    """Where the files go: found out, and made, before anything is measured."""
    here = checkout()
    return writable(wanted or (here / "bench" / "results" if here else Path.cwd()) / f"{KIND}-{slug(result_stamp)}")


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
    """A run on disk."""

    def __init__(self, place: Path, result: Result) -> None:
        self.place, self.result = place, result

    @classmethod
    def begin(cls, place: Path, result: Result, resume: bool) -> Record:
        """A new run, or with ``resume`` the unfinished one of this folder, if it was begun in the same way."""
        path = place / UNFINISHED
        if not resume and path.exists():
            raise UsageError(f"{path} is an unfinished run: --resume goes on with it; remove it to begin anew")
        if not resume or not path.exists():
            return cls(place, result)
        known = load(path)
        for name in SAME:
            if known["stamp"].get(name) != result["stamp"].get(name):
                raise UsageError(f"--resume: {path} has another {name}: {known['stamp'].get(name)}")
        if known["settings"] != result["settings"]:
            other = [name for name, value in result["settings"].items() if known["settings"].get(name) != value]
            raise UsageError(f"--resume: {path} was begun with another {', '.join(other)}")
        return cls(place, known)

    def left(self, planned: list[workloads.Workload]) -> list[workloads.Workload]:
        done = {workloads.of_row(row) for row in self.result["rows"]}
        return [workload for workload in planned if workload not in done]

    def keep(self, row: stats.Row) -> None:
        self.result["rows"].append(row)
        try:
            files.write(self.place / UNFINISHED, files.as_json(self.result))
        except OSError as reason:
            raise UsageError(f"{self.place}: {reason.strerror}; --resume goes on with what is there") from reason

    def finish(self, whole: bool) -> Path:
        """Where the rows are now."""
        self.result["whole"] = whole
        if not whole:
            return files.write(self.place / UNFINISHED, files.as_json(self.result))
        path = files.write(self.place / WHOLE, files.as_json(self.result))
        (self.place / UNFINISHED).unlink(missing_ok=True)
        return path


def load(path: Path) -> Result:
    """A file of the bench; UsageError where it is none, or of another schema."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as reason:
        raise UsageError(f"{path}: {reason.strerror}") from reason
    except ValueError as reason:
        raise UsageError(f"{path}: broken JSON: {reason}") from reason
    if not isinstance(result, dict) or result.get("kind") != KIND:
        raise UsageError(f"{path}: these are not results of `matmul-grad bench`")
    if result.get("schema") != SCHEMA:
        raise UsageError(f"{path}: schema {result.get('schema')}, this version reads {SCHEMA}")
    try:
        missing = [name for name in KEYS if name not in result]
        for row in result["rows"]:
            workloads.of_row(row)
            if not {"flops", "bytes", "device", "threads"} <= set(row):
                raise KeyError("flops")
    except (KeyError, TypeError) as reason:
        raise UsageError(f"{path}: these are not rows of `matmul-grad bench`: {reason}") from reason
    if missing:
        raise UsageError(f"{path}: there is no {missing[0]} in it")
    return result


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
