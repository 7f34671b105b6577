"""The base class of every section of a recipe, and types that several sections share."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from agentloop.text import hide_secrets


class Section(BaseModel):
    """Base of every section: unknown keys are errors, and assigned values are validated too.

    A default never depends on another key of its section: a section that sets one key has the same
    values elsewhere as a section that is not written at all.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    KEYS_COMMAND: ClassVar[str] = "agentloop config"
    """Command that prints the keys of the recipe, for messages."""

    def plain(self) -> dict[str, Any]:
        """Return the values as JSON data without secrets: for files, the report and loggers."""
        data: dict[str, Any] = hide_secrets(json.loads(self.model_dump_json(by_alias=True)))
        return data


def _a_folder_name(value: str) -> str:
    if not value.strip("."):
        raise ValueError(f"{value!r} names another folder: use letters, digits, . _ -")
    return value


FolderName = Annotated[str, Field(pattern=r"^[\w.-]+$", max_length=120), AfterValidator(_a_folder_name)]
"""A name that becomes a folder: letters, digits, `.`, `_`, `-`, and not only dots."""


def _switch(value: Any) -> Any:
    return ({} if value else None) if isinstance(value, bool) else value


Switch = BeforeValidator(_switch)
"""Mark of an optional section: `true` is the section with its defaults, `false` is null."""

Processes = Annotated[int, Field(ge=1, le=4096)]
"""A number of processes or threads that will be started."""

Seconds = Annotated[float, Field(gt=0, le=1e8)]
"""A time limit. The bound (3 years) keeps it within what timers of the operating system take."""


def _an_http_address(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("write it as http://host:port")
    return value


HttpAddress = Annotated[str, AfterValidator(_an_http_address)]
"""An address that begins with http:// or https://."""


def _a_plain_address(value: str) -> str:
    if "?" in value or "@" in urlsplit(value).netloc:
        raise ValueError("an address with a query or a user is shown and stored: give keys in headers beside it")
    return value


PlainAddress = Annotated[HttpAddress, AfterValidator(_a_plain_address)]
"""An `HttpAddress` that can hold no secret: without user, password and query."""
