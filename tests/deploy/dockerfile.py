"""Just enough of a Dockerfile to check ours: its stages, with what each inherits from the stages before.

stages(Path("Dockerfile").read_text())[-1].environment
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

INSTRUCTION = re.compile(r"^([A-Z]+)\s+(.*)$", re.DOTALL)


@dataclass(frozen=True)
class Stage:
    """One FROM. `instructions` begin with those of the stage it is built on."""

    name: str
    instructions: tuple[tuple[str, str], ...]
    own: int

    @property
    def text(self) -> str:
        """What the stage itself says."""
        return "\n".join(" ".join(instruction) for instruction in self.instructions[-self.own :])

    def value(self, instruction: str) -> str:
        """The last word on USER, EXPOSE, ENTRYPOINT, ..."""
        return [value for name, value in self.instructions if name == instruction][-1]

    @property
    def environment(self) -> dict[str, str]:
        """Its SPECMOE_* variables."""
        declared = " ".join(value for name, value in self.instructions if name == "ENV")
        return dict(re.findall(r"(SPECMOE_\w+)=(\S+)", declared))

    @property
    def healthcheck(self) -> list[str]:
        """The command that tells whether a container is healthy."""
        return list(json.loads(self.value("HEALTHCHECK").split("CMD", 1)[1]))


def stages(text: str) -> list[Stage]:
    """The stages in order."""
    found: dict[str, Stage] = {}
    name, inherited, own = "", (), []
    for instruction, value in _instructions(text):
        if instruction != "FROM":
            own.append((instruction, value))
            continue
        if name:
            found[name] = Stage(name, (*inherited, *own), len(own))
        base, _, name = value.partition(" AS ")
        inherited, own = (found[base].instructions if base in found else ()), []
    return [*found.values(), Stage(name, (*inherited, *own), len(own))]


def _instructions(text: str) -> list[tuple[str, str]]:
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = lines.replace("\\\n", " ")
    matches = [INSTRUCTION.match(line) for line in joined.splitlines() if line.strip()]
    return [(match[1], match[2].strip()) for match in matches if match]
