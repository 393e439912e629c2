"""A comparison in five pictures: recall by distance and layer, accuracy for its time, reliability, coverage.

Drawn without a display and without matplotlib's global state, as `training.plots` does.

    specmoe compare --traces train.npz --validation validation.npz --test test.npz --folder comparison
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from training.approaches import ORACLE
from training.compare_report import ahead, ranked, trained
from training.metrics import START
from training.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PIXELS_PER_INCH,
    PURPLE,
    RED,
    SKY,
    coverage,
    reliability,
)
from training.presets import DEFAULT

Document = dict[str, Any]

COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, "#000000")
# With as many lines as this, colours come round again with another dash.
DASHES = ("-", "--", ":")
START_PLACE = -1.5
WITH_LEGEND = (12.5, 5.6)


def draw_all(document: Document, folder: Path) -> dict[str, str]:
    """Draw every picture into an existing folder. Returns title -> file name."""
    pictures = {
        "Recall by distance": recall_by_distance(document),
        "Recall by layer": recall_by_layer(document),
    }
    served = [result for result in trained(document) if result["kind"] == "trained"]
    if served:
        pictures["Accuracy for its time"] = accuracy_by_time(document, served)
        shown = next((result for result in served if result["name"] == DEFAULT), served[0])
        pictures |= _of_one(document, shown)
    files = {title: title.lower().replace(" ", "_").replace(",", "") + ".png" for title in pictures}
    for title, figure in pictures.items():
        figure.savefig(folder / files[title], dpi=PIXELS_PER_INCH)
    return files


def recall_by_distance(document: Document) -> Figure:
    """Recall@k of every approach over the distance; the token start stands alone left of it."""
    figure = Figure(figsize=WITH_LEGEND, layout="constrained")
    panel = figure.subplots()
    for result, look in _looks(document):
        scores = result["distances"]
        distances = [d for d in scores if d != START]
        panel.plot([int(d) for d in distances], [scores[d]["recall_at_k"] for d in distances], **look)
        marker = {"color": look["color"], "marker": "D", "markersize": 4}
        panel.plot([START_PLACE], [scores[START]["recall_at_k"]], **marker)
    last = max((int(d) for d in document["results"][0]["distances"] if d != START), default=1)
    ticks = [1, *range(4, last + 1, 4)]
    panel.set_xticks([START_PLACE, *ticks], ["token\nstart", *map(str, ticks)])
    panel.set(xlabel="layers ahead", ylabel=f"recall@{document['spec']['top_k']}", ylim=(0, 1.02))
    _finish(figure, panel)
    return figure


def recall_by_layer(document: Document) -> Figure:
    """Recall@k of every target layer, at token start and one layer ahead."""
    figure = Figure(figsize=(14, 5.6), layout="constrained")
    shown = list(document["results"][0]["by_layer"])
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, distance in zip(panels, shown, strict=True):
        for result, look in _looks(document):
            cells = result["by_layer"][distance]
            panel.plot([int(layer) for layer in cells], [c["recall_at_k"] for c in cells.values()], **look)
        panel.set(title=ahead(distance), xlabel="target layer", ylim=(0, 1.02))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        _tidy(panel)
    panels[0].set_ylabel(f"recall@{document['spec']['top_k']}")
    _finish(figure, panels[0])
    return figure


def accuracy_by_time(document: Document, served: Sequence[Document]) -> Figure:
    """Recall@k against the time of a served call, with the frontier of those that none beats in both."""
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    shown = list(document["results"][0]["by_layer"])
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    times = [served_us(result) for result in served]
    for panel, distance in zip(panels, shown, strict=True):
        recalls = [result["distances"][distance]["recall_at_k"] for result in served]
        best = frontier(times, recalls)
        panel.plot([times[i] for i in best], [recalls[i] for i in best], color=GREY, linestyle="--", zorder=1)
        for number, result in enumerate(served):
            colour, marker = COLOURS[number % len(COLOURS)], "osD"[number // len(COLOURS) % 3]
            panel.scatter(
                times[number], recalls[number], s=55, color=colour, marker=marker, label=result["name"]
            )
        panel.set(title=f"{ahead(distance)} (dashed: frontier)", xscale="log")
        panel.set_xlim(min(times) / 2, max(times) * 2)  # room for two ticks, however close the times are
        panel.set(xlabel="µs a served call (step where there is one, else predict)")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:,.0f}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        _tidy(panel)
    panels[0].set_ylabel(f"recall@{document['spec']['top_k']}")
    _finish(figure, panels[0])
    return figure


def served_us(result: Document) -> float:
    """Microseconds of what a decode loop calls: a step where there is one, else a whole predict."""
    cost = result["cost"]
    return float(cost["predict_us"] if cost["step_us"] is None else cost["step_us"])


def frontier(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Which ones no other is as cheap as and better than, cheapest first (Pareto)."""
    best: list[int] = []
    for number in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if not best or scores[number] > scores[best[-1]]:
            best.append(number)
    return best


def _of_one(document: Document, result: Document) -> dict[str, Figure]:
    """Reliability and coverage of one approach, as in an evaluation."""
    one = {"spec": document["spec"], "distances": result["distances"], "reliability": result["reliability"]}
    pictures = {f"Reliability of {result['name']}": reliability(one)}
    if result["distances"][START]["coverage"]:
        pictures[f"Coverage of {result['name']}"] = coverage(one)
    return pictures


def _looks(document: Document) -> list[tuple[Document, Document]]:
    """Every result, best first, with how its line is drawn; the oracle's is at 1 everywhere and left out."""
    shown = [result for result in ranked(document) if result["name"] != ORACLE] or ranked(document)
    return [
        (
            result,
            {
                "color": COLOURS[number % len(COLOURS)],
                "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
                "linewidth": 1.3 if result["kind"] == "baseline" else 2.0,
                "label": result["name"],
            },
        )
        for number, result in enumerate(shown)
    ]


def _finish(figure: Figure, panel: Axes) -> None:
    _tidy(panel)
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)


def _tidy(panel: Axes) -> None:
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
