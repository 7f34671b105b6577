"""Messages to ids, and sampled ids to messages, for any model with a chat template.

Messages and the ids of a trajectory come in; the ids to append go out, and sampled turns come back
as text, reasoning and tool calls. Sampled tokens are never rendered, decoded or encoded again. The
files, in the order of use:

    renderer       `ChatRenderer`: start a conversation, extend it, parse sampled turns
    template       `Template`: a chat template, rendered as text; environment: its Jinja environment
    content_forms  the form in which a template takes contents; call_forms: that of calls
    tokenizer      `SafeEncoder`: encode text so that contents never become control tokens
    rendering      `Rendering`: template and encoder together; contents are protected
    images         how images count in tokens, and how they are sent to the engine
    continuation/  what a template writes between a sampled turn and the next
    sampled        `SampledText`: a sampled turn that keeps the positions of its control tokens
    formats/       tool-call formats; call_json: JSON that a model wrote, read strictly
    proof/         the proof, before a run, that a template keeps the token law
"""

from agentloop.chat.formats import HermesFormat, ToolFormat, load_format
from agentloop.chat.renderer import ChatRenderer
from agentloop.chat.tokenizer import check_vocabulary, load_tokenizer

__all__ = ["ChatRenderer", "HermesFormat", "ToolFormat", "check_vocabulary", "load_format", "load_tokenizer"]
