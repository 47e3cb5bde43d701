"""`python -m bench`, from the root of a checkout: what is measured by a command of its own.

python -m bench cpu-ratio             every target of the CPU, a quarter of an hour on a machine at rest
python -m bench cpu-ratio --quick     the same in a minute, on a few shapes: to see it run
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from matmul_grad.cli import INTERRUPTED, UNUSABLE, Unusable, require

PROGRAM = "python -m bench"


class Parser(argparse.ArgumentParser):
    """Says in one line what it cannot take."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(UNUSABLE)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        require("rich", "rich", "bench")
        from . import cpu_ratio

        parser = Parser(prog=PROGRAM, description="benchmarks that are commands")
        commands = parser.add_subparsers(dest="name", required=True, metavar="command")
        cpu_ratio.add_options(commands.add_parser(cpu_ratio.KIND, help=cpu_ratio.HELP, description=cpu_ratio.HELP))
        return cpu_ratio.run(parser.parse_args(arguments))
    except Unusable as reason:
        print(f"{PROGRAM}: {reason}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
