"""The source distribution: all that an installation is built from, and no half of anything else."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "kernels", "normtweak")


def test_the_source_distribution_is_complete(tmp_path):
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in (*SOURCES, "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=tmp_path, check=True, capture_output=True)
    (archive,) = (tmp_path / "dist").glob("normtweak-*.tar.gz")
    with tarfile.open(archive) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    wanted = {
        path.relative_to(tmp_path).as_posix() for name in SOURCES for path in (tmp_path / name).rglob("*") if path.suffix in (".py", ".cpp", ".h")
    }
    assert len(wanted) > 100
    assert wanted | {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= packed
    # setuptools adds tests/test_*.py by itself, without the modules and folders beside them that they need
    assert not [name for name in packed if name.startswith("tests") or name.endswith((".so", ".o"))]
