"""Registers functions as operations of torch, which torch.compile takes as they are, at little cost for each call.

`torch.library.custom_op` does the same and wraps every call for autograd, which takes longer than the launch of a
kernel. The operations here are called inside autograd functions, where there is nothing to record.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._ops import OpOverload

Function = TypeVar("Function", bound=Callable[..., Any])

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
