"""The command `matmul-grad`: check, info, warmup, bench, gpu-report, tune.

Exit codes: 0 all is well, 1 something disagrees or does not compile, 2 the command cannot be done here,
130 interrupted, 141 whoever read the output stopped reading.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__, machine
from .bench import gpu_report
from .bench import tune as tuning
from .cli_common import EXIT_MISMATCH, complain, require, require_cuda, require_isa, run_command, thread_count


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without ᵀ gets a question mark
    given = sys.argv[1:] if arguments is None else arguments
    return run_command("matmul-grad", lambda: dispatch(given))


def dispatch(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["bench"]:
        return bench(arguments[1:])
    command = parse(arguments)
    known = {"check": check, "info": info, "warmup": warm_up, "gpu-report": gpu_report.run, "tune": tuning.run}
    return known[command.name](command)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="matmul-grad", description="matmul and both gradients, checked and timed")
    parser.add_argument("--version", action="version", version=f"matmul_grad {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="command")
    check = commands.add_parser("check", help="compare with torch: numbers, a training, times; exit 1 on disagreement")
    check.add_argument("--no-train", dest="train", action="store_false", help="leave out the training")
    check.add_argument("--no-time", dest="time", action="store_false", help="leave out the times")
    check.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    check.add_argument("--seed", type=seed, default=0, metavar="N", help="of all random values; default: 0")
    check.add_argument(
        "--threads", type=thread_count, metavar="N", help="default: torch.get_num_threads(), and 1 for the times"
    )
    commands.add_parser("info", help="print what products run on here")
    commands.add_parser("warmup", help="compile every CPU kernel now")
    commands.add_parser("bench", help="time this package beside torch and others; report and compare runs")
    gpu_report.add_options(commands.add_parser("gpu-report", help=gpu_report.HELP))
    tuning.add_options(commands.add_parser("tune", help=tuning.HELP))
    return parser.parse_args(arguments)


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 31:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 2^31, got {value}")
    return value


def check(command: argparse.Namespace) -> int:
    if command.train:
        require(sklearn="scikit-learn")
    if command.device == "cuda":
        require_cuda("--device cuda")
    require_isa()
    from .check import Options, run
    from .console import make_console

    options = Options(command.train, command.time, command.device, command.seed, command.threads)
    return run(options, make_console())


def info(command: argparse.Namespace) -> int:
    require_isa()
    facts = machine.describe() | {"cache": machine.describe_cache()}
    print(*machine.lines(facts), sep="\n")
    return 0


def warm_up(command: argparse.Namespace) -> int:
    require_isa()
    from . import warmup

    warmup.require_cache()
    try:
        for name, seconds in warmup.compiled():
            print(f"{name:24}  {seconds:6.2f} s", flush=True)
    except warmup.NotCompiled as reason:
        complain(f"matmul-grad: {reason}")
        return EXIT_MISMATCH
    for note in machine.left_to_torch():
        print(note)
    print(f"cache: {machine.describe_cache()}")
    return 0


def bench(arguments: Sequence[str]) -> int:
    """A command of commands, with options of its own."""
    from .bench import commands

    return commands.main(list(arguments), "matmul-grad bench")
