"""A GPU that is not there: tensors say that they are on `cuda:0` and have their values on the CPU.

PyTorch's own fake tensors have no values, so what needs some (a fit, a training, a whole pipeline)
cannot run on them. Here it can, as a GPU would have it: devices that are mixed raise, a generator
of another device raises, and each time that the host would wait for the device is noted with the
place that asks: a value read, a copy from or to memory that is not pinned, a size that depends on
values.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
READS = {
    aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero, aten.masked_select,
    aten.unique_dim, aten._unique2, aten.unique_consecutive, aten.repeat_interleave,
    aten._linalg_check_errors, aten._linalg_eigh, aten.linalg_lstsq, aten._linalg_svd,
    aten.linalg_eig, aten.linalg_cholesky,
}  # fmt: skip
"""What gives the host a value, or needs one there."""
SMALL = 65_536
"""Bytes that CUDA takes from any memory without a wait."""
COPIES = {aten._to_copy, aten.copy_}
TAKES_INDICES = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
WRAPPERS = (__file__, "_compile.py", "eval_frame.py")
SILENT = ("/torch/", __file__, "<")
"""Frames that ask for nobody's sake but their caller's."""


class OnDevice(Tensor):
    """A tensor of the device; `inner` holds its values.

    To torch's own C++ it is one of the CPU: that has a thread to go back in and an autocast, which
    CUDA has not without a GPU. So what C++ answers by itself is answered here.
    """

    inner: Tensor
    device = DEVICE  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]
    is_cpu = False  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> Any:
        if isinstance(inner, OnDevice) or inner.is_meta:  # made as of the type of a parameter
            return torch.nn.Parameter(inner, requires_grad)
        made: Any = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
        )
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> OnDevice:
        return OnDevice(inner["inner"])

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = torch.device(device or DEVICE), dtype or self.dtype
        if device.type == DEVICE.type and dtype == self.dtype and layout is None and not copy:
            return self
        return aten._to_copy(
            self, dtype=dtype, device=device, non_blocking=non_blocking, memory_format=layout
        )

    def cpu(self, *_: Any) -> Tensor:
        return self.to("cpu")

    def cuda(self, *_: Any, **__: Any) -> OnDevice:
        return self

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDevice:
        made = OnDevice(self.inner.detach().clone()).requires_grad_(self.requires_grad)
        made.__dict__.update({name: value for name, value in vars(self).items() if name != "inner"})
        return memo.setdefault(id(self), made)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")

    def __array__(self, *_: Any) -> Any:
        return self.numpy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert CURRENT, "a tensor of a device that is gone"
        return CURRENT[-1].compute(func, args, kwargs or {})


CURRENT: list[Accelerator] = []


class Accelerator(TorchDispatchMode):
    """The device, as long as it is entered."""

    def __init__(self, doubles: bool = True) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        """By library and place, `leansd trainer.take_step`."""
        self.doubles = doubles
        self._pinned: dict[int, Tensor] = {}

    def __enter__(self) -> Accelerator:
        CURRENT.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        CURRENT.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.compute(func, args, kwargs or {})

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation, on the side where its tensors are."""
        tensors = list(_list_tensors((args, tuple(kwargs.values()))))
        ours = [each for each in tensors if isinstance(each, OnDevice)]
        target = kwargs.get("device")
        packet = func.overloadpacket
        if packet is aten.is_pinned:
            return _locate(args[0]) in self._pinned
        if packet is aten._pin_memory:
            made = args[0].clone()
            self._pinned[_locate(made)] = made
            return made
        if packet is aten._to_copy and target is not None and torch.device(target).type == "meta":
            return func(_map(args[0], _take_values), **kwargs)
        if packet in COPIES:
            source = args[1] if packet is aten.copy_ else args[0]
            into = args[0].device if packet is aten.copy_ else target
            goes = (source.device if into is None else torch.device(into)).type == DEVICE.type
            if packet is aten._to_copy and _is_going_back():  # to the type that came forth
                goes = isinstance(source, OnDevice)
            if goes != isinstance(source, OnDevice) and not self._is_free(source, args, kwargs):
                self.note_wait()
        else:
            goes = bool(ours) if target is None else torch.device(target).type == DEVICE.type
            self._check_devices(func, args, tensors, ours)
            self._check_generator(kwargs.get("generator"), goes)
            if ours and (packet in READS or _masks(packet, args)):
                self.note_wait()
        if not ours and not goes:
            return func(*args, **kwargs)
        known: dict[int, OnDevice] = {id(each.inner): each for each in ours}
        args = _map(args, _take_values)
        kwargs = {name: _map(value, _take_values) for name, value in kwargs.items()}
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        made = func(*args, **kwargs)
        if not goes:
            return made
        if not self.doubles and getattr(made, "dtype", None) == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return _map(made, lambda each: known[id(each)] if id(each) in known else OnDevice(each))

    def _check_devices(self, func: Any, args: Any, tensors: list[Tensor], ours: list[Any]) -> None:
        strangers = [each for each in tensors if not isinstance(each, OnDevice)]
        if not ours or not strangers or _is_going_back():
            return
        if func.overloadpacket in TAKES_INDICES and isinstance(args[0], OnDevice):
            self.note_wait()
            return
        changed = func._schema.name.endswith("_") and not isinstance(args[0], OnDevice)
        if changed or any(each.dim() for each in strangers):
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, but found at least two "
                f"devices, {DEVICE} and cpu!"
            )

    def _is_free(self, source: Tensor, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the host goes on: what is small is taken along with the command itself."""
        if isinstance(source, OnDevice) or not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            return False
        return source.nbytes <= SMALL or _locate(source) in self._pinned

    def _check_generator(self, generator: Any, goes: bool) -> None:
        if generator is not None and goes != (generator.device.type == DEVICE.type):
            raise RuntimeError(
                f"Expected a {DEVICE.type if goes else 'cpu'} device type for generator but found "
                f"{generator.device.type}"
            )

    def note_wait(self) -> None:
        """The host waits here, for who called torch."""
        frame = sys._getframe(1)
        while frame.f_back is not None and any(part in frame.f_code.co_filename for part in SILENT):
            frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        library = next(
            (
                name
                for name in ("leansd", "diffusers", "transformers", "accelerate", "safetensors")
                if f"/{name}/" in str(path)
            ),
            "tests",
        )
        self.waits[f"{library} {path.stem}.{frame.f_code.co_name}"] += 1


def _list_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _list_tensors(each)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_map(each, change) for each in value])
    return value


def _take_values(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, OnDevice) else tensor


def _is_going_back() -> bool:
    """Whether autograd itself asks: what it makes without a tensor, zeros, is of the CPU here."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.endswith(WRAPPERS):
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"


def _locate(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _masks(packet: Any, args: Any) -> bool:
    if packet not in TAKES_INDICES:
        return False
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])


class Event:
    """A double of CUDA's: what is done with events."""

    done: ClassVar[list[str]] = []

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.done.append("record")

    def synchronize(self) -> None:
        self.done.append("wait")

    def elapsed_time(self, last: Any) -> float:
        return 10.0


def _let_tensors_move(patch: Any) -> None:
    """Let parameters and buffers go to the device and back, being the same objects throughout.

    That is what `tensor.data = ...` does between devices, also in `module.to(...)`: it is no change
    that their version counters would know of.
    """

    def swap(one: Tensor, other: Tensor) -> None:
        version = one._version
        own_swap(one, other)
        torch._C._autograd._unsafe_set_version_counter((one,), (version,))

    def read(tensor: Tensor) -> Tensor:
        return tensor.detach() if isinstance(tensor, OnDevice) else own_data.__get__(tensor)

    def write(tensor: Tensor, value: Tensor) -> None:
        if isinstance(tensor, OnDevice) or isinstance(value, OnDevice):
            made = value.detach()
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            swap(tensor, torch.nn.Parameter(made, tensor.requires_grad) if is_parameter else made)
        else:
            own_data.__set__(tensor, value)

    own_swap, own_data = torch.utils.swap_tensors, torch.Tensor.data
    patch.setattr(torch.utils, "swap_tensors", swap)
    patch.setattr(torch.Tensor, "data", property(read, write))
    patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)


class Stream:
    """A double of CUDA's."""

    def synchronize(self) -> None:
        """All is done already."""


@contextmanager
def simulate(patch: Any, *, doubles: bool = True) -> Iterator[Accelerator]:
    """The device, and what of `torch.cuda` is asked for, by pytest's monkeypatch.

    Args:
        doubles: whether it has numbers of double precision, as Apple's has not.
    """
    torch._C._ensureCUDADeviceGuardSet()  # torch.tensor asks the guard; without a GPU, for nothing
    stand_ins: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "current_device": lambda: 0,
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda *_: Stream(),
        "stream": lambda *_: nullcontext(),
        "synchronize": lambda *_: None,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 2**30,
        "reset_peak_memory_stats": lambda *_: None,
        "get_device_name": lambda *_: "A Card",
        "mem_get_info": lambda *_: (2**33, 2**34),
    }
    for name, stand_in in stand_ins.items():
        patch.setattr(torch.cuda, name, stand_in)
    patch.setattr(Event, "done", [])
    autocast = torch.autocast

    def cast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        """That of the device, which of the CPU does nothing to tensors of the device."""
        enabled = kwargs.pop("enabled", True) and device_type == DEVICE.type
        return autocast("cpu", *args, enabled=enabled, **kwargs)

    def group(*args: Any) -> Any:
        """As torch's, which would say that they are on the CPU."""
        grouped = own_group(*args).items()
        return {(each[0][0][0].device, kind): each for (_, kind), each in grouped}

    own_group = clip_grad._group_tensors_by_device_and_dtype
    patch.setattr(clip_grad, "_group_tensors_by_device_and_dtype", group)
    patch.setattr(torch, "autocast", cast)
    _let_tensors_move(patch)
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with Accelerator(doubles) as entered:
            yield entered
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
