"""The quickstart's tokenizer, chat template and model configuration, built from nothing.

    python recipes/quickstart/tokenizer.py --out DIR

writes a Hugging Face folder without weights. The build is deterministic.

384 ids: 256 bytes (any text can be encoded), 121 merges and 7 tags. A digit is always one token,
alone, so that copying a number is copying tokens. The merges are learned from the conversations of
the task itself, so the text that every conversation repeats costs a few tokens, and a laptop's CPU
spends its time on what differs.
"""

import argparse
import json
from pathlib import Path

from data import TOOLS, with_call, without_call  # type: ignore[import-not-found]  # beside this script
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
VOCAB_SIZE = 384

CHAT_TEMPLATE = """\
{#- ChatML turns with hermes tool calls. A tool is announced by its name and argument names alone: the
    weights were taught what it does, and a JSON schema would be most of the prompt. -#}
{%- macro turn(role, body) -%}
  {{ '<|im_start|>' + role + '\\n' + (body or '') + '<|im_end|>\\n' }}
{%- endmacro -%}
{%- set ns = namespace(system='', calls='') -%}
{%- if messages and messages[0].role == 'system' -%}
  {%- set ns.system = messages[0].content -%}
{%- endif -%}
{%- if tools -%}
  {%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') + '# Tools' -%}
  {%- for tool in tools -%}
    {%- set function = tool.function if tool.function is defined else tool -%}
    {%- set arguments = (function.parameters | default({})).properties | default({}) -%}
    {%- set ns.system = ns.system + '\\n' + function.name + '(' + arguments | join(', ') + ')' -%}
  {%- endfor -%}
{%- endif -%}
{%- if ns.system -%}{{ turn('system', ns.system) }}{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'tool' -%}
    {%- if loop.first or loop.previtem.role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
    {{ '\\n<tool_response>\\n' + (message.content or '') + '\\n</tool_response>' }}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
  {%- elif message.role == 'assistant' and message.tool_calls -%}
    {%- set ns.calls = message.content or '' -%}
    {%- for call in message.tool_calls -%}
      {%- set function = call.function if call.function is defined else call -%}
      {%- set arguments = function.arguments -%}
      {%- if arguments is not string -%}{%- set arguments = arguments | tojson -%}{%- endif -%}
      {%- set ns.calls = ns.calls + ('\\n' if ns.calls else '') + '<tool_call>\\n{"name": "' + function.name
          + '", "arguments": ' + arguments + '}\\n</tool_call>' -%}
    {%- endfor -%}
    {{ turn('assistant', ns.calls) }}
  {%- elif not (loop.first and message.role == 'system') -%}
    {{ turn(message.role, message.content) }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

EXAMPLES = {"12 * 34": "408", "12 + 34": "46", "56 - 34": "22", "78 - 12": "66", "12 + 78 - 56": "34"}

# Other text of tools and users, for the merges that the task leaves over.
OTHER_TEXT = [
    "Error: the expression is not valid.",
    "Compute the value of the expression with the calculator tool.",
    "What is the answer to this question? The answer is the number in the result.",
]

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.06,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "use_cache": True,
    "dtype": "float32",
}


def corpus() -> list[str]:
    """The texts that merges are learned from, split at the tags, which are never merged."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = json.dumps
    template = environment.from_string(CHAT_TEMPLATE)
    texts = [
        template.render(messages=row["messages"], tools=TOOLS)
        for expression, value in EXAMPLES.items()
        for row in (with_call(expression, value, train_call=True), without_call(expression, value))
    ] * 10  # often enough that the task's words come before the others
    for tag in SPECIAL + TAGS:
        texts = [part for text in texts for part in text.split(tag)]
    return texts + OTHER_TEXT


def build_tokenizer() -> Tokenizer:
    """Train the byte-level BPE and append the tags. Decoding keeps the hermes tags (not "special").

    The text is split into words like Qwen2's tokenizer does (digits one by one). Any other split
    would be lost: transformers picks the tokenizer class by model type, and the class has its own.
    """
    qwen = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = qwen.normalizer
    tokenizer.pre_tokenizer = qwen.pre_tokenizer
    tokenizer.decoder = qwen.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL) - len(TAGS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in TAGS])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        size = tokenizer.get_vocab_size()
        raise ValueError(f"the corpus gave {size} ids, not {VOCAB_SIZE}: add text to OTHER_TEXT")
    return tokenizer


def write_model_folder(out: Path) -> None:
    """Everything of a model folder except the weights."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save(str(out / "tokenizer.json"))
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    ids = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    documents = {
        "config.json": CONFIG | ids,
        "generation_config.json": {
            "eos_token_id": [end, pad],
            "pad_token_id": pad,
            "do_sample": True,
            "temperature": 1.0,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, document in documents.items():
        (out / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the quickstart's tokenizer and configuration.")
    parser.add_argument("--out", type=Path, required=True)
    write_model_folder(parser.parse_args().out)


if __name__ == "__main__":
    main()
