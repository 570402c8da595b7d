"""lorafold's command line, with all that it imports imported before the clock starts.

python benchmarks/lorafold_merge.py merge BASE ADAPTER -o OUT
"""

from measuring import wait_for_the_start

import lorafold
from lorafold.cli import command
from lorafold.cli.loading import loading

if __name__ == "__main__":
    with loading():
        for name in lorafold.__all__:
            getattr(lorafold, name)
    wait_for_the_start()
    command()
