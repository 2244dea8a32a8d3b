"""Writes the tables of README.md and docs/ from the figures in docs/results/.

    python docs/scripts/tables.py           # writes what has changed
    python docs/scripts/tables.py --check   # exit 1 where a page does not say what the results say

A file of docs/results/ is what a command printed, and how it is shown:

    command    what prints the figures
    measured   when, and on what
    note       more to say beside the command; may be absent
    columns    [[heading, format, "left" or "right"], ...], a format of Python over a row's fields
    rows       objects; `id` names one for `said`. `from`: "FILE/ID" of a row in another file, whose
               fields it has too. `show`: {heading: format} where its own differ from the columns'
    study      instead of rows: what `mlx-sleep study --json` prints, of which `means` makes them
    said       {page: [sentence, ...]}: formats over the rows by id, which the page must contain;
               a page may have the sentence in several lines

In a page the table stands between `<!-- results: NAME -->` and `<!-- end of NAME -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
_BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def means(study: dict) -> list[dict]:
    """A row for each difficulty d, with the id "d" + d: `always`, which is what one answer to
    everything gets, and for each model and N a field such as hybrid_4 = {"mean", "seeds"}, the
    seeds from the worst to the best."""
    found: dict[int, dict[str, list[float]]] = {}
    for row in study["rows"]:
        seeds = found.setdefault(row["difficulty"], {})
        seeds.setdefault(f"{row['model']}_{row['passes']}", []).append(row["accuracy"])
    return [
        {
            "id": f"d{difficulty}",
            "difficulty": difficulty,
            "always": study["always"][str(difficulty)],
            **{name: {"mean": fmean(x), "seeds": sorted(x)} for name, x in models.items()},
        }
        for difficulty, models in found.items()
    ]


def rows(of: dict) -> list[dict]:
    return means(of["study"]) if "study" in of else [{**row_of(r), **r} for r in of["rows"]]


def row_of(row: dict) -> dict:
    """The row of another file that this one is from, if it is from one."""
    if "from" not in row:
        return {}
    name, _, wanted = row["from"].partition("/")
    return next(r for r in rows(results(name)) if r.get("id") == wanted)


def table(of: dict) -> str:
    """The lines of a page for one file of results."""
    headings, formats, sides = zip(*of["columns"], strict=True)
    rules = ["---:" if side == "right" else "---" for side in sides]
    lines = [headings, rules]
    for row in rows(of):
        shown = row.get("show", {})
        lines.append(
            [shown.get(h, f).format(**row) for h, f in zip(headings, formats, strict=True)]
        )
    source = f"`{of['command']}`; {of['measured']}."
    if of.get("note"):
        source += f" {of['note']}"
    return "\n".join([source, "", *(f"| {' | '.join(line)} |" for line in lines), "", ""])


def filled(text: str) -> str:
    """A page with its tables as the results have them."""
    return _BLOCK.sub(lambda m: f"{m[1]}{table(results(m[2]))}{m[3]}", text)


def sentences() -> Iterator[tuple[str, str]]:
    """(page, sentence) of all results, with their numbers."""
    for file in sorted(RESULTS.glob("*.json")):
        of = results(file.stem)
        named = {row["id"]: row for row in rows(of) if "id" in row}
        for page, formats in of.get("said", {}).items():
            for sentence in formats:
                yield page, " ".join(sentence.format(**named).split())


def missing() -> list[str]:
    """Sentences that a page should contain and does not, as "page: sentence"."""
    return [
        f"{page}: {said}"
        for page, said in sentences()
        if said not in " ".join((ROOT / page).read_text(encoding="utf-8").split())
    ]


def main() -> None:
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            stale.append(str(page.relative_to(ROOT)))
            if "--check" not in sys.argv:
                page.write_text(new, encoding="utf-8")
    wrong = [f"{page} is stale; run python docs/scripts/tables.py" for page in stale]
    wrong = wrong if "--check" in sys.argv else []
    wrong += [f"not in the page: {sentence}" for sentence in missing()]
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
