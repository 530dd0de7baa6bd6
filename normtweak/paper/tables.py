"""Results over seeds as a table on the terminal and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from ..checkpoint import check_parent
from ..estimates import Estimate, mean
from ..files import beside


@dataclass(frozen=True)
class Line:
    """A row's labels, and each figure's values, one a seed (one in all for the float model)."""

    labels: tuple[str, ...]
    values: dict[str, list[float]]

    def estimate(self, name: str) -> Estimate:
        """Mean over seeds and its standard error."""
        return mean(torch.tensor(self.values[name], dtype=torch.float64))


def as_table(title: str, labels: tuple[str, ...], lines: list[Line]) -> Table:
    """For the terminal: mean ± standard error over seeds."""
    names = list(dict.fromkeys(name for line in lines for name in line.values))
    table = Table(*labels, *names, title=title)
    for line in lines:
        table.add_row(*line.labels, *(str(line.estimate(name)) if name in line.values else "-" for name in names))
    return table


def write_csv(file: Path, labels: tuple[str, ...], lines: Iterable[Line]) -> None:
    """A line for each row and figure: labels, figure, mean, standard_error (empty for one seed), seeds, values; whole or not at all."""
    check_parent(file)
    with beside(file) as path, path.open("w", newline="", encoding="utf8") as handle:
        writer = csv.writer(handle)
        writer.writerow([*labels, "figure", "mean", "standard_error", "seeds", "values"])
        for line in lines:
            for name, values in line.values.items():
                estimate = line.estimate(name)
                error = "" if estimate.standard_error is None else estimate.standard_error
                writer.writerow([*line.labels, name, estimate.value, error, len(values), " ".join(map(repr, values))])
