"""Encoding: content never becomes a control token, and is otherwise encoded as the tokenizer
encodes it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from agentloop.chat import load_tokenizer
from agentloop.chat.tokenizer import SafeEncoder, check_vocabulary
from agentloop.errors import ModelError

MARK = "\ue0a7"
PIECES = [
    "<|im_end|>",
    "<|im_start|>",
    "<tool_call>",
    "</tool_call>",
    "<|im_",
    "end|>",
    " ",
    "\n",
    "a",
    "Zürich",
    "12",
    "<",
]


@pytest.fixture(scope="module")
def quickstart(quickstart_model: Path) -> Any:
    return load_tokenizer(str(quickstart_model))


def without_added_tokens(tokenizer: Any) -> Tokenizer:
    """The oracle for plain text: the same tokenizer without any control token."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["added_tokens"], data["post_processor"] = [], None
    return Tokenizer.from_str(json.dumps(data))


@pytest.fixture(scope="module", params=["quickstart", "qwen"])
def pair(request: pytest.FixtureRequest) -> tuple[SafeEncoder, Tokenizer]:
    tokenizer = request.getfixturevalue(request.param)
    return SafeEncoder(tokenizer), without_added_tokens(tokenizer)


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=8).map("".join))
@settings(max_examples=150, deadline=None)
def test_plain_encoding_is_that_of_a_tokenizer_without_control_tokens(
    pair: tuple[SafeEncoder, Tokenizer], text: str
) -> None:
    encoder, oracle = pair
    ids = encoder.encode_plain(text)
    assert ids == oracle.encode(text, add_special_tokens=False).ids
    assert not set(ids) & set(encoder.added.values())


@given(st.lists(st.tuples(st.sampled_from(PIECES) | st.text(max_size=4), st.booleans()), max_size=8))
@settings(max_examples=150, deadline=None)
def test_a_protected_text_has_the_templates_control_tokens_and_no_other(
    pair: tuple[SafeEncoder, Tokenizer], pieces: list[tuple[str, bool]]
) -> None:
    encoder, _ = pair
    contents = [(text.replace(MARK, ""), is_content) for text, is_content in pieces]
    text = "".join(encoder.protect(text, MARK) if is_content else text for text, is_content in contents)
    ids = encoder.encode_protected(text, MARK)
    # the template's own text, with contents replaced by a letter that merges with nothing
    shell = "".join("\x00" if is_content else text for text, is_content in contents)
    expected = [encoder.added[match] for match in encoder.pattern.findall(shell)]
    assert [token for token in ids if token in set(encoder.added.values())] == expected


@given(st.text(max_size=20))
@settings(max_examples=60, deadline=None)
def test_without_a_control_token_both_ways_agree(pair: tuple[SafeEncoder, Tokenizer], text: str) -> None:
    encoder, _ = pair
    text = f"<|im_start|>user\n{text.replace(MARK, '')}<|im_end|>\n"
    assert encoder.encode_protected(text, MARK) == encoder.encode(text)


def words(vocabulary: list[str], added: list[AddedToken], normalizer: Any = None) -> Any:
    """A tokenizer of whole words, so that a control token may also be a word."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.add_tokens(added)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_control_token_that_is_also_a_word_of_the_vocabulary_does_not_come_out_of_text() -> None:
    tokenizer = words(["?", "<end>", "a"], [AddedToken("<end>", special=True)])
    encoder = SafeEncoder(tokenizer)
    assert encoder.encode("a <end>") == [2, 1]
    assert 1 not in encoder.encode_plain("a <end>")
    assert encoder.encode_plain("a")[0] == 2


def test_a_control_token_that_appears_by_normalization_is_seen() -> None:
    added = [AddedToken("<end>", normalized=True, special=True)]
    encoder = SafeEncoder(words(["?", "<end>", "a"], added, normalizers.NFKC()))
    full_width = "a ＜end＞"
    assert encoder.encode(full_width) == [2, 1]
    assert encoder.has_control(full_width) and not encoder.has_control("a")
    assert 1 not in encoder.encode_plain(full_width)
    assert 1 not in encoder.encode_protected(encoder.protect(full_width, MARK), MARK)


def test_a_control_token_that_takes_the_white_space_around_it_still_does() -> None:
    added = [AddedToken("<end>", rstrip=True, special=True), AddedToken("<begin>", lstrip=True, special=True)]
    encoder = SafeEncoder(words(["?", "<end>", "<begin>", "a"], added))
    text = "a<end> \n <begin> a <end>a"
    assert encoder.encode_protected(text, MARK) == encoder.encode(text)


def test_added_white_space_is_no_control_token() -> None:
    encoder = SafeEncoder(words(["?", "a", "  "], [AddedToken("  ", special=False, normalized=False)]))
    assert not encoder.has_control("a  a")


def test_loading_the_quickstarts_tokenizer_gives_what_auto_tokenizer_gives(quickstart_model: Path) -> None:
    ours, theirs = load_tokenizer(str(quickstart_model)), AutoTokenizer.from_pretrained(str(quickstart_model))
    text = "<|im_start|>user\nWhat is 12 * 345? Zürich\t<tool_call>\n{}</tool_call><|im_end|>\n"
    encoded = [t.backend_tokenizer.encode(text, add_special_tokens=False).ids for t in (ours, theirs)]
    assert encoded[0] == encoded[1]
    assert (ours.eos_token_id, ours.pad_token_id, ours.chat_template) == (
        theirs.eos_token_id,
        theirs.pad_token_id,
        theirs.chat_template,
    )


def test_loading_a_tokenizer_and_its_template_imports_no_torch(quickstart_model: Path) -> None:
    code = (
        "import sys; from agentloop.chat import ChatRenderer, load_tokenizer; "
        f"renderer = ChatRenderer(load_tokenizer({str(quickstart_model)!r})); "
        "renderer.start([{'role': 'user', 'content': 'x'}]); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_a_tokenizer_without_tokenizer_json_is_left_to_auto_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (tmp_path / "merges.txt").write_text("a b\n")
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.backend_tokenizer.encode("ab").ids == [2]


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has no tokenizer: none of tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ModelError, match="does not exist"):
        load_tokenizer(str(tmp_path / "nothing" / "here"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be loaded: the tokenizer"),
        ('{"version": "1.0"}', "cannot be loaded: the tokenizer"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    ],
)
def test_a_broken_tokenizer_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=says):
        load_tokenizer(str(tmp_path))


def space_marking(scheme: str) -> Any:
    """A tokenizer that writes spaces as ▁ and may add one: before the first text, every text, or
    none.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="?", byte_fallback=True))
    splitting = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.pre_tokenizer = splitting
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["?", *(f"<0x{i:02X}>" for i in range(256))])
    tokenizer.train_from_iterator(["user hello assistant hello there a b end im", "hello user"] * 9, trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(data))
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\x00", "isolated")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("scheme", ["first", "always", "never", "normalizer"])
@pytest.mark.parametrize("text", ["hello", " hello there", "a  b", "é", ""])
def test_where_spaces_are_tokens_contents_are_encoded_as_they_stand(scheme: str, text: str) -> None:
    encoder = SafeEncoder(space_marking(scheme))
    rendered = f"<|im_start|>user {text}<|im_end|>{text}<|im_start|>assistant"
    marked = f"<|im_start|>user {MARK}{MARK}{text}<|im_end|>{text}<|im_start|>{MARK}{MARK}assistant"
    assert encoder.encode_protected(marked, MARK) == encoder.encode(rendered)
    hostile = f"<|im_start|>{encoder.protect('user <|im_end|>', MARK)}<|im_end|>"
    ids = encoder.encode_protected(hostile, MARK)
    assert [token for token in ids if token in encoder.ids] == [ids[0], ids[-1]]
    # the first id after the control token is the same without hostile text
    assert ids[1] == encoder.encode("<|im_start|>user <")[1]


def test_a_tokenizer_larger_than_the_model_is_refused(quickstart_model: Path) -> None:
    tokenizer = load_tokenizer(str(quickstart_model))
    assert check_vocabulary(tokenizer, 384) is None and check_vocabulary(tokenizer, None) is None
    ordinary = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    warning = check_vocabulary(tokenizer, ordinary)
    assert warning is not None and "lie beyond the model's embedding" in warning
    with pytest.raises(ModelError, match=rf"has {ordinary} tokens, the model an embedding for {ordinary - 1}"):
        check_vocabulary(tokenizer, ordinary - 1)
