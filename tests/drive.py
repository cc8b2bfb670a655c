"""What tests drive LLaVA with: its LLM's input seen, its controller and worker started and asked."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import requests
import torch

HOST = "127.0.0.1"
# LLaVA's evaluation scripts name the device `cuda`; on a machine without one, that is the CPU.
NO_CUDA = """
import torch
def to(self, *args, _to=torch.Tensor.to, **kwargs):
    if kwargs.get("device") == "cuda":
        kwargs["device"] = "cpu"
    return _to(self, *args, **kwargs)
torch.Tensor.to = to
"""


def llm_input(model, **inputs):
    """The hidden states that the first layer of the LLM really receives."""
    received = []
    hook = model.get_model().layers[0].register_forward_pre_hook(lambda _, args: received.append(args[0].detach()))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        hook.remove()
    return received[0]


def pad_rows(rows):
    """Rows of token ids, as LLaVA's collator pads them: ids and mask, [rows, longest]."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])


def prompt(text):
    return f"A chat. USER: {text} ASSISTANT:"


def free_port():
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def process(log, module, *arguments):
    with log.open("w") as output:
        command = [sys.executable, "-m", module, *arguments]
        child = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "NO_PROXY": HOST, "no_proxy": HOST},
            cwd=log.parent,
        )
        try:
            yield child
        finally:
            child.terminate()
            child.wait(20)


def wait_for(ask, child, log, seconds=90):
    """Poll until `ask` gives something true, the child ends, or time is up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert child.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(requests.RequestException):
            if ask():
                return
        time.sleep(0.5)
    raise AssertionError(f"no answer after {seconds} s:\n{log.read_text()[-3000:]}")


@contextlib.contextmanager
def served(checkpoint, folder, device="cpu"):
    """A controller and one worker; gives (controller's address, worker's address, the worker's log)."""
    ports = free_port(), free_port()
    controller, worker = (f"http://{HOST}:{port}" for port in ports)
    logs = folder / "controller.log", folder / "worker.log"
    with process(logs[0], "llava.serve.controller", "--host", HOST, "--port", str(ports[0])) as first:
        wait_for(lambda: requests.post(f"{controller}/list_models", timeout=5).ok, first, logs[0])
        with process(
            logs[1], "llava.serve.model_worker", "--host", HOST, "--port", str(ports[1]), "--worker-address", worker,
            "--controller-address", controller, "--model-path", str(checkpoint), "--device", device,
        ) as second:  # fmt: skip

            def answers():
                models = requests.post(f"{controller}/list_models", timeout=5).json()["models"]
                # A worker registers before it listens.
                return models and requests.post(f"{worker}/worker_get_status", timeout=5).ok

            wait_for(answers, second, logs[1])
            yield controller, worker, logs[1]


def generate(address, model, text, images=(), max_new_tokens=8):
    """The stream of a worker, chunk by chunk."""
    data = {
        "model": model, "prompt": text, "images": list(images), "temperature": 0.0,
        "max_new_tokens": max_new_tokens, "stop": "</s>",
    }  # fmt: skip
    with requests.post(f"{address}/worker_generate_stream", json=data, stream=True, timeout=60) as response:
        assert response.ok
        return [json.loads(chunk) for chunk in response.iter_lines(delimiter=b"\0") if chunk]
