"""``python -m tests.faults``: see :mod:`tests.faults.plan`, which the processes that it starts can import."""

import sys

from tests.faults.plan import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
