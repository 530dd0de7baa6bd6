"""Tokens per second over HTTP: vLLM with packed linears beside vLLM's bfloat16 and, for 4 bits per channel or in groups, its own GPTQ kernel.

python benchmarks/serve.py W4_FOLDER [FOLDER ...] [--float smollm2-135m] [--batches 1 16] [--rounds 7] [--eager]

Run it with a Python that has vLLM and normtweak. All servers are started first; all but the one that is measured are stopped (SIGSTOP), round after round.
Servers bind their threads to cores by themselves; VLLM_CPU_OMP_THREADS_BIND chooses other ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import vllm

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "compat"))
from endpoint import Endpoint, serve
from normtweak import models

TOKENS = 64
PROMPT = "Item {} of the list of things to know about the ocean is that"
COMMON = ["--max-model-len", "512", "--dtype", "bfloat16"]


def contenders(folders: list[str], unpacked: str, eager: bool) -> dict[str, tuple[list[str], str, dict[str, str]]]:
    """Name -> command, model, environment."""
    options = [*COMMON, *(["--enforce-eager"] if eager else [])]

    def command(folder: str, *own: str) -> list[str]:
        return ["normtweak", "serve", folder, "--engine", "vllm", "--", *options, *own]

    # its default for 4 bits on a CPU, 8-bit activations, fails at K = 576 per channel
    own_kernel = {"VLLM_CPU_INT4_W4A8": "0"}
    plain = str(models.resolve(unpacked))
    found = {"vLLM bf16": (command(plain), plain, {})}
    for folder in folders:
        settings = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
        kind = f"W{settings['bits']} " + ("per channel" if settings["group_size"] == -1 else f"g{settings['group_size']}")
        head = bool(settings.get("lm_head"))
        found[f"normtweak {kind}{', packed head' if head else ''}"] = command(folder), folder, {}
        if settings["bits"] in (4, 8) and settings["sym"] and not head:
            found[f"vLLM {kind}"] = command(folder, "--quantization", "gptq"), folder, own_kernel
    return found


def seconds(endpoint: Endpoint, batch: int, number: int) -> float:
    """Of one request for so many texts of TOKENS tokens; a new prompt each time, so that no prefix is in the cache."""
    prompts = [PROMPT.format(f"{number}.{i}") for i in range(batch)]
    body = {"prompt": prompts, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    start = time.perf_counter()
    with endpoint.post("/v1/completions", body) as response:
        usage = json.load(response)["usage"]
    if usage["completion_tokens"] != batch * TOKENS:
        raise RuntimeError(f"{endpoint.model}: {usage['completion_tokens']} tokens instead of {batch * TOKENS}")
    return time.perf_counter() - start


def measure(running: dict[str, Endpoint], batches: list[int], rounds: int) -> dict[tuple[str, int], list[float]]:
    """Seconds of each round of each contender, which are all paused, and batch; after one round that isn't counted."""
    times: dict[tuple[str, int], list[float]] = {(name, batch): [] for name in running for batch in batches}
    for number in range(rounds + 1):
        for name, endpoint in running.items():
            endpoint.resume()
            for batch in batches:
                taken = seconds(endpoint, batch, number)
                if number:
                    times[name, batch].append(taken)
            endpoint.pause()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--float", default=models.EMBEDDED, metavar="MODEL", help="the float model beside them")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--eager", action="store_true", help="without torch.compile, which takes minutes the first time")
    options = parser.parse_args()
    with ExitStack() as stack:
        running = {}
        for name, (command, model, environment) in contenders(options.folders, options.float, options.eager).items():
            running[name] = stack.enter_context(serve(command, model, {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"} | environment))
            running[name].pause()
        times = measure(running, options.batches, options.rounds)
    print(
        f"vLLM {vllm.__version__}, {TOKENS} tokens a request, medians of {options.rounds} interleaved rounds; of the ratio, with its smallest and largest"
    )
    for batch in options.batches:
        for name in running:
            taken, base = times[name, batch], times["vLLM bf16", batch]
            ratios = sorted(b / t for b, t in zip(base, taken, strict=True))
            speed, spread = batch * TOKENS / statistics.median(taken), f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"  batch {batch:2}  {name:40} {speed:8.1f} tokens/s  {statistics.median(ratios):5.2f} x bf16 {spread}")


if __name__ == "__main__":
    main()
