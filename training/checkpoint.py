"""A checkpoint on disk: tensors and plain numbers, replaced whole, and nothing else is ever read back."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from training.errors import RunInvalid


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` so that `path` always holds a whole checkpoint, the old or the new one."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises RunInvalid where there is none or it is damaged."""
    if not path.is_file():
        raise RunInvalid(
            f"{path} does not exist.", remedy="Give the folder of a run made by `specmoe train`."
        )
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RunInvalid(
            f"{path} is damaged: {str(error).splitlines()[0]}", remedy="Train again into a new folder."
        ) from error
    return content
