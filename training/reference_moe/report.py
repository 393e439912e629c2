"""What trained reference models are worth, side by side: report.json, report.md and curve.png.

    specmoe reference-moe report runs/reference runs/dense --texts runs/texts --out runs/report

Perplexity on the test texts, beside a unigram's; the experts' use, and what an expert tells of a text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from training.collection.model import load
from training.reference_moe import usage
from training.reference_moe.curve import draw
from training.reference_moe.loop import LOOK_WINDOWS, SavedRun, read_run
from training.reference_moe.model import count_parameters
from training.reference_moe.pipeline import load_tokenizer, tokenized
from training.reference_moe.scores import Scores, score, unigram_losses
from training.reference_moe.texts import texts_of
from training.reference_moe.windows import Ids, check_length

SCHEMA = 1
# Of each domain: a minute's work for the model that is shipped.
SCORED_TOKENS = 20_000
Document = dict[str, Any]


def report(runs: list[Path], texts: Path, out: Path) -> str:
    """Score the runs, the first of which is the one that matters, and write what came out. Returns report.md.

    Raises RunInvalid, TextInvalid where runs or texts are not what they must be.
    """
    saved = {folder.resolve().name: read_run(folder) for folder in runs}
    tokenizer, first = load_tokenizer(runs[0]), next(iter(saved.values())).config
    ids = {split: tokenized(tokenizer, texts_of(texts, split)) for split in ("train", "validation", "test")}
    check_length(ids["test"], first, "test")
    unigram = unigram_losses(ids["train"], ids["test"], first.vocabulary, first.context, SCORED_TOKENS)
    looked_at = unigram_losses(
        ids["train"], ids["validation"], first.vocabulary, first.context, LOOK_WINDOWS * first.context
    )
    document: Document = {
        "schema": SCHEMA,
        "unigram": {
            "perplexity": float(np.exp(np.mean(list(unigram.values())))),
            "perplexity_by_domain": {domain: float(np.exp(loss)) for domain, loss in unigram.items()},
            "validation_loss": float(np.mean(list(looked_at.values()))),
        },
        "models": {
            name: _model(folder, run, ids["test"])
            for folder, (name, run) in zip(runs, saved.items(), strict=True)
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draw(document, out / "curve.png")
    told = in_words(document)
    (out / "report.md").write_text(told, encoding="utf-8")
    return told


def _model(folder: Path, run: SavedRun, test: Ids) -> Document:
    model = load(str(folder), device="cpu", dtype="float32").model
    scores = score(model, test, run.config.context, SCORED_TOKENS)
    parameters, active = count_parameters(model)
    return {
        "shape": run.config.shape,
        "parameters": parameters,
        "active_parameters": active,
        "tokens": run.step * run.config.step_tokens,
        "minutes": round(run.seconds / 60, 1),
        "perplexity": scores.perplexity,
        "perplexity_by_domain": {domain: float(np.exp(loss)) for domain, loss in scores.losses.items()},
        "experts": _experts(scores),
        "log": run.log,
    }


def _experts(scores: Scores) -> Document | None:
    """How the experts are used; None where there is no choice."""
    if not scores.counts.shape[1]:
        return None
    by_domain = usage.shares(scores.counts)
    return {
        "usage_entropy": usage.entropy(by_domain.mean(0)).tolist(),
        "usage_entropy_by_domain": {
            domain: float(of.mean())
            for domain, of in zip(scores.losses, usage.entropy(by_domain), strict=True)
        },
        "told_of_domain_bits": usage.told_by_expert(scores.counts).tolist(),
        "most_bits": float(np.log2(len(by_domain))),
    }


def in_words(document: Document) -> str:
    """The report as Markdown."""
    models, unigram = document["models"], document["unigram"]
    lines = [
        "# Reference models, on test texts\n",
        "| | parameters, those a token meets | tokens, minutes | perplexity | unigram's |",
        "|---|---|---|---:|---:|",
    ]
    for name, of in models.items():
        lines.append(
            f"| {name} | {of['parameters'] / 1e6:.1f} M, {of['active_parameters'] / 1e6:.1f} M"
            f" | {of['tokens'] / 1e6:.1f} M, {of['minutes']:.0f} | {of['perplexity']:.1f}"
            f" | {unigram['perplexity']:.0f} |"
        )
    lines += ["", f"| perplexity | {' | '.join(models)} | unigram |", "|---|" + "---:|" * (len(models) + 1)]
    for domain, of_unigram in unigram["perplexity_by_domain"].items():
        row = " | ".join(f"{of['perplexity_by_domain'][domain]:.1f}" for of in models.values())
        lines.append(f"| {domain} | {row} | {of_unigram:.0f} |")
    for name, of in models.items():
        if of["experts"] is not None:
            lines += ["", *_experts_in_words(name, of["experts"])]
    lines += ["", "![loss on validation texts](curve.png)"]
    return "\n".join(lines) + "\n"


def _experts_in_words(name: str, experts: Document) -> list[str]:
    entropies, told = experts["usage_entropy"], experts["told_of_domain_bits"]
    return [
        f"| {name}, layer | {' | '.join(map(str, range(len(entropies))))} |",
        "|---|" + "---:|" * len(entropies),
        f"| entropy of the experts' use, of 1 | {' | '.join(f'{value:.3f}' for value in entropies)} |",
        f"| bits an expert tells of the domain (of {experts['most_bits']:.2f})"
        f" | {' | '.join(f'{value:.3f}' for value in told)} |",
    ]
