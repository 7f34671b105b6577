"""A run's tokenizer, as far as the viewer needs it: the text of each token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentloop.files import is_file
from agentloop.model_folder import cached_file
from agentloop.report.tokens import stream_pieces

FILE = "tokenizer.json"


class Decoder:
    """Decodes ids one by one.

    Args:
        tokenizer: of the `tokenizers` library.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(token_id for token_id, token in added.items() if token.special)

    @classmethod
    def load(cls, model_path: Any, run_dir: Path) -> Decoder | None:
        """Load the tokenizer of a model folder or hub id, without torch and without downloads.

        None: it is not on this machine, or has no `tokenizer.json`.
        """
        if not isinstance(model_path, str) or not model_path:
            return None
        from tokenizers import Tokenizer

        places = (base / model_path / FILE for base in (Path(), run_dir))
        found = next((place for place in places if is_file(place)), None) or cached_file(model_path, FILE)
        if found is None:
            return None
        try:
            return cls(Tokenizer.from_file(str(found)))
        except Exception:  # noqa: BLE001  # the library raises bare Exception for a file it cannot read
            return None

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text that each token adds; see `report.tokens.stream_pieces`.

        Raises:
            OverflowError, TypeError: an id cannot be one of any tokenizer.
        """
        return stream_pieces(ids, self.text)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of ids, control tokens included. Raises as `pieces`."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))
