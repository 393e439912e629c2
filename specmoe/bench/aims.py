"""What a measured number should be, and whether it is.

specmoe bench --only stream
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Aim:
    """A limit. at_least: it is the least that is wanted, not the most."""

    what: str
    limit: float
    unit: str
    at_least: bool = False

    def report(self, measured: float) -> dict[str, Any]:
        """Fit for JSON: the number, the limit, and whether it is kept."""
        met = measured >= self.limit if self.at_least else measured <= self.limit
        return {
            "what": self.what,
            "measured": round(measured, 2),
            "limit": self.limit,
            "unit": self.unit,
            "at_least": self.at_least,
            "met": bool(met),
        }
