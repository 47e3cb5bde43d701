"""`matmul-grad bench`, and `compare` for shapes and functions of your own.

command       options, exit codes                                        one process, which multiplies nothing
  workloads       what is compared: suites to products
  runner   the turns: workloads to rows                                    speaks to the sessions over pipes
    session    makes backends ready, checks them, times them      a process for each pool of threads
      backends, operands, right, work     who multiplies what, and is it right
      roof, peak, devices                   the ceilings of the machine, and what it says of itself
  record      rows on disk, a run that goes on, CSV
figures       rows to ratios, means, worst cases, what differs: pure
tables, pictures, page, readme, files_of_run    figures to Markdown, PNG and SVG, HTML, README.md
library       `compare`
"""

from matmul_grad.bench.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
