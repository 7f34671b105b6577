"""Read a model folder in the Hugging Face layout. No other module reads such folders.

`hub` downloads, `folder` finds a folder and reads the facts in its config.json, `files` reads JSON
and the headers of safetensors, `check` checks all of it before a run starts (`tensors`: names and
shapes against the architecture), `pretrained` loads parts of it through transformers, `output`
writes folders.

Importing this imports neither torch nor transformers.
"""

from agentloop.model_folder.check import check_files, check_tensors, find_model
from agentloop.model_folder.files import StoredTensor, refuse_pointer
from agentloop.model_folder.folder import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    VISION_TYPES,
    ModelFolder,
)
from agentloop.model_folder.hub import cached_file, download
from agentloop.model_folder.output import check_target, copy_tokenizer
from agentloop.model_folder.pretrained import code_warning, load_image_processor, load_pretrained

__all__ = [
    "CONFIG_FILE",
    "TOKENIZER_FILES",
    "VISION_TYPES",
    "ModelFolder",
    "StoredTensor",
    "cached_file",
    "check_files",
    "check_target",
    "check_tensors",
    "code_warning",
    "copy_tokenizer",
    "download",
    "find_model",
    "load_image_processor",
    "load_pretrained",
    "refuse_pointer"
]  # fmt: skip
