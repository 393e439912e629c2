"""Reads the expert logs of DeepSeek's ESFT: a folder with a file for each layer, in it a line for each text.

    expert_weights_1.txt:   8  26  56  57  60  11   2   7 ...     0.0414  0.047  0.0446 ...

Tabs part the numbers of a line: the experts of the text's tokens, top-k each, and after two tabs their
weights, rounded to four places. Line i is of the same text in all files. Each folder rank_N has other texts.

    specmoe traces import results/expert_scores/intent --out traces/ --domain intent \\
        --model deepseek-v2-lite --num-experts 64 --top-k 6
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from traces.errors import TraceError, TraceFormatError
from traces.importers.recorded import Recorded, trace_of
from traces.importers.told import Imported, Told, needed

LAYER_FILE = re.compile(r"expert_weights_(\d{1,4})\.txt")
MAX_BYTES = 4 << 30  # of all files of a folder
MAX_LINE_BYTES = 64 << 20
RECORD_AGAIN = "Give the folder that get_expert_scores.py wrote, whole and unchanged."

Texts = list[tuple[Int64[np.ndarray, "n K"], Float32[np.ndarray, "n K"]]]


def folders(source: Path) -> list[Path]:
    """The folders with logs in them: the source, or those of its ranks, in name order."""
    if layer_files(source):
        return [source]
    return sorted(folder for folder in source.glob("rank_*") if layer_files(folder))


def layer_files(folder: Path) -> dict[int, Path]:
    """The logs of a folder by their layer's number, in order."""
    found = (
        {int(match[1]): file for file in folder.iterdir() if (match := LAYER_FILE.fullmatch(file.name))}
        if folder.is_dir()
        else {}
    )
    return dict(sorted(found.items()))


def read(path: Path, told: Told) -> Imported:
    """The trace in a folder, of domain "unknown", with gates.

    Raises TraceError naming the file and line that is malformed.
    """
    if told.model is None:
        raise TraceFormatError(f"{path} does not name its model.", remedy="Name it: --model NAME.")
    num_experts = needed(path, told.num_experts, "how many experts a layer has", "--num-experts")
    top_k = needed(path, told.top_k, "how many experts a token is routed to", "--top-k")
    files = layer_files(path)
    size = sum(file.stat().st_size for file in files.values())
    if size > MAX_BYTES:
        raise TraceFormatError(
            f"{path} has {size} bytes, {MAX_BYTES} at most are read.", remedy="Record fewer tokens."
        )
    layers = [list(_texts(file, top_k)) for file in files.values()]
    _check_same_texts(list(files.values()), layers)
    sequences = [
        Recorded(
            f"line {number}",
            np.stack([experts for experts, _ in text], axis=1),
            gates=np.stack([weights for _, weights in text], axis=1),
        )
        for number, text in enumerate(zip(*layers, strict=True), 1)
    ]
    if not sequences:
        raise TraceError(f"{path} has no lines in its files.", remedy=RECORD_AGAIN)
    return trace_of(path, sequences, model=told.model, num_experts=num_experts, layers=list(files))


def _texts(file: Path, top_k: int) -> Iterator[tuple[Int64[np.ndarray, "n K"], Float32[np.ndarray, "n K"]]]:
    """Experts and weights of each line."""
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(MAX_LINE_BYTES):
            number += 1
            try:
                listed, weighed = line.decode("ascii").rstrip("\r\n").split("\t\t")
                experts = np.array(listed.split("\t")).astype(np.int64)
                with np.errstate(
                    over="ignore"
                ):  # what does not fit becomes infinite, and the check refuses it
                    weights = np.array(weighed.split("\t")).astype(np.float32)
            except (ValueError, OverflowError) as error:
                raise TraceFormatError(
                    f"{file}, line {number}: found {line[:50]!r}, expected numbers with tabs between them,"
                    " and two tabs before the weights.",
                    remedy=RECORD_AGAIN,
                ) from error
            if len(experts) != len(weights) or len(experts) % top_k:
                raise TraceError(
                    f"{file}, line {number}: {len(experts)} experts and {len(weights)} weights, expected"
                    f" as many of both and {top_k} for each token.",
                    remedy="Correct --top-k, or record again.",
                )
            yield experts.reshape(-1, top_k), weights.reshape(-1, top_k)


def _check_same_texts(files: list[Path], layers: list[Texts]) -> None:
    """Raise TraceError where files do not have the same texts, as far as their lengths tell."""
    for file, texts in zip(files, layers, strict=True):
        if len(texts) != len(layers[0]):
            raise TraceError(
                f"{file} has {len(texts)} lines, but {files[0]} {len(layers[0])}.", remedy=RECORD_AGAIN
            )
        for number, ((experts, _), (first, _)) in enumerate(zip(texts, layers[0], strict=True), 1):
            if len(experts) != len(first):
                raise TraceError(
                    f"{file}, line {number}: {len(experts)} tokens, but {files[0]} has {len(first)} there.",
                    remedy=RECORD_AGAIN,
                )
