"""LLaVA's controller, worker, command line and evaluation, with checkpoints of our types, on the loopback."""

import base64
import contextlib
import json
import os
import subprocess
import sys
from functools import cache

import pytest
import requests
from drive import NO_CUDA, generate, prompt, served

pytest.importorskip("fastapi", reason="LLaVA's controller and worker need fastapi")
pytest.importorskip("uvicorn", reason="LLaVA's controller and worker need uvicorn")

OURS = ("saep", "tokenpacker")
QUESTION = "What does the picture show?"


@pytest.fixture(scope="module")
def servers(trained, tmp_path_factory, device):
    """type string -> controller's address, worker's address, model name; started once, in whatever order tests come."""
    with contextlib.ExitStack() as running:

        @cache
        def get(projector_type):
            checkpoint = trained(projector_type).checkpoint
            addresses = running.enter_context(served(checkpoint, tmp_path_factory.mktemp("serve"), device))
            return (*addresses[:2], checkpoint.name)

        yield get


@pytest.fixture(params=OURS)
def server(request, servers):
    return servers(request.param)


@pytest.mark.cuda
def test_worker_streams_an_answer_about_an_image(server, tiny):
    controller, worker, model = server
    found = requests.post(f"{controller}/get_worker_address", json={"model": model}, timeout=5).json()["address"]
    assert found == worker
    image = base64.b64encode((tiny.images / "flower.jpg").read_bytes()).decode()
    text = prompt(f"<image>\n{QUESTION}")

    chunks = generate(worker, model, text, [image])
    assert len(chunks) > 1  # it streams
    assert all(chunk["error_code"] == 0 for chunk in chunks)
    assert chunks[-1]["text"].startswith(text)
    assert len(chunks[-1]["text"]) > len(text)

    for malformed in ("no base64!", base64.b64encode(b"no image").decode()):
        (chunk,) = generate(worker, model, text, [malformed])
        assert chunk["error_code"] == 1
    (chunk,) = generate(worker, model, prompt("no place for an image"), [image])
    assert chunk["error_code"] == 1
    assert generate(worker, model, text, [image]) == chunks  # and goes on working


def test_long_prompts_are_refused_by_the_reduced_count(server, tiny):
    """The worker has 2048 positions; 1960 of text leave room for 36 visual tokens, not for 144."""
    _, worker, model = server
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(tiny.llm)
    image = base64.b64encode((tiny.images / "flower.jpg").read_bytes()).decode()

    def of_length(tokens):
        words = "z " * tokens
        while len(tokenizer(prompt(f"{words}{QUESTION}")).input_ids) > tokens:
            words = words[2:]
        return prompt(f"<image>\n{words}{QUESTION}")

    fits = generate(worker, model, of_length(1960), [image], max_new_tokens=4)
    assert "Exceeds max token length" not in fits[-1]["text"]
    assert fits[-1]["error_code"] == 0
    (refused,) = generate(worker, model, of_length(2020), [image], max_new_tokens=4)
    assert "Exceeds max token length" in refused["text"]


@pytest.mark.slow
@pytest.mark.parametrize("projector_type", OURS)
def test_command_line_chat(trained, tiny, tmp_path, projector_type):
    done = subprocess.run(
        [sys.executable, "-m", "llava.serve.cli", "--model-path", trained(projector_type).checkpoint, "--image-file",
         tiny.images / "flower.jpg", "--device", "cpu", "--temperature", "0", "--max-new-tokens", "6"],
        input=f"{QUESTION}\n\n", cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    prompt_and_answer = done.stdout.split("Human: ")[1]  # the template that LLaVA picks by the model's name
    answer = prompt_and_answer.split("Assistant: ")[1]
    assert len(answer.split()) > 1, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("projector_type", OURS)
def test_evaluation_on_a_question_file(trained, tiny, tmp_path, projector_type):
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    rows = [{"question_id": n, "image": name, "text": QUESTION} for n, name in enumerate(("flower.jpg", "china.jpg"))]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sitecustomize.py").write_text(NO_CUDA)
    done = subprocess.run(
        [sys.executable, "-m", "llava.eval.model_vqa_loader", "--model-path", trained(projector_type).checkpoint,
         "--image-folder", tiny.images, "--question-file", questions, "--answers-file", answers,
         "--temperature", "0", "--conv-mode", "vicuna_v1", "--max_new_tokens", "24"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["question_id"] for row in found] == [0, 1]
    assert all(len(row["text"].split()) > 1 for row in found)
