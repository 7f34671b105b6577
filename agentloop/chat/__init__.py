"""Messages to ids and sampled ids to messages."""

from agentloop.chat.formats import HermesFormat, ToolFormat, load_format
from agentloop.chat.renderer import ChatRenderer
from agentloop.chat.tokenizer import load_tokenizer

__all__ = ["ChatRenderer", "HermesFormat", "ToolFormat", "load_format", "load_tokenizer"]
