"""The tiny model of the trainer's tests."""

from __future__ import annotations

from tests.trainer.conftest import tiny_model

__all__ = ["tiny_model"]
