"""Selects the back end of an operation: once, when the module or optimizer that runs it is built.

The package of an operation offers one `Operation`: its back ends by name, fastest first, and `reference`, which
runs everywhere, last. To add a back end, put its module beside `reference.py` and one `Backend` into that list.

A back end that launches kernels registers them by `custom_op`, so that torch.compile takes them as they are.
`torch.library.custom_op` does the same and wraps every call for autograd, which takes longer than the launch of a
kernel. The operations here are called inside autograd functions, where there is nothing to record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import isfunction
from types import SimpleNamespace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast

import torch
from torch._ops import OpOverload

from deepseek_v3.utils.errors import ConfigError

Function = TypeVar("Function", bound=Callable[..., Any])
Op = TypeVar("Op")  # the type of a back end: a function, or a module with several functions


class Target(NamedTuple):
    """What an operation will run on: the device, and the dtype and the widths (last axes) of its rows."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    widths: tuple[int, ...] = ()


def _runs_everywhere(target: Target) -> str | None:  # noqa: ARG001 -- the interface of an obstacle
    return None


@dataclass(frozen=True)
class Backend(Generic[Op]):
    """A back end: `load` imports and returns it; `obstacle` returns why it cannot run at a target, or None."""

    name: str
    load: Callable[[], Op]
    obstacle: Callable[[Target], str | None] = _runs_everywhere


@dataclass(frozen=True)
class Selection(Generic[Op]):
    """A selected back end, and why each faster one was passed over; `str` gives all of it for a log."""

    operation: str
    backend: str
    run: Op
    passed_over: tuple[str, ...]

    def __str__(self) -> str:
        reasons = f" ({'; '.join(self.passed_over)})" if self.passed_over else ""
        return f"{self.operation} {self.backend}{reasons}"


class Operation(Generic[Op]):
    """An operation and its back ends, fastest first."""

    def __init__(self, name: str, *backends: Backend[Op]) -> None:
        self.name = name
        self.backends = {backend.name: backend for backend in backends}

    def select(self, target: Target, name: str = "auto") -> Selection[Op]:
        """The back end of this name; with `auto` the first one that can run at the target.

        Raises ConfigError, with the reason, if the named back end does not exist or cannot run there.
        """
        if name != "auto" and name not in self.backends:
            names = ", ".join(self.backends)
            raise ConfigError(f"{self.name}: has no back end {name!r}; choose auto or one of {names}")
        passed_over: list[str] = []
        for backend in self.backends.values() if name == "auto" else [self.backends[name]]:
            obstacle = backend.obstacle(target)
            if obstacle is None:
                return Selection(self.name, backend.name, backend.load(), tuple(passed_over))
            passed_over.append(f"{backend.name} {obstacle}")
        raise ConfigError(f"{self.name}: back end {'; '.join(passed_over)}; choose auto or another back end")


def copyable(backend: Op) -> Op:
    """The public functions of a back end that is a module, in an object.

    A layer that holds it can be copied with `copy.deepcopy`, which copies no modules.
    """
    functions = {name: each for name, each in vars(backend).items() if isfunction(each) and name[0] != "_"}
    return cast(Op, SimpleNamespace(**functions))


class Select(Protocol):
    """Selects a back end for rows of these widths; `model/backends.py` makes it for one device and type."""

    def __call__(self, operation: Operation[Op], *widths: int) -> Op: ...


def triton_obstacle(target: Target) -> str | None:
    """Why a Triton kernel cannot run at a target; None if it can."""
    if target.device.type != "cuda":
        return "needs a CUDA device"
    try:
        import triton  # noqa: F401 -- not every build of torch includes it
    except ImportError as error:
        return f"needs Triton, which cannot be imported ({error})"
    return None


@cache
def multiprocessors(device: torch.device) -> int:
    """The multiprocessors of a GPU; a few where Triton's interpreter runs a kernel."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


_NAMESPACE = "deepseek_v3"
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")  # which unregisters its operations when it is deleted


def custom_op(name: str) -> Callable[[Callable[..., Any]], OpOverload]:
    """Decorates a function of tensors and numbers, whose result is new and whose arguments stay as they are.

    The function becomes `torch.ops.deepseek_v3.NAME`; its annotations are the operation's schema.
    """

    def register(function: Callable[..., Any]) -> OpOverload:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        operation: OpOverload = getattr(getattr(torch.ops, _NAMESPACE), name).default
        return operation

    return register


def fake_of(operation: OpOverload) -> Callable[[Function], Function]:
    """Decorates the function that gives an operation's results without their values, for the compiler."""

    def register(function: Function) -> Function:
        torch.library.register_fake(operation.name(), function, lib=_LIBRARY)
        return function

    return register
