"""An OpenAI-compatible server as a child process, and its clients: what the checks and the benchmark of serving share. Standard library and psutil."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil

START_SECONDS = 900


class Endpoint:
    """A running server: requests to it, and the memory of its processes."""

    def __init__(self, process: subprocess.Popen, port: int, model: str) -> None:
        self.process, self.port, self.model = process, port, model

    def post(self, path: str, body: dict, timeout: float = 600):
        """The open response of a request."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps({"model": self.model} | body).encode())
        request.add_header("Content-Type", "application/json")
        return urllib.request.urlopen(request, timeout=timeout)

    def complete(self, prompt: str, tokens: int, **body) -> str:
        """Greedy text after a prompt."""
        with self.post("/v1/completions", {"prompt": prompt, "max_tokens": tokens, "temperature": 0} | body) as response:
            return json.load(response)["choices"][0]["text"]

    def complete_ids(self, prompt: list[int], tokens: int, **own) -> list[int]:
        """Greedy token ids after a prompt's (vLLM alone gives them), past an end-of-text."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True} | own
        with self.post("/v1/completions", body) as response:
            return json.load(response)["choices"][0]["token_ids"]

    def logprobs(self, prompt: list[int]) -> list[float]:
        """The log probability of each of a prompt's token ids but the first, after those before it (vLLM alone gives them)."""
        with self.post("/v1/completions", {"prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0}) as response:
            found = json.load(response)["choices"][0]["prompt_logprobs"]
        return [after[str(token)]["logprob"] for token, after in zip(prompt[1:], found[1:], strict=True)]

    def stream_chat(self, content: str, tokens: int) -> list[str]:
        """The pieces of a streamed answer."""
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0, "stream": True}
        pieces = []
        with self.post("/v1/chat/completions", body) as response:
            for line in response:
                data = line.decode().strip().removeprefix("data: ")
                if data and data != "[DONE]":
                    pieces += [choice["delta"].get("content") or "" for choice in json.loads(data)["choices"]]
        return [piece for piece in pieces if piece]

    def healthy(self) -> bool:
        """Whether /health answers with 200."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def processes(self) -> list[psutil.Process]:
        """The server and its children."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def memory(self) -> int:
        """Resident bytes of the server's processes that they share with nobody else."""
        return sum(process.memory_full_info().uss for process in self.processes())

    def pause(self) -> None:
        """Stop its processes, which may spin while they wait."""
        for process in self.processes():
            process.suspend()

    def resume(self) -> None:
        """Let them go on."""
        for process in self.processes():
            process.resume()


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(arguments: Sequence[str], model: str, environment: dict[str, str]) -> Iterator[Endpoint]:
    """Start `python -m <arguments> --port <free>`, wait until it is healthy, stop it at the end. An early exit raises RuntimeError with the log's end."""
    port = free_port()
    before, separator, after = list(arguments), [], []
    if "--" in before:
        at = before.index("--")
        before, separator, after = before[:at], ["--"], before[at + 1 :]
    command = [sys.executable, "-m", *before, "--port", str(port), *separator, *after]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True)
        try:
            endpoint, end = Endpoint(process, port, model), time.monotonic() + START_SECONDS
            while not endpoint.healthy():
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"exit code {process.poll()}\n" + log.read()[-6000:])
                time.sleep(1)
            yield endpoint
        finally:
            _stop(process)


def _stop(process: subprocess.Popen) -> None:
    children = [] if process.poll() is not None else psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        for paused in [*children, psutil.Process(process.pid)]:
            paused.resume()
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
    for child in psutil.wait_procs(children, 10)[1]:
        child.kill()
