"""What is wrong with a request's JSON, said for people: the field, what came, what was expected.

pydantic.ValidationError -> `explained` -> RequestInvalid

.venv/bin/python -m pytest tests/service/test_malformed_requests.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import ErrorDetails

from service.errors import RequestInvalid

# Of a wrong value, this much is shown: enough to find it, not a body sent back.
MAX_SHOWN_CHARACTERS = 60
REMEDY = "docs/rest-api.md and /openapi.json describe every field."


def explained(problems: Sequence[ErrorDetails]) -> RequestInvalid:
    """The first problem in words, and how many more there are."""
    first, more = problems[0], len(problems) - 1
    others = f" ({more} more {'problem' if more == 1 else 'problems'}.)" if more else ""
    return RequestInvalid(_sentence(first) + others, remedy=REMEDY)


def path(location: Sequence[int | str]) -> str:
    """sequences[0].experts[2], as one would write it."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{shown(part)}" for part in location)
    return text.removeprefix(".")


def shown(text: str) -> str:
    """Shortened, and in ASCII: what came may hold half a character, which cannot be sent back."""
    plain = text.encode("ascii", "backslashreplace").decode()
    return plain if len(plain) <= MAX_SHOWN_CHARACTERS else plain[: MAX_SHOWN_CHARACTERS - 3] + "..."


def _sentence(problem: ErrorDetails) -> str:
    field = path(problem["loc"])
    match problem["type"]:
        case "json_invalid":
            return f"The body is not JSON: {shown(str(problem['ctx']['error']))}."
        case "missing":
            return f"{field} is missing."
        case "extra_forbidden":
            return f"{field} is not a field of this request."
        case "model_type" | "model_attributes_type":
            return f"{field or 'The body'} is {came(problem['input'])}, expected an object."
        case "finite_number":
            return f"{field} is not a finite number."
    expected = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{field} is {came(problem['input'])}, expected {expected[:1].lower()}{expected[1:]}."


def came(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    return (
        {True: "true", False: "false", None: "null"}[value]
        if value is None or isinstance(value, bool)
        else shown(repr(value))
    )
