"""`matmul-grad gpu-report`: what can be proven and measured of these kernels on a GPU, in minutes, by one command.

command      options, the order of the steps, exit codes        one process
  steps      a step, its limit, what became of it               each step in a process of its own, or in several
    child    the steps that measure: tasks in order, a line of JSON for each
device       everything that asks the GPU itself; tests put another in its place
jobs, contenders, right, measure        what is compared, who multiplies, is it right, how long does it take
figures, report                         rows to figures and targets; JSON and Markdown
"""
