"""The loop on another device than the host. No GPU is needed to see that no operation mixes the two: the meta device refuses that as well."""

from contextlib import nullcontext

import pytest
import torch
from torch.fx.experimental import _config as config
from torch.overrides import TorchFunctionMode

from normtweak import formats, models
from normtweak.activations import BlockCalls, Stream, device_of, embed_all
from normtweak.config import PolishConfig, QuantizeConfig
from normtweak.families import find
from normtweak.linear import PackedLinear
from normtweak.loop import quantize_blocks
from normtweak.polish import polish
from normtweak.progress import Silent

GPU = torch.device("meta")


class Values(TorchFunctionMode):
    """Tensors on the meta device have no values: who asks for some, on the way to the host say, is given ones."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.to, torch.Tensor.cpu) and args[0].is_meta:
            device = torch.device("cpu") if function is torch.Tensor.cpu else next((a for a in args[1:] if isinstance(a, torch.device)), GPU)
            if device.type == "cpu":
                return torch.ones(args[0].shape, dtype=args[0].dtype)
        if function in (torch.Tensor.item, torch.Tensor.__bool__) and args[0].is_meta:
            return 1.0 if function is torch.Tensor.item else True
        if function is torch.equal and args[0].is_meta:
            return True
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def shapes_alone(monkeypatch):
    """The meta device knows none; which elements of a mask are set it takes for all."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    with config.patch(meta_nonzero_assume_all_nonzero=True):
        yield


@pytest.mark.parametrize("method", ["gptq", "rtn", "awq", "smoothquant"])
@pytest.mark.parametrize("target_stream", ["float", "quantized"])
def test_the_loop_keeps_host_and_gpu_apart(small_model, method, target_stream):
    model = models.load(small_model)
    recipe = QuantizeConfig.preset(method=method, group_size=32, tweak={"target_stream": target_stream})
    blocks, calls, tokens = model.model.layers, BlockCalls(model, model.model.layers), torch.zeros(4, 16, dtype=torch.int64)
    stream = Stream(embed_all(calls, tokens, 2, also=(1, 2)), calls, 2, torch.float32, GPU)
    closed = []

    def close(index, block, norms):
        packed = [module for module in block.modules() if isinstance(module, PackedLinear)]
        assert packed and all(t.device == GPU for module in packed for t in module.buffers())
        form = formats.open_format(formats.describe("gptq", {"x": formats.Scheme.of(packed[0])}, []))
        closed.append([tensor.cpu() for module in packed for tensor in form.write("x", module).values()])

    with Values():
        _, last, floating = quantize_blocks(
            "model.layers", len(blocks), lambda i: blocks[i].to(GPU), close, stream, recipe, Silent(), find(model.config)
        )
    assert len(closed) == len(blocks)
    assert last.hidden.device.type == floating.hidden.device.type == "cpu"


def test_the_polish_keeps_host_and_gpu_apart(small_model):
    model = models.load(small_model).to(GPU)
    tokens, hidden = torch.zeros(4, 16, dtype=torch.int64), torch.zeros(4, 16, model.config.hidden_size)
    with Values():
        _, values = polish(model, model.model.layers, tokens, hidden, PolishConfig(), dtype=torch.float32, progress=Silent())
    assert all(value.device == GPU for value in values.values())


def test_device_of(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device_of("auto") == device_of("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match="device: name must be one of this machine's 0 GPUs, or cpu, got cuda"):
            device_of(name)
    with pytest.raises(ValueError, match="auto, cpu, cuda or cuda:N, got tpu"):
        device_of("tpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("auto") == torch.device("cuda", 0)
    assert device_of("cuda:1") == torch.device("cuda", 1)
