"""What to run on a first GPU, in the order in which it decides most: measure, compare variants, then test.

    python tools/first_card.py --out DIR              every call, 45 minutes at most
    python tools/first_card.py --out DIR --only 1,2   some, where a machine is lent for ten minutes at a time
    python tools/first_card.py --list

From a checkout, installed or not. No call depends on the end of another, each ends within its minutes, and what it
prints is in DIR beside its reports. A variant is a copy of the sources in which one line differs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ENDING = 60  # seconds that a call may take to end, beyond its minutes
CODE = ("bench", "kernels", "matmul_grad")
SHAPES = "4096,4096,4096 8192,3072,768 1024,1024,1024 128,4096,4096"  # large k, small k, one wave, decode
TESTS = f"-m pytest -p no:cacheprovider -p no:benchmark -n {min(16, os.cpu_count() or 1)} --dist worksteal tests -m"


class Edit(NamedTuple):
    """A line that differs in a variant."""

    file: str
    old: str
    new: str


class Call(NamedTuple):
    """One call: what it is for, its minutes, the arguments of Python. {out}: a folder of its own."""

    name: str
    why: str
    minutes: float
    arguments: str
    edit: Edit | None = None


TWO_LOOPS = Edit(
    "kernels/gpu/plan.py",
    "return whole and fits and resident_blocks(config, problem, target) == 1",
    "return False",
)
TWO_LAUNCHES = Edit("kernels/gpu/choose.py", "FUSED_WAVES = 2 ", "FUSED_WAVES = 0 ")
REPORT = "-m matmul_grad gpu-report --out {out}"
CALLS = (
    Call("look", "is anything wrong? mend that first", 2, f"{REPORT} --steps sanitized --minutes 2"),
    Call("ratios", "fit the constants of choose.py to these", 9, f"{REPORT} --steps compile,ratios,launch --minutes 9"),
    Call(
        "tiles", "every tile against the default", 5, f"-m matmul_grad tune --dtype bf16 --shapes {SHAPES} --minutes 5"
    ),
    Call("two loops", "does one loop over tiles and k pay?", 4, f"{REPORT} --steps ratios --minutes 4", TWO_LOOPS),
    Call("two launches", "does one backward launch pay?", 4, f"{REPORT} --steps ratios --minutes 4", TWO_LAUNCHES),
    Call("native", "right, and below 5 us a call?", 2, f"{REPORT} --steps launch,native --minutes 2"),
    Call("tests", "a case of each kind", 9, f"{REPORT} --steps tests --minutes 9"),
    Call("memory", "errors and races of memory", 5, f"{REPORT} --steps memcheck,racecheck --minutes 5"),
    Call("every tile", "exact in every tile, in what time there is", 9, f"{TESTS} 'gpu and slow'"),
)


def variant(edit: Edit, root: Path, folder: Path) -> Path:
    """A copy of the sources with the edit. ValueError where the line is not there exactly once."""
    folder.mkdir(exist_ok=True)
    for name in CODE:
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    path = folder / edit.file
    text = path.read_text(encoding="utf-8")
    if text.count(edit.old) != 1:
        raise ValueError(f"{edit.file} holds {edit.old!r} {text.count(edit.old)} times")
    path.write_text(text.replace(edit.old, edit.new), encoding="utf-8")
    return folder


def run(call: Call, out: Path, root: Path = ROOT) -> str:
    """What became of a call; its output is in a log."""
    name = call.name.replace(" ", "-")
    place = out / name
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, open(out / f"{name}.log", "wb") as log:
        checkout = variant(call.edit, root, Path(folder)) if call.edit else root
        environment = os.environ | {
            "PYTHONPATH": str(checkout),
            "MATMUL_GRAD_REQUIRE_GPU": "1",
            "MATMUL_GRAD_TUNED": str(place / "tuned.json"),  # what one call finds is no other's
        }
        command = [sys.executable, *arguments(call, place)]
        process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return f"status {process.wait(60 * call.minutes + ENDING)}"
        except subprocess.TimeoutExpired:
            return f"ended after {call.minutes} minutes"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def arguments(call: Call, out: Path) -> list[str]:
    """
    >>> arguments(CALLS[0], Path("x"))[:3]
    ['-m', 'matmul_grad', 'gpu-report']
    """
    found = shlex.split(call.arguments)
    return [word.format(out=out) for word in found]


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("first-card"))
    parser.add_argument("--only", default="", metavar="N,N", help="numbers of calls")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(given)
    only = {int(number) for number in options.only.split(",") if number}
    for number, call in enumerate(CALLS, 1):
        if only and number not in only:
            continue
        line = f"{number} {call.name}, {call.minutes} minutes: {call.why}"
        if options.list:
            print(f"{line}\n    python {call.arguments}")
            continue
        print(line, flush=True)
        print(f"    {run(call, options.out.resolve())}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
