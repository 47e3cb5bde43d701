"""`python -m matmul_grad` is `matmul-grad`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
