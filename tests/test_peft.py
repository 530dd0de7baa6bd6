"""LoRA on packed linears, through peft as its users call it."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import normtweak
from normtweak import PackedLinear
from normtweak.integrations.peft import PackedLoraLinear

TARGETS = ["q_proj", "v_proj", "down_proj"]
TOKENS = torch.arange(2, 66).reshape(4, 16)


@pytest.fixture(scope="module")
def packed(small_model, tmp_path_factory):
    """A packed checkpoint of the small llama, W4 per channel."""
    out = tmp_path_factory.mktemp("packed") / "out"
    normtweak.quantize(small_model, out=out, config=normtweak.QuantizeConfig(method="rtn", tweak=None))
    return out


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapted(folder, **settings):
    return get_peft_model(load(folder), LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings))


@torch.no_grad()
def logits(model):
    return model.eval()(TOKENS).logits


def train(model, steps=20):
    """The loss on TOKENS before each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_twenty_steps_lower_the_loss_and_the_adapter_reloads(packed, tmp_path):
    model = adapted(packed)
    assert sum(isinstance(module, PackedLoraLinear) for module in model.modules()) == 6
    assert torch.equal(logits(model), logits(load(packed)))  # B starts at zero
    codes = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("qweight")}
    losses = train(model)
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(buffer, codes[name]) for name, buffer in model.named_buffers() if name in codes)
    model.save_pretrained(tmp_path / "adapter")
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(load(packed), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load(packed)))


def test_transformers_own_adapters(packed, tmp_path):
    model = load(packed)
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}
    again = load(packed)
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(load(packed)))


def test_the_gradient_is_that_of_the_float_weights(packed):
    model, linear = adapted(packed, init_lora_weights=False), torch.nn.Linear(64, 64, bias=False)
    module = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(module.base_layer, PackedLinear)
    linear.weight.data = module.base_layer.dequantize()
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    x, grad = torch.randn(5, 64, requires_grad=True), torch.randn(5, 64)
    module(x).backward(grad)
    y = linear(x) + module.scaling["default"] * (x @ a.t() @ b.t())
    wanted = torch.autograd.grad(y, (x, a, b), grad)
    for got, one in zip((x.grad, a.grad, b.grad), wanted, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-4, atol=1e-4)


def test_what_packed_weights_cannot_do_is_said(packed):
    with pytest.raises(ValueError, match="init_lora_weights must be True, False or gaussian for packed linears, got pissa"):
        adapted(packed, init_lora_weights="pissa")
    with pytest.raises(ValueError, match=r"variant combination: \('use_dora',\)"):
        adapted(packed, use_dora=True)
    with pytest.raises(ValueError, match="merge: the base layer must be in floating point, got packed weights"):
        adapted(packed).merge_and_unload()


def test_the_trainer_takes_an_adapted_model(packed, tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    Trainer(adapted(packed), arguments, train_dataset=rows).train()
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(load(packed), arguments, train_dataset=rows)
