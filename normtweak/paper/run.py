"""One call of `normtweak paper`: everything checked, then cell by cell, then tables, CSV and figures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ..calibration.languages import PRESETS
from ..checks import check_pattern
from ..config import CalibrationConfig, QuantizeConfig, require
from ..evaluate import check_names
from ..progress import Progress
from .experiments import FIGURES, TABLES, Experiment, Scope
from .figure import check_matplotlib, draw
from .lab import Evaluation, Lab
from .tables import Line, as_table, write_csv


@dataclass(frozen=True)
class Request:
    """What is asked for. tables, figures: numbers of the paper's. seeds: runs of each quantization. rows: a regular expression; rows without it in their labels are left
    out. sources: files of calibration text for table 8. languages: of its V2 text, None for the model family's own, where known."""

    tables: tuple[int, ...] = ()
    figures: tuple[int, ...] = ()
    seeds: int = 3
    samples: int = 64
    length: int = 256
    rows: str = ""
    sources: tuple[str, ...] = ()
    languages: str | None = None

    def __post_init__(self) -> None:
        require(bool(self.tables or self.figures), "paper", "table, figure", "asked for, one of them at least", "neither")
        for argument, asked, there in (("table", self.tables, TABLES), ("figure", self.figures, FIGURES)):
            for number in asked:
                require(number in there, "paper", argument, "one of " + ", ".join(map(str, there)), number)
        check_names("paper", "calibration", self.sources)
        require(self.seeds >= 1, "paper", "seeds", "1 or more", self.seeds)
        if self.rows:
            check_pattern("paper", "rows", self.rows)


def run(model: str, request: Request, evaluation: Evaluation, out: Path, progress: Progress, device: str = "auto") -> Iterator[Table | str]:
    """The experiments, one after another; yields each table when it is finished. Results lie in `out` as CSV (figures also as PNG), each quantization's own in
    out/cells: a run that was interrupted goes on with those that are missing. Raises ValueError for whatever can be wrong before anything is run."""
    require(out.absolute().parent.is_dir() and (out.is_dir() or not out.exists()), "paper", "out", "a folder, new or an earlier run's", out)
    require(
        7 not in request.tables or bool(evaluation.choices or evaluation.lambada), "paper", "table 7", "given tasks by --choice or --lambada", "none"
    )
    if request.figures:
        check_matplotlib()
    lab = Lab(model, evaluation, out, progress, device)
    languages = request.languages or PRESETS.get(lab.folder.config.model_type)
    scope = Scope(CalibrationConfig(samples=request.samples, length=request.length), request.sources, languages)
    asked = [(f"table{number}", TABLES[number]) for number in request.tables] + [(f"figure{number}", FIGURES[number]) for number in request.figures]
    chosen = [(name, experiment, _chosen(experiment, scope, request)) for name, experiment in asked]
    # all that is measured of a quantization is measured at once, since it is thrown away then
    wanted: dict[Path, set[str]] = {}
    for _, experiment, rows in chosen:
        for row in rows:
            for seed in row.seeds:
                if row.config is not None:
                    lab.check(row.config, seed)
                wanted.setdefault(lab.path(row.config, seed), set()).update(experiment.measures)
    out.mkdir(exist_ok=True)
    for name, experiment, rows in chosen:
        lines = [Line(row.labels, {}) for row in rows]
        for seed in range(request.seeds):  # a whole table of one seed before the next
            for row, line in zip(rows, lines, strict=True):
                if seed not in row.seeds:
                    continue
                yield f"{name}, {', '.join(filter(None, row.labels))}, seed {seed}"
                found = lab.results(row.config, seed, tuple(sorted(wanted[lab.path(row.config, seed)])))
                for measure in experiment.measures:
                    for figure, value in found[measure].items():
                        line.values.setdefault(figure, []).append(value)
        write_csv(out / f"{name}.csv", experiment.labels, lines)
        if name.startswith("figure"):
            draw(out / f"{name}.png", experiment.title, lines)
            yield f"{experiment.title}: {out / name}.png, {out / name}.csv"
        else:
            yield as_table(experiment.title, experiment.labels, lines)


@dataclass(frozen=True)
class _Chosen:
    """A row whose configuration has been made. The float model is measured once, whatever the seeds."""

    labels: tuple[str, ...]
    config: QuantizeConfig | None
    seeds: range


def _chosen(experiment: Experiment, scope: Scope, request: Request) -> list[_Chosen]:
    rows = [row for row in experiment.rows(scope) if re.search(request.rows, ", ".join(row.labels))]
    require(bool(rows), "paper", "rows", f"found in a label of {experiment.title}", request.rows)
    configs = [row.config for row in rows]
    return [_Chosen(row.labels, config, range(request.seeds if config else 1)) for row, config in zip(rows, configs, strict=True)]
