"""Tools that make images: the model looks closer (`image_zoom_in`) or draws (`draw_on_image`).

An episode's images are its `Gallery`: those of the row, numbered from 0, then those that the tool
has made. `boxes` reads coordinates in pixels or relative ones. What a tool returns is an
`ImageFile`: it enters the conversation, the ids, the engine and the training batch as it is.
Needs Pillow: `pip install 'agentloop-rl[images]'`.

    tools:
      - class_name: tools.image.ImageZoomIn
      - class_name: tools.image.DrawOnImage
"""

from tools.image.draw import DrawOnImage
from tools.image.zoom import ImageZoomIn

__all__ = ["DrawOnImage", "ImageZoomIn"]
