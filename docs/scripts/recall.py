"""Draws docs/images/recall.svg: what SmolLM2 recalls, by the sleeps since it was told.

python docs/scripts/recall.py
"""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 640, 300, 62, 44, 240
INK, LINE, S, ZERO = "#7d8590", "#7d859055", "#8250df", "#d1242f"


def text(x: float, y: float, words: str, anchor: str = "middle", size: int = 12) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}">{words}</text>'


def draw(rows: list[dict]) -> str:
    """rows of `eval memory`: case after_16_sleeps/age_A_B, accuracy, low, high, n, zeroed."""
    step = (WIDTH - LEFT - 20) / len(rows)

    def height(share: float) -> float:
        return BOTTOM - share * (BOTTOM - TOP)

    parts = [text(LEFT, 22, "Answers right, by the sleeps since the fact was told", "start", 14)]
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = height(share)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 20}" stroke="{LINE}"/>')
        parts.append(text(LEFT - 8, y + 4, f"{share:.0%}", "end"))
    for i, row in enumerate(rows):
        x = LEFT + (i + 0.5) * step
        low, high, at = height(row["low"]), height(row["high"]), height(row["accuracy"])
        parts.append(
            f'<path d="M{x:.1f} {low:.1f}V{high:.1f}M{x - 6:.1f} {low:.1f}h12M{x - 6:.1f} '
            f'{high:.1f}h12" stroke="{S}" stroke-width="1.5"/>'
            f'<circle cx="{x:.1f}" cy="{at:.1f}" r="5" fill="{S}"/>'
            f'<path d="M{x - 4:.1f} {height(row["zeroed"]) - 4:.1f}l8 8m0 -8l-8 8" '
            f'stroke="{ZERO}" stroke-width="2"/>'
        )
        first, last = row["case"].rsplit("_", 2)[1:]
        parts.append(text(x, BOTTOM + 20, f"{first} to {last}"))
        parts.append(text(x, BOTTOM + 35, f"{row['n']} questions", size=10))
    parts.append(text((LEFT + WIDTH) / 2, HEIGHT - 6, "sleeps since"))
    parts.append(
        f'<circle cx="{WIDTH - 150}" cy="{TOP - 26}" r="5" fill="{S}"/>'
        + text(WIDTH - 140, TOP - 22, "S kept", "start")
        + f'<path d="M{WIDTH - 89} {TOP - 30}l8 8m0 -8l-8 8" stroke="{ZERO}" stroke-width="2"/>'
        + text(WIDTH - 76, TOP - 22, "S = 0", "start")
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'fill="{INK}" font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
        "<title>Recall against sleeps</title>" + "".join(parts) + "</svg>\n"
    )


def rows() -> list[dict]:
    found = json.loads((DOCS / "results" / "memory_smollm2.json").read_text(encoding="utf-8"))
    return [row for row in found["rows"] if "/age_" in row["case"]]


if __name__ == "__main__":
    (DOCS / "images" / "recall.svg").write_text(draw(rows()), encoding="utf-8")
