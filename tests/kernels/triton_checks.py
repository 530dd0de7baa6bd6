"""Runs Triton bodies where there is no GPU: in Triton's interpreter, or as compiled PTX in the simulator `ptx_check`.

Both replace only what launches a kernel: an op's body runs as it is on CPU tensors, its grids and launch options included. Memory
from torch.empty is NaN (the largest integer) before a kernel sees it.

    with interpreted():
        op(x, out)                                                      # of an op's bodies Triton's is chosen, if it has one
    with simulated(80, {"op_fwd_kernel": {"out_ptr"}}) as reports:      # asserts that the simulator has no findings
        op(x, out)
    assert_coalesced(reports)
    with only_launched() as names:                                      # asserts that nothing waits for the device
        op(x, out)

The interpreter multiplies bfloat16 wrongly and rounds to it by truncation, so that bfloat16 goes through the simulator only.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language import core
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpretedFunction, _patch_lang

from normtweak_kernels import gpu

ENVIRONMENT = "NORMTWEAK_TOOLS"
BESIDE = Path(__file__).parents[3] / "shared" / "tools"
CAPABILITIES = (80, 90)

Mutation = Callable[[str, str], str]


def tools_folder() -> Path | None:
    """Where ptx_check.py and inspect_kernels.py are, or None. A folder that is named and doesn't hold them is an error."""
    named = os.environ.get(ENVIRONMENT)
    folder = Path(named) if named else BESIDE
    if (folder / "ptx_check.py").exists():
        return folder
    if named:
        raise pytest.UsageError(f"{ENVIRONMENT} must name the folder of ptx_check.py, got {named}")
    return None


def tool(name: str) -> ModuleType:
    """The tool of that name as a module, loaded once."""
    if name not in sys.modules:
        folder = tools_folder()
        assert folder is not None, f"tests that use {name} carry the marker ptx"
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@contextmanager
def _launching(launch: Callable[..., None], capability: int, config: int) -> Iterator[None]:
    """Kernels are launched by `launch(kernel, grid, positional, named)`, as on an sm_<capability>.

    Of an autotuned kernel's configurations the one with the given index is taken.
    """

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launch(kernel, grid, args, named)

    def run_tuned(tuner: Any, *args: Any, **named: Any) -> None:
        tuner.fn.run(*args, **named, **tuner.configs[config % len(tuner.configs)].all_kwargs())

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty fills its memory, see torch.utils.deterministic
    try:
        with (
            mock.patch.object(triton.JITFunction, "run", run),
            mock.patch.object(Autotuner, "run", run_tuned),
            mock.patch.object(gpu, "interpreted", return_value=True),
            mock.patch.object(gpu, "architecture", return_value=f"sm_{capability}"),
        ):
            yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def interpreted(capability: int = 80, config: int = 0) -> Iterator[None]:
    """Kernels launched inside run in Triton's interpreter, and so do the functions of triton.language that are kernels' own code."""

    def launch(kernel: Any, grid: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            InterpretedFunction(kernel.fn)[grid](*args, **named)

    def call(function: Any, *args: Any, **named: Any) -> Any:
        return InterpretedFunction(function.fn).rewrite()(*args, **named)

    # triton.language's own functions see it by its module `core`; patching both for each of their calls would take most of the time.
    language = _patch_lang(_see_the_language)
    try:
        with _launching(launch, capability, config), mock.patch.object(triton.JITFunction, "__call__", call):
            yield
    finally:
        language.restore()


def _see_the_language() -> tuple[Any, ...]:
    return tl, core


@contextmanager
def simulated(
    capability: int, outputs: dict[str, set[str]], config: int = 0, *, profile: int = 4, mutate: Mutation = lambda name, ptx: ptx
) -> Iterator[list[Any]]:
    """Kernels launched inside are compiled for sm_<capability>, and their PTX is executed; yields the list of ptx_check's reports.

    outputs: for each kernel's name those of its arguments that it must write before anything reads them.
    mutate: given a kernel's name and its PTX, gives the PTX that runs.
    """
    check = tool("ptx_check")
    reports: list[Any] = []

    def launch(kernel: Any, grid: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | named
        options = {name: value for name, value in given.items() if name not in kernel.arg_names}
        # Triton compiles None and the integer 1 into the kernel.
        const = {
            p.name: given[p.name]
            for p in kernel.params
            if p.is_constexpr or given[p.name] is None or (type(given[p.name]) is int and given[p.name] == 1)
        }
        call = {name: given[name] for name in kernel.arg_names if name not in const}
        types = {name: "*bf16" for name, value in call.items() if getattr(value, "dtype", None) == torch.bfloat16}
        call = {name: _argument(value) for name, value in call.items()}
        call |= {name: check.Out(call[name]) for name in outputs[kernel.__name__] & call.keys()}
        compiled = check.compile_triton(kernel, call, const, capability, types, **options)
        program, meta = check.Program(mutate(kernel.__name__, compiled.asm["ptx"])), compiled.metadata
        grid = grid(given) if callable(grid) else grid
        report = program.launch(meta.name, grid, 32 * meta.num_warps, list(call.values()), meta.shared, profile=profile)
        assert report.ok, report
        reports.append(report)

    with _launching(launch, capability, config):
        yield reports


@contextmanager
def only_launched() -> Iterator[list[str]]:
    """Kernels aren't executed, and whatever would wait for a GPU raises; yields the names of the kernels launched.

    A body that passes can be captured in a CUDA graph, as far as its synchronisation goes.
    """
    launched: list[str] = []

    def launch(kernel: Any, grid: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        launched.append(kernel.__name__)

    def wait(*args: Any, **named: Any) -> Any:
        raise AssertionError("this waits for the device")

    with ExitStack() as stack:
        stack.enter_context(_launching(launch, capability=80, config=0))
        for method in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            stack.enter_context(mock.patch.object(torch.Tensor, method, wait))
        yield launched


def _argument(value: Any) -> Any:
    """A kernel's argument as ptx_check takes it, of the type that Triton gives it; bfloat16 travels as its bits."""
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous()
        return (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).detach().numpy()
    if isinstance(value, float):
        return np.float32(value)
    return np.int32(value) if -(2**31) <= value < 2**31 else np.int64(value)


def assert_coalesced(reports: list[Any], ratio: float = 1.3, ways: float = 2.0) -> None:
    """No access to global memory asks for more than `ratio` times the least number of sectors, none to shared memory conflicts in more `ways`.

    For shapes that 16 divides: with others Triton loads element by element what a thread has beside each other, and caches make good for it.
    """
    for report in reports:
        for row in report.access_table():
            _, _, _, sectors, conflicts = row
            assert sectors is None or sectors <= ratio, (report.name, row)
            assert conflicts is None or conflicts <= ways, (report.name, row)
