"""Rows of a dataset by Hugging Face's package `datasets` (extra: datasets): of the hub, or of a folder here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import CalibrationConfig, require

# Rows from which the next one is drawn, since a streamed dataset isn't known as a whole.
SHUFFLED = 10_000


def rows(config: CalibrationConfig, seed: int) -> Iterator[tuple[str, Any]]:
    """(place, row) of the dataset behind "hf:" in random order, streamed: a folder that `save_to_disk` wrote, a folder of .parquet, .json, .jsonl, .csv or .txt files, or
    a name on the hub. Raises ValueError when the package is missing, or there is no such dataset, subset or split."""
    name = config.source.removeprefix("hf:")
    found = importlib.util.find_spec("datasets") is not None
    require(found, "calibration", "source", f"{config.source} read by the package datasets: pip install 'normtweak[datasets]'", "no such package")
    import datasets

    try:
        if Path(name).is_dir() and any(Path(name, file).is_file() for file in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(name)
            data = saved[config.split] if isinstance(saved, datasets.DatasetDict) else saved
            data = data.shuffle(seed=seed)
        else:
            data = datasets.load_dataset(name, config.subset, split=config.split, streaming=True).shuffle(seed=seed, buffer_size=SHUFFLED)
        for number, row in enumerate(data, 1):
            yield f"{config.source} row {number}", row
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(f"calibration: source must be a dataset with such a subset and split, got {type(error).__name__}: {reason}") from error
