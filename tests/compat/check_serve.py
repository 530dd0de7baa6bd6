"""`normtweak serve` against normtweak.load. Run it with a Python that has vLLM, or transformers' server (`make compat` makes them):

python tests/compat/check_serve.py FOLDER ... [--engine vllm]   greedy text of 8 prompts over HTTP, streaming, 16 clients for so many --seconds, memory
python tests/compat/check_serve.py FOLDER ... --rounded         checkpoints whose activations are rounded: log probabilities
python tests/compat/check_serve.py --parallel                   two CPU ranks on small models that are made here, and one whose heads don't divide
python tests/compat/check_serve.py --lora                       an adapter beside its base model, a small one that is made here

A line for each check; the exit code is 1 when one failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import normtweak
from calibration import SENTENCES
from endpoint import Endpoint, serve
from small_models import make_model

PROMPTS = [
    "The capital of France is", "Once upon a time there was", "def fibonacci(n):", "Water boils at", "The three primary colours are",
    "To make a cup of tea,", "In 1969 the first", "The opposite of hot is",
]  # fmt: skip
# A model at 2 bits has nothing to say to most questions; the first that it answers is streamed.
QUESTIONS = [
    "What is the capital of France?", "Tell me about the ocean.", "Why is the sky blue?", "Write a poem about a river.", "List three colours.", "Who wrote Hamlet?",
    "Explain photosynthesis to a child.", "Translate 'good morning' into French.", "What did the people of the valley eat?", "Continue: one, two, three,",
    "Write a Python function that adds two numbers.", "Give me a recipe for bread.",
]  # fmt: skip
TOKENS, CLIENTS = 32, 16
# Memory may still grow by so much after the first fifth of the time: allocators settle late.
GROWTH = 1.03
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
failures: list[str] = []


def report(name: str, good: bool, detail: str) -> None:
    print(f"{'ok  ' if good else 'FAIL'} {name}: {detail}", flush=True)
    if not good:
        failures.append(name)


def expected(folder: str) -> tuple[list[str], str, str]:
    """What transformers' generate writes with packed linears, in float32: after PROMPTS; a question that it answers, in the chat template, and the answer."""
    model, tokenizer = normtweak.load(folder, dtype=torch.float32), normtweak.load_tokenizer(folder)

    def greedy(ids: torch.Tensor) -> str:
        output = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        return tokenizer.decode(output, skip_special_tokens=True)

    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        answer = greedy(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids)
        if len(answer) > 10:
            return [greedy(tokenizer(prompt, return_tensors="pt").input_ids) for prompt in PROMPTS], question, answer
    raise RuntimeError(f"{folder}: the model answers no question, nothing can be streamed")


def expected_ids(model: torch.nn.Module, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """What generate writes after prompts of token ids, past an end-of-text."""
    model.generation_config.eos_token_id = None
    return [model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, len(ids) :].tolist() for ids in prompts]


def command(folder: str, engine: str, *options: str) -> list[str]:
    own = ["--enforce-eager", "--max-model-len", "512"] if engine == "vllm" else []
    return ["normtweak", "serve", folder, "--engine", engine, "--", "--dtype", "float32", *own, *options]


def compare(name: str, endpoint: Endpoint, wanted: list[str]) -> None:
    got = [endpoint.complete(prompt, TOKENS) for prompt in PROMPTS]
    same = sum(a == b for a, b in zip(got, wanted, strict=True))
    first = next((f"; first other: {a!r} for {b!r}" for a, b in zip(got, wanted, strict=True) if a != b), "")
    report(f"{name} greedy text", same == len(wanted), f"{same} of {len(wanted)} prompts equal over {TOKENS} tokens{first}")


def load_test(name: str, endpoint: Endpoint, seconds: float) -> None:
    """So many clients at once, each with one request after the other."""
    counts, errors = [0] * CLIENTS, []
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        while time.monotonic() < end:
            try:
                endpoint.complete(PROMPTS[(number + counts[number]) % len(PROMPTS)] * (1 + number % 3), 16 + 4 * number)
                counts[number] += 1
            except Exception as error:  # noqa: BLE001  (whatever it is, it counts)
                errors.append(repr(error))
                return

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 5)
    before = endpoint.memory()
    for thread in threads:
        thread.join()
    after = endpoint.memory()
    report(f"{name} clients", not errors, f"{CLIENTS} for {seconds:.0f} s, {sum(counts)} requests, {len(errors)} errors {errors[:1]}")
    detail = f"{before / 1e6:.0f} MB after a fifth of the time, {after / 1e6:.0f} MB at the end"
    report(f"{name} memory", after <= GROWTH * before, detail)


def logprobs(folder: str, texts: list[list[int]], activations: str | None) -> torch.Tensor:
    """What normtweak.load makes of them: the log probability of each token after those before it."""
    model, found = normtweak.load(folder, dtype=torch.float32, activations=activations), []
    for ids in map(torch.tensor, texts):
        with torch.no_grad():
            found.append(model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0])
    return torch.cat(found)


def check_rounded(folder: str) -> None:
    """A checkpoint whose activations are rounded to 8 bits. Sums in another order move some of them to the next integer, and those move others in each layer
    after: no two ways of computing such a model write the same text. What must be the same is how far they are from the exact product."""
    name, tokenizer = f"vllm, {Path(folder).name}", normtweak.load_tokenizer(folder)
    texts = [tokenizer(text).input_ids[:400] for text in SENTENCES]
    exact, ours = logprobs(folder, texts, "auto"), logprobs(folder, texts, None)
    with serve(command(folder, "vllm"), folder, ENVIRONMENT) as endpoint:
        theirs = torch.tensor([value for ids in texts for value in endpoint.logprobs(ids)])
    off, wanted = (theirs - exact).std().item(), (ours - exact).std().item()
    report(f"{name} rounding", 0.8 < off / wanted < 1.25, f"log probabilities {off:.3f} from the exact product's, {wanted:.3f} in normtweak.load")
    means = [-values.mean().item() for values in (theirs, ours, exact)]
    allowed = 4 * (theirs - ours).std().item() / len(ours) ** 0.5
    detail = f"{means[0]:.4f} a token, {means[1]:.4f} in normtweak.load, {means[2]:.4f} without rounding; {len(ours)} tokens, allowed {allowed:.4f}"
    report(f"{name} log likelihood", abs(means[0] - means[1]) < allowed, detail)


def check(folder: str, engine: str, seconds: float) -> None:
    name = f"{engine}, {Path(folder).name}"
    wanted, question, answer = expected(folder)
    with serve(command(folder, engine), folder, ENVIRONMENT) as endpoint:
        compare(name, endpoint, wanted)
        pieces = endpoint.stream_chat(question, TOKENS)
        good = "".join(pieces) == answer and len(pieces) > 1
        report(f"{name} streamed chat", good, f"{question!r}, {len(pieces)} pieces: {''.join(pieces)!r}" + ("" if good else f" for {answer!r}"))
        if seconds:
            load_test(name, endpoint, seconds)


SIZES = {"hidden_size": 128, "intermediate_size": 576, "head_dim": 32, "num_hidden_layers": 3}
# Name -> model, how it is quantized. 576 columns in groups of 64, halved, cut a group.
SMALL = {
    "W2 g64 asymmetric": ({}, ["--bits", "2", "--group-size", "64", "--asymmetric"]),
    "W4, v_proj 8 bits g32, one key-value head": ({"num_key_value_heads": 1}, ["--bits", "4", "--module", "v_proj=8:32"]),
    "qwen2 W3 g64 with biases, packed head": ({"model_type": "qwen2"}, ["--bits", "3", "--group-size", "64", "--lm-head", "--skip", "k_proj|q_proj|v_proj"]),
    "phi3 W4 g64, merged in the checkpoint": ({"model_type": "phi3"}, ["--bits", "4", "--group-size", "64"]),
}  # fmt: skip


SMALL_PROMPTS = torch.randint(2, 90, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()


def make_packed(folder: Path, name: str, number: int) -> str:
    """One of SMALL, quantized."""
    model, own = SMALL[name]
    source, out = make_model(folder / f"float{number}", **SIZES | model), str(folder / f"packed{number}")
    options = ["--calibration", "random", "--samples", "4", "--length", "24", "--no-tweak", *own]
    subprocess.run([sys.executable, "-m", "normtweak", "quantize", str(source), "--out", out, *options], check=True, capture_output=True)
    return out


def compare_ids(name: str, endpoint: Endpoint, wanted: list[list[int]], **own) -> None:
    got = [endpoint.complete_ids(prompt, TOKENS, **own) for prompt in SMALL_PROMPTS]
    same = sum(a == b for a, b in zip(got, wanted, strict=True))
    report(name, same == len(wanted), f"{same} of {len(wanted)} prompts equal over {TOKENS} tokens, {got[0][:8]}")


def check_parallel() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(SMALL):
            out = make_packed(Path(folder), name, number)
            wanted = expected_ids(normtweak.load(out, dtype=torch.float32), SMALL_PROMPTS, TOKENS)
            parallel = command(out, "vllm", "--tensor-parallel-size", "2", "--max-model-len", "128")
            with serve(parallel, out, ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}) as endpoint:
                compare_ids(f"{name}, 2 ranks", endpoint, wanted)
        odd = make_model(Path(folder) / "odd", hidden_size=96, num_attention_heads=3, num_key_value_heads=3, head_dim=32)
        result = subprocess.run([sys.executable, "-m", *command(str(odd), "vllm", "--tensor-parallel-size", "2")], capture_output=True, text=True)
        report("heads that don't divide", result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1, result.stderr.strip()[-200:])


def add_adapter(folder: Path, model: torch.nn.Module) -> str:
    """A LoRA of random numbers, as peft writes it; the model computes with it from now on."""
    rank, alpha, targets, tensors = 8, 16, ["q_proj", "v_proj", "gate_proj", "down_proj"], {}
    for path, linear in model.named_modules():
        if path.rpartition(".")[2] in targets:
            a, b = torch.randn(rank, linear.in_features) / linear.in_features**0.5, torch.randn(linear.out_features, rank) / rank**0.5
            tensors |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
            linear.register_forward_hook(lambda _, inputs, y, a=a, b=b: y + alpha / rank * (inputs[0] @ a.t() @ b.t()))
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets, "task_type": "CAUSAL_LM", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)


def check_lora() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        name = "W4, v_proj 8 bits g32, one key-value head"
        out = make_packed(Path(folder), name, 0)
        model = normtweak.load(out, dtype=torch.float32)
        base = expected_ids(model, SMALL_PROMPTS, TOKENS)
        adapter = add_adapter(Path(folder) / "adapter", model)
        adapted = expected_ids(model, SMALL_PROMPTS, TOKENS)
        report("the adapter", not any(a == b for a, b in zip(adapted, base, strict=True)), "changes what is written after each prompt")
        options = ["--max-model-len", "128", "--enable-lora", "--lora-modules", f"adapted={adapter}"]
        with serve(command(out, "vllm", *options), out, ENVIRONMENT) as endpoint:
            compare_ids(f"{name}, without the adapter", endpoint, base)
            compare_ids(f"{name}, with the adapter", endpoint, adapted, model="adapted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--engine", choices=["vllm", "transformers"], default="vllm")
    parser.add_argument("--seconds", type=float, default=120, help="of the test with 16 clients; 0 leaves it out")
    parser.add_argument("--rounded", action="store_true", help="of SmoothQuant: log probabilities in place of text")
    parser.add_argument("--parallel", action="store_true")
    parser.add_argument("--lora", action="store_true")
    options = parser.parse_args()
    for folder in options.folders:
        if options.rounded:
            check_rounded(folder)
        else:
            check(folder, options.engine, options.seconds)
    if options.parallel:
        check_parallel()
    if options.lora:
        check_lora()
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
