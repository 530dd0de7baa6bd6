"""Faults planted into compiled PTX, and whether the simulator or a test's own comparison finds them.

A mutant lacks one barrier or one wait for an asynchronous copy, or one of its comparisons includes equality where it didn't, or the other way round.
A comparison's fault shows only where its operands are equal, so that of a test's calls those run in which that happened.
"""

from __future__ import annotations

import itertools
import linecache
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

from triton_checks import simulated, tool

BARRIER = re.compile(r"\b(bar\.sync|barrier\.sync|cp\.async\.wait_group|cp\.async\.wait_all)\b")
ACCESS = re.compile(r"\b(ld|st)\.shared\S*\s[^\[]*\[(\S+?)[+\]]")
COMPARISON = re.compile(r"\bsetp\.(lt|le|gt|ge|lo|ls|hi|hs)(u?)\.")
OTHER = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "lo": "ls", "ls": "lo", "hi": "hs", "hs": "hi"}
# Calls that a mutant survives before it counts as not found.
ATTEMPTS = 2

Call = Callable[[], object]
Pattern = re.Pattern[str]


@dataclass(frozen=True)
class Site:
    """A place for a fault: the number of its line in the PTX, what stands there in the mutant, and the line of the kernel that it comes from."""

    number: int
    mutated: str
    source: str


@dataclass(frozen=True)
class Fault:
    """What became of a planted fault. One that was not found and has a reason can't have an effect."""

    what: str
    found: bool
    reason: str | None


def sites(ptx: str) -> Iterator[Site]:
    """Where faults can be planted."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, re.M))
    source = ""
    for number, line in enumerate(ptx.splitlines()):
        if place := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            source = linecache.getline(files[place[1]], int(place[2])).strip()
        elif BARRIER.search(line):
            yield Site(number, "", source)
        elif match := COMPARISON.search(line):
            yield Site(number, line.replace(match[0], f"setp.{OTHER[match[1]]}{match[2]}.", 1), source)


def same_data(lines: list[str], site: Site) -> bool:
    """Whether a barrier stands between loads from shared memory and stores of the same threads to the same addresses.

    In tl.sum and tl.max a warp stores over what it has loaded itself. Addresses depend on the thread's number alone, so that the simulator sees all of them.
    """
    accesses = [(i, *access.groups()) for i, line in enumerate(lines) if (access := ACCESS.search(line))]
    loads = itertools.takewhile(lambda access: access[1] == "ld", reversed([access for access in accesses if access[0] < site.number]))
    stores = itertools.takewhile(lambda access: access[1] == "st", (access for access in accesses if access[0] > site.number))
    read, written = {address for _, _, address in loads}, {address for _, _, address in stores}
    return bool(read and written) and ("core.reduce(" in site.source or read == written)


def repeated(lines: list[str], site: Site) -> bool:
    """Whether the same barrier stands beside it."""
    before, after = (
        [other.strip() for other in part if not other.strip().startswith(("//", ".loc"))] for part in (lines[: site.number], lines[site.number + 1 :])
    )
    return lines[site.number].strip() in (before[-1], after[0])


def _words(line: str) -> str:
    return " ".join(line.rstrip("; ").split())


class _Survey:
    """What happens in which of the calls when nothing is wrong."""

    def __init__(self, calls: list[Call], outputs: dict[str, set[str]]) -> None:
        self.kernels: dict[str, str] = {}  # PTX -> name
        self.launched: dict[str, list[int]] = defaultdict(list)
        self.equal: dict[tuple[str, str], list[int]] = defaultdict(list)  # PTX, comparison
        batch = tool("ptx_check").Batch
        compile_comparison = batch.i_setp

        def watched(this: Any, inst: Any) -> Any:
            run, kind = compile_comparison(this, inst), this.kinds(inst)[-1]
            a, b = (this.source(operand, kind) for operand in inst.args[1:3])
            key = self.running, _words(inst.text)

            def watching_run(mask: Any) -> None:
                if self.equal[key][-1:] != [self.call] and (np.broadcast_to(a() == b(), this.L) & this.lanes(mask)).any():
                    self.equal[key].append(self.call)
                run(mask)

            return watching_run

        def note(name: str, ptx: str) -> str:
            self.kernels[ptx], self.running = name, ptx
            if self.launched[ptx][-1:] != [self.call]:
                self.launched[ptx].append(self.call)
            return ptx

        with mock.patch.object(batch, "i_setp", watched), simulated(80, outputs, mutate=note, profile=0):
            for self.call, call in enumerate(calls):
                call()

    def relevant(self, ptx: str, line: str) -> list[int]:
        """The calls in which a fault in this line can show: of barriers those that launch the kernel."""
        calls = self.launched[ptx] if BARRIER.search(line) else self.equal[ptx, _words(line)]
        return calls[:ATTEMPTS]


def _notices(call: Call, outputs: dict[str, set[str]], ptx: str, mutant: str) -> bool:
    try:
        with simulated(80, outputs, mutate=lambda _, compiled: mutant if compiled == ptx else compiled, profile=0):
            call()
    except (AssertionError, ValueError, IndexError):
        return True
    return False


def plant(
    calls: list[Call], outputs: dict[str, set[str]], harmless: list[tuple[Pattern, Pattern, str]], never_equal: list[tuple[Pattern, str]]
) -> Iterator[Fault]:
    """Every fault of every kernel that the calls launch.

    harmless: why faults that nobody finds have no effect, by patterns for the line of the kernel and for the line of PTX. never_equal: why the operands of
    comparisons that were not equal in any of the calls can't be, by a pattern for the line of the kernel.
    """
    survey = _Survey(calls, outputs)
    for ptx, kernel in survey.kernels.items():
        lines = ptx.splitlines()
        for site in sites(ptx):
            line = lines[site.number].strip()
            mutant = "\n".join([*lines[: site.number], site.mutated, *lines[site.number + 1 :]])
            relevant = survey.relevant(ptx, line)
            found, reason = any(_notices(calls[i], outputs, ptx, mutant) for i in relevant), None
            if not found:
                reasons = [why for where, what, why in harmless if where.search(site.source) and what.search(line)]
                if not relevant:
                    reasons += [why for where, why in never_equal if where.search(site.source)]
                if BARRIER.search(line) and repeated(lines, site):
                    reasons.append("the same barrier stands beside it")
                if line.startswith("bar.sync") and same_data(lines, site):
                    reasons.append("it parts accesses of the same threads to the same addresses")
                reason = next(iter(reasons), None)
            yield Fault(f"{kernel}, line {site.number}: {line}   equal in calls {relevant}, from: {site.source}", found, reason)
