"""Writes a comparison down for people: one table of all approaches, checks of the scoring, pictures.

`training.compare` -> document -> FOLDER/{report.md, compare.json, *.png}

    specmoe compare --traces train.npz --validation validation.npz --test test.npz --folder comparison
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from training.approaches import CONTROL, ORACLE
from training.compare import standing
from training.metrics import START, TOP_N
from training.report import UNKNOWN, markdown_table, write_json

Document = dict[str, Any]

REPORT = "report.md"
NUMBERS = "compare.json"
POPULARITY = "popularity"
DISTANCES = (START, "1", "4", "8")
# How far the control may be from popularity: it has learnt how often each expert is routed, and from noise.
CONTROL_MARGIN = 0.02
PROTOTYPE = (
    "An earlier prototype reported 33.75 / 51.26 / 59.89 / 72.71 % for n = 1, 3, 5, 10 with 128 experts: how"
    " often the expert with the highest gate is among the first n, as here. The two cannot be compared."
    " Its windows of one prompt overlapped and lay on both sides of its split, and it saw the tokens right of"
    " the one it forecast, which contain the answer. Here whole sequences belong to one split, and a forecast"
    " sees only what came before it. The number of experts differs, too: guessing reaches n of so many. The"
    " oracle knows which experts are routed, not which gate is highest, so it is sure only from n = k."
)
QUICK = (
    "**Made with `--quick`: tiny predictors on few tokens. The numbers say that everything runs, and nothing"
    " else.**"
)


def write_comparison(document: Document, folder: Path) -> None:
    """Write what `compare` found into its folder; an earlier report there is replaced."""
    from training.compare_plots import draw_all  # matplotlib is needed here alone

    write_json(document, folder / NUMBERS)
    pictures = draw_all(document, folder)
    (folder / REPORT).write_text(markdown(document, pictures), encoding="utf-8")


def markdown(document: Document, pictures: dict[str, str]) -> str:
    """The report as Markdown. pictures: title -> file name beside it."""
    sections = [
        f"# Approaches compared: {document['spec']['model']}",
        QUICK if document["quick"] else "",
        summary(document),
        "## Scores",
        "Best first, by recall@k at token start and one layer ahead. Recall@k / recall@2k.",
        score_table(document),
        "## Top-n accuracy and calibration",
        "How often the expert with the highest gate is among the first n, one layer ahead, and the expected"
        " calibration error (ECE).",
        top_n_table(document),
        PROTOTYPE,
        "## Cost",
        "Microseconds are medians for one sequence on one thread of"
        f" {_hardware(document)}; `step` is one layer more of a token, where a predictor has it.",
        cost_table(document),
        *(["## Seeds", seed_table(document)] if document["further"] else []),
        "## Is the scoring right?",
        *checks(document),
        "## Pictures",
        *(f"![{title}]({file})" for title, file in pictures.items()),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def summary(document: Document) -> str:
    """What everything was trained and scored on."""
    spec, tokens = document["spec"], document["tokens"]
    some = "" if document["every"] == 1 else f", one test token in {document['every']} scored"
    passes = "the presets' passes" if document["passes"] is None else f"{document['passes']} passes each"
    precision = "" if document["precision"] is None else f" in {document['precision']}"
    given = [name.replace("_", " ") for name in ("token_ids", "gates") if document[name]]
    return (
        f"{spec['num_layers']} layers × {spec['num_experts']} experts, top-{spec['top_k']}, with"
        f" {' and '.join(given) or 'neither token ids nor gates'}. {tokens['train']:,} tokens to train on,"
        f" {tokens['validation']:,} to validate and calibrate, {tokens['test']:,} to test{some}."
        f" Trained{precision} with {passes} and seed 0."
    )


def score_table(document: Document) -> str:
    """Recall of every approach, best first."""
    distances = _distances(document)
    rows = [
        [result["name"], *(_recalls(result["distances"][d]) for d in distances)]
        for result in ranked(document)
    ]
    return markdown_table(["approach", *map(ahead, distances)], rows)


def top_n_table(document: Document) -> str:
    """Top-n accuracy one layer ahead, and the calibration error."""
    nearest = _distances(document)[:2][-1]
    rows = []
    for result in ranked(document):
        accuracy = result["distances"][nearest]["top_n_accuracy"] or {}
        errors = [result["distances"][d]["ece"] for d in dict.fromkeys((START, nearest))]
        rows.append(
            [
                result["name"],
                *(_number(accuracy.get(str(n)), 4) for n in TOP_N),
                *(_number(error, 4) for error in errors),
            ]
        )
    titles = [f"ECE, {ahead(d)}" for d in dict.fromkeys((START, nearest))]
    return markdown_table(["approach", *(f"n = {n}" for n in TOP_N), *titles], rows)


def cost_table(document: Document) -> str:
    """What each trained approach takes: parameters, bytes, training, one call."""
    header = ["approach", "parameters", "bytes", "passes", "training s", "predict µs", "step µs"]
    rows = []
    for result in trained(document):
        cost = result["cost"]
        rows.append(
            [
                result["name"],
                f"{cost['parameters']:,}",
                f"{cost['bytes']:,}",
                str(result["passes"]),
                _number(result["trained_seconds"], 0),
                _number(cost["predict_us"], 0),
                _number(cost["step_us"], 0),
            ]
        )
    return markdown_table(header, rows) if rows else "Nothing was trained."


def seed_table(document: Document) -> str:
    """The best approaches with every seed: mean and standard deviation of recall@k."""
    distances = _distances(document)[:2]
    rows = []
    for name in dict.fromkeys(result["name"] for result in document["further"]):
        runs = [r for r in (*document["results"], *document["further"]) if r["name"] == name]
        cells = [_spread(r["distances"][d]["recall_at_k"] for r in runs) for d in distances]
        rows.append([name, str(len(runs)), *cells])
    return "Recall@k: mean ± standard deviation over the seeds.\n\n" + markdown_table(
        ["approach", "seeds", *map(ahead, distances)], rows
    )


def checks(document: Document) -> list[str]:
    """What must hold if the scoring is right, and whether it does; for those that were compared."""
    by_name = {result["name"]: result for result in document["results"]}
    lines = []
    if ORACLE in by_name:
        lowest = min(scores["recall_at_k"] for scores in by_name[ORACLE]["distances"].values())
        told = "as it must be" if lowest == 1 else "**expected 1: the scoring is wrong**"
        lines.append(f"The oracle forecasts the truth: its lowest recall@k is {lowest:.3f}, {told}.")
    if CONTROL in by_name and POPULARITY in by_name:
        gap = control_gap(by_name[CONTROL], by_name[POPULARITY])
        lines.append(
            f"{CONTROL} learnt from routing dealt anew between tokens, so it can know popularity alone. Its"
            f" recall@k at token start and one layer ahead is up to {gap:.3f} from popularity's (allowed:"
            f" {CONTROL_MARGIN}), {_control_verdict(gap, document['quick'])}."
        )
    return lines or ["Neither the oracle nor the control beside popularity was compared."]


def _control_verdict(gap: float, quick: bool) -> str:
    if gap <= CONTROL_MARGIN:
        return "as it must be"
    if quick:
        return "which means nothing after so few steps"
    return "**more than it may: something leaks, or it was trained too little or too long**"


def control_gap(control: Document, popularity: Document) -> float:
    """The largest difference in recall@k at token start and one layer ahead."""
    shared = [d for d in (START, "1") if d in control["distances"]]
    return float(
        max(
            abs(control["distances"][d]["recall_at_k"] - popularity["distances"][d]["recall_at_k"])
            for d in shared
        )
    )


def ranked(document: Document) -> list[Document]:
    """Results of seed 0, best first."""
    return sorted(document["results"], key=standing, reverse=True)


def trained(document: Document) -> list[Document]:
    """Those that were trained, the control too, best first."""
    return [result for result in ranked(document) if result["kind"] != "baseline"]


def ahead(distance: str) -> str:
    """A distance in words."""
    return "token start" if distance == START else f"{distance} ahead"


def _distances(document: Document) -> list[str]:
    return [d for d in DISTANCES if d in document["results"][0]["distances"]]


def _hardware(document: Document) -> str:
    return " and ".join(sorted({r["cost"]["hardware"] for r in trained(document)})) or "no machine"


def _recalls(scores: Document) -> str:
    return f"{scores['recall_at_k']:.3f} / {scores['recall_at_2k']:.3f}"


def _spread(values: Iterable[float]) -> str:
    several = list(values)
    return f"{mean(several):.4f} ± {stdev(several):.4f}"


def _number(value: float | None, digits: int) -> str:
    return UNKNOWN if value is None else f"{value:,.{digits}f}"
