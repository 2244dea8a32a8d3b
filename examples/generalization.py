"""Where an adapter loses recall: in wordings, or in names and values, that it was not trained on.

    mlx-sleep models get smollm2 FOLDER
    python examples/generalization.py FOLDER mlx_sleep/adapters/smollm2 --out seen.json

The same kind of lives four times, each new: told and asked in the wordings of the training or in
others, about its names and values or others.
"""

import argparse
from pathlib import Path

from ablations import lives, load, measure, table

from mlx_sleep.utils.errors import errors_in_one_line

STAGE = 1  # of the curriculum
SPLITS = {"training's": "train", "others": "test"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of the base model")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a .json file")
    parser.add_argument("--batches", type=int, default=40, help="to measure on")
    options = parser.parse_args()
    model = load(options.adapter, options.model)
    rows = []
    for wordings, split in SPLITS.items():
        for values, other in SPLITS.items():
            batches = lives(options.model, STAGE, options.batches, split, other)
            what = f"wordings {wordings}, values {values}"
            row = {"what": what, "wordings": wordings, "values": values}
            rows.append({**row, **measure(model, batches)})
    table(rows, options.out)


if __name__ == "__main__":
    errors_in_one_line()
    main()
