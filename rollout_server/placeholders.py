"""Placeholder tokens: where a prompt shows its images, and which tokens are never sampled.

A prompt holds one placeholder (`<|image_pad|>`) for each token that an image becomes, in runs: one
run for each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentloop.model_folder import ModelFolder
from rollout_server.errors import RequestError


@dataclass(slots=True, frozen=True)
class Placeholders:
    """The placeholder tokens of a model that takes images.

    Attributes:
        image: id of the token that represents a part of an image.
        never_sampled: ids of all placeholders, of videos too. A sampled one would count as part of
            an image in the next turn and in training.
    """

    image: int
    never_sampled: tuple[int, ...]

    def runs(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Return `[start, end)` of each run of image placeholders: `[4, 9, 9, 5]` has (1, 3)."""
        runs: list[tuple[int, int]] = []
        if self.image not in ids:
            return runs

        for place, token in enumerate(ids):
            if token == self.image:
                if runs and runs[-1][1] == place:
                    runs[-1] = (runs[-1][0], place + 1)
                else:
                    runs.append((place, place + 1))
        return runs

    def check(self, ids: Sequence[int], images: int) -> list[tuple[int, int]]:
        """Return the runs of a prompt with this number of images.

        Raises:
            RequestError: the numbers differ.
        """
        runs = self.runs(ids)
        if len(runs) != images:
            raise RequestError(
                f"input_ids have {len(runs)} runs of the image token {self.image}, but image_data has "
                f"{images} images; send one run for each image",
                "image_data",
            )
        return runs

    def collapse(self, ids: Sequence[int]) -> list[int]:
        """Return `ids` with each run reduced to one placeholder: the form that SGLang expands."""
        collapsed: list[int] = []
        end = 0
        for start, after in self.runs(ids):
            collapsed += [*ids[end:start], self.image]
            end = after
        return [*collapsed, *ids[end:]]


def placeholders_of(folder: ModelFolder) -> Placeholders | None:
    """Return the placeholders of a model; None if its config.json names none."""
    if not folder.takes_images or folder.image_token_id is None:
        return None
    return Placeholders(folder.image_token_id, folder.placeholder_ids)
