"""The commands that lead from a model to a published predictor, and which of them are done: `specmoe learn`.

collect -> traces split -> train -> evaluate, each as a person would type it, for each stack of the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traces.errors import TraceError

STATE = "learn.json"
RECORDED, PARTS, RUN, REPORT = "recorded", "parts", "run", "report"


@dataclass(frozen=True)
class Learning:
    """What is to be learnt, and how.

    recording, training: options of `specmoe collect` and `specmoe train`.
    """

    model: str
    folder: Path
    store: str
    alias: str
    recording: tuple[str, ...]
    training: tuple[str, ...]

    def commands(self) -> Iterator[list[str]]:
        """One after another; the next is known once the one before is done."""
        recorded = self.folder / RECORDED
        yield ["collect", self.model, *self.recording, "--out", str(recorded)]
        stacks = sorted(path.name for path in recorded.iterdir() if path.is_dir())
        for stack in stacks or [""]:
            yield from self._of_stack(recorded / stack, self.folder / stack)

    def _of_stack(self, recorded: Path, folder: Path) -> Iterator[list[str]]:
        from traces.files import load

        parts, store = folder / PARTS, ["--store", self.store]
        train, validation, test = (str(parts / name) for name in ("train", "validation", "test"))
        yield ["traces", "split", str(recorded), "--out", str(parts)]
        traces = ["--traces", train, "--validation", validation, "--run", str(folder / RUN)]
        yield ["train", *traces, *self.training, "--publish", *store, "--alias", self.alias]
        name = f"{load(Path(test)).spec.model}@{self.alias}"
        report = ["--report", str(folder / REPORT), "--baselines", "--train-traces", train]
        yield ["evaluate", name, *store, "--traces", test, *report]


def _going_on(words: list[str]) -> list[str]:
    """The command with what it needs to take up what it left, or without what it cannot take up."""
    if words[0] == "train":
        from training.loop import CHECKPOINT

        run = Path(words[words.index("--run") + 1])
        if (run / CHECKPOINT).exists():
            return [*words, "--resume"]
        shutil.rmtree(run, ignore_errors=True)
    elif words[0] == "traces":
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
    elif words[0] == "collect":
        return [*words, "--resume"]
    return words


class State:
    """Which commands are done, in `learn.json` of the folder, and the options they belong to.

    options: what must be the same when it goes on, once something was recorded.

    Raises TraceError where the folder has something and is not to be gone on with, or was begun otherwise.
    """

    def __init__(self, folder: Path, options: dict[str, Any], *, resume: bool) -> None:
        self._file = folder / STATE
        self._document: dict[str, Any] = {"options": options, "done": [], "begun": None}
        if resume and self._file.exists():
            self._take_up(options)
        elif folder.exists() and not self._is_free(folder):
            raise TraceError(
                f"{folder} exists already and is not an empty folder that specmoe learn began.",
                remedy="Choose another --folder; --resume goes on with one that was interrupted.",
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def _is_free(self, folder: Path) -> bool:
        """Whether no file is in it, but for the record of a recording that never began."""
        return folder.is_dir() and not any(p.is_file() for p in folder.rglob("*") if p != self._file)

    @property
    def kept(self) -> bool:
        """Whether there is anything to go on with."""
        return not self._is_free(self._file.parent)

    @property
    def done(self) -> list[list[str]]:
        done: list[list[str]] = self._document["done"]
        return done

    def begin(self, words: list[str]) -> list[str]:
        """Note that this command runs now. Returns it, made to go on with what an interruption left."""
        interrupted = self._document["begun"] == words
        self._document["begun"] = words
        self._write()
        return _going_on(words) if interrupted else words

    def end(self) -> None:
        self.done.append(self._document["begun"])
        self._document["begun"] = None
        self._write()

    def _take_up(self, options: dict[str, Any]) -> None:
        try:
            document = json.loads(self._file.read_text(encoding="utf-8"))
            before = document["options"]
            self._document = {name: document[name] for name in self._document}
        except (ValueError, KeyError, TypeError) as error:
            raise TraceError(
                f"{self._file} is not what specmoe learn wrote: {error!r}.",
                remedy="Begin again in another --folder.",
            ) from error
        other = [name for name in options if before.get(name) != options[name]]
        if not self.kept:
            self._document["options"] = options
        elif other:
            told = "; ".join(f"{name} was {before.get(name)!r}, not {options[name]!r}" for name in other)
            raise TraceError(
                f"{self._file.parent} was begun with other options: {told}.",
                remedy="Give the same ones with --resume, or another --folder.",
            )

    def _write(self) -> None:
        partial = self._file.with_name(f"{STATE}.partial")
        partial.write_text(json.dumps(self._document, indent=1) + "\n", encoding="utf-8")
        partial.replace(self._file)
