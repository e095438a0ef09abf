"""A complete use of smelt: train small experts, merge them with `smelt merge`, and measure whether it paid.

Run it with `make demo` or `python -m examples.demo`. Read in this order: `__main__`, `corpus`, `model`,
`train`, `commands`, `evaluate`, `results`, `page`.
"""

import os

# Read by OpenMP when torch is first imported. Threads that wait for each other give their core away at once:
# on a machine that does something else as well, training takes twice the time instead of five times.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
