"""What may import what: the syntax trees are walked, so that an import inside a function counts too."""

import ast
import os
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE, KERNELS = ROOT / "normtweak", ROOT / "kernels" / "normtweak_kernels"

# The floors of normtweak/, top first: a module may import from its own floor only what is listed in SIDEWAYS, and nothing above.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"commands"},
    {"demo", "paper", "serving"},
    {"integrations"},
    {"retweak"},
    {"pipeline", "convert"},
    {"loop", "polish", "evaluate", "describe", "warm", "blocks", "card", "sequences"},
    {"models", "text", "tasks"},
    {"quantizers", "calibration", "checkpoint", "formats", "shards"},
    {"folding", "inputs", "rounding"},
    {"losses", "families", "norms", "activations", "attention", "linear"},
    {"config", "estimates", "terminal"},
    {"progress", "memory", "files", "checks"},
]
SIDEWAYS: set[tuple[str, str]] = set()
# Heavy or optional packages, and the only files whose business they are.
OWNERS = {
    "transformers": {"models", "attention", "integrations/transformers", "integrations/transformers_serve"},
    "accelerate": {"models"},
    "huggingface_hub": {"models"},
    "safetensors": {"checkpoint", "models", "calibration/kept"},
    "typer": {"cli", "terminal", "commands/*"},
    "rich": {"cli", "terminal", "commands/*", "demo", "paper/tables", "paper/run"},
    "datasets": {"calibration/hub"},
    "vllm": {"integrations/vllm"},
    "peft": {"integrations/peft"},
    "lm_eval": {"evaluate"},
    "auto_round": {"quantizers/autoround"},
    "matplotlib": {"paper/figure"},
    "normtweak_kernels": None,
}
LAZY = {"transformers", "accelerate", "huggingface_hub", "vllm", "lm_eval", "datasets", "matplotlib", "auto_round", "peft"}


def imports(path):
    """(module, names, top_level) of every import in a file; relative ones are made absolute."""
    tree = ast.parse(path.read_text(encoding="utf8"))
    root = path.parent
    package = [part for part in root.relative_to(ROOT).parts if part != "kernels"]
    top = set()
    for node in tree.body:
        top |= set(ast.walk(node)) if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, [], node in top
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])]), [alias.name for alias in node.names], node in top


def files(root):
    return sorted(root.rglob("*.py"))


def name_of(path, root):
    return path.relative_to(root).with_suffix("").as_posix()


def floor_of(module):
    return next((i for i, floor in enumerate(FLOORS) if module in floor), None)


@pytest.mark.parametrize("path", files(PACKAGE), ids=lambda p: name_of(p, PACKAGE))
def test_arrows_run_downward(path):
    own = name_of(path, PACKAGE).split("/")[0]
    if own == "__init__":
        return
    assert floor_of(own) is not None, f"{own} stands on no floor: add it to FLOORS"
    for module, names, _ in imports(path):
        parts = module.split(".")
        if parts[0] != "normtweak":
            continue
        for target in [parts[1]] if len(parts) > 1 else names:
            if target == own:
                continue
            assert floor_of(target) is not None, f"{own} imports {target}, which stands on no floor"
            below = floor_of(target) > floor_of(own) or (own, target) in SIDEWAYS
            assert below, f"{own} imports {target}, which is not below it"


@pytest.mark.parametrize("path", files(PACKAGE), ids=lambda p: name_of(p, PACKAGE))
def test_heavy_packages_have_owners(path):
    own = name_of(path, PACKAGE)
    for module, _, top_level in imports(path):
        package = module.split(".")[0]
        if OWNERS.get(package) is None:
            continue
        assert any(fnmatchcase(own, owner) for owner in OWNERS[package]), f"{own} imports {package}, whose business it isn't"
        if package in LAZY and not own.startswith("integrations/"):
            assert not top_level, f"{own} imports {package} when it is imported itself"


@pytest.mark.parametrize("path", files(KERNELS), ids=lambda p: name_of(p, KERNELS))
def test_kernels_know_torch_alone(path):
    own = name_of(path, KERNELS)
    folder = own.split("/")[0] if "/" in own else None
    for module, names, _ in imports(path):
        package = module.split(".")[0]
        assert package not in ("normtweak", "transformers"), f"{own} imports {package}"
        if package == "triton":
            assert (folder is not None and path.name.startswith("triton_")) or own == "launch", f"{own} imports triton"
        if package == "normtweak_kernels":
            inside = module.split(".")[1:] or names
            assert "_native" not in inside or own == "native", f"{own} imports the C++ module by itself"
            ops = {p.name for p in KERNELS.iterdir() if p.is_dir()}
            others = ops - {folder}
            if folder is not None:
                assert not others & set(inside), f"{own} imports another op's folder"


def test_native_sources_know_no_torch_and_only_bindings_knows_pybind11():
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        included = [line for line in path.read_text(encoding="utf8").splitlines() if line.startswith("#include")]
        assert not [line for line in included if "torch" in line or "ATen" in line], path
        if path.name != "bindings.cpp":
            assert not [line for line in included if "pybind11" in line], path


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_prints_nothing_and_loads_no_heavy_package():
    code = (
        "import sys, os; before = dict(os.environ); import normtweak, normtweak_kernels; assert dict(os.environ) == before;"
        "print([m for m in ('transformers', 'triton', 'accelerate', 'vllm', 'peft', 'typer', 'kernels') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert result.stdout.strip() == "[]"
    assert result.stderr == ""


def test_lives_beside_hugging_faces_kernels(tmp_path):
    """transformers imports Hugging Face's package `kernels` where it is installed; ours must not be found under that name."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("mark = 'theirs'")
    code = "import normtweak_kernels, normtweak, kernels, transformers; print(kernels.mark, normtweak_kernels.__name__)"
    for cwd in (tmp_path, ROOT):  # at the repository's root our folder kernels/ is on the path too, before theirs
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cwd, env=environment)
        assert result.stdout.strip() == "theirs normtweak_kernels"
