"""The tensors of a model folder, read one at a time, in whole or by rows."""

from __future__ import annotations

from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from agentloop.errors import ModelError
from agentloop.model_folder import ModelFolder


class SafetensorsFolder:
    """Reader of a model folder's safetensors files.

    Files are read, not mapped: touched pages of a mapped file count as the process's memory until
    the kernel needs them elsewhere, and a rank would seem to hold its shard twice.

    Attributes:
        path: the folder.
        specs: name -> layout of each tensor, and its file.
        bytes_read: bytes of tensors read so far, in the files' dtype.

    Raises:
        ModelError: the folder holds no safetensors, or a file is missing or damaged.
    """

    def __init__(self, folder: ModelFolder) -> None:
        self.path = str(folder.path)
        self.bytes_read = 0
        self.specs = folder.weights
        self._open: dict[Path, FileIO] = {}

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.spec.end - tensor.spec.begin for tensor in self.specs.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.specs[name].spec.shape

    def read(self, name: str, rows: slice | None) -> Tensor:
        """Read a tensor, or only some of its rows.

        Raises:
            ModelError: the file ended early.
        """
        spec, path = self.specs[name].spec, self.specs[name].file
        begin, end, shape = spec.begin, spec.end, spec.shape
        if rows is not None:
            row = (end - begin) // shape[0]
            begin, end, shape = begin + rows.start * row, begin + rows.stop * row, (rows.stop - rows.start, *shape[1:])

        data = torch.empty(end - begin, dtype=torch.uint8)
        if path not in self._open:
            self._open[path] = path.open("rb", buffering=0)
        file = self._open[path]
        file.seek(begin)
        view = data.numpy().data
        while view:
            count = file.readinto(view)
            if not count:
                raise ModelError(
                    f"{path} was truncated while it was read", "do not change the model folder while a run starts"
                )
            view = view[count:]

        self.bytes_read += len(data)
        return data.view(getattr(torch, spec.dtype)).view(shape)

    def close(self) -> None:
        """Close the files; reading again opens them again."""
        for file in self._open.values():
            file.close()
        self._open.clear()
