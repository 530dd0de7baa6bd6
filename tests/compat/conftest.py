"""Peers in virtual environments of their own, and the table that `make compat` writes."""

import json
import os
import subprocess
from pathlib import Path

import pytest

import normtweak

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
# Where the environments are unless a variable says otherwise.
PEERS = {name: (f"NORMTWEAK_COMPAT_{name.replace('-', '_').upper()}", f".venv-compat-{name}") for name in ("gptqmodel", "compressed-tensors", "vllm")}
# A file whose table is written anew when every peer was there and all tests passed.
TABLE = "NORMTWEAK_COMPAT_TABLE"
BEGIN, END = "<!-- written by make compat -->", "<!-- end -->"
_NOT_RUN: dict[str, int] = {}
_ROWS: list[tuple[str, ...]] = []


def _python(peer: str) -> Path:
    variable, folder = PEERS[peer]
    return Path(os.environ.get(variable) or ROOT / folder) / "bin" / "python"


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("compat"):
        (peer,) = mark.args
        if not _python(peer).exists():
            reason = f"{peer} has no environment: make compat, or {PEERS[peer][0]}=FOLDER"
            if TABLE in os.environ:
                pytest.fail(reason)
            _NOT_RUN[reason] = _NOT_RUN.get(reason, 0) + 1
            pytest.skip(reason)


def pytest_terminal_summary(terminalreporter) -> None:
    for reason, count in _NOT_RUN.items():
        terminalreporter.write_line(f"NOT RUN: {count} tests of other people's loaders: {reason}", yellow=True, bold=True)
    for line in _table():
        terminalreporter.write_line(line)


def _table() -> list[str]:
    return (
        ["| checkpoint | loaded by | greedy tokens | logits |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in sorted(_ROWS))]
        if _ROWS
        else []
    )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = os.environ.get(TABLE)
    if path and exitstatus == 0 and not _NOT_RUN:
        file = ROOT / path
        before, rest = file.read_text(encoding="utf8").split(BEGIN)
        file.write_text("\n".join([before + BEGIN, "", *_table(), "", END]) + rest.split(END)[1], encoding="utf8")


class Peer:
    """A peer's Python: runs the scripts of this folder."""

    def __init__(self, name: str) -> None:
        self.python = str(_python(name))

    def run(self, script: str, *arguments: object) -> str:
        """What a script prints. A failing one fails the test with the end of what it printed."""
        # GPTQModel compiles its plain kernel anew for every length of the sequence, which takes longer than running it.
        settings = {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | settings
        command = [self.python, str(HERE / script), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE)
        assert result.returncode == 0, f"{script}: exit code {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        return result.stdout

    def answers(self, script: str, folder: Path) -> dict:
        """The answers that a script prints as its last line."""
        return json.loads(self.run(script, folder).splitlines()[-1])

    def version(self, package: str) -> str:
        """A package and its version."""
        code = f"from importlib.metadata import version; print(version({package!r}))"
        return f"{package} {subprocess.run([self.python, '-c', code], capture_output=True, text=True, check=True).stdout.strip()}"


@pytest.fixture
def peer(request) -> Peer:
    """The peer that the test's marker names."""
    return Peer(request.node.get_closest_marker("compat").args[0])


@pytest.fixture
def row():
    """Adds a row to the table: checkpoint, loader, greedy tokens, logits."""
    return lambda *cells: _ROWS.append(tuple(map(str, cells)))


@pytest.fixture(scope="session")
def exported(embedded_model, tmp_path_factory):
    """The folder of the embedded model's export with some settings: GPTQ on a little text, no tweak."""
    made: dict[str, Path] = {}

    def export(**settings) -> Path:
        name = "-".join(f"{key}={value}" for key, value in settings.items())
        if name not in made:
            calibration = {"source": "random", "samples": 8, "length": 64}
            config = normtweak.QuantizeConfig.from_dict({"tweak": None, "calibration": calibration} | settings)
            made[name] = tmp_path_factory.mktemp("exported") / "out"
            normtweak.quantize(embedded_model, out=made[name], config=config)
        return made[name]

    return export
