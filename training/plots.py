"""An evaluation in four pictures: recall by distance and by layer, reliability, coverage.

Drawn without a display and without matplotlib's global state.

    specmoe evaluate gpt-oss-20b --traces test.npz --report report
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training.metrics import START

Document = dict[str, Any]

# Okabe and Ito's colours, told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C",
)  # fmt: skip
SHOWN_DISTANCES = {START: BLUE, "1": ORANGE, "4": GREEN}
BASELINE_COLOURS = {
    "random": GREY, "popularity": PURPLE, "repeat": RED, "exponential average": ORANGE,
    "layer markov": GREEN, "nearest maps": SKY,
}  # fmt: skip
LEVEL_COLOURS = (GREEN, BLUE, RED, ORANGE, PURPLE, SKY)
PIXELS_PER_INCH = 150
# Where the token start stands on an axis of distances, which begin at 1.
START_PLACE = -1.5


def draw_all(document: Document, folder: Path) -> dict[str, str]:
    """Draw every picture into an existing folder. Returns title -> file name."""
    pictures = {
        "Recall by distance": recall_by_distance(document),
        "Recall by layer": recall_by_layer(document),
        "Reliability": reliability(document),
    }
    if document["distances"][START]["coverage"]:
        pictures["Coverage"] = coverage(document)
    files = {title: title.lower().replace(" ", "_") + ".png" for title in pictures}
    for title, figure in pictures.items():
        figure.savefig(folder / files[title], dpi=PIXELS_PER_INCH)
    return files


def recall_by_distance(document: Document) -> Figure:
    """Recall@k and recall@2k over the distance, with the baselines where they were scored."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (metric, title) in zip(panels, _recall_titles(document), strict=True):
        for name, scores in document["baselines"].items():
            if name in BASELINE_COLOURS:
                _draw_distances(panel, scores, metric, name, BASELINE_COLOURS[name], width=1.3)
        label = f"{document['model']} v{document['version']}"
        _draw_distances(panel, document["distances"], metric, label, BLUE, width=2.6)
        panel.set(title=title, xlabel="layers ahead", ylim=(0, 1.02))
        _tidy(panel)
    panels[0].set_ylabel("share of routed experts predicted")
    _legend_beside(figure, panels[0])
    return figure


def recall_by_layer(document: Document) -> Figure:
    """Recall@k and recall@2k of every target layer, at the token start and some distances."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (metric, title) in zip(panels, _recall_titles(document), strict=True):
        for distance, colour in SHOWN_DISTANCES.items():
            cells = document["by_layer"].get(distance, {})
            panel.plot(
                [int(layer) for layer in cells],
                [scores[metric] for scores in cells.values()],
                color=colour, marker="o", markersize=3.5, label=_ahead(distance),
            )  # fmt: skip
        panel.set(title=title, xlabel="target layer")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        _tidy(panel)
    panels[0].set_ylabel("share of routed experts predicted")
    _legend_beside(figure, panels[0])
    return figure


def reliability(document: Document) -> Figure:
    """How often an expert was routed, over the probability it was given: on the diagonal is honest."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    shown = [d for d in SHOWN_DISTANCES if d in document["reliability"]]
    panels = figure.subplots(1, len(SHOWN_DISTANCES), sharex=True, sharey=True)
    for panel, distance in zip(panels, shown, strict=False):
        bins = document["reliability"][distance]
        panel.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
        panel.plot(
            [b["probability"] for b in bins], [b["routed"] for b in bins],
            color=SHOWN_DISTANCES[distance], marker="o", markersize=5,
        )  # fmt: skip
        ece = document["distances"][distance]["ece"]
        panel.set(title=f"{_ahead(distance)}: ECE {ece:.4f}", xlabel="probability", xlim=(0, 1), ylim=(0, 1))
        panel.set_aspect("equal")
        _tidy(panel)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    panels[0].set_ylabel("share that was routed")
    return figure


def coverage(document: Document) -> Figure:
    """How often the coverage sets held every routed expert (dashed: as promised), and how large they are."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    levels = document["distances"][START]["coverage"]
    for level, colour in zip(levels, LEVEL_COLOURS, strict=False):
        by_distance = {d: scores["coverage"][level] for d, scores in document["distances"].items()}
        left.axhline(float(level), color=colour, linewidth=1, linestyle="--")
        _draw_distances(left, by_distance, "covered", f"{float(level):.0%} set", colour)
        _draw_distances(right, by_distance, "mean_set_size", f"{float(level):.0%} set", colour)
    left.set(title="all routed experts in the set (dashed: promised)", xlabel="layers ahead")
    left.set_ylabel("share of layers")
    experts = document["spec"]["num_experts"]
    right.set(title=f"size of the set, of {experts}", xlabel="layers ahead", ylabel="experts", ylim=(0, None))
    for panel in (left, right):
        _tidy(panel)
    _legend_beside(figure, right)
    return figure


def _draw_distances(
    panel: Axes, scores: Document, metric: str, label: str, colour: str, *, width: float = 2.0
) -> None:
    """A line over the distances; the token start, which is none, stands alone left of them."""
    ahead = [d for d in scores if d != START]
    values = [scores[d][metric] for d in ahead]
    panel.plot([int(d) for d in ahead], values, color=colour, linewidth=width, label=label)
    panel.plot([START_PLACE], [scores[START][metric]], color=colour, marker="D", markersize=3 + width)
    last = max((int(d) for d in ahead), default=1)
    ticks = [1, *range(4, last + 1, 4)]
    panel.set_xticks([START_PLACE, *ticks], ["token\nstart", *map(str, ticks)])


def _legend_beside(figure: Figure, panel: Axes) -> None:
    """What was drawn last comes first, as it mostly lies on top."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)


def _recall_titles(document: Document) -> tuple[tuple[str, str], tuple[str, str]]:
    top_k = document["spec"]["top_k"]
    return ("recall_at_k", f"recall@{top_k}"), ("recall_at_2k", f"recall@{2 * top_k}")


def _ahead(distance: str) -> str:
    return "token start" if distance == START else f"{distance} ahead"


def _tidy(panel: Axes) -> None:
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
