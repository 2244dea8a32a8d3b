"""What matters in a retrofit: short runs that differ from one another in one thing.

    mlx-sleep models get smollm2 FOLDER
    python examples/ablations.py FOLDER --out ablations --tokens 700000 --chat chat.jsonl

Each run is `train_in_pytorch.py retrofit` with the options below and the same seed, so that all
see the same lives in the same order; those of more passes, as many tokens. What was trained before
is not trained again, so that the script can be stopped. It ends with a table, and with
ablations.json beside the runs.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

RUNS = {
    "as it is": "",
    "random start": "--init random",
    "low-rank changes too": "--lora-rank 16",
    "3 layers": "--before 10 18 26",
    "10 layers": "--before 4 7 10 13 15 17 19 22 24 26",
    "only the user's words folded": "--fold user",
    "2 passes": "--passes 2 --loop-range 6 27",
    "4 passes": "--passes 4 --loop-range 6 27",
}
FIGURES = "values", "values_1_3", "whole_values", "zeroed", "refusals"


def folder_of(out: Path, name: str) -> Path:
    return out / name.replace(" ", "-").replace("'", "")


def trained_in(out: Path) -> dict | None:
    """What a whole run says of itself; None of one that was stopped, or never started."""
    path = out / "adapter_config.json"
    trained = json.loads(path.read_text())["trained"] if path.exists() else {}
    return trained if trained.get("figures") else None


def train(options, name: str) -> dict:
    """The row of one run: its name, options, tokens, seconds and figures."""
    out = folder_of(options.out, name)
    if not trained_in(out):
        trainer = Path(__file__).with_name("train_in_pytorch.py")
        command = [sys.executable, trainer, "retrofit", options.model, "--out", out]
        command += ["--tokens", options.tokens, "--batch", options.batch, "--seed", options.seed]
        command += ["--shares", *options.shares, "--workers", options.workers]
        command += ["--evaluate-every", 1e9, *RUNS[name].split()]
        command += ["--chat", options.chat] if options.chat else []
        command += ["--resume"] if (out / "recipe.json").exists() else []
        subprocess.run([str(part) for part in command], check=True)
    trained = trained_in(out)
    if not trained:  # Ctrl-C stops a run with a checkpoint, and exit status 0
        sys.exit("stopped; the same command goes on")
    last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = max(row.get("seconds", 0) for row in last)
    return {
        "what": name,
        "options": RUNS[name],
        "tokens": trained["tokens"],
        "seconds": round(seconds),
        **{figure: round(trained["figures"].get(figure, 0), 4) for figure in FIGURES},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of the base model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=700_000, help="of each run")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--shares", type=float, nargs=3, default=[0.4, 0.6, 0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--chat", type=Path, help="ordinary chat of the base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [train(options, name) for name in options.only]
    (options.out / "ablations.json").write_text(json.dumps(rows, indent=2) + "\n")
    print("\n" + " " * 30 + "".join(f"{name:>13}" for name in (*FIGURES, "tokens", "seconds")))
    for row in rows:
        shares = "".join(f"{row[name]:13.1%}" for name in FIGURES)
        print(f"{row['what']:30}{shares}{row['tokens']:13}{row['seconds']:13}")


if __name__ == "__main__":
    main()
