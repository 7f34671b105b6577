"""Building an index: killed and resumed, twice at once, on a full disk, from a corpus that changes."""

from __future__ import annotations

import fcntl
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from agentloop.errors import ConfigError, DataError, DiskError
from tests.tools.search.support import PASSAGES, silent, write_corpus
from tools.search.index import base, building
from tools.search.index.bm25 import Bm25Builder, Bm25Index
from tools.search.index.building import MANIFEST, Arrays, build_index
from tools.search.index.folder import open_folder


class Killed(BaseException):
    """Ends a build where it is, as a signal would."""


class Dying(Bm25Builder):
    """Is killed in its part number `at`."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.made = at, 0

    def part(self, texts: list[str]) -> Arrays:
        self.made += 1
        if self.made == self.at:
            raise Killed
        return super().part(texts)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "PART_PASSAGES", 2)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != MANIFEST}


def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c")
    build_index(corpus, tmp_path / "whole", Bm25Builder(), progress=silent)
    with pytest.raises(Killed):
        build_index(corpus, tmp_path / "i", Dying(3), progress=silent)
    assert not (tmp_path / "i").exists()

    again = Dying(99)
    build_index(corpus, tmp_path / "i", again, progress=silent)
    assert again.made == 1, "two of three parts were there"
    assert files_of(tmp_path / "i") == files_of(tmp_path / "whole")
    assert not (tmp_path / ".i.partial").exists()


def test_a_build_that_was_killed_while_it_wrote_the_index_repeats_that(tmp_path: Path) -> None:
    class DiesLate(Bm25Builder):
        def finish(self, *args: Any) -> dict[str, Any]:
            super().finish(*args)
            raise Killed

    corpus = write_corpus(tmp_path / "c")
    with pytest.raises(Killed):
        build_index(corpus, tmp_path / "i", DiesLate(), progress=silent)
    again = Dying(99)
    build_index(corpus, tmp_path / "i", again, progress=silent)
    assert again.made == 0
    assert open_folder(tmp_path / "i").index.search(["genentech"], 1)[0].numbers == [4]


@pytest.mark.parametrize("step", ["rename_folder", "rmtree"])
def test_a_build_that_was_killed_in_its_last_steps_has_lost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    corpus = write_corpus(tmp_path / "c")

    remove = shutil.rmtree

    def die(folder: Path, *arguments: Any, **options: Any) -> None:
        if step == "rename_folder" or (tmp_path / "i").exists():
            raise Killed
        remove(folder, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(building if step == "rename_folder" else shutil, step, die)
        build_index(corpus, tmp_path / "i", Bm25Builder(), progress=silent)
    again = Dying(99)
    build_index(corpus, tmp_path / "i", again, force=True, progress=silent)
    assert again.made == 0, "all parts were there"
    assert open_folder(tmp_path / "i").index.passages == len(PASSAGES)
    assert not (tmp_path / ".i.partial").exists()


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "journal"])
def test_a_damaged_part_is_made_again(tmp_path: Path, damage: str) -> None:
    corpus = write_corpus(tmp_path / "c")
    build_index(corpus, tmp_path / "whole", Bm25Builder(), progress=silent)
    with pytest.raises(Killed):
        build_index(corpus, tmp_path / "i", Dying(3), progress=silent)
    partial = tmp_path / ".i.partial"
    file = next((partial / "parts").glob("00001.words.npy"))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    elif damage == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    elif damage == "missing":
        file.unlink()
    else:
        journal = partial / "parts.jsonl"
        journal.write_bytes(journal.read_bytes()[:-20])
    again = Dying(99)
    build_index(corpus, tmp_path / "i", again, progress=silent)
    assert again.made == 2
    assert files_of(tmp_path / "i") == files_of(tmp_path / "whole")


def test_another_corpus_or_other_options_begin_anew(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c")
    for change in ("options", "corpus"):
        with pytest.raises(Killed):
            build_index(corpus, tmp_path / change, Dying(3), progress=silent)
        builder = Dying(99)
        if change == "corpus":
            write_corpus(corpus, PASSAGES[1:])
        else:
            builder.options = {**builder.options, "k1": 2.0}
        build_index(corpus, tmp_path / change, builder, progress=silent)
        assert builder.made == 3


def test_two_builds_at_once(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c")
    with (tmp_path / ".i.partial.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process builds"):
            build_index(corpus, tmp_path / "i", Bm25Builder(), progress=silent)
    build_index(corpus, tmp_path / "i", Bm25Builder(), progress=silent)
    with pytest.raises(ConfigError, match=r"exists\n.*--force"):
        build_index(corpus, tmp_path / "i", Bm25Builder(), progress=silent)


def test_an_index_is_replaced_only_on_request_and_nothing_else_ever(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c")
    build_index(corpus, tmp_path / "i", Bm25Builder(), progress=silent)
    write_corpus(corpus, PASSAGES[:3])
    build_index(corpus, tmp_path / "i", Bm25Builder(), force=True, progress=silent)
    assert open_folder(tmp_path / "i").index.passages == 3

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis").write_text("years of work")
    with pytest.raises(ConfigError, match="is not an index"):
        build_index(corpus, tmp_path / "mine", Bm25Builder(), force=True, progress=silent)


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    """The last step renames a folder, which cannot take a link's name."""
    corpus = write_corpus(tmp_path / "c")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for force in (False, True):
        build_index(corpus, tmp_path / "link", Bm25Builder(), force=force, progress=silent)
        assert (tmp_path / "link").is_symlink()
        assert open_folder(tmp_path / "disk").index.passages == len(PASSAGES)


def test_a_place_where_nothing_can_be_made_is_named(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c")
    (tmp_path / ".i.partial").symlink_to(tmp_path / "nowhere")
    for out in (tmp_path / "i", corpus / "below"):
        with pytest.raises(ConfigError, match=r"the folder .*\.partial cannot be made: .*\n.*choose another --out"):
            build_index(corpus, out, Bm25Builder(), progress=silent)


MANIFESTS: dict[str, dict[str, Any]] = {
    "kind": {"kind": "x"},
    "corpus": {"corpus": "a text"},
    "corpus.path": {"corpus": {"path": 5, "bytes": 1, "digest": ""}},
    "files": {"files": [1]},
    "files.a.bytes": {"files": {"a": {"xxh3": ""}}},
    "index": {"kind": "dense"},
    "does not list offsets.npy": {"files": {}},
}


@pytest.mark.parametrize("says", MANIFESTS)
def test_a_manifest_that_was_altered_is_named(tmp_path: Path, says: str) -> None:
    build_index(write_corpus(tmp_path / "c"), tmp_path / "i", Bm25Builder(), progress=silent)
    file = tmp_path / "i" / MANIFEST
    file.write_bytes(orjson.dumps(orjson.loads(file.read_bytes()) | MANIFESTS[says]))
    with pytest.raises(DataError, match=f"{MANIFEST} is damaged: .*{says}"):
        open_folder(tmp_path / "i")


def test_a_full_disk_is_named_and_the_parts_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of file sizes stands for the disk. First a part does not fit, then the index."""
    monkeypatch.setattr(building, "PART_PASSAGES", 200)
    passages = [("", " ".join(f"w{number * word % 997}" for word in range(20))) for number in range(600)]
    corpus = write_corpus(tmp_path / "c", passages)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for most, parts in ((5_000, 0), (30_000, 3)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
            with pytest.raises(DiskError, match="free on its disk"):
                build_index(corpus, tmp_path / "i", Bm25Builder(), progress=silent)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            assert len((tmp_path / ".i.partial/parts.jsonl").read_bytes().splitlines()) == parts
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "i").exists()
    again = Dying(99)
    build_index(corpus, tmp_path / "i", again, progress=silent)
    assert again.made == 0


def test_a_corpus_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c")

    class Writing(Bm25Builder):
        def part(self, texts: list[str]) -> Arrays:
            with corpus.open("ab") as file:
                file.write(b" \n")
            return super().part(texts)

    with pytest.raises(DataError, match="changed while its index was built"):
        build_index(corpus, tmp_path / "i", Writing(), progress=silent)


def test_wrong_input_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c")
    with corpus.open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(DataError, match="line 7 "):
        build_index(corpus, tmp_path / "i", Bm25Builder(), progress=silent)
    (tmp_path / "empty").write_bytes(b"\n\n")
    with pytest.raises(DataError, match="has no passage"):
        build_index(tmp_path / "empty", tmp_path / "i", Bm25Builder(), progress=silent)
    with pytest.raises(DataError, match="is not a file"):
        build_index(tmp_path, tmp_path / "i", Bm25Builder(), progress=silent)
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize("verify", [False, True])
def test_a_damaged_index_is_not_served(tmp_path: Path, verify: bool) -> None:
    corpus = write_corpus(tmp_path / "c")
    build_index(corpus, tmp_path / "i", Bm25Builder(), progress=silent)
    data = tmp_path / "i/data.csc.index.npy"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match="its checksum differs"):
        open_folder(tmp_path / "i", verify=verify)
    data.write_bytes(whole[:-4])
    with pytest.raises(DataError, match="has another size"):
        open_folder(tmp_path / "i", verify=verify)
    data.unlink()
    with pytest.raises(DataError, match="is missing"):
        open_folder(tmp_path / "i", verify=verify)


def test_an_index_knows_its_corpus(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c")
    build_index(corpus, tmp_path / "i", Bm25Builder(), progress=silent)
    moved = tmp_path / "elsewhere"
    corpus.rename(moved)
    with pytest.raises(DataError, match="--corpus"):
        open_folder(tmp_path / "i")
    assert open_folder(tmp_path / "i", corpus=moved).corpus.document(4)["id"] == "4"
    write_corpus(moved, PASSAGES[::-1])
    with pytest.raises(DataError, match="is not the corpus"):
        open_folder(tmp_path / "i", corpus=moved)
    with pytest.raises(ConfigError, match="is not an index"):
        open_folder(tmp_path)


def test_no_file_is_read_with_pickle(tmp_path: Path) -> None:
    build_index(write_corpus(tmp_path / "c"), tmp_path / "i", Bm25Builder(), progress=silent)
    np.save(tmp_path / "i/data.csc.index.npy", np.array([{"a": print}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        Bm25Index(tmp_path / "i")


def test_a_missing_library_names_the_extra() -> None:
    with pytest.raises(ConfigError, match=r"needs not_there.*\n.*agentloop-rl\[search\]"):
        base.library("not_there")
