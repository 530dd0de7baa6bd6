"""Code of ours that runs when somebody imports an engine, so that `import normtweak` itself needn't import it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(engine: str, ours: str) -> None:
    """Import the module `ours` as soon as the module `engine` has been imported: at once if it is there already, never if it never is."""
    if engine in sys.modules:
        importlib.import_module(ours)
    else:
        sys.meta_path.insert(0, _AfterImport(engine, ours))


class _AfterImport(MetaPathFinder):
    """Finds nothing by itself: it adds a step to the import of one module, and leaves `sys.meta_path` when that module has been imported."""

    def __init__(self, engine: str, ours: str) -> None:
        self.engine, self.ours = engine, ours

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """What the other finders find, with a loader that imports our module after theirs was executed."""
        if name != self.engine:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)  # an import may be asked for and fail, or be interrupted: the next one counts as well
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_follow(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                importlib.import_module(self.ours)

            spec.loader.exec_module = execute_and_follow  # type: ignore[method-assign]
        return spec
