"""Tiny models in LLaVA's formats, made once a session, and runs of LLaVA's own training script on them."""

import inspect
import logging
import os
import sys
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
import warm
from filelock import FileLock
from packaging.version import Version

os.environ["TRANSFORMERS_OFFLINE"] = "1"  # a test that reaches for a hub is wrong
DEVICE = os.environ.get("LLAVA_PROJECTORS_TEST_DEVICE", "cpu")  # tests/gpu/run.py sets it to cuda
if DEVICE == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # results are compared bit for bit
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which torch may do first
else:  # among several cards, the trainer would split batches
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

from llava_projectors.tiny import assets, train  # noqa: E402

# Tests that run side by side share the cores: with more threads than cores, torch takes several times as long.
# pytest-xdist's controller imports this file too, and its workers inherit OMP_NUM_THREADS from it: for all cores.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
SHARE = max(1, (os.cpu_count() or 1) // WORKERS)
THREADS = min(SHARE, int(os.environ.get("OMP_NUM_THREADS", SHARE)))
os.environ["OMP_NUM_THREADS"] = str(THREADS)
torch.set_num_threads(THREADS)


def pytest_configure():
    if DEVICE not in ("cpu", "cuda"):
        raise pytest.UsageError(f"LLAVA_PROJECTORS_TEST_DEVICE={DEVICE} must be cpu or cuda")
    if DEVICE == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError(f"LLAVA_PROJECTORS_TEST_DEVICE=cuda, but torch {torch.__version__} sees no GPU")
        torch.backends.cudnn.allow_tf32 = False  # values in float32 are compared with float64


# They need another transformers, in an environment of its own: `make test-next`.
collect_ignore = [] if "LLAVA_NEXT_PACKAGE" in os.environ else ["next"]

# These files take minutes, because their tests start many processes.
LONG = ("test_examples", "test_slice_training", "test_deepspeed", "test_spatial", "test_doctor", "test_serving")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Long files first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session")
def device():
    """Where the tests marked `cuda` run: all of them on a CPU too, at tiny sizes, but for what takes `gpu`."""
    return DEVICE


@pytest.fixture(scope="session")
def gpu(device):
    """Skips where no test runs on a GPU."""
    if device == "cpu":
        pytest.skip("needs a GPU: LLAVA_PROJECTORS_TEST_DEVICE is cpu here, tests/gpu/run.py sets it to cuda")
    return device


def skip_unless_llava_trains():
    if Version(transformers.__version__) < Version("4.36"):
        pytest.skip("LLaVA's training script passes attn_implementation, which transformers knows from 4.36 on")


@pytest.fixture(scope="session")
def can_train():
    """Skips where the installed LLaVA's script itself cannot run."""
    skip_unless_llava_trains()


@dataclass
class Tiny:
    root: Path
    tower: Path
    # With a quarter of the patches: LLaVA's script holds the tower in float16, which many CPUs only emulate.
    coarse_tower: Path
    llm: Path
    pretrain_data: Path
    finetune_data: Path
    images: Path

    def pretrain(self, name, projector_type, environment=None, **arguments):
        """Stage 1 in a subprocess; returns the folder with `mm_projector.bin` and the output."""
        options = train.pretrain_arguments(self.pretrain_data, self.images, max_steps=3, **arguments)
        return self.run(name, projector_type, environment, options)

    def finetune(self, name, projector_type, adapter=None, environment=None, **arguments):
        """Stage 2 in a subprocess; returns the checkpoint's folder and the output."""
        options = train.finetune_arguments(self.finetune_data, self.images, adapter, **{"max_steps": 3, **arguments})
        return self.run(name, projector_type, environment, options)

    def output(self, name):
        return self.root / "runs" / f"llava-{name}"

    def run(self, name, projector_type, environment, options):
        skip_unless_llava_trains()
        output = self.output(name)
        command = train.training_command(output, self.llm, self.coarse_tower, projector_type, **options)
        return output, self.execute(command, self.root / "runs" / f"{name}.log", environment)

    @staticmethod
    def execute(command, log, environment=None):
        """Run a command of LLaVA's script to its end; returns the output, which is in the log too."""
        if DEVICE == "cuda":  # which does not work in a fork
            return train.run(command, log, environment)
        log.parent.mkdir(exist_ok=True)
        return train.output_of(log, warm.call(command, log, log, env={**os.environ, **(environment or {})}))


@pytest.fixture
def messages():
    """What is logged for the user to read, line by line."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("llava_projectors")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)


@pytest.fixture
def installed_distribution(tmp_path):
    """Make a folder that, on PYTHONPATH, is an installed distribution with one module and entry points of ours."""

    def make(name, module, source, *entry_points):
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        metadata = tmp_path / f"{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text("\n".join(["[llava_projectors]", *entry_points, ""]))
        return tmp_path

    return make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """One folder for all processes that run tests."""
    base = tmp_path_factory.getbasetemp()
    shared = os.environ.get("LLAVA_PROJECTORS_TEST_ROOT")  # by tests that are started one by one: tests/gpu/run.py
    root = Path(shared) if shared else (base if WORKERS == 1 else base.parent) / "tiny"
    made = root / "made"
    with FileLock(f"{root}.lock"):
        if not made.exists():
            assets.make_dataset(root / "data", num_scenes=2)
            assets.make_vision_tower(root / "clip")
            assets.make_vision_tower(root / "clip-coarse", patch_size=28)
            assets.make_llm(root / "vicuna")
            made.touch()
    return Tiny(
        root,
        root / "clip",
        root / "clip-coarse",
        root / "vicuna",
        root / "data" / "pretrain.json",
        root / "data" / "finetune.json",
        root / "data" / "images",
    )


@dataclass
class Trained:
    adapter: Path
    checkpoint: Path
    output: str


@pytest.fixture(scope="session")
def trained(tiny):
    """type string -> its pretrained adapter and its checkpoint, over-fitted in 60 steps; trained once."""

    @cache
    def get(projector_type):
        name = projector_type.replace(":", "-").replace("=", "-")
        outputs = tiny.root / f"{name}.txt"
        with FileLock(f"{outputs}.lock"):
            if not outputs.exists():
                adapter, first = tiny.pretrain(f"{name}-pretrain", projector_type)
                _, second = tiny.finetune(
                    name, projector_type, adapter / "mm_projector.bin", max_steps=60, learning_rate=4e-3
                )
                outputs.write_text(first + second)
        return Trained(tiny.output(f"{name}-pretrain"), tiny.output(name), outputs.read_text())

    return get


@pytest.fixture(scope="session")
def can_generate():
    """Skips where the installed LLaVA itself cannot generate."""
    from llava.model import LlavaLlamaForCausalLM

    parameters = inspect.signature(LlavaLlamaForCausalLM.forward).parameters
    if Version(transformers.__version__) >= Version("4.38") and "cache_position" not in parameters:
        pytest.skip("transformers passes cache_position from 4.38 on, which this LLaVA's forward does not take")


@pytest.fixture(scope="session")
def model_args(tiny):
    """The real ModelArguments of LLaVA's script, with the tiny vision tower."""
    from llava.train.train import ModelArguments

    def make(projector_type, **arguments):
        defaults = {"vision_tower": str(tiny.tower), "mm_vision_select_layer": -2}
        return ModelArguments(mm_projector_type=projector_type, **{**defaults, **arguments})

    return make


@pytest.fixture(scope="session")
def build_model(tiny, model_args):
    """type string -> a LLaVA model as its training script builds it, on random weights."""
    from llava.model import LlavaLlamaForCausalLM

    def make(projector_type):
        torch.manual_seed(0)
        model = LlavaLlamaForCausalLM.from_pretrained(tiny.llm)
        model.get_model().initialize_vision_modules(model_args(projector_type))
        return model.eval()

    return make


@pytest.fixture
def llava_train(tiny, can_train, tmp_path, monkeypatch):
    """Run LLaVA's `train()` in this process, for errors that come before the first step."""
    from accelerate.state import AcceleratorState
    from llava import conversation
    from llava.train import train as script

    # The trainer's arguments set it for the whole process, and for all that it starts.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")

    def run(projector_type, **arguments):
        data = train.finetune_arguments(tiny.finetune_data, tiny.images, None, max_steps=1)
        llm = arguments.pop("llm", tiny.llm)
        command = train.training_command(
            tmp_path / "llava-x", llm, tiny.coarse_tower, projector_type, **{**data, **arguments}
        )
        monkeypatch.setattr(sys, "argv", command[2:])
        monkeypatch.setattr(conversation, "default_conversation", conversation.default_conversation)
        script.train()

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
