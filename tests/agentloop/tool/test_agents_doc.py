"""The tool with images of docs/agents.md, copied from the page, called as in an episode."""

from __future__ import annotations

import io
import re
from pathlib import Path

from PIL import Image

from agentloop.tool.loading import load_toolset
from agentloop.types import Task, ToolCall

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


async def test_the_tool_of_the_page_shows_a_new_image_of_the_rows(repo: Path, tmp_path: Path) -> None:
    page = (repo / "docs" / "agents.md").read_text()
    (code,) = [block for block in BLOCK.findall(page) if "class Rotate(Tool)" in block]
    (tmp_path / "rotate.py").write_text(code)
    (tmp_path / "tools.yaml").write_text("tools: [{class_name: './rotate.py:Rotate'}]")
    file = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(file, "PNG")

    toolset = load_toolset(tmp_path / "tools.yaml")
    session = toolset.session(Task("0", "tool_agent", [], images=[{"bytes": file.getvalue()}]))
    result = await session.call(ToolCall("rotate", {"degrees": 90}), 10.0)
    await session.close()
    toolset.close()
    assert result.text == "20 x 40" and result.error is None and result.metrics == {"rotations": 1.0}
    assert [image.size for image in result.images] == [(20, 40)]
