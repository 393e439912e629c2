"""The loss curves of reference models, a unigram's loss beside them, in one picture.

specmoe reference-moe report runs/reference runs/dense --texts runs/texts --out runs/reference-report
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from training.plots import BLUE, GREEN, GREY, ORANGE, PIXELS_PER_INCH, PURPLE

COLOURS = (BLUE, ORANGE, GREEN, PURPLE)


def draw(document: dict[str, Any], file: Path) -> None:
    """Draw the validation losses of a report's models over the tokens they were trained on, as a PNG."""
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes = figure.subplots()
    for place, (name, of) in enumerate(document["models"].items()):
        tokens = [entry["tokens"] / 1e6 for entry in of["log"]]
        active = f"{of['parameters'] / 1e6:.1f} M parameters, {of['active_parameters'] / 1e6:.1f} M a token"
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(
            tokens, [entry["validation"] for entry in of["log"]], color=colour, label=f"{name}: {active}"
        )
    axes.axhline(document["unigram"]["validation_loss"], color=GREY, linestyle="--", label="unigram")
    axes.set_xlabel("training tokens, millions")
    axes.set_ylabel("loss on validation texts, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=PIXELS_PER_INCH)
