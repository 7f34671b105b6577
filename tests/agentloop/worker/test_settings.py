"""A worker reads the recipe that the main process has."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentloop.config import Recipe
from agentloop.config.loading import load_config, read_config

REPO = Path(__file__).resolve().parents[3]
RECIPES = sorted(
    path for path in (REPO / "recipes").rglob("*.yaml") if {"run", "data"} <= (read_config(path) or {}).keys()
)


def test_there_are_recipes() -> None:
    assert len(RECIPES) > 8


@pytest.mark.parametrize("file", RECIPES, ids=lambda path: str(path.relative_to(REPO)))
def test_a_recipe_is_the_same_after_it_was_sent(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEARCH_PORT", "SANDBOX_URL", "SEARCH_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9" if "URL" in name else "9")
    recipe = load_config(Recipe, file, ["rollout.token=a-secret"])
    sent = Recipe.model_validate_json(recipe.model_dump_json(by_alias=True), context={"folder": recipe.folder})
    assert sent == recipe and sent.folder == recipe.folder and sent.rollout.token == "a-secret"
