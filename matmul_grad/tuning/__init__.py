"""`matmul-grad tune`: which tile is fastest for a problem on this GPU, measured, and kept for `choose` to read.

command    options, progress, exit codes                                       one process
table      the file of winners: read, checked, written whole after each problem
child      every candidate of a problem: compiled, right, timed                another, begun again where it dies
"""
