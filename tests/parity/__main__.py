"""Compares the architectures with PyTorch's, on random weights: `make parity`. Needs torch.

    python -m tests.parity [--json] [NAME ...]

`max_logit_error` is the largest difference of logits, `greedy_agreement` the part of positions with
the same likeliest token.
"""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import argparse
import sys
from dataclasses import asdict

from mlx_sleep.cli.output import emit
from mlx_sleep.utils.errors import UserError

from . import run

assert mlx_sleep  # imported for its effect


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="parity", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures; default: all")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    args = parser.parse_args(arguments)
    rows = []
    for case in run(args.names):
        rows.append(asdict(case))
        if sys.stderr.isatty():
            print(f"\rparity: {len(rows)} rows", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    emit("parity", rows, args.json)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
