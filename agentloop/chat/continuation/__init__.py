"""Continuations: what a chat template writes between a sampled turn and the next one.

New messages come in; the ids to append to the trajectory go out, up to and including the generation
prompt. They are found by rendering a known probe turn followed by the new messages, so that sampled
turns are never rendered. The files, in the order of use:

    tool_role      `emulate_tool_role`: rewrite tool messages for templates that have none
    tool_images    `fold_tool_images`: the same for templates whose tool messages show no images
    probe          the known conversation: a question, and an answer or a turn with calls
    turn_end       `TurnEnd`: which control token ends a turn, or which one opens the next
    copied_text    `TemplateTextCache`: the text around contents that a template only copies
    continuation   `Continuations`: find a continuation; refuse templates that do not only append
"""
