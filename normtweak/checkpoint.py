"""Reading and writing model folders: memory-mapped safetensors in, atomically written safetensors out. No pickle."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import require
from .files import beside, sync
from .linear import PackedLinear

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
QUANTIZE_CONFIG = "quantize_config.json"
RECIPE = "normtweak.json"
# safetensors' names of the dtypes that model folders hold.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class WeightFiles:
    """The tensors of a model folder, read one by one from memory-mapped safetensors files."""

    def __init__(self, folder: Path, rename: Callable[[str], str] = lambda name: name) -> None:
        """Reads every file's header. `rename` turns a stored name into the one that the model uses.

        Raises ValueError for a folder without safetensors weights, or a damaged or missing file.
        """
        self.folder = folder
        self._where: dict[str, tuple[str, str]] = {}  # the model's name -> file, stored name
        # of a mixture's thousands of tensors, without opening a file for each
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for file in self._file_names():
            require((folder / file).is_file(), "checkpoint", "weights", f"complete ({INDEX} names {file})", "no such file")
            try:
                with self._open(file) as handle:
                    for name in handle.keys():  # noqa: SIM118  (no mapping)
                        self._where[rename(name)] = file, name
                        header = handle.get_slice(name)
                        self._shapes[rename(name)], self._dtypes[rename(name)] = tuple(header.get_shape()), header.get_dtype()
            except SafetensorError as error:
                raise ValueError(
                    f"checkpoint: {folder / file} must be a whole safetensors file, got one that is damaged or truncated ({error})"
                ) from error

    def _open(self, file: str) -> Any:
        # A mapping for each read: the pages that a tensor touched leave this process together with the tensor, not with the last of the file's tensors.
        return safe_open(self.folder / file, framework="pt")

    def _file_names(self) -> list[str]:
        index = self.folder / INDEX
        if index.is_file():
            try:
                files = set(json.loads(index.read_text(encoding="utf8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"checkpoint: {index} must be JSON with a weight_map, got {type(error).__name__}: {error}") from error
            named = bool(files) and all(isinstance(file, str) for file in files)
            require(named, "checkpoint", str(index), "JSON with a weight_map of tensors to files", f"{next(iter(files), 'an empty one')}")
            return sorted(files)
        names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        others = sorted(path.name for path in self.folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        hint = f" (found {others[0]}; name a GGUF file as FOLDER:FILE.gguf, convert pickled weights to safetensors)" if others else ""
        require(bool(names), "checkpoint", str(self.folder), f"a folder with safetensors weights{hint}", "none")
        return [SINGLE] if SINGLE in names else names

    def names(self) -> list[str]:
        """All tensors' names."""
        return list(self._where)

    def by_file(self) -> dict[str, list[str]]:
        """The tensors' names, file by file."""
        files: dict[str, list[str]] = {}
        for name, (file, _) in self._where.items():
            files.setdefault(file, []).append(name)
        return files

    def written(self, name: str) -> str:
        """What the files call the tensor that the model calls `name`; the name itself when they have no such tensor."""
        return self._where.get(name, ("", name))[1]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from its header."""
        return self._shapes[name]

    def empty(self, name: str) -> Tensor:
        """A tensor's shape and dtype, as a tensor on the meta device. Raises ValueError for a dtype that no checkpoint read here has."""
        require(self._dtypes[name] in _DTYPES, "checkpoint", name, "of a dtype that is read here", self._dtypes[name])
        return torch.empty(self._shapes[name], dtype=_DTYPES[self._dtypes[name]], device="meta")

    def read(self, name: str) -> Tensor:
        """A tensor."""
        file, stored = self._where[name]
        with self._open(file) as handle:
            return handle.get_tensor(stored)

    def find(self, name: str) -> str | None:
        """The stored name of a parameter: as it is, or with or without the `model.` in front that heads add."""
        candidates = (name, f"model.{name}", name.partition(".")[2])
        return next((candidate for candidate in candidates if candidate in self._where), None)

    def fill(self, module: nn.Module, prefix: str = "", *, skip: tuple[str, ...] = ()) -> None:
        """Give the parameters of `module` that are still on the meta device, and the buffers that the checkpoint has, their values.

        prefix: the module's path in the model. skip: parameters, or modules (with a dot at the end), that are left alone; packed linears are.
        Raises ValueError for a parameter that the checkpoint lacks or holds in another shape.
        """
        values: dict[str, Tensor] = {}
        packed = tuple(f"{prefix}{path}." for path, inner in module.named_modules() if isinstance(inner, PackedLinear))
        # made with the module, so never on the meta device: a router's correction, say, which is 0 before training
        buffers = {name for name, _ in module.named_buffers()}
        for name, tensor in module.state_dict().items():
            full = prefix + name
            if full.startswith(skip) or full.startswith(packed) or not (tensor.is_meta or name in buffers):
                continue
            stored = self.find(full)
            if stored is None and name in buffers and not tensor.is_meta:
                continue
            require(stored is not None, "checkpoint", str(self.folder), f"a checkpoint with the parameter {full}", "none of that name")
            assert stored is not None
            require(self.shape(stored) == tuple(tensor.shape), "checkpoint", stored, f"of shape {tuple(tensor.shape)}", self.shape(stored))
            values[name] = self.read(stored)
        module.load_state_dict(values, strict=False, assign=True)

    def check_finite(self) -> Iterator[str]:
        """Read every floating-point tensor once; yields each name. Raises ValueError naming the first that holds NaN or infinity."""
        for name in self._where:
            tensor = self.read(name)
            if tensor.is_floating_point():
                require(bool(torch.isfinite(tensor).all()), "checkpoint", name, "finite", "NaN or infinity")
            yield name


# Files of a model folder that hold or index weights; pickled ones are never handed on.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def other_files(folder: Path) -> list[Path]:
    """The files of a model folder beside its weights, by their paths in it."""
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [p for p in paths if p.suffix not in _WEIGHTS and not p.name.endswith(".index.json") and not p.parts[0].startswith(".")]


def check_out_folder(out: Path) -> None:
    """Raise ValueError unless `out` is free: missing, or an empty folder, under a parent that exists."""
    free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    require(free, "checkpoint", "out", "a new or empty folder", f"{out}, which holds something")
    out = out.resolve()
    require(out.parent.is_dir(), "checkpoint", "out", "in a folder that exists", out)
    # the finished folder is renamed to its place, which no mount point can be
    require(not os.path.ismount(out), "checkpoint", "out", "a folder inside a mounted one", f"{out}, which is a mount point")


def check_disk(where: str, out: Path, size: int) -> None:
    """Raise ValueError when a folder of `size` bytes won't fit on its disk."""
    needed, free = size + 64 * 2**20, shutil.disk_usage(out.absolute().parent).free
    require(free >= needed, where, "out", f"on a disk with {needed / 2**20:.0f} MiB free", f"{free / 2**20:.0f} MiB free")


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError where the system refuses, as any other writing does: for a full disk, say."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


class CheckpointWriter:
    """Writes a model folder beside its place and renames it there when it is whole.

    Use it as a context manager: an error or Ctrl-C removes what was written. A killed run leaves `.<name>.partial` with the finished
    shards; the next run to the same folder starts it anew and says so.
    """

    def __init__(self, out: Path, shards: int) -> None:
        check_out_folder(out)
        self.out, self.shards = out.resolve(), shards
        self.partial = self.out.parent / f".{self.out.name}.partial"
        self._weight_map: dict[str, str] = {}
        self._bytes = 0
        self._whole = False

    def __enter__(self) -> CheckpointWriter:
        try:
            self.partial.mkdir(exist_ok=True)
            self._lock = os.open(self.partial, os.O_RDONLY)
        except OSError as error:
            raise ValueError(f"checkpoint: out must be in a folder that can be written, got {self.out} ({error.strerror})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a run that ended between the two lines above took the folder that is locked here away with it
            if not self.partial.exists() or os.fstat(self._lock).st_ino != self.partial.stat().st_ino:
                raise BlockingIOError
        except BlockingIOError:
            os.close(self._lock)
            raise ValueError(f"checkpoint: out must be a folder that no other run is writing, got {self.out}") from None
        leftovers = list(self.partial.iterdir())
        if leftovers:
            logger.warning("removing %d files that an interrupted run left in %s", len(leftovers), self.partial)
            for path in leftovers:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        if self._whole and self.partial.exists():
            logger.error("the checkpoint is whole but could not be moved to %s; it is kept as %s", self.out, self.partial)
        elif self.partial.exists():
            shutil.rmtree(self.partial)
        os.close(self._lock)

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write shard `number` (from 0) at once, whole or not at all."""
        name = f"model-{number + 1:05d}-of-{self.shards:05d}.safetensors"
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with beside(self.partial / name) as path:
            save(whole, path)
        self._weight_map |= dict.fromkeys(whole, name)
        self._bytes += sum(tensor.nbytes for tensor in whole.values())

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Give tensors that were written before other values, whole shard by whole shard."""
        for file in sorted({self._weight_map[name] for name in tensors}):
            shard = load_file(self.partial / file)
            self._bytes -= sum(tensor.nbytes for tensor in shard.values())
            self.write(int(file.split("-")[1]) - 1, {name: tensors.get(name, tensor) for name, tensor in shard.items()})

    @property
    def size(self) -> int:
        """Bytes of the tensors written so far."""
        return self._bytes

    def copy(self, folder: Path, names: Iterable[Path]) -> None:
        """Take files of another folder over as they are."""
        for name in names:
            (self.partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, self.partial / name)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        write_text(self.partial / name, text)

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file."""
        write_json(self.partial / name, data)

    def finish(self) -> None:
        """Write the index and move the folder to its place."""
        self.write_json(INDEX, {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._weight_map.items()))})
        for path in self.partial.rglob("*"):
            sync(path)
        sync(self.partial)
        self._whole = True
        check_out_folder(self.out)
        self.partial.rename(self.out)
        sync(self.out.parent)


def check_parent(file: Path) -> None:
    """Raise ValueError unless a file can go to its place: in a folder that exists, and where no folder is."""
    require(file.absolute().parent.is_dir(), "checkpoint", str(file), "in a folder that exists", "none")
    require(not file.is_dir(), "checkpoint", str(file), "a file", "a folder")


def write_text(file: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    check_parent(file)
    with beside(file) as path:
        path.write_text(text, encoding="utf8")


def write_json(file: Path, data: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(file, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """What normtweak noted when it wrote the folder, or None for another's. Raises ValueError for a file that is no JSON object."""
    path = folder / RECIPE
    if not path.is_file():
        return None
    try:
        recipe = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(f"checkpoint: {path} must be JSON, got {error}") from error
    require(isinstance(recipe, dict), "checkpoint", str(path), "a JSON object", type(recipe).__name__)
    return recipe


def stored_activations(quantization: Mapping[str, Any] | None) -> str:
    """How a checkpoint's activations enter its packed products: what its `meta` says, which other readers pass over, or "auto"."""
    return _meta(quantization or {}).get("activations", "auto")


def written_here(quantization: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this `quantization_config` was written by normtweak, as its `meta` says."""
    writers = _meta(quantization).get("quantizer")
    return any(str(name).startswith("normtweak:") for name in (writers if isinstance(writers, list) else [writers]))


def _meta(quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    # Other tools' checkpoints are asked too, by loaders that pass them on: whatever they keep there, it isn't ours.
    meta = quantization.get("meta")
    return meta if isinstance(meta, Mapping) else {}
