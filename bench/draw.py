"""Draws the result of `compare.py --json` as a picture: `draw.py RESULT.json PICTURE.png`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

MORE_IS_BETTER = ("streams at", "chunks/s of", "times one")
OURS, OTHERS, INK = "#c2410c", "#94a3b8", "#1e293b"


def draw(result: dict[str, object], to: Path) -> None:
    """One panel for each measure, and one bar for each proxy: the median of its rounds, their minimum and maximum."""
    measures: dict[str, dict[str, dict[str, object]]] = result["measures"]  # type: ignore[assignment]
    columns = 2
    rows = -(-len(measures) // columns)
    plt.rcParams.update({"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "ytick.color": INK})
    figure, panels = plt.subplots(rows, columns, figsize=(11, 2.35 * rows), squeeze=False)
    for panel in panels.flat[len(measures) :]:
        panel.axis("off")
    for panel, (what, peers) in zip(panels.flat, measures.items(), strict=False):
        ranked = sorted(peers.items(), key=lambda item: -float(item[1]["median"]))  # type: ignore[arg-type]
        if any(more in what for more in MORE_IS_BETTER):
            ranked.reverse()
        names = [name for name, _ in ranked]
        medians = [float(figures["median"]) for _, figures in ranked]  # type: ignore[arg-type]
        rounds: list[list[float]] = [figures["rounds"] for _, figures in ranked]  # type: ignore[misc]
        spread = [
            [median - min(values) for median, values in zip(medians, rounds, strict=True)],
            [max(values) - median for median, values in zip(medians, rounds, strict=True)],
        ]
        colours = [OURS if name == "sseproxy" else OTHERS for name in names]
        panel.barh(names, medians, xerr=spread, color=colours, height=0.68, error_kw={"lw": 0.8, "ecolor": INK})
        # A bar that is much longer than all others is cut, because the others would be too short to compare.
        near = sorted(medians)[-2] if len(medians) > 1 else medians[0]
        far = [median > 1.6 * near for median in medians]
        edge = 1.16 * max(max(values) for values, off in zip(rounds, far, strict=True) if not off)
        panel.set_xlim(0, edge)
        for at, (median, values, off) in enumerate(zip(medians, rounds, far, strict=True)):
            shown = f"{median:,.1f}" if median < 100 else f"{median:,.0f}"
            panel.annotate(
                f"{shown} →" if off else shown,
                (edge if off else max(values), at),
                (-4 if off else 4, 0),
                textcoords="offset points",
                va="center",
                ha="right" if off else "left",
                fontsize=8,
                color="white" if off else INK,
            )
        panel.set_title(what, loc="left", fontsize=10, fontweight="bold")
        panel.spines[["top", "right", "bottom"]].set_visible(False)
        panel.xaxis.set_visible(False)
        panel.tick_params(left=False)
    figure.text(
        0.01, 0.003, str(result["machine"]) + "; medians of rounds, lines from the minimum to the maximum", fontsize=8
    )
    figure.tight_layout(rect=(0, 0.015, 1, 1), h_pad=1.6)
    figure.savefig(to, dpi=110)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
