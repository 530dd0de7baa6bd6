"""The examples of docs/transformers.md run as they stand, beside folders of the names that they use."""

import re
from pathlib import Path

import pytest
import torch

import normtweak

PAGE = Path(__file__).parent.parent / "docs" / "transformers.md"
EXAMPLES = re.findall(r"^## (.+?)$|^```python\n(.*?)^```", PAGE.read_text(encoding="utf8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folders(small_model, tmp_path_factory):
    """float, packed and theirs (a packed folder that doesn't say who wrote it)."""
    place = tmp_path_factory.mktemp("docs")
    (place / "float").symlink_to(small_model)
    for name, form in (("packed", "gptq"), ("theirs", "compressed-tensors")):
        normtweak.quantize(small_model, out=place / name, config=normtweak.QuantizeConfig(method="rtn", tweak=None, format=form))
    return place


def test_there_are_examples():
    assert len([code for _, code in EXAMPLES if code]) == 7


@pytest.mark.parametrize("code", [code for _, code in EXAMPLES if code], ids=range(7))
def test_example(folders, monkeypatch, code):
    monkeypatch.chdir(folders)
    names: dict = {}
    exec(compile(code, str(PAGE), "exec"), names)
    model = names["model"]
    assert any(isinstance(module, normtweak.PackedLinear) for module in model.modules())
    with torch.no_grad():
        assert model(torch.arange(2, 10)[None]).logits.isfinite().all()
