"""Loading a tokenizer, and encoding text so that content can never become a control token."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from agentloop.errors import ModelError


def load_tokenizer(path: str) -> Any:
    """Load the Hugging Face tokenizer of a model folder or hub id.

    Raises:
        ModelError: the folder holds no tokenizer, or nothing is there.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            f"model.path {path} holds no config.json", "give the folder of a Hugging Face model, or a hub id"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as exc:
        reason = str(exc).strip().splitlines()[0]
        raise ModelError(
            f"no tokenizer can be loaded from model.path {path}: {reason}",
            "give a folder with config.json, tokenizer.json and tokenizer_config.json, or the id of a model on the hub",
        ) from exc
    if not tokenizer.is_fast:
        raise ModelError(
            f"{path} has no fast tokenizer (tokenizer.json)", "convert it with transformers' AutoTokenizer"
        )
    return tokenizer


class SafeEncoder:
    """Encodes text in two ways: with control tokens recognized, and with all of them read as plain text."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        self._backend = tokenizer.backend_tokenizer
        self.added: dict[str, int] = {
            token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.content
        }
        self._pattern = re.compile(
            "|".join(re.escape(t) for t in sorted(self.added, key=len, reverse=True)) or r"(?!)"
        )
        # The same model without any added token: there is no text that it encodes to a control id.
        plain = json.loads(self._backend.to_str())
        plain["added_tokens"] = []
        plain["post_processor"] = None
        self._plain = Tokenizer.from_str(json.dumps(plain))

    def has_control(self, text: str) -> bool:
        """Whether `text` holds the spelling of an added token."""
        return self._pattern.search(text) is not None

    def encode(self, text: str) -> list[int]:
        """Encode text of the template: control tokens become their ids, nothing is added around."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Encode text of a user, a tool or a page: no control id can come out."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def protect(self, text: str, mark: str) -> str:
        """`text` with every control spelling replaced by `mark` + number + `mark`."""
        order = list(self.added)
        return self._pattern.sub(lambda match: f"{mark}{order.index(match.group())}{mark}", text)

    def encode_protected(self, text: str, mark: str) -> list[int]:
        """Encode a rendering whose contents were protected: template tokens become ids, contents stay text.

        Added tokens always split the text before anything else happens to it, so encoding piece by piece gives the same
        ids as encoding the whole.
        """
        order = list(self.added)
        restore = re.compile(f"{re.escape(mark)}(\\d+){re.escape(mark)}")
        ids: list[int] = []
        position = 0
        for match in self._pattern.finditer(text):
            ids += self.encode_plain(
                restore.sub(lambda m: order[int(m.group(1))], text[position : match.start()])
            )
            ids.append(self.added[match.group()])
            position = match.end()
        return ids + self.encode_plain(restore.sub(lambda m: order[int(m.group(1))], text[position:]))
