"""`python -m bench`, from the root of a checkout: what is measured by a command of its own.

python -m bench [run] …               what `matmul-grad bench` does; so do compare and report
python -m bench cpu-ratio             every target of the CPU, in 20 minutes, on a machine at rest
python -m bench cpu-ratio --quick     the same in a minute, on a few shapes: to see it run
python -m bench conv                  convolutions and their gradients: layers of known models, against their targets
python -m bench cpu-paths             what packing repays: the measurements behind kernels/cpu/config.py
python -m bench switch                torch with the switch on over torch with it off: overhead, and training steps
python -m bench training              steps of an MLP with the activation in the product; weight gradients added up
python -m bench grouped               grouped products, over a loop of torch.mm and over torch's own
python -m bench first-call            the first product of a process: seconds over `import torch`, cache empty and full
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from matmul_grad.cli_common import Parser, run_command

PROGRAM = "python -m bench"


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    return run_command(PROGRAM, lambda: dispatch(given))


def dispatch(arguments: Sequence[str]) -> int:
    from matmul_grad.bench import commands as whole
    from matmul_grad.bench import conv, cpu_ratio, first_call, grouped, packing, switch_overhead, training

    if not arguments or arguments[0] in whole.VERBS or arguments[0].startswith("--"):
        return whole.main(list(arguments), PROGRAM)
    parser = Parser(prog=PROGRAM, description="benchmarks that are commands")
    commands = parser.add_subparsers(dest="name", required=True, metavar="command")
    modules = (cpu_ratio, conv, packing, switch_overhead, training, grouped, first_call)
    known = {module.KIND: module for module in modules}
    for name, module in known.items():
        module.add_options(commands.add_parser(name, help=module.HELP, description=module.HELP))
    command = parser.parse_args(arguments)
    return int(known[command.name].run(command))


if __name__ == "__main__":
    sys.exit(main())
