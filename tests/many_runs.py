"""`python tests/many_runs.py RUNS`, on each rank: train several times on the same ranks, so that they start once.

RUNS is a JSON list with the overrides of each run.
"""

import json
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))


def work() -> None:
    from composition import composed

    import train

    for overrides in json.loads(sys.argv[1]):
        train.train(composed(overrides))


if __name__ == "__main__":
    from distributed import parallel

    parallel.run(work)
