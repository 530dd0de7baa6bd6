"""Packages under two roots, and the optional C++ module. Everything else is in pyproject.toml.

Without a C++ compiler the package installs all the same and runs its torch reference. NORMTWEAK_REQUIRE_NATIVE=1 makes that an error.
NORMTWEAK_SANITIZE=1 builds the module with the address and undefined behaviour sanitizers, see `make sanitize`.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

REQUIRED = os.environ.get("NORMTWEAK_REQUIRE_NATIVE") == "1"
# No -march: one wheel serves every processor of an architecture, the bodies are chosen at run time (csrc/cpu/isa.cpp).
# Contraction to FMA is allowed: it changes no code, scale or dequantized value, only the rounding of sums. Without
# -fno-trapping-math GCC keeps branches around float16's conversions and doesn't vectorize them.
COMPILE_ARGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if os.environ.get("NORMTWEAK_SANITIZE") == "1" else []
if SANITIZERS:
    # Not optimized: with the checks in it, optimizing the unrolled bodies takes minutes, and would drop reads that nothing uses.
    COMPILE_ARGS += ["-O0", "-g1", *SANITIZERS]
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []


class NinjaBuildExt(build_ext):
    """Compiles with ninja where it is present (in parallel, only what changed), else one file after the other."""

    def build_extension(self, ext):
        try:
            import pybind11

            ext.include_dirs = [*ext.include_dirs, pybind11.get_include()]
            self.link_by_the_compiler()
            if shutil.which("ninja") and self.compiler.compiler_type == "unix":
                self.build_with_ninja(ext)
            else:
                super().build_extension(ext)
        except (ImportError, OSError, CompileError, subprocess.CalledProcessError) as error:
            # A module from an earlier build would be installed as if it were this source's.
            for root in (self.build_lib, "kernels"):
                (Path(root) / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
            reason = "the compiler failed, see above" if isinstance(error, subprocess.CalledProcessError) else str(error)
            outcome = "NORMTWEAK_REQUIRE_NATIVE=1 makes this an error" if REQUIRED else "the package will run its torch reference, slower"
            print(f"normtweak: the native kernels were not built ({reason}); {outcome}", file=sys.stderr)
            raise CompileError(reason) from error

    def link_by_the_compiler(self):
        """CXX links too: setuptools links by the interpreter's own compiler, which may be missing, or know another OpenMP than CXX's objects want."""
        own, linker = shlex.split(sysconfig.get_config_var("CXX") or ""), getattr(self.compiler, "linker_so_cxx", [])
        if own and linker[: len(own)] == own and "LDCXXSHARED" not in os.environ:
            self.compiler.linker_so_cxx = [*self.compiler.linker_exe_cxx, *linker[len(own) :]]

    def build_with_ninja(self, ext):
        root, build = Path(__file__).parent.resolve(), Path(self.build_temp).resolve()
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        include = [f"-I{path}" for path in (*ext.include_dirs, *self.compiler.include_dirs)]
        compiler = shlex.join([*self.compiler.compiler_so_cxx, *include, *ext.extra_compile_args])
        linker = shlex.join([*self.compiler.linker_so_cxx, *ext.extra_link_args])
        objects = [Path(source).with_suffix(".o").as_posix().replace("/", "_") for source in ext.sources]
        rules = [
            f"rule cxx\n  command = {compiler} -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n",
            f"rule link\n  command = {linker} $in -o $out\n",
            *(f"build {obj}: cxx {ninja_path(root / source)}" for obj, source in zip(objects, ext.sources, strict=True)),
            f"build {ninja_path(output)}: link {' '.join(objects)}\n",
        ]
        (build / "build.ninja").write_text("\n".join(rules))
        subprocess.run(["ninja", "-C", str(build)], check=True)


def ninja_path(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    packages=[*find_packages(include=["normtweak", "normtweak.*"]), *find_packages("kernels", include=["normtweak_kernels*"])],
    # kernels/ itself is no package: that import name belongs to Hugging Face's `kernels`.
    package_dir={"normtweak_kernels": "kernels/normtweak_kernels"},
    ext_modules=[
        Extension(
            "normtweak_kernels._native",
            sources=["csrc/bindings.cpp", *(path.as_posix() for path in sorted(Path("csrc/cpu").glob("*.cpp")))],
            depends=[path.as_posix() for path in sorted(Path("csrc").rglob("*.h"))],
            extra_compile_args=[*COMPILE_ARGS, *OPENMP],
            extra_link_args=[*OPENMP, *SANITIZERS],
            language="c++",
            optional=not REQUIRED,
        )
    ],
    cmdclass={"build_ext": NinjaBuildExt},
)
