"""What a quantized model lost: perplexity, KL divergence and top-1 agreement with the float model, and how well it still does at tasks."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .activations import computing
from .calibration import leading_bos
from .calibration.text import read_utf8
from .checks import check_ids
from .config import require
from .estimates import Difference, Estimate, Metric, exponential_mean, mean, paired_difference
from .progress import Progress, Silent
from .tasks import Choice, Passage, choose, last_words, read_choices, read_passages

# The Python language reference, in every CPython's standard library: text that no calibration set of ours is drawn from.
PYTHON_DOCS = "python-docs"


@dataclass(frozen=True)
class Score:
    """Perplexity exp(mean NLL) of the predicted tokens and its standard error, by the windows' means.

    Against a second model (the float one, say): mean KL(other || model) in nats and the share of equal argmaxes with their standard errors, and
    the perplexity over the other's, paired by window.
    """

    perplexity: float
    standard_error: float | None
    kl: float | None = None
    kl_error: float | None = None
    top1_agreement: float | None = None
    top1_error: float | None = None
    ratio: Difference | None = None


def read_text(source: str) -> str:
    """The text of a file, or of the Python language reference for "python-docs". Raises ValueError for a file that is missing or not UTF-8."""
    if source == PYTHON_DOCS:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in sorted(topics))
    path = Path(source)
    require(path.is_file(), "eval", "text", f"a text file or {PYTHON_DOCS}", source)
    return read_utf8("eval", path)


def check_names(where: str, argument: str, sources: Sequence[str]) -> None:
    """Raise ValueError for files of the same name in different folders, where results have the files' names."""
    names = [Path(source).name for source in dict.fromkeys(sources)]
    require(len(set(names)) == len(names), where, argument, "files called differently, since results have their names", ", ".join(names))


def text_windows(tokenizer: Any, text: str, count: int, length: int) -> Tensor:
    """Window i of a text is its tokens [i * (T // count), ...) for `length` tokens, int64 [count, length]; no special tokens.

    The whole text is tokenized once. Raises ValueError when it is too short for windows that don't overlap.
    """
    require(count >= 1 and length >= 2, "eval", "windows, length", "at least 1 and 2", (count, length))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    stride = len(ids) // count
    require(stride >= length, "eval", "text", f"at least windows x length = {count * length} tokens long", f"{len(ids)} tokens")
    return torch.tensor([ids[i * stride : i * stride + length] for i in range(count)])


@torch.inference_mode()
def score(
    model: Any,
    tokenizer: Any,
    windows: Tensor,
    *,
    against: Any = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Score:
    """Score a causal model on windows [count, length], and beside a float model when `against` is given.

    Each window is given on its own, behind the tokenizer's BOS where the tokenizer puts one. dtype: of matrix products. Raises ValueError for ids that the model doesn't have.
    """
    check_ids("eval", int(windows.max()), model.config.get_text_config().vocab_size)
    bos = leading_bos(tokenizer)
    device = model.device
    nll, other_nll, divergence, agreed = (torch.zeros(len(windows), dtype=torch.float64) for _ in range(4))
    number = 0
    # beside a second model one window at a time, since two sets of logits are held
    batches = windows.split(batch_size if against is None else 1)
    with (progress or Silent()).task("evaluating", len(batches)) as advance:
        for batch in batches:
            batch = batch.to(device)
            given = batch if bos is None else torch.cat([torch.full_like(batch[:, :1], bos), batch], 1)
            start = given.shape[1] - batch.shape[1]
            with computing(device.type, dtype):
                logits = model(input_ids=given, use_cache=False).logits[:, start:-1]
                reference = None if against is None else against(input_ids=given, use_cache=False).logits[:, start:-1]
            targets = batch[:, 1:]
            for index, target in enumerate(targets):
                own = logits[index].float().log_softmax(-1)
                nll[number] = functional.nll_loss(own, target)
                if reference is not None:
                    theirs = reference[index].float().log_softmax(-1)
                    other_nll[number] = functional.nll_loss(theirs, target)
                    divergence[number] = functional.kl_div(own, theirs, log_target=True, reduction="sum") / len(target)
                    agreed[number] = (own.argmax(-1) == theirs.argmax(-1)).double().mean()
                number += 1
            advance()
    perplexity = exponential_mean(nll)
    if against is None:
        return Score(perplexity.value, perplexity.standard_error)
    kl, agreement = mean(divergence), mean(agreed)
    ratio = paired_difference(nll, other_nll).exponential()
    return Score(perplexity.value, perplexity.standard_error, kl.value, kl.standard_error, agreement.value, agreement.standard_error, ratio)


def check_harness() -> None:
    """Raise ValueError when lm-eval isn't installed."""
    found = importlib.util.find_spec("lm_eval") is not None
    require(found, "eval", "tasks", "run by lm-eval: pip install 'normtweak[eval]'", "no such package")


def harness(model: Any, tokenizer: Any, tasks: list[str], *, limit: int | None = None, batch_size: int = 8) -> list[Metric]:
    """What lm-eval (EleutherAI's lm-evaluation-harness) finds for a list of its tasks, or of paths of task files (*.yaml): every metric of every task.

    Values and standard errors are lm-eval's own; samples are kept where a metric is a mean over documents, so that two models can be compared pairwise. limit: documents of
    each task. Raises ValueError when lm-eval is missing or doesn't know a task.
    """
    check_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    unknown = [task for task in tasks if not task.endswith(".yaml") and task not in known]
    require(not unknown, "eval", "tasks", "lm-eval's tasks or files of that kind", ", ".join(unknown))
    try:
        results = simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size), tasks=tasks, limit=limit)
    except OSError as error:  # no connection, no such data set
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"eval: tasks must be ones whose data lm-eval can load, got {type(error).__name__}: {reason}") from error
    return [metric for task, values in results["results"].items() for metric in _metrics(task, values, results["samples"].get(task, []))]


def _metrics(task: str, values: dict[str, Any], samples: list[dict[str, Any]]) -> list[Metric]:
    """lm-eval's `metric,filter` entries of one task."""
    found = []
    for key, value in values.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{name}_stderr,{kind}")
        items = {s["doc_id"]: s[name] for s in samples if s.get("filter", kind) == kind and isinstance(s.get(name), int | float)}
        own = torch.tensor([float(items[number]) for number in sorted(items)], dtype=torch.float64)
        paired = len(own) > 0 and abs(own.mean().item() - value) < 1e-6
        label = name if kind == "none" else f"{name} ({kind})"
        found.append(Metric(task, label, Estimate(float(value), float(error) if isinstance(error, int | float) else None), own if paired else None))
    return found


@dataclass(frozen=True)
class Comparison:
    """One figure of a model, and (beside a second model) the other's and their difference (of perplexities: ratio), paired by item."""

    task: str
    metric: str
    value: Estimate
    other: Estimate | None = None
    difference: Difference | None = None


def compare(ours: list[Metric], theirs: list[Metric] | None = None) -> list[Comparison]:
    """Every metric of a model, beside those of a second one that was asked the same."""
    others = {(metric.task, metric.name): metric for metric in theirs or []}
    rows = []
    for metric in ours:
        other = others.get((metric.task, metric.name))
        rows.append(Comparison(metric.task, metric.name, metric.value, *((other.value, metric.against(other)) if other else ())))
    return rows


@dataclass(frozen=True)
class Suite:
    """Tasks to be asked: passages and questions by their files' names, and names of lm-eval's tasks; `limit` items of each at most."""

    passages: dict[str, list[Passage]]
    questions: dict[str, list[Choice]]
    harness: list[str]
    limit: int | None = None

    @classmethod
    def read(cls, passages: list[Path], questions: list[Path], tasks: list[str], limit: int | None = None) -> Suite:
        """From JSONL files (see `tasks`) and lm-eval's task names. Raises ValueError for files that can't be read, and when lm-eval is wanted and missing."""
        if tasks:
            check_harness()
        names = [path.stem for path in (*passages, *questions)]
        require(len(set(names)) == len(names), "eval", "files", "called differently, since tasks have their names", ", ".join(names))
        return cls({p.stem: read_passages(p, limit) for p in passages}, {p.stem: read_choices(p, limit) for p in questions}, tasks, limit)

    def __bool__(self) -> bool:
        return bool(self.passages or self.questions or self.harness)

    def run(self, model: Any, tokenizer: Any, *, against: Any = None, dtype: torch.dtype, progress: Progress | None = None) -> list[Comparison]:
        """Every figure of a model, beside a second one's when `against` is given. dtype: of matrix products."""
        theirs = None if against is None else self._metrics(against, tokenizer, dtype, progress)
        return compare(self._metrics(model, tokenizer, dtype, progress), theirs)

    def _metrics(self, model: Any, tokenizer: Any, dtype: torch.dtype, progress: Progress | None) -> list[Metric]:
        found = []
        for name, passages in self.passages.items():
            found += last_words(name, model, tokenizer, passages, dtype=dtype, progress=progress)
        for name, questions in self.questions.items():
            found += choose(name, model, tokenizer, questions, dtype=dtype, progress=progress)
        if self.harness:
            with computing(model.device.type, dtype):
                found += harness(model, tokenizer, self.harness, limit=self.limit)
        return found
