"""Write docs/config.md from the config models, so that it cannot drift from the code."""

from __future__ import annotations

from pathlib import Path

from agentloop.config import Recipe, SftRecipe
from agentloop.config.docs import describe

HEADER = """# Every key of a recipe

Written by `make docs` from `agentloop/config/`; `agentloop config` prints the same. A recipe's relative paths are
relative to the recipe's folder, an override's to the working directory.
"""


def main() -> None:
    parts = [HEADER]
    for title, model in (("`agentloop train`", Recipe), ("`agentloop sft`", SftRecipe)):
        parts.append(f"## {title}\n\n```\n" + "\n".join(describe(model)).strip() + "\n```\n")
    (Path(__file__).parent / "config.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
