"""AutoRound: each weight's rounding and each group's range are learned by signed gradient descent on the block's output (arXiv 2309.05516).

The learning is done by the package auto-round (extra `autoround`), which is given one block at a time by the interface that it has for other tools.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from normtweak_kernels import QuantizedWeight

from ..activations import Passes, Stream
from ..config import QuantizeConfig, require
from ..folding import Fold
from ..linear import replace
from ..rounding import stored
from . import Quantizer, Run

# Sequences a step, the package's own default.
BATCH = 8


class AutoRound(Quantizer):
    """The package's SignRound with its own settings but for the number of iterations.

    It learns on what the quantized blocks before make of the calibration text, towards the float model's own output.
    """

    def check(self) -> None:
        """Raise ValueError unless the package is there."""
        found = importlib.util.find_spec("auto_round") is not None
        require(found, "autoround", "auto-round", "installed: pip install 'normtweak[autoround]'", "no such package")

    def quantize_block(
        self, linears: Mapping[str, nn.Linear], run: Run, config: QuantizeConfig, folds: Sequence[Fold] = ()
    ) -> dict[str, QuantizedWeight]:
        """See Quantizer."""
        assert isinstance(run, Passes)  # the output head, the only thing that isn't a block, is refused by QuantizeConfig
        configs = {name: own for name in linears if (own := config.for_module(name))}
        target = run.output("float")
        with plain_copies(run.block, {name: linears[name] for name in configs}) as copies:
            model = _Model(run)
            settings = {name: {"bits": 16} for name, module in model.named_modules() if isinstance(module, nn.Linear)}
            names = {id(module): name for name, module in model.named_modules()}
            for name, own in configs.items():
                settings[names[id(copies[name])]] = {"bits": own.bits, "group_size": own.group_size, "sym": own.symmetric}
            with quiet(), torch.random.fork_rng(devices=[]), torch.enable_grad():
                _learn(model, run.stream("quantized"), target, settings, config)
        return {name: found(copies[name], own) for name, own in configs.items()}


@contextmanager
def plain_copies(block: nn.Module, linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, nn.Linear]]:
    """The linears are copies of class nn.Linear while open: the package knows no other class, and writes into their weights."""
    paths = {id(module): path for path, module in block.named_modules()}
    copies = {}
    for name, linear in linears.items():
        copy = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        copy.load_state_dict({leaf: p.detach().clone() for leaf, p in linear.named_parameters()}, assign=True)
        copies[name] = copy.requires_grad_(False)
        replace(block, paths[id(linear)], copy)
    try:
        yield copies
    finally:
        for linear in linears.values():
            replace(block, paths[id(linear)], linear)


class _Block(nn.Module):
    """A block as the package likes it: hidden states in, hidden states out; masks and positions are the stream's business."""

    def __init__(self, run: Passes) -> None:
        super().__init__()
        self.block, self._index, self._stream = run.block, run.index, run.stream("quantized")

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [B, L, H] -> [B, L, H], float32."""
        return torch.cat([self._stream.send(self.block, self._index, part) for part in hidden_states.split(self._stream.batch_size)])


class _Layers(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])


class _Model(nn.Module):
    """A model of one block."""

    def __init__(self, run: Passes) -> None:
        super().__init__()
        self.model = _Layers(_Block(run))
        self.dtype = torch.float32
        self.config: Any = SimpleNamespace(architectures=[], model_type="normtweak", _name_or_path="", to_dict=dict)


def _learn(model: _Model, stream: Stream, target: Tensor, settings: dict[str, dict[str, Any]], config: QuantizeConfig) -> None:
    """Leaves the learned scale and zero point in each linear as attributes `scale` and `zp`, and the dequantized weight in its place."""
    import auto_round
    from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
    from auto_round.schemes import QuantizationScheme

    scheme = QuantizationScheme(bits=config.bits, group_size=config.group_size, sym=config.symmetric, data_type="int", act_bits=16)
    hidden, device = stream.hidden, str(stream.device)
    samples, length = hidden.shape[:2]
    learner = auto_round.AutoRound(
        model=model, tokenizer="", scheme=scheme, alg_configs=SignRoundConfig(iters=config.rounding_iterations), layer_config=settings,
        nsamples=samples, seqlen=length, batch_size=min(BATCH, samples), seed=config.seed, device_map=device,
        amp=False, enable_torch_compile=False, low_cpu_mem_usage=False,
    )  # fmt: skip
    learner.post_init()
    inputs: list[Any] = [(((row,), {}),) for row in hidden.split(1)]
    learner.quantize_block(
        block=model.model.layers[0], inputs=inputs, q_input=list(hidden.split(1)), reference_output=list(target.split(1)),
        device=device, auto_offload=False,
    )  # fmt: skip


def found(linear: Any, config: QuantizeConfig) -> QuantizedWeight:
    """What the package left in a linear: codes on the grid of its scales [N, G], which may be negative, and zero points."""
    weight, scales = linear.weight.detach().double(), linear.scale.half().t()
    groups, k = scales.shape[0], weight.shape[1]
    zeros = torch.as_tensor(linear.zp).expand(scales.t().shape).t().to(torch.uint8)
    codes = (weight.unflatten(1, (groups, -1)) / scales.double().t()[:, :, None]).round().flatten(1)[:, :k]
    codes += zeros.double().t().repeat_interleave(k // groups, 1)
    return stored(codes.clamp(0, 2**config.bits - 1).to(torch.uint8), scales, zeros, config)


@contextmanager
def quiet() -> Iterator[None]:
    """None of the package's advice while open, only its errors."""
    import auto_round  # noqa: F401  (importing it sets the level)

    logger = logging.getLogger("autoround")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
