"""Images on their way to the sender process: each goes there once, and none is lost on the way."""

from __future__ import annotations

import base64
import io

from PIL import Image

from agentloop.trace.sender.images import KEPT, MARK, ReceivedImages, SentImages


def png(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def test_all_images_of_a_request_are_there_however_many() -> None:
    sent, received = SentImages(), ReceivedImages()
    images = [png(number) for number in range(2 * KEPT + 40)]
    references = [sent.reference(image) for image in images]
    received.add(sent.new)
    shown = [received.image(reference) for reference in references]
    assert [image.getpixel((0, 0)) for image in shown if image is not None] == [
        (number % 256, number // 256, 7) for number in range(len(images))
    ]
    sent.new = {}
    received.add({"later": base64.b64encode(png()).decode()})
    assert received.image(references[-1]) is not None, "what the sender believes to be there stays"
    assert sent.reference(images[-1]) == references[-1] and not sent.new


def test_an_image_that_cannot_be_read_is_not_referred_to() -> None:
    sent, received = SentImages(), ReceivedImages()
    assert sent.reference("/nowhere.png") is None and sent.reference({"path": None}) is None
    assert not sent.new
    received.add({"1": base64.b64encode(b"no image").decode(), "2": "??"})
    assert [received.image({MARK: key}) for key in ("1", "2", "3")] == [None, None, None]
    assert received.image("1") is None


def test_another_process_is_sent_everything_again() -> None:
    sent, image = SentImages(), png()
    first = sent.reference(image)
    assert first is not None and set(sent.new) == {first[MARK]}
    sent.forget()
    again = sent.reference(image)
    assert again is not None and set(sent.new) == {again[MARK]}
