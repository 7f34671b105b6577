"""Let transformers' own code attend over the KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rollout_server.engines.torch_engine.model.attention import AttentionPass

UNSUPPORTED = ("softcap", "s_aux")
"""Options of transformers' attention functions that ours does not implement: capped scores,
attention sinks."""


class AttentionHook:
    """The attention function of one model: it attends through the pass that is running.

    transformers looks attention functions up by name in a registry of the process. So each model is
    loaded with a separate function under a separate name, which stays in the registry. It would be
    simpler to pass the attention pass as an argument of the model's forward, but some models
    (Nemotron, StableLM) do not pass unknown arguments to their attention layers.

    Attributes:
        name: the model's `attn_implementation`.
    """

    def __init__(self) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.name = f"agentloop_rows_{id(self):x}"
        self._pass: AttentionPass | None = None
        ALL_ATTENTION_FUNCTIONS.register(self.name, self)

    @contextmanager
    def attending(self, attention_pass: AttentionPass) -> Iterator[None]:
        """Let the model attend through `attention_pass` in this context. One pass at a time."""
        self._pass = attention_pass
        try:
            yield
        finally:
            self._pass = None

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend in one layer; transformers calls this.

        Args:
            query: [B, A, S, K], and `key`, `value` likewise with H heads; B is 1 (prefill) or S is
                1 (decode).

        Returns:
            [B, S, A, D], and None in place of the attention weights.
        """
        attention_pass = self._pass
        assert attention_pass is not None
        if isinstance(attention_pass, ProbePass):
            attention_pass.note(options)

        batch, _, steps, dim = query.shape
        q, k, v = (t.transpose(1, 2).reshape(batch * steps, t.shape[1], t.shape[3]) for t in (query, key, value))
        # torch types every unknown attribute of a module as a tensor.
        layer: int = module.layer_idx  # type: ignore[assignment]
        out = attention_pass.attend(layer, q, k, v, dim**-0.5 if scaling is None else scaling)
        return out.view(batch, steps, *out.shape[1:]), None


class ProbePass:
    """Records what each layer would cache, and its attention options, without attending.

    Attributes:
        layers: by layer: key-value heads, key dim, value dim.
        windows: sizes of sliding windows.
        unsupported: names of options that this engine does not implement.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[int, int, int]] = {}
        self.windows: set[int] = set()
        self.unsupported: set[str] = set()

    def attend(
        self, layer: int, q_TAK: torch.Tensor, k_THK: torch.Tensor, v_THD: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        self.layers[layer] = (k_THK.shape[1], k_THK.shape[2], v_THD.shape[2])
        return q_TAK.new_zeros(*q_TAK.shape[:2], v_THD.shape[2])

    def note(self, options: dict[str, Any]) -> None:
        """Record the options that a layer passes to its attention function."""
        if options.get("sliding_window") is not None:
            self.windows.add(options["sliding_window"])
        self.unsupported |= {name for name in UNSUPPORTED if options.get(name) is not None}
