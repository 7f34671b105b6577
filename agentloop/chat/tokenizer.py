"""Load a tokenizer, and encode text so that contents can never become control tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from agentloop.errors import ModelError
from agentloop.model_folder import TOKENIZER_FILES, ModelFolder, load_pretrained, refuse_pointer

SHORT, REMEMBERED = 24, 8192
"""Texts of at most `SHORT` characters are cached, up to `REMEMBERED`: keys, roles, names."""

LONG, LONG_REMEMBERED = 32_000, 32
"""The latest longer texts are cached too: many rows share a system message with tool schemas."""

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model")
"""Files that may hold a vocabulary. Without any, transformers would make an empty one."""

_ONE = "\ue0a8"
"""A private-use character that serves as the only control token of a second tokenizer."""


def load_tokenizer(path: str, *, model: bool = True, trust_remote_code: bool = False) -> Any:
    """Load the Hugging Face tokenizer of a model folder or hub id.

    Args:
        path: the folder or id.
        model: require the folder of a model; False: a folder with only a tokenizer is enough.
        trust_remote_code: whether Python code of the folder may run (`model.trust_remote_code`).

    `tokenizer.json` is read directly. transformers' `AutoTokenizer` imports torch, which would cost
    the process of the agent loops a second of CPU and 200 MB; it is used only if there is no such
    file.

    Raises:
        ModelError: the path does not exist, or contains no fast tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    find = ModelFolder.resolve if model else ModelFolder.find
    folder = find(path, ("config.json", *TOKENIZER_FILES, "*.jinja")).path
    loader = PreTrainedTokenizerFast
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ModelError(
            f"{folder} has no tokenizer: none of {', '.join(VOCABULARIES)}",
            "copy the tokenizer's files from the published model",
        )
    if (folder / "tokenizer.json").is_file():
        refuse_pointer(folder / "tokenizer.json")
    else:
        from transformers import AutoTokenizer

        loader = AutoTokenizer

    what = "the tokenizer (tokenizer.json, tokenizer_config.json)"
    tokenizer = load_pretrained(loader, str(folder), what, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise ModelError(
            f"{path} has no fast tokenizer (tokenizer.json)", "convert it with transformers' AutoTokenizer"
        )
    return tokenizer


def check_vocabulary(tokenizer: Any, vocab_size: int | None) -> str | None:
    """Compare a tokenizer with the rows of its model's embedding.

    Args:
        vocab_size: `ModelFolder.vocab_size`; None: not known.

    Returns:
        a warning about control tokens beyond the embedding, which some published models have; or
        None.

    Raises:
        ModelError: ordinary text would be encoded to ids that the model does not have.
    """
    if vocab_size is None:
        return None
    tokens = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    if tokens > vocab_size:
        raise ModelError(
            f"the tokenizer has {tokens} tokens, the model an embedding for {vocab_size} (vocab_size in config.json)",
            "use the tokenizer that was published with the model",
        )
    beyond = sorted(str(token) for index, token in tokenizer.added_tokens_decoder.items() if index >= vocab_size)
    if not beyond:
        return None
    return (
        f"the tokenizer's {', '.join(beyond[:3])}{' ...' if len(beyond) > 3 else ''} lie beyond the model's embedding "
        f"of {vocab_size} rows: an episode that contains one fails"
    )


class SafeEncoder:
    """Encodes text with control tokens recognized, or with all of them read as plain text.

    Control tokens are the added tokens of the tokenizer, special or not, except those that are only
    white space.

    Attributes:
        added: the id of each control token, by its spelling.
        ids: the ids of all control tokens.
        spelling: the spelling of each control token, by its id.
        spellings: the spellings of all control tokens.
        pattern: matches any control token; of two at one position, the longer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        self.added: dict[str, int] = {token.content: index for index, token in added.items()}
        self.ids = frozenset(added)
        self.spellings = frozenset(self.added)
        self.spelling: dict[int, str] = {index: token.content for index, token in added.items()}
        self._order = list(self.added)
        self._number = {token: number for number, token in enumerate(self._order)}

        spellings = "|".join(re.escape(token) for token in sorted(self.added, key=len, reverse=True))
        self.pattern = re.compile(spellings or r"(?!)")

        self._plain: dict[str, bool] = {}
        self._pieces: dict[str, list[int]] = {}
        self._long_pieces = lru_cache(LONG_REMEMBERED)(self._encode_whole)
        self._tokens = list(added.values())

        # For texts that could form a control token together with their neighbours.
        self._longest = max(map(len, self.added), default=0)
        self._ends = frozenset(token[cut:] for token in self.added for cut in range(1, len(token)))
        self._starts = frozenset(token[:cut] for token in self.added for cut in range(1, len(token)))
        self._last = re.compile("|".join(sorted({re.escape(token[-1]) for token in self.added})) or r"(?!)")
        self._first = re.compile("|".join(sorted({re.escape(token[0]) for token in self.added})) or r"(?!)")

        # Tokens that absorb adjacent white space.
        self._eats_right = {token.content for token in added.values() if token.rstrip}
        self._eats_left = {token.content for token in added.values() if token.lstrip}

        # These tokens are matched after normalization, which may turn "＜end＞" into "<end>".
        self._matches_normalized = any(token.normalized for token in added.values()) and bool(self._backend.normalizer)

    def find_control(self, text: str, start: int = 0) -> re.Match[str] | None:
        """Return the first match of a control token in `text[start:]`."""
        return self.pattern.search(text, start)

    def has_control(self, text: str) -> bool:
        """Whether the tokenizer finds a control token in `text`."""
        if self.pattern.search(text):
            return True
        return self._matches_normalized and self.pattern.search(self._normalized(text)) is not None

    def is_plain(self, text: str) -> bool:
        """Whether `text` contains no control token and cannot form one with adjacent text."""
        if len(text) > SHORT:
            return not (self.has_control(text) or self._may_join(text))

        known = self._plain.get(text)
        if known is None:
            if len(self._plain) >= REMEMBERED:
                self._plain.clear()
            known = self._plain[text] = not (self.has_control(text) or self._may_join(text))
        return known

    def encode(self, text: str) -> list[int]:
        """Encode text of the template: control tokens become their ids; no tokens are added."""
        return self._encode_pieces(text) if self._splits_cleanly else self._encode_whole(text)

    def _encode_whole(self, text: str) -> list[int]:
        if len(text) > LONG:
            # A batch releases Python's lock: a thread that encodes does not stop the others.
            ids: list[int] = self._backend.encode_batch([text], add_special_tokens=False)[0].ids
            return ids
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _encode_pieces(self, text: str) -> list[int]:
        """Encode the text between control tokens piece by piece, with cached ids for short pieces.

        The ids are those of `_encode_whole`, at three quarters of the cost: the text between
        control tokens is mostly the template's own, short, and the same each time.
        """
        ids: list[int] = []
        position = 0
        for match in self.pattern.finditer(text):
            if match.start() > position:
                ids += self._encode_piece(text[position : match.start()])
            ids.append(self.added[match.group()])
            position = match.end()
        return ids + self._encode_piece(text[position:]) if position < len(text) else ids

    def _encode_piece(self, text: str) -> list[int]:
        if len(text) > SHORT:
            return self._long_pieces(text) if len(text) <= LONG else self._encode_whole(text)

        ids = self._pieces.get(text)
        if ids is None:
            if len(self._pieces) >= REMEMBERED:
                self._pieces.clear()
            ids = self._pieces[text] = self._encode_whole(text)
        return ids

    @cached_property
    def _splits_cleanly(self) -> bool:
        """Whether control tokens split a text before any other step and leave the rest as it is."""
        tokens = self._tokens
        plain = not any(token.lstrip or token.rstrip or token.normalized or token.single_word for token in tokens)
        return plain and not self._start_matters

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, control tokens included; invalid UTF-8 becomes U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def encode_plain(self, text: str) -> list[int]:
        """Encode text of a user, a tool or a page; the result never contains a control token."""
        return self._without_controls(text) if self.has_control(text) else self.encode(text)

    def protect(self, text: str, mark: str) -> str:
        """Return `text` with every control token replaced by `mark` + its number + `mark`.

        If the text could form a control token with its neighbours, `mark` + `mark` is put at both
        ends, inside of the white space there, which a template may strip.
        """
        if self._matches_normalized and not self.pattern.search(text):
            text = self._normalized(text)

        apart = mark + mark if self._may_join(text) else ""
        text = self.pattern.sub(lambda match: f"{mark}{self._number[match.group()]}{mark}", text)
        if not apart:
            return text

        core = text.strip()
        begin = text.index(core)
        return f"{text[:begin]}{apart}{core}{apart}{text[begin + len(core) :]}"

    def encode_protected(self, text: str, mark: str) -> list[int]:
        """Encode a rendering with protected contents: only the template's tokens become control
        ids.

        Added tokens split a text before any other step, so encoding piece by piece gives the same
        ids as encoding the whole. `mark` + `mark` is removed.
        """
        protected = re.compile(f"{re.escape(mark)}(\\d*){re.escape(mark)}")

        def plain(piece: str) -> list[int]:
            restored = protected.sub(lambda match: self._order[int(match[1])] if match[1] else "", piece)
            return self._plain_after_control(restored) if ids else self.encode_plain(restored)

        ids: list[int] = []
        position = 0
        for match in self.pattern.finditer(text):
            if match.start() < position:
                continue  # it lies in the white space that the token before it took

            piece = text[position : match.start()]
            ids += plain(piece.rstrip() if match.group() in self._eats_left else piece)
            ids.append(self.added[match.group()])
            position = match.end()
            if match.group() in self._eats_right:
                position += len(text[position:]) - len(text[position:].lstrip())
        return ids + plain(text[position:])

    def _plain_after_control(self, text: str) -> list[int]:
        """Encode plain text after a control token; some tokenizers add a space at the start."""
        if not text or not self._start_matters:
            return self.encode_plain(text)

        backend = self._one_control
        ids: list[int] = backend.encode(_ONE + text.replace(_ONE, ""), add_special_tokens=False).ids[1:]
        return ids if self.ids.isdisjoint(ids) else self.encode_plain(text)

    @cached_property
    def _start_matters(self) -> bool:
        """Whether text at the very start is encoded differently from text after a control token."""
        return any(self._encode_whole(token + "a b")[1:] != self._encode_whole("a b") for token in self._order[:1])

    @cached_property
    def _one_control(self) -> Any:
        """A copy of the tokenizer whose only control token is one that no text contains."""
        from tokenizers import AddedToken, Tokenizer

        data = json.loads(self._backend.to_str())
        data["added_tokens"] = []
        backend = Tokenizer.from_str(json.dumps(data))
        backend.add_special_tokens([AddedToken(_ONE, normalized=False)])
        return backend

    def _may_join(self, text: str) -> bool:
        """Whether the text begins with the end of a control token, or ends with a beginning."""
        if self._matches_normalized:
            text = self._normalized(text)

        head, tail = text.lstrip()[: self._longest], text.rstrip()[-self._longest :]
        if self._last.search(head) and any(head[: m.end()] in self._ends for m in self._last.finditer(head)):
            return True
        if not self._first.search(tail):
            return False
        return any(tail[m.start() :] in self._starts for m in self._first.finditer(tail))

    def _normalized(self, text: str) -> str:
        return str(self._backend.normalizer.normalize_str(text)) if self._backend.normalizer else text

    def _without_controls(self, text: str) -> list[int]:
        """Run the tokenizer's steps, except the one that finds added tokens."""
        text = self._normalized(text)
        splitter = self._backend.pre_tokenizer
        pieces = [piece for piece, _ in splitter.pre_tokenize_str(text)] if splitter else [text]
        model = self._backend.model
        return [token for piece in pieces for token in self._piece(model, piece)]

    def _piece(self, model: Any, piece: str) -> Sequence[int]:
        ids = [token.id for token in model.tokenize(piece)]
        if len(piece) > 1 and not self.ids.isdisjoint(ids):
            # A vocabulary may contain a control token as an ordinary word; its halves do not match.
            half = len(piece) // 2
            return [*self._piece(model, piece[:half]), *self._piece(model, piece[half:])]
        return ids
