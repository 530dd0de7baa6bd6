"""op -> implementations. The choice is made per call, by the arguments and by NORMTWEAK_BACKEND (reference, cpp or triton)."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ENVIRONMENT = "NORMTWEAK_BACKEND"
# Fastest first: the first that can run the arguments is chosen.
BACKENDS = ("triton", "cpp", "reference")


@dataclass(frozen=True)
class Implementation:
    """One body of an op. `refuses(*args)` says why it can't run these arguments, or gives None when it can."""

    op: str
    backend: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None]


_IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {}


def register(op: str, backend: str, refuses: Callable[..., str | None] = lambda *args: None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make a function the `backend` body of `op`."""
    if backend not in BACKENDS:
        raise ValueError(f"register: backend must be one of {', '.join(BACKENDS)}, got {backend}")

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _IMPLEMENTATIONS.setdefault(op, {})[backend] = Implementation(op, backend, function, refuses)
        return function

    return add


def register_lazily(op: str, backend: str, module: str, refuses: Callable[..., str | None]) -> None:
    """Like `register`, for a body in a module that is costly to import, or can't be everywhere, by its full name.

    `refuses` must be cheap and let through only what is worth the import. The first call that it lets through imports the module,
    which must register its own body of the op for the same backend; that one replaces this, with its own `refuses`.
    """

    def loaded() -> Implementation:
        importlib.import_module(module)
        return _IMPLEMENTATIONS[op][backend]

    register(op, backend, lambda *args: refuses(*args) or loaded().refuses(*args))(lambda *args: loaded().run(*args))


def ops() -> list[str]:
    """The names of all ops."""
    return sorted(_IMPLEMENTATIONS)


def forced() -> str | None:
    """The backend that NORMTWEAK_BACKEND asks for, or None."""
    return os.environ.get(ENVIRONMENT) or None


def select(op: str, *args: Any) -> Implementation:
    """The implementation that runs `op` on these (positional, schema-ordered) arguments.

    Raises ValueError for an unknown op or NORMTWEAK_BACKEND, and when the backend asked for can't run the arguments: a forced
    choice is never replaced silently.
    """
    implementations = _IMPLEMENTATIONS.get(op)
    if implementations is None:
        raise ValueError(f"{op}: op must be one of {', '.join(ops())}, got {op}")
    forced_name = forced()
    if forced_name:
        if forced_name not in BACKENDS:
            raise ValueError(f"{op}: {ENVIRONMENT} must be one of {', '.join(BACKENDS)}, got {forced_name}")
        if forced_name not in implementations:
            raise ValueError(f"{op}: {ENVIRONMENT} must be one of {', '.join(implementations)} for this op, got {forced_name}")
        reason = implementations[forced_name].refuses(*args)
        if reason:
            raise ValueError(f"{op}: {ENVIRONMENT}={forced_name} can't run this call: {reason}")
        return implementations[forced_name]
    for backend in BACKENDS:
        implementation = implementations.get(backend)
        if implementation is not None and implementation.refuses(*args) is None:
            return implementation
    raise ValueError(f"{op}: no backend runs this call")


def which_backend(op: str, *args: Any) -> str:
    """The backend ("triton", "cpp" or "reference") that `op` would use for these arguments, in the schema's order."""
    return select(op, *args).backend


def eager(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors needs nothing of torch's dispatcher: no gradient, no tracing or compiling, no mode, no subclass.

    The dispatcher costs more than a small product, and a model that generates text calls one for every linear and token.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    if _transformed():
        return False
    grad = torch.is_grad_enabled()
    return not any(t is not None and (type(t) not in (Tensor, torch.nn.Parameter) or (grad and t.requires_grad) or t.is_neg()) for t in tensors)


def _transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def check_transforms(op: str, *tensors: Tensor | None) -> None:
    """Raise ValueError inside torch.func's transforms and for a tensor with a forward-mode tangent: the ops differentiate in reverse mode alone."""
    if torch.compiler.is_compiling() or not _transformed():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ValueError(f"{op}: must be differentiated by torch.autograd in reverse mode, got a transform of torch.func")
    if any(t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise ValueError(f"{op}: must be differentiated by torch.autograd in reverse mode, got a forward-mode tangent")
