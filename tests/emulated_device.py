"""A second device for machines without one: tensors that say they lie on a GPU and hold their values on the CPU.

Operations refuse to mix devices as CUDA does, random generators have to be the device's own, and whatever would have
the CPU wait for the device is counted.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten

NAME = "emulated"
WAITS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
    aten._linalg_eigh.default,
    aten._linalg_svd.default,
}
"""Operations that have the CPU read a number from the device, mostly for the shape of what comes out."""
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
"""They take indices from the CPU, and masks, whose true elements CUDA counts."""


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()  # there are no other random numbers than the CPU's

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def synchronize(self, device: Any = None) -> None:
        pass


_COMPOSITE = set(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"))


class Emulated(Tensor):
    """A tensor on the emulated device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Emulated:
        with torch.inference_mode(False):  # wrappers of inference tensors could not be detached
            return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                layout=held.layout,
                device=DEVICE,
                requires_grad=held.requires_grad,
            )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Emulated({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = _held(value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)  # read back on the CPU, where `map_location` has the suite read all

    def tolist(self) -> Any:
        _note("tolist")
        return self.held.tolist()

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first.")


_setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)


class Waits(TorchDispatchMode):
    """Runs the device while it is entered, and notes what has the CPU wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __enter__(self) -> Waits:
        # `torch.tensor` then makes its tensor on the CPU, and moves it by an operation that is seen here.
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in _COMPOSITE:  # whole operations arrive in inference mode, where nothing is taken apart before
            with self:
                found = func.decompose(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        return _run(func, args, kwargs or {})

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Notes waits in here."""
        _noted.append(self.found)
        try:
            yield
        finally:
            _noted.pop()


_noted: list[list[str]] = []
"""Where waits are noted."""


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    there = [value for value in tensors if isinstance(value, Emulated)]
    wanted = kwargs.get("device")
    target = None if wanted is None else torch.device(wanted).type
    if func is aten._to_copy.default:
        source = args[0]
        to = target or source.device.type
        if to != source.device.type:
            _note(f"copy to {to}", kwargs.get("non_blocking", False) and to == NAME)
        options = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking")}
        copied = func(_held(source), **options)
        if copied is _held(source):
            copied = copied.clone()
        return Emulated(copied) if to == NAME else copied
    if func is aten.copy_.default:
        to, source = args[:2]
        if source.device.type != to.device.type and source.device.type != "meta":
            asynchronous = (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)) and to.device.type == NAME
            _note(f"copy to {to.device.type}", asynchronous)
        _held(to).copy_(_held(source))
        return to
    if not there and target != NAME:
        return func(*args, **kwargs)
    if func in WAITS:
        _note(str(func))
    for value in tensors:
        if not isinstance(value, Emulated):
            if func in INDEXED:
                _note(f"{func} with an index on the CPU")
            elif value.dim():
                raise RuntimeError(f"Expected all tensors to be on the same device, found {NAME} and cpu: {func}")
    if func in INDEXED and any(index is not None and index.dtype == torch.bool for index in args[1]):
        _note(f"{func} with a mask")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")
    if target == NAME:
        kwargs = kwargs | {"device": torch.device("cpu")}
    out = func(*tree_map_only(Emulated, _held, args), **tree_map_only(Emulated, _held, kwargs))
    if target is not None and target != NAME:
        return out
    out = tree_map_only(Tensor, lambda value: value if isinstance(value, Emulated) else Emulated(value), out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def _held(value: Tensor) -> Tensor:
    return value.held if isinstance(value, Emulated) else value


def _note(what: str, fine: bool = False) -> None:
    if fine or not _noted:
        return
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    lines = [f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno} {frame.name}" for frame in frames[-8:-3]]
    _noted[-1].append(f"{what} at {' < '.join(reversed(lines))}")
