"""The embedded model, packed to 4 bits, in transformers and peft."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache, pipeline

import normtweak

pytestmark = [pytest.mark.slow, pytest.mark.model]


@pytest.fixture(scope="module")
def packed(embedded_model, tmp_path_factory):
    """W4 per channel, rounded to nearest."""
    out = tmp_path_factory.mktemp("packed") / "out"
    normtweak.quantize(embedded_model, out=out, config=normtweak.QuantizeConfig(method="rtn", tweak=None))
    return out


@torch.no_grad()
def test_a_compiled_decode_step_is_one_graph_with_the_same_logits(packed):
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    prompt = AutoTokenizer.from_pretrained(packed)("The capital of France is", return_tensors="pt").input_ids
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    steps = {"eager": model, "compiled": torch.compile(model, fullgraph=True)}
    logits = {}
    for name, step in steps.items():
        cache = StaticCache(config=model.config, max_cache_len=32)
        last = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
        logits[name] = torch.cat([step(last + offset, past_key_values=cache).logits for offset in range(3)])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(logits["compiled"], logits["eager"], rtol=1e-4, atol=1e-3)


def test_static_and_dynamic_caches_and_the_pipeline_agree(packed):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32), AutoTokenizer.from_pretrained(packed)
    settings = {"max_new_tokens": 32, "do_sample": False}
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    dynamic = model.generate(**prompt, **settings)
    assert torch.equal(dynamic, model.generate(**prompt, cache_implementation="static", **settings))
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)("The capital of France is", **settings)[0]["generated_text"]
    assert text == tokenizer.decode(dynamic[0], skip_special_tokens=True)
    assert "Paris" in text


def test_twenty_steps_of_lora_lower_the_loss(packed, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model, tokenizer = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32), AutoTokenizer.from_pretrained(packed)
    tokens = tokenizer("A packed weight keeps its codes; an adapter beside it learns what the codes can't say.", return_tensors="pt").input_ids
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(20):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2, losses
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)


MEASURE = """
import resource, sys, time, torch, transformers, normtweak, transformers.models.llama.modeling_llama
load = normtweak.load if sys.argv[1] == "load" else transformers.AutoModelForCausalLM.from_pretrained
began = time.process_time()
load(sys.argv[2], dtype=torch.float16)
print(time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_loading_takes_no_more_than_normtweak_load(packed):
    def measured(how):
        runs = [subprocess.run([sys.executable, "-c", MEASURE, how, str(packed)], capture_output=True, text=True, check=True) for _ in range(3)]
        seconds, peaks = zip(*(map(float, run.stdout.split()) for run in runs), strict=True)
        return min(seconds), min(peaks)

    (ours, least), (theirs, most) = measured("load"), measured("from_pretrained")
    assert theirs < 1.5 * ours
    # the stored and the packed codes of one linear at a time are there twice, and nothing else
    assert most < least + 64 * 2**20
