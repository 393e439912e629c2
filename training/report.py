"""Writes an evaluation down for people: Markdown with pictures, and the numbers as JSON.

specmoe evaluate gpt-oss-20b --traces test.npz --report report
report/{report.md, metrics.json, recall_by_distance.png, recall_by_layer.png, reliability.png, coverage.png}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.metrics import START

Document = dict[str, Any]

REPORT = "report.md"
METRICS = "metrics.json"
UNKNOWN = "–"
# Columns of the table of distances: title, key in the scores, digits after the point.
COLUMNS = (
    ("recall@k", "recall_at_k", 3),
    ("recall@2k", "recall_at_2k", 3),
    ("hit@1", "hit_at_1", 3),
    ("exact set", "exact_set", 3),
    ("gate mass", "gate_mass_recall", 3),
    ("ECE", "ece", 4),
    ("Brier", "brier", 4),
)
BASELINE_DISTANCES = (START, "1", "4", "8")


def write_report(document: Document, folder: Path) -> None:
    """Write `Evaluation.document()` into a folder, which is made; files of an earlier report are replaced."""
    from training.plots import draw_all  # matplotlib is needed here alone

    folder.mkdir(parents=True, exist_ok=True)
    write_json(document, folder / METRICS)
    pictures = draw_all(document, folder)
    (folder / REPORT).write_text(markdown(document, pictures), encoding="utf-8")


def write_json(document: Document, path: Path) -> None:
    """The document as JSON, six digits to a number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(document), indent=1) + "\n", encoding="utf-8")


def markdown(document: Document, pictures: dict[str, str]) -> str:
    """The report as Markdown. pictures: title -> file name beside it."""
    sections = [
        f"# {document['model']}, version {document['version']}",
        summary(document),
        "## By distance",
        distance_table(document, list(document["distances"])),
        top_n_table(document),
        *(["## Coverage", coverage_table(document)] if document["distances"][START]["coverage"] else []),
        *(["## Beside the baselines", baseline_table(document)] if document["baselines"] else []),
        *_withheld_sections(document),
        *(["## Coverage with adaptation", adaptation_table(document)] if document["adaptation"] else []),
        *(["## What a cache keeps", cache_table(document)] if document["cache"] else []),
        "## By domain",
        domain_table(document),
        "## By layer",
        layer_table(document),
        "## Pictures",
        *(f"![{title}]({file})" for title, file in pictures.items()),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def summary(document: Document) -> str:
    """What was scored on what, and what it costs to run."""
    spec, trace, cost = document["spec"], document["trace"], document["cost"]
    given = [name.replace("_", " ") for name in ("token_ids", "gates") if trace[name]]
    some = "" if document["scored_every"] == 1 else f" (one in {document['scored_every']} scored)"
    return (
        f"{document['tokens']:,} tokens of {document['sequences']:,} sequences{some}, recorded from"
        f" {trace['model']}: {spec['num_layers']} layers × {spec['num_experts']} experts,"
        f" top-{spec['top_k']}, with {' and '.join(given) or 'neither token ids nor gates'}."
        f"\n\n{cost['predictor']}: {cost['parameters']:,} parameters, {cost['bytes'] / 1e6:.1f} MB;"
        f" predict {cost['predict_us']:.0f} µs, advance {cost['advance_us']:.0f} µs for one sequence"
        f" (median, {cost['provider']}, {cost['hardware']})."
    )


def distance_table(document: Document, distances: Sequence[str]) -> str:
    """Every score at these distances."""
    rows = [_score_row(distance, document["distances"][distance]) for distance in distances]
    return markdown_table(["distance", *(title for title, _, _ in COLUMNS)], rows)


def few_distances(document: Document) -> list[str]:
    """The token start and the powers of two: what fits a terminal."""
    return [d for d in document["distances"] if d == START or int(d).bit_count() == 1]


def top_n_table(document: Document) -> str:
    """How often the highest-gate expert is among n predictions; empty where gates are unknown."""
    known = {d: scores["top_n_accuracy"] for d, scores in document["distances"].items()}
    if any(accuracy is None for accuracy in known.values()):
        return ""
    counts = list(known[START])
    rows = [[d, *(f"{accuracy[n]:.3f}" for n in counts)] for d, accuracy in known.items()]
    return markdown_table(["distance", *(f"top-{n} accuracy" for n in counts)], rows)


def coverage_table(document: Document) -> str:
    """How often the coverage sets held every routed expert, and how large they were."""
    levels = list(document["distances"][START]["coverage"])
    rows = [
        [d, *(f"{held['covered']:.3f} / {held['mean_set_size']:.1f}" for held in scores["coverage"].values())]
        for d, scores in document["distances"].items()
    ]
    return "Share of layers covered / mean experts in the set.\n\n" + markdown_table(
        ["distance", *(f"{float(level):.0%} set" for level in levels)], rows
    )


def baseline_table(document: Document) -> str:
    """Recall@k / recall@2k of the version and of every baseline."""
    distances = [d for d in BASELINE_DISTANCES if d in document["distances"]]
    everyone = {
        **document["baselines"],
        f"**{document['model']} {document['version']}**": document["distances"],
    }
    rows = [[name, *(_recalls(scores[d]) for d in distances)] for name, scores in everyone.items()]
    return "Recall@k / recall@2k.\n\n" + markdown_table(["", *map(_ahead, distances)], rows)


def adaptation_table(document: Document) -> str:
    """Coverage by domain, with the published set sizes and with those that learn from their misses."""
    adaptation = document["adaptation"]
    levels = list(next(iter(adaptation.values()))["published"])
    rows = [
        [
            f"{domain}, {kind}",
            *(f"{held['covered']:.3f} / {held['mean_set_size']:.1f}" for held in by.values()),
        ]
        for domain, kinds in adaptation.items()
        for kind, by in kinds.items()
    ]
    return (
        "Share of forecasts covered / mean experts in the set, by domain of the prompt.\n\n"
        + markdown_table(["sets", *(f"{float(level):.0%} set" for level in levels)], rows)
    )


def cache_table(document: Document) -> str:
    """Hit rate of every policy, by share of the experts resident."""
    shares = list(next(iter(document["cache"].values())))
    rows = [[name, *(f"{rates[share]:.3f}" for share in shares)] for name, rates in document["cache"].items()]
    return "Hit rate, by share of all layers' experts that is resident.\n\n" + markdown_table(
        ["kept by", *(f"{float(share):.1%}" for share in shares)], rows
    )


def domain_table(document: Document) -> str:
    """Recall@k / recall@2k by domain of the prompt."""
    rows = [
        [name, *(_recalls(scores[d]) if d in scores else UNKNOWN for d in (START, "1"))]
        for name, scores in document["domains"].items()
    ]
    return "Recall@k / recall@2k.\n\n" + markdown_table(["domain", *map(_ahead, (START, "1"))], rows)


def layer_table(document: Document) -> str:
    """Every score by target layer, all distances and the token start together."""
    rows = [_score_row(str(layer), scores) for layer, scores in enumerate(document["layers"])]
    return markdown_table(["layer", *(title for title, _, _ in COLUMNS)], rows)


def _withheld_sections(document: Document) -> list[str]:
    sections = []
    for name, title in (("token_ids", "token ids"), ("gates", "gates"), ("hidden", "hidden states")):
        scores = document.get(f"without_{name}")
        if scores:
            rows = [_score_row(d, scores[d]) for d in BASELINE_DISTANCES if d in scores]
            sections += [
                f"## Without {title}",
                markdown_table(["distance", *(column for column, _, _ in COLUMNS)], rows),
            ]
    return sections


def _score_row(name: str, scores: Document) -> list[str]:
    return [
        name,
        *(UNKNOWN if scores[key] is None else f"{scores[key]:.{digits}f}" for _, key, digits in COLUMNS),
    ]


def _recalls(scores: Document) -> str:
    return f"{scores['recall_at_k']:.3f} / {scores['recall_at_2k']:.3f}"


def _ahead(distance: str) -> str:
    if distance == START:
        return "token start"
    return f"{distance} layer{'s' if distance != '1' else ''} ahead"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that can be read in a terminal too."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return value
