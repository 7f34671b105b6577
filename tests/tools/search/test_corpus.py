"""Passages in a file: the forms that others wrote, and lines that are none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from agentloop.errors import DataError
from tests.tools.search.support import PASSAGES, write_corpus
from tools.search import corpus as module
from tools.search.corpus import Corpus, fingerprint, open_corpus, read_lines


def test_the_established_forms_are_read(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"id": "0", "contents": "\\"Title\\"\\ntext"}\r\n'
        b"\n"
        b'{"id": "1", "title": "Title", "text": "text", "url": "u"}\n'
        b'{"id": 2, "text": "text"}\n  \n'
        b'{"contents": "alone"}'
    )
    lines = list(read_lines(file))
    assert [line.contents for line in lines] == ['"Title"\ntext', "Title\ntext", "\ntext", "alone"]
    assert [line.number for line in lines] == [0, 1, 2, 3]
    offsets = np.array([line.start for line in lines] + [lines[-1].end], np.int64)
    with Corpus(file, offsets) as corpus:
        assert [corpus.document(i)["contents"] for i in range(len(corpus))] == [line.contents for line in lines]
        assert corpus.document(1)["url"] == "u"
    # From the middle, as a resumed build does.
    assert [line.contents for line in read_lines(file, 2, lines[2].start)] == ["\ntext", "alone"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "line 4 is not JSON: .*, at column 2\n"),
        (b'{"contents": "\xff"}', "line 4 is not JSON"),
        (b'{"contents": "\\ud800"}', "line 4 is not JSON"),
        (b"[]", "line 4 is list, not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"id": "3"}', "has neither a text `contents` nor a text `text`"),
        (b'{"contents": 5}', "has neither"),
        (b'{"contents": ["a"]}', "has neither"),
        (b'{"text": null, "title": "a"}', "has neither"),
        (b"[" * 100_000, "is not JSON"),
        (b"\x00", "is not JSON"),
    ],
)
def test_a_line_that_is_no_passage_is_named(tmp_path: Path, line: bytes, says: str) -> None:
    """With its number in the file, as editors count: blank lines too, and also from the middle of the file."""
    file = tmp_path / "c.jsonl"
    file.write_bytes(b'\n{"contents": "fine"}\n \n' + line + b"\n")
    for number, start in ((0, 0), (0, 1), (1, 22)):
        with pytest.raises(DataError, match=says):
            list(read_lines(file, number, start))


@pytest.mark.parametrize(
    "content",
    [b'[\n  {"id": "0", "contents": "a"}\n]\n', b'[{"contents": "a"}]', b'{\n "contents": "a"\n}\n', b"id,text\n0,a\n"],
    ids=["pretty array", "array", "pretty object", "csv"],
)
def test_of_a_file_in_another_form_the_error_says_to_write_json_lines(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "c.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"c\.jsonl, line 1 is") as caught:
        list(read_lines(file))
    assert str(caught.value.hint).startswith('write JSON lines: {"id": .., "contents": ')


def test_a_file_without_line_ends_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_LINE", 1000)
    file = tmp_path / "c.jsonl"
    file.write_bytes(b'{"contents": "' + b"a" * 5000)
    with pytest.raises(DataError, match="more than 1,000 bytes"):
        list(read_lines(file))


def test_published_files_are_opened_as_they_are_and_their_lines_are_found_once(tmp_path: Path) -> None:
    file = write_corpus(tmp_path / "wiki-18.jsonl")
    with file.open("ab") as more:
        more.write(b"\n" + b'{"id": "6", "contents": "last"}')
    with open_corpus(file) as corpus:
        assert len(corpus) == len(PASSAGES) + 1
        assert corpus.document(0)["contents"].startswith('"Pavia')
        assert corpus.document(6)["contents"] == "last"
    kept = tmp_path / "wiki-18.jsonl.offsets.npy"
    before = kept.stat().st_mtime_ns
    with open_corpus(file) as corpus:
        assert len(corpus) == len(PASSAGES) + 1
    assert kept.stat().st_mtime_ns == before

    with file.open("ab") as more:
        more.write(b'\n{"contents": "new"}\n')
    with open_corpus(file) as corpus:
        assert corpus.document(7)["contents"] == "new"
    kept.write_bytes(b"damaged")
    with open_corpus(file) as corpus:
        assert len(corpus) == len(PASSAGES) + 2


@pytest.mark.parametrize("content", [None, b"", b"\n"])
def test_a_file_without_a_passage_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "c.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"c\.jsonl"):
        open_corpus(file)


def test_a_fingerprint_tells_files_apart(tmp_path: Path) -> None:
    first, second = write_corpus(tmp_path / "a"), write_corpus(tmp_path / "b")
    assert fingerprint(first) == fingerprint(second)
    data = bytearray(second.read_bytes())
    data[50] ^= 1
    second.write_bytes(bytes(data))
    assert fingerprint(first) != fingerprint(second)


@pytest.mark.parametrize("kept", [b"", b"junk", b"\x93NUMPY", None])
def test_kept_places_that_cannot_be_read_are_found_anew(tmp_path: Path, kept: bytes | None) -> None:
    file, beside = write_corpus(tmp_path / "c.jsonl"), tmp_path / "c.jsonl.offsets.npy"
    if kept is None:
        np.save(beside, np.zeros(0, np.int64))
    else:
        beside.write_bytes(kept)
    with open_corpus(file) as corpus:
        assert len(corpus) == len(PASSAGES)


def test_a_file_that_changes_is_noticed_and_one_that_is_put_back_is_read_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_corpus(tmp_path / "c.jsonl")
    content = file.read_bytes()
    with open_corpus(file) as corpus:
        first = corpus.raw(0)
        for changed in (b"", content[: len(content) // 2], content.replace(b"1488", b"1489"), content + content):
            write_later(file, changed)
            for read in (lambda: corpus.raw(0), lambda: corpus.document(5), corpus.check):
                with pytest.raises(DataError, match=r"c\.jsonl has changed since its index was built") as caught:
                    read()
                assert "build the index again" in (caught.value.hint or "")
            write_later(file, content)
            assert corpus.raw(0) == first
        assert len(caplog.records) == 4, "said once for each change"
        file.unlink()
        write_corpus(file, PASSAGES[1:])
        assert corpus.raw(0) == first, "another file of the name is not this one"


def test_a_file_that_becomes_shorter_between_check_and_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_corpus(tmp_path / "c.jsonl")
    with open_corpus(file) as corpus:
        monkeypatch.setattr(Corpus, "check", lambda _: None)
        file.write_bytes(b"")
        with pytest.raises(DataError, match="has changed since its index was built"):
            corpus.raw(0)


def write_later(file: Path, content: bytes) -> None:
    """Write into a file that is there, and at another time: the clock of a disk has steps."""
    before = file.stat().st_mtime_ns
    file.write_bytes(content)
    os.utime(file, ns=(before, before + 10**9))
