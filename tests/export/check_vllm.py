"""Exported folders in vLLM: `EXPORTED=… PLUGIN=… pytest --noconftest check_vllm.py`, which `make check-vllm` runs.

EXPORTED has what `make_folders.py` made. PLUGIN is a folder in which this package is installed: on the
path, vLLM finds the plugin; without it, vLLM's transformers backend runs the folder's own code.
"""

import base64
import concurrent.futures
import contextlib
import functools
import importlib
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EXPORTED = Path(os.environ["EXPORTED"])
# One tile; grids of tiles; LLaVA-NeXT's and ViP-LLaVA's, where their environments made them.
KINDS = (
    "saep", "tokenpacker-scale-factor-3", "slice9", "slice16", "anyres-unpad", "qwen2-pad", "qwen2-anyres",
    "qwen2-slice", "phi3",
)  # fmt: skip
NAMES = [name for name in KINDS if (EXPORTED / name).is_dir()]
QUESTIONS = (
    "What does the picture show?",
    "Describe the colours, in one sentence.",
    "Which one is darker?",
    "What moves?",
)
HOST = "127.0.0.1"
WAYS = ("backend", "native")
BACKEND = "falling back to Transformers implementation"
sys.path[:0] = [str(HERE.parents[1] / "llava_projectors" / "export"), str(HERE)]
compare = importlib.import_module("compare")
aspect_of = importlib.import_module("ask_vllm").aspect_of


def environment(way):
    return {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        **({"PYTHONPATH": os.environ["PLUGIN"]} if way == "native" else {}),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "NO_PROXY": HOST,
        "no_proxy": HOST,
    }


def cases_of(name):
    return compare.load_cases(EXPORTED / f"{name}.pt")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_llava_says(name, way, tmp_path):
    """The plugin is asked all at once; the backend has to be told how pictures are seen."""
    layout = json.loads((EXPORTED / name / "config.json").read_text())["image_layout"]
    aspects = {"all"} if way == "native" else {aspect_of(layout, case) for case in cases_of(name)}
    answered = sum(
        assert_equal(EXPORTED / name, EXPORTED / f"{name}.pt", way, tmp_path, aspect) for aspect in sorted(aspects)
    )
    assert answered == len(cases_of(name)) >= 9


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["slice9", "anyres-unpad"])
def test_two_ranks_say_it_too(name, way, tmp_path):
    """`--tensor-parallel-size 2`: the LLM is split, each rank holds the whole projector."""
    assert assert_equal(EXPORTED / name, EXPORTED / f"{name}.pt", way, tmp_path, "all", 2) == len(cases_of(name))


@pytest.mark.parametrize("name", ["saep", "anyres-unpad"])
def test_visual_tokens_that_were_computed_elsewhere(name, tmp_path):
    """`--enable-mm-embeds`: as many positions as there are tokens."""
    assert assert_equal(EXPORTED / name, EXPORTED / f"{name}.pt", "native", tmp_path, "embeddings") >= 8


def assert_equal(folder, reference, way, tmp_path, *options):
    """Answers token by token, and the lengths of the prompts -> how many there were."""
    answers, output = ask_offline(folder, reference, way, tmp_path, *options)
    assert answers, output[-4000:]
    assert (BACKEND in output) == (way == "backend")
    for answer in answers:
        assert answer["found"] == answer["expected"]
    return len(answers)


def ask_offline(folder, reference, way, tmp_path, *options):
    command = [sys.executable, HERE / "ask_vllm.py", folder, reference, *map(str, options)]
    done = subprocess.run(
        command, env=environment(way), cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"found"')], (
        done.stdout + done.stderr
    )


@pytest.mark.skipif("qwen2-slice" not in NAMES, reason="LLaVA-NeXT's environment made no folder")
def test_what_the_backend_cannot_tell_apart_is_refused_at_the_start(tmp_path):
    """A single picture, which is cut, and several, which are seen whole."""
    name = "qwen2-slice"
    answers, output = ask_offline(EXPORTED / name, EXPORTED / f"{name}.pt", "backend", tmp_path)
    assert not answers
    assert "which vLLM's transformers backend cannot tell apart. Install llava-projectors beside vLLM" in output


@pytest.fixture(scope="module")
def made_today(tmp_path_factory):
    """A folder that no LLaVA made -> it, and what transformers says on it in the environment of vLLM."""

    @functools.cache
    def make(kind):
        root = tmp_path_factory.mktemp(kind)
        reference, new = EXPORTED / "saep.pt", root / "reference.pt"
        source = EXPORTED / "saep" if kind == "merged" else EXPORTED.parent / "started" / "saep"
        option = ["--merge", root / "merged"] if kind == "merged" else []
        command = [sys.executable, HERE / "ask_transformers.py", source, reference, new, *option]
        done = subprocess.run(command, env=environment("backend"), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        before, after = ([case["answer_ids"] for case in compare.load_cases(path)] for path in (reference, new))
        assert before != after
        assert len({tuple(answer) for answer in after}) > 1
        return root / "merged" if kind == "merged" else source, new

    return make


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["merged", "new projector"])
def test_folders_of_todays_stack_are_what_transformers_says(made_today, kind, way, tmp_path):
    """A merged LoRA adapter with a trained projector, and what `--new-projector` wrote."""
    assert_equal(*made_today(kind), way, tmp_path)


def free_port():
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def server(command, way, log):
    """Runs `command --host … --port …` until it answers -> the address of its chats."""
    port = free_port()
    with log.open("w") as output:
        child = subprocess.Popen(
            [*command, "--host", HOST, "--port", str(port), "--dtype", "float32", "--trust-remote-code"],
            stdout=output, stderr=subprocess.STDOUT, env=environment(way), cwd=log.parent,
        )  # fmt: skip
        try:
            end = time.monotonic() + 300
            while True:
                assert child.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < end, log.read_text()[-4000:]
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5):
                    break
                time.sleep(1)
            yield f"http://{HOST}:{port}/v1/chat/completions"
        finally:
            child.terminate()
            child.wait(60)


def vllm_server(name, way, log):
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", EXPORTED / name,
        "--max-model-len", "1024", "--enforce-eager", "--max-num-seqs", "4", "--gpu-memory-utilization", "0.3",
        "--chat-template", EXPORTED / name / "chat_template_vllm.jinja", "--served-model-name", "llava",
    ]  # fmt: skip
    return server(command, way, log)


@pytest.mark.parametrize("name", [name for name in ("saep", "qwen2-anyres") if name in NAMES])
def test_transformers_own_server(name, tmp_path):
    """`transformers serve`, whose packages vLLM brings; it gives no token ids."""
    command = [Path(sys.executable).with_name("transformers"), "serve", EXPORTED / name, "--device", "cpu"]
    picked = [case for case in cases_of(name) if case["given_as"] == "pictures"][::4]
    with server(command, "backend", tmp_path / "log") as url:
        for case in picked:
            answer = ask(url, case, model=str(EXPORTED / name))
            assert answer["usage"]["prompt_tokens"] == len(case["logits"])
            assert answer["usage"]["completion_tokens"] == len(case["answer_ids"])
            if name == "saep":  # a random LLM writes bytes that are no UTF-8
                assert answer["choices"][0]["message"]["content"] == case["text"]


@pytest.mark.parametrize("task", ["any-to-any", "image-text-to-text"])
def test_pipelines(task, caplog):
    """Here, for the first wants torchvision, which vLLM brings."""
    import transformers

    case = cases_of("saep")[0]
    question = next(question for question in QUESTIONS if question in case["prompt"])
    content = [{"type": "image", "image": case["images"][0].convert("RGB")}, {"type": "text", "text": question}]
    transformers.logging.enable_propagation()
    pipe = transformers.pipeline(task, model=str(EXPORTED / "saep"), trust_remote_code=True, dtype="float32")
    settings = {"max_new_tokens": case["max_new_tokens"], "do_sample": False}
    (answer,) = pipe(text=[{"role": "user", "content": content}], return_full_text=False, generate_kwargs=settings)
    assert answer["generated_text"].strip() == case["text"]
    assert "is not supported" not in caplog.text


def encoded(image):
    data = io.BytesIO()
    image.convert("RGB").save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def ask(url, case, **settings):
    images = [encoded(image) for image in case["images"]]
    question = next(question for question in QUESTIONS if question in case["prompt"])
    content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}} for image in images]
    if case["given_as"] == "video":  # the frames of a video are named so, whatever their format
        content = [{"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{','.join(images)}"}}]
    return post(url, [*content, {"type": "text", "text": question}], case["max_new_tokens"], **settings)


def post(url, content, max_tokens, **settings):
    body = {
        "temperature": 0,
        "max_tokens": max_tokens,
        "messages": [{"role": "user", "content": content}],
        **(settings or {"model": "llava", "return_token_ids": True}),
    }
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name in ("saep", "slice9", "qwen2-anyres") if name in NAMES])
def test_the_openai_server(name, way, tmp_path):
    """Pictures of several sizes, two in a prompt, videos, each prompt twice, five at once, with vLLM's caches on."""
    cases = [case for case in cases_of(name) if case["given_as"] != "pad"]
    videos = [case for case in cases if case["given_as"] == "video"]
    picked = [*cases[:8], *videos, cases[-1], *videos, *cases[:8]]  # the last has two pictures
    with vllm_server(name, way, tmp_path / "log") as url, concurrent.futures.ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda case: ask(url, case), picked))
        if videos and way == "native":
            assert_mixed_is_refused(url, videos[0]["images"])
    assert (BACKEND in (tmp_path / "log").read_text()) == (way == "backend")
    for case, answer in zip(picked, answers):
        assert answer["choices"][0]["token_ids"] == case["answer_ids"]
        assert answer["usage"]["prompt_tokens"] == len(case["logits"])


def assert_mixed_is_refused(url, frames):
    """A picture beside a video, whose places in the prompt look alike."""
    picture, video = encoded(frames[0]), ",".join(map(encoded, frames))
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{video}"}},
    ]
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(url, content, 1)
    assert "a prompt takes pictures or videos" in caught.value.read().decode()
