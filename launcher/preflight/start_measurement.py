"""Start one rank of the timed all-reduce, with the environment that a rank of a run gets."""

import sys

from launcher.ranks.start_rank import main

if __name__ == "__main__":
    main(sys.argv[1:], module="launcher.preflight.measure")
