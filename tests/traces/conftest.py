"""Shards that tests read, and damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.traces.made_up import files, made_up_trace, write_shards
from traces.shard import Shard


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of four shards, of 8, 4, 7 and 3 tokens."""
    folder = write_shards(tmp_path / "shards", made_up_trace(lengths=(5, 3, 4, 7, 3)), max_shard_tokens=8)
    assert [Shard(file).num_tokens for file in files(folder)] == [8, 4, 7, 3]
    return folder
