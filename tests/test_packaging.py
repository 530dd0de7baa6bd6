"""The source distribution: all that an installation is built from, and no half of anything else. The build: by the compiler that is asked for."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "kernels", "normtweak")


def copy_what_is_built_from(folder):
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))


def test_the_source_distribution_is_complete(tmp_path):
    copy_what_is_built_from(tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "kernels" / "normtweak_kernels" / "_native.so").touch()  # as an editable installation leaves one
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


# Makes every file that it is asked for, and says so in it.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
    case "$1" in
        -o) echo "by the stand-in" > "$2" ;;
        -MF) echo "none:" > "$2" ;;
    esac
    shift
done
"""


def test_the_compiler_that_is_asked_for_links_too(tmp_path):
    """In a folder with a space in its name."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    copy_what_is_built_from(folder)
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key not in ("CC", "CXX", "LDCXXSHARED")}
    environment |= {"CXX": str(compiler), "NORMTWEAK_REQUIRE_NATIVE": "1"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, check=True, capture_output=True, env=environment)
    (module,) = (folder / "kernels" / "normtweak_kernels").glob("_native*.so")
    assert module.read_text() == "by the stand-in\n"
