"""`normtweak serve` against normtweak.load. Run it with a Python that has vLLM, or transformers' server (`make compat` makes them):

python tests/compat/check_serve.py FOLDER ... [--engine vllm]   greedy text of 8 prompts over HTTP, streaming, 16 clients for so many --seconds, memory
python tests/compat/check_serve.py --parallel                   two CPU ranks on small models that are made here, and one whose heads don't divide

A line for each check; the exit code is 1 when one failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import normtweak
from endpoint import Endpoint, serve
from small_models import make_model

PROMPTS = [
    "The capital of France is", "Once upon a time there was", "def fibonacci(n):", "Water boils at", "The three primary colours are",
    "To make a cup of tea,", "In 1969 the first", "The opposite of hot is",
]  # fmt: skip
QUESTION = "What is the capital of France?"
TOKENS, CLIENTS = 32, 16
# Memory may still grow by so much after the first fifth of the time: allocators settle late.
GROWTH = 1.03
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
failures: list[str] = []


def report(name: str, good: bool, detail: str) -> None:
    print(f"{'ok  ' if good else 'FAIL'} {name}: {detail}", flush=True)
    if not good:
        failures.append(name)


def expected(folder: str, prompts: list[str], tokens: int, question: str | None = None) -> list[str]:
    """What transformers' generate writes with packed linears, in float32, after the prompts and after the question in the chat template."""
    model, tokenizer = normtweak.load(folder, dtype=torch.float32), normtweak.load_tokenizer(folder)
    inputs = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
    if question is not None:
        chat = [{"role": "user", "content": question}]
        inputs.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids)
    outputs = [model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :] for ids in inputs]
    return [tokenizer.decode(output, skip_special_tokens=True) for output in outputs]


def expected_ids(folder: str, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """The same for prompts of token ids, past an end-of-text."""
    model = normtweak.load(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return [model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, len(ids) :].tolist() for ids in prompts]


def command(folder: str, engine: str, *options: str) -> list[str]:
    own = ["--enforce-eager", "--max-model-len", "512"] if engine == "vllm" else []
    return ["normtweak", "serve", folder, "--engine", engine, "--", "--dtype", "float32", *own, *options]


def compare(name: str, endpoint: Endpoint, prompts: list[str], wanted: list[str], tokens: int) -> None:
    got = [endpoint.complete(prompt, tokens) for prompt in prompts]
    same = sum(a == b for a, b in zip(got, wanted, strict=True))
    first = next((f"; first other: {a!r} for {b!r}" for a, b in zip(got, wanted, strict=True) if a != b), "")
    report(f"{name} greedy text", same == len(prompts), f"{same} of {len(prompts)} prompts equal over {tokens} tokens{first}")


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


def check(folder: str, engine: str, seconds: float) -> None:
    name = f"{engine}, {Path(folder).name}"
    *wanted, answer = expected(folder, PROMPTS, TOKENS, QUESTION)
    with serve(command(folder, engine), folder, ENVIRONMENT) as endpoint:
        compare(name, endpoint, PROMPTS, wanted, TOKENS)
        pieces = endpoint.stream_chat(QUESTION, TOKENS)
        good = "".join(pieces) == answer and (len(pieces) > 1 or len(answer) < 10)
        report(f"{name} streamed chat", good, f"{len(pieces)} pieces: {''.join(pieces)!r}" + ("" if good else f" for {answer!r}"))
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


def check_parallel() -> None:
    prompts = torch.randint(2, 90, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    options = ["--calibration", "random", "--samples", "4", "--length", "24", "--no-tweak"]
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (model, own)) in enumerate(SMALL.items()):
            source, out = make_model(Path(folder) / f"float{number}", **SIZES | model), str(Path(folder) / f"packed{number}")
            quantize = [sys.executable, "-m", "normtweak", "quantize", str(source), "--out", out, *options, *own]
            subprocess.run(quantize, check=True, capture_output=True)
            wanted = expected_ids(out, prompts, 32)
            parallel = command(out, "vllm", "--tensor-parallel-size", "2", "--max-model-len", "128")
            with serve(parallel, out, ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}) as endpoint:
                got = [endpoint.complete_ids(prompt, 32) for prompt in prompts]
                same = sum(a == b for a, b in zip(got, wanted, strict=True))
                report(f"{name}, 2 ranks", same == len(prompts), f"{same} of {len(prompts)} prompts equal over 32 tokens, {got[0][:8]}")
        odd = make_model(Path(folder) / "odd", hidden_size=96, num_attention_heads=3, num_key_value_heads=3, head_dim=32)
        result = subprocess.run([sys.executable, "-m", *command(str(odd), "vllm", "--tensor-parallel-size", "2")], capture_output=True, text=True)
        report("heads that don't divide", result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1, result.stderr.strip()[-200:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--engine", choices=["vllm", "transformers"], default="vllm")
    parser.add_argument("--seconds", type=float, default=120, help="of the test with 16 clients; 0 leaves it out")
    parser.add_argument("--parallel", action="store_true")
    options = parser.parse_args()
    for folder in options.folders:
        check(folder, options.engine, options.seconds)
    if options.parallel:
        check_parallel()
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
