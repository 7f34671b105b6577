"""Cards without a card: product code runs on fake `cuda` tensors, and each mix of devices or dtypes is an error.

`runtime.c`, preloaded, makes torch believe in eight cards: current devices, streams, events and the threads of
backward passes are torch's own. torch's `FakeTensorMode` computes shapes, dtypes and devices in place of values, and
raises where an operator gets tensors of two devices, with the exceptions that CUDA makes too. `FakeCards` adds:

- **Whole numbers are real.** Token ids, positions, grids of images and cumulative lengths are computed on the host
  beside the fake tensors, because shapes depend on them. Floats have no values.
- **What the host reads** of a fake float is a zero, and of a flag without a value True. Each transfer between host and
  card is recorded with the place in the product that asked for it.
- **More is an error** than in `FakeTensorMode`: operators whose kernels take one dtype only. An index on the host is
  a transfer: CUDA copies it, and waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten

ROOT = Path(__file__).parents[2]
PRODUCT = ("agentloop/", "rollout_server/", "trainer/")

RANK, RANKS = 3, 8
"""The rank that tests are, unless it is rank 0 that does something: what lands on the default card by mistake shows."""

LARGEST = 2**22
"""Elements of the largest tensor whose values are computed."""

COPIES = (aten._to_copy.default, aten.copy_.default)
"""Operators that may have tensors of two devices: they are the transfers."""

ONE_DTYPE = (
    "mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "index_add", "index_add_", "index_copy", "index_copy_",
    "index_put", "index_put_", "lerp", "masked_scatter", "masked_scatter_", "_flash_attention_forward",
    "_flash_attention_backward", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)  # fmt: skip
"""Operators whose CUDA kernels take floating tensors of one dtype, which their shape functions do not all check."""


class MixError(AssertionError):
    """An operator got tensors that no CUDA kernel takes."""


class _Shapes(FakeTensorMode):
    """`FakeTensorMode` as where torch sees no card: else `torch.tensor(.., device="cuda")` copies to one."""

    avoid_device_init = True


class FakeCards:
    """Runs what is inside on fake tensors, see the module.

    Attributes:
        transfers: (direction, place) of the copies between host and card: "to card" or "to host", and the innermost
            file of the product that caused it.
        devices: the cards on which tensors were computed.
    """

    def __init__(self) -> None:
        self.transfers: list[tuple[str, str]] = []
        self.devices: set[torch.device] = set()
        self._fake = _Shapes(allow_non_fake_inputs=True)
        self._values = WeakIdKeyDictionary()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[FakeCards]:
        """Run the block on fake tensors."""
        # It remembers results by their arguments, and takes "cuda" for the card that was current then.
        FakeTensorMode.cache_clear()
        with _modules_move(), self._fake, _Dispatch(self), _HostReads(self):
            yield self

    @contextlib.contextmanager
    def watch(self) -> Iterator[set[tuple[str, str]]]:
        """Collect the transfers inside the block."""
        begin, seen = len(self.transfers), set[tuple[str, str]]()
        yield seen
        seen.update(self.transfers[begin:])

    def value(self, tensor: Tensor) -> Tensor | None:
        """The values of a tensor, on the host; None if they are not known."""
        if not isinstance(tensor, FakeTensor):
            return None if tensor.is_floating_point() or tensor.is_meta else tensor
        found: Tensor | None = self._values.get(tensor)
        return found

    def keep(self, tensor: Any, value: Any) -> None:
        """Remember the values of a fake tensor."""
        known = isinstance(value, Tensor) and not value.is_floating_point()
        if known and isinstance(tensor, FakeTensor) and tensor.numel() <= LARGEST:
            self._values[tensor] = value

    def make(self, device: torch.device, value: Tensor) -> Tensor:
        """A fake tensor with these values."""
        made = torch.empty(value.shape, dtype=value.dtype, device=device)
        self.keep(made, value)
        return made

    def forget(self, tensor: Any) -> None:
        """Forget the values of a fake tensor: it was written to with unknown ones."""
        self._values.pop(tensor, None)

    def read(self, tensor: Tensor) -> Any:
        """What the host reads of a fake tensor: a number, or a list."""
        if tensor.device.type == "cuda":
            self.transfers.append(("to host", place()))
        value, shape, dtype = self.value(tensor), tensor.shape, tensor.dtype
        with _outside():
            if value is None:
                value = torch.full(shape, dtype == torch.bool)
            return value.to(dtype).tolist()


def used_cards() -> set[int]:
    """The cards on which this process made streams, memory or a context since the last call."""
    bits = int(ctypes.CDLL(None).fakecuda_used())
    return {card for card in range(torch.cuda.device_count()) if bits >> card & 1}


def place() -> str:
    """The innermost file of the product on the stack; "" outside of it, as in a thread of a backward pass."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename.removeprefix(f"{ROOT}/")
        if name.startswith(PRODUCT):
            return name
        frame = frame.f_back
    return ""


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """Compute on real tensors."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


@contextlib.contextmanager
def _modules_move() -> Iterator[None]:
    """Let `Module.to` move fake parameters; tied ones stay tied.

    torch gives real parameters other memory. Fake ones it exchanges for others, which fails where a `FakeTensorMode`
    remembers them.
    """
    apply = torch.nn.Module._apply

    def applied(module: torch.nn.Module, move: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
        if not any(isinstance(parameter, FakeTensor) for parameter in module.parameters(recurse)):
            return apply(module, move, recurse)
        made: dict[int, torch.nn.Parameter] = {}
        for part in module.modules() if recurse else [module]:
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    if id(parameter) not in made:
                        made[id(parameter)] = torch.nn.Parameter(move(parameter.detach()), parameter.requires_grad)
                    part._parameters[name] = made[id(parameter)]
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else move(buffer)
        return module

    torch.nn.Module._apply = applied  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Module._apply = apply  # type: ignore[method-assign]


class _Dispatch(TorchDispatchMode):
    """Sees each operator before `FakeTensorMode` does."""

    def __init__(self, cards: FakeCards) -> None:
        super().__init__()
        self._cards = cards

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(not issubclass(kind, FakeTensor) for kind in types):
            return NotImplemented  # a DTensor: its parts come here next

        if func in (aten._local_scalar_dense.default, aten.item.default):
            number = self._cards.read(args[0])
            while isinstance(number, list):  # of one element, in one or more dimensions
                number = number[0]
            return number
        if func is aten._pin_memory.default:
            return args[0].clone()
        if _is_composite(func):
            # In inference mode, operators that are made of others come here whole.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts

        args = self._with_whole_indices(func, args)
        tensors = _tensors((*args, *kwargs.values()))
        self._check(func, tensors)
        computed = self._compute(func, args, kwargs, tensors)
        if computed is not None and _has_dynamic_shape(func):
            return tree_map_only(Tensor, partial(self._cards.make, tensors[0].device), computed)

        out = func(*args, **kwargs)
        outs = _tensors([out])
        self._note(func, tensors, outs)
        if computed is None:
            for tensor in _written(func, args):
                self._cards.forget(tensor)
        else:
            for tensor, value in zip(outs, _tensors([computed]), strict=True):
                self._cards.keep(tensor, value)
        return out

    def _compute(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """The result on real whole numbers; None if an input or the result is not of these."""
        if any(self._cards.value(tensor) is None for tensor in tensors):
            return None
        if not tensors and not _makes_whole_numbers(func, args, kwargs):
            return None

        args, kwargs = tree_map_only(Tensor, self._cards.value, (args, kwargs))
        kwargs = {name: torch.device("cpu") if name == "device" and value else value for name, value in kwargs.items()}
        if kwargs.pop("pin_memory", None):
            kwargs["pin_memory"] = False
        with _outside():
            out = func(*args, **kwargs)
        return out if all(tensor.numel() <= LARGEST for tensor in _tensors([out])) else None

    def _with_whole_indices(self, func: Any, args: Any) -> Any:
        """Replace masks among the indices of `x[mask]` by the places where they are set."""
        if func.overloadpacket not in (aten.index, aten.index_put, aten.index_put_):
            return args
        indices: list[Tensor | None] = []
        for index in args[1]:
            value = None if index is None or index.dtype != torch.bool else self._cards.value(index)
            if value is None:
                indices.append(index)
                continue
            with _outside():
                found = value.nonzero(as_tuple=True)
            indices += [self._cards.make(index.device, one) for one in found]
        return (args[0], indices, *args[2:])

    def _check(self, func: Any, tensors: list[Tensor]) -> None:
        name = func.overloadpacket.__name__
        devices = {tensor.device for tensor in tensors if tensor.dim()}
        if len(devices) > 1 and func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            # CUDA copies an index from the host, and waits for the copy.
            self._cards.transfers.append(("to card", place()))
        elif len(devices) > 1 and func not in COPIES:
            raise MixError(f"{func} in {place()}: tensors on {' and '.join(sorted(map(str, devices)))}")
        dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        if name in ONE_DTYPE and len(dtypes) > 1 and torch.device("cpu") not in devices:
            if name == "_flash_attention_backward" and dtypes == {torch.bfloat16, torch.float32}:
                return  # its log-sum-exp is float32; the stand-in for flash-attn checks the rest
            raise MixError(f"{func} in {place()}: tensors of {' and '.join(sorted(map(str, dtypes)))}")

    def _note(self, func: Any, tensors: list[Tensor], outs: list[Tensor]) -> None:
        self._cards.devices |= {tensor.device for tensor in outs if tensor.device.type == "cuda"}
        if func in COPIES and tensors and outs:
            source, target = tensors[-1].device.type, outs[0].device.type
            if {source, target} == {"cpu", "cuda"}:
                self._cards.transfers.append(("to card" if target == "cuda" else "to host", place()))


class _HostReads(TorchFunctionMode):
    """Answers the methods that read a tensor's memory without an operator."""

    def __init__(self, cards: FakeCards) -> None:
        super().__init__()
        self._cards = cards

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer: Callable[..., Any] | None = _ANSWERS.get(func)
        if answer is not None and isinstance(args[0], FakeTensor):
            return answer(self._cards, *args, **kwargs)
        if func is torch.asarray:  # of a mapped file: safetensors reads nothing of it
            with _outside():
                return func(*args, **kwargs)
        if func is torch.tensor and isinstance(args[0], list):  # of numbers, some of them tensors
            args = (tree_map_only(FakeTensor, self._cards.read, args[0]), *args[1:])
        return func(*args, **kwargs)


def _numpy(cards: FakeCards, tensor: Tensor) -> np.ndarray:
    if tensor.device.type != "cpu":
        raise TypeError(f"can't convert a {tensor.device} tensor to numpy: copy it to the host first (Tensor.cpu)")
    value = cards.value(tensor)
    if value is not None:
        dtype = tensor.dtype
        with _outside():
            return value.to(dtype).numpy()
    return np.zeros(tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))


def _tolist(cards: FakeCards, tensor: Tensor) -> Any:
    return cards.read(tensor)


def _data_ptr(cards: FakeCards, tensor: Tensor) -> int:
    # Different for each memory, and aligned as the tensor is in it.
    return int(StorageWeakRef(tensor.untyped_storage()).cdata) * 64 + tensor.storage_offset() * tensor.itemsize


_ANSWERS: dict[Any, Callable[..., Any]] = {
    Tensor.numpy: _numpy,
    Tensor.tolist: _tolist,
    Tensor.data_ptr: _data_ptr,
}


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operator is made of other operators."""
    key = "CompositeImplicitAutograd"
    return func.namespace == "aten" and bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key))


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments or results, and in lists of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [one for one in value if isinstance(one, Tensor)]
    return found


def _has_dynamic_shape(func: Any) -> bool:
    """Whether the shape of an operator's result depends on values."""
    return torch.Tag.dynamic_output_shape in func.tags or func is aten.repeat_interleave.Tensor


def _makes_whole_numbers(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator without tensors makes a tensor of whole numbers."""
    dtype = kwargs.get("dtype")
    if func.overloadpacket in (aten.empty, aten.empty_strided, aten.rand, aten.randn):
        return False
    if dtype is not None:
        return not dtype.is_floating_point and not dtype.is_complex
    if func.overloadpacket in (aten.arange, aten.full):
        return not any(isinstance(value, float) for value in args)
    return False


def _written(func: Any, args: Any) -> list[Tensor]:
    """The tensors that an operator writes to."""
    schema = func._schema.arguments
    return [
        value
        for argument, value in zip(schema, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor)
    ]


@contextlib.contextmanager
def process_group(rank: int, ranks: int) -> Iterator[None]:
    """A process group whose other ranks do not exist: collectives change nothing and return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.cuda.set_device(rank)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
        torch.cuda.set_device(0)
