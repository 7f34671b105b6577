"""The tokenizer, chat template and configuration of a Qwen2.5-VL of 0.8 M parameters.

    python model.py --out model

writes a Hugging Face folder without weights; `sft.yaml` adds them. The build is deterministic.

408 ids: 256 bytes, merges of the task's own conversations, control tokens and tags. A digit is
always one token, alone.

The vision tower has one block without windows. Every picture becomes 56 x 56 pixels, four tokens.
"""

import argparse
import json
import random
from pathlib import Path

from data import (  # type: ignore[import-not-found]  # beside this script
    colours,
    guess,
    point,
    read,
    zoom,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2Tokenizer, Qwen2VLImageProcessorPil

VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION]
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
VOCAB_SIZE = 408
CONTEXT = 4096
PATCH, MERGE, SIDE = 14, 2, 56

TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": CONTEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
}
TOWER = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "window_size": 8 * PATCH,
    "fullatt_block_indexes": [0],
    "out_hidden_size": 128,
    "initializer_range": 0.06,
}

CHAT_TEMPLATE = """\
{#- ChatML turns with images and hermes tool calls. A tool is announced by its name and argument names alone: the
    weights were taught what it does, and a JSON schema would be most of the prompt. -#}
{%- macro body(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}
    {%- for part in content or [] -%}
      {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
        {{ '<|vision_start|><|image_pad|><|vision_end|>' }}
      {%- elif 'text' in part -%}{{ part.text }}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- macro turn(role, text) -%}
  {{ '<|im_start|>' + role + '\\n' + text + '<|im_end|>\\n' }}
{%- endmacro -%}
{%- set ns = namespace(system='', calls='') -%}
{%- if messages and messages[0].role == 'system' -%}
  {%- set ns.system = body(messages[0].content) -%}
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
    {{ '\\n<tool_response>\\n' + body(message.content) + '\\n</tool_response>' }}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
  {%- elif message.role == 'assistant' and message.tool_calls -%}
    {%- set ns.calls = body(message.content) -%}
    {%- for call in message.tool_calls -%}
      {%- set function = call.function if call.function is defined else call -%}
      {%- set arguments = function.arguments -%}
      {%- if arguments is not string -%}{%- set arguments = arguments | tojson -%}{%- endif -%}
      {%- set ns.calls = ns.calls + ('\\n' if ns.calls else '') + '<tool_call>\\n{"name": "' + function.name
          + '", "arguments": ' + arguments + '}\\n</tool_call>' -%}
    {%- endfor -%}
    {{ turn('assistant', ns.calls) }}
  {%- elif not (loop.first and message.role == 'system') -%}
    {{ turn(message.role, body(message.content)) }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def corpus() -> list[str]:
    """The texts that merges are learned from, split at the tags, which are never merged."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = json.dumps
    template = environment.from_string(CHAT_TEMPLATE)
    rng = random.Random("corpus")
    rows = [maker(rng) for maker in (point, colours, read, guess, zoom, zoom) for _ in range(60)]
    texts = [template.render(messages=row["messages"], tools=row.get("tools")) for row in rows]
    for tag in SPECIAL + TAGS + ["<image>"]:
        texts = [part for text in texts for part in text.split(tag)]
    return texts


def build_tokenizer() -> Tokenizer:
    """Train a byte-level BPE that splits words like Qwen2's, and append the control tokens."""
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
        raise ValueError(f"the corpus gave {tokenizer.get_vocab_size()} ids, not {VOCAB_SIZE}: change VOCAB_SIZE")
    return tokenizer


def write_model_folder(out: Path) -> None:
    """Write everything of a model folder except the weights."""
    tokenizer = build_tokenizer()
    ids = {text: tokenizer.token_to_id(text) for text in SPECIAL}
    ends = {"bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, **ends},
        vision_config=TOWER,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype="float32",
        **ends,
    )
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    size = {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}
    Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, size=size).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    documents = {
        "generation_config.json": {
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": True,
            "temperature": 1.0,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, document in documents.items():
        (out / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the model's tokenizer and configuration.")
    parser.add_argument("--out", type=Path, required=True)
    write_model_folder(parser.parse_args().out)


if __name__ == "__main__":
    main()
