"""Figure 1 as a picture, by matplotlib (extra: paper)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..config import require
from ..files import beside
from .tables import Line


def check_matplotlib() -> None:
    """Raise ValueError when matplotlib isn't installed."""
    require(
        importlib.util.find_spec("matplotlib") is not None,
        "paper",
        "figure",
        "drawn by matplotlib: pip install 'normtweak[paper]'",
        "no such package",
    )


def draw(file: Path, title: str, lines: list[Line]) -> None:
    """Drift of the means over the block's number, one panel for each scheme, a line and a band of a standard error for each method. Writes a PNG."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    schemes = list(dict.fromkeys(line.labels[0] for line in lines))
    figure = Figure(figsize=(5 * len(schemes), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(schemes), squeeze=False)[0]
    for scheme, panel in zip(schemes, panels, strict=True):
        for line in (line for line in lines if line.labels[0] == scheme):
            estimates = [line.estimate(name) for name in line.values if name.endswith(" mean")]
            centre, error = [e.value for e in estimates], [e.standard_error or 0.0 for e in estimates]
            (drawn,) = panel.plot(centre, label=line.labels[1])
            low, high = ([c + sign * e for c, e in zip(centre, error, strict=True)] for sign in (-1, 1))
            panel.fill_between(range(len(centre)), low, high, color=drawn.get_color(), alpha=0.2)
        panel.set(title=scheme, xlabel="block", yscale="log", ylabel="mean over channels of |difference of means|")
        panel.legend()
    figure.suptitle(title)
    with beside(file) as path, path.open("wb") as handle:
        figure.savefig(handle, format="png", dpi=120)
