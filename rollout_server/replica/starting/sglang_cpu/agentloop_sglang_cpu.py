"""A platform plugin for SGLang: its CPU platform, chosen by name.

SGLang's environment imports this module, never ours: `sglang_environment` puts this folder on its
path and sets SGLANG_PLATFORM. Without a platform, SGLang 0.5.23 looks for an accelerator while it
builds its own code of vision-language models, and does not start.
"""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities


class Platform(CpuSRTPlatform):  # type: ignore[misc]  # sglang is in another environment
    """SGLang's CPU platform, with an attention that runs on any CPU."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"


def activate() -> str:
    """Return the class of the platform; the entry point that SGLang calls."""
    return f"{__name__}:Platform"
