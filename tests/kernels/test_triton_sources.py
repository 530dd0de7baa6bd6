"""What the sources of Triton's kernels must say, read from their syntax trees."""

import ast
from pathlib import Path

import pytest

import normtweak_kernels

SOURCES = sorted(Path(normtweak_kernels.__file__).parent.rglob("triton_*.py"))


def loads_without_other(source):
    """Lines of masked loads that don't say what the masked elements are: the compiler may leave anything in them."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "load"):
            continue
        given = {"pointer", "mask", "other"} & ({keyword.arg for keyword in call.keywords} | set(("pointer", "mask", "other")[: len(call.args)]))
        if "mask" in given and "other" not in given:
            found.append(call.lineno)
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_masked_load_says_what_the_masked_elements_are(file):
    assert loads_without_other(file.read_text(encoding="utf8")) == []


def test_what_is_found():
    lines = ["tl.load(p)", "tl.load(p, mask=m)", "tl.load(p, m)", "tl.load(p, mask=m, other=0)", "tl.load(p, m, 0.0)", "tl.store(p, v, mask=m)"]
    assert loads_without_other("\n".join(lines)) == [2, 3]
    assert len(SOURCES) >= 6
