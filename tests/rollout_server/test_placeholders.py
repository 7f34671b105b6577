"""Where a prompt shows its images, and how many."""

from __future__ import annotations

import pytest

from rollout_server.errors import RequestError
from rollout_server.placeholders import Placeholders

PAD = 9
PLACEHOLDERS = Placeholders(PAD, (PAD, 8))


def test_each_run_of_placeholders_is_an_image() -> None:
    ids = [PAD, 4, PAD, PAD, 5, PAD]
    assert PLACEHOLDERS.check(ids, 3) == [(0, 1), (2, 4), (5, 6)]
    assert PLACEHOLDERS.check([4, 5], 0) == []


@pytest.mark.parametrize(
    ("ids", "images"), [([4, 5], 1), ([4, PAD, PAD, 5], 0), ([4, PAD, PAD, 5], 2), ([PAD, 4, PAD], 1)]
)
def test_another_number_of_images_is_refused(ids: list[int], images: int) -> None:
    with pytest.raises(RequestError, match=rf"has {images} images"):
        PLACEHOLDERS.check(ids, images)


def test_collapsed_each_image_has_one_placeholder() -> None:
    assert PLACEHOLDERS.collapse([PAD, 4, PAD, PAD, 5, PAD]) == [PAD, 4, PAD, 5, PAD]
