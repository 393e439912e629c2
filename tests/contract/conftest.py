"""Fixtures of the contract tests."""

from tests.contract.clients import connect

__all__ = ["connect"]
