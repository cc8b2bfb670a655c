"""Do no harm: a program or model that does not use our types is as it was, in every thread and every fork."""

import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import warm

from llava_projectors.integration.gate import Package, is_ours

IN_THREADS = """
import threading, time
failed = []

def run(script, delay):
    time.sleep(delay)
    try:
        exec(script, {"failed": failed})
    except BaseException as error:
        failed.append(f"{script}: {error!r}")

threads = [threading.Thread(target=run, args=arguments) for arguments in [%s]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(failed or "done")
"""


def in_threads(*scripts, before="", timeout=150):
    """Run scripts in threads of a fresh interpreter, each after its delay; returns the last line it prints."""
    script = before + IN_THREADS % ", ".join(map(repr, scripts))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("delay", [0.05, 0.3, 0.8])
def test_another_thread_may_import_what_a_seam_needs(delay):
    """Python holds its import lock while it asks a finder; importing torch there waited for ever."""
    assert in_threads(("import torch", 0), ("import llava.model.builder", delay)) == "done"


def test_nothing_waits_for_ever_where_torch_itself_fails():
    """Torch cannot be imported by two threads that enter it at different places, with or without this plugin."""
    in_threads(("import transformers", 0), ("import llava.model.builder", 0.3))


PATCH_AND_UNPATCH = """
import llava_projectors
for _ in range(20):
    llava_projectors.patch()
    llava_projectors.unpatch()
"""
# LLaVA itself cannot be entered by two threads at different places, so this one waits until it is imported.
RELOAD = """
import importlib, sys, time
while not failed and not hasattr(sys.modules.get("llava.model.builder"), "load_pretrained_model"):
    time.sleep(0.01)
from llava.model.multimodal_encoder import builder as towers
from llava.model.multimodal_projector import builder as projectors
for _ in range(20):
    importlib.reload(projectors)
    importlib.reload(towers)
"""


def test_twenty_rounds_of_importing_patching_and_unpatching_in_threads():
    threads = [("import llava.model.builder", 0), (RELOAD, 0), (PATCH_AND_UNPATCH, 0), (PATCH_AND_UNPATCH, 0.1)]
    assert in_threads(*threads, before="import sys, torch, transformers; sys.setswitchinterval(1e-5)") == "done"


def test_an_import_that_is_under_way_misses_no_finder():
    """Python goes through the meta path by index: when a finder is removed meanwhile, it skips the next one."""
    script = """
import importlib.machinery, sys
import llava_projectors

class Unpatching:
    @staticmethod
    def find_spec(*_):
        llava_projectors.unpatch()

llava_projectors.patch()
sys.meta_path.insert(sys.meta_path.index(importlib.machinery.PathFinder), Unpatching)
import colorsys
print("found")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=150)
    assert done.stdout == "found\n", done.stderr


def test_after_unpatch_nothing_of_ours_runs():
    """Not for transformers' own LLaVA either, whose classes load exported folders."""
    script = """
import sys
import llava_projectors
llava_projectors.unpatch()
import transformers.models.llava.modeling_llava
print("llava_projectors.serving.hook" in sys.modules)
"""
    done = warm.run([sys.executable, "-c", script])
    assert done.stdout == "False\n", done.stderr


FORK = {
    "__init__.py": "",
    "model/__init__.py": "",
    "model/projectors.py": """
        from torch import nn
        def build_vision_projector(config, delay_load=False):
            if config.mm_projector_type == 'resampler':
                return 'the resampler of the fork'
            if config.mm_projector_type in ('ldp', 'ldpv2'):
                return 'the ldpv2 of the fork'
            if config.mm_projector_type.startswith('mlp'):
                return nn.Linear(4, 8)
            raise ValueError(f'Unknown projector type: {config.mm_projector_type}')
        """,
    "model/towers.py": """
        class Tower:
            def __getattr__(self, name):
                raise RuntimeError(f'the tower was asked for {name}')
        def build_vision_tower(cfg, **kwargs):
            return Tower()
        """,
    "model/arch.py": """
        from .projectors import build_vision_projector
        from .towers import build_vision_tower
        class Base:
            def __init__(self, *args):
                pass
        class InheritedMetaModel(Base):
            def initialize_vision_modules(self, model_args, fsdp=None):
                self.called = (model_args, fsdp)
        class ForkMetaModel(Base):
            def __init__(self, config):
                self.config = config
                self.vision_tower = build_vision_tower(config)
                self.mm_projector = build_vision_projector(config)
            def initialize_vision_modules(self, model_args, fsdp=None):
                self.called = (model_args, fsdp)
            def __getattr__(self, name):
                raise RuntimeError(f'the model was asked for {name}')
        class SegMetaModel(Base):
            def initialize_seg_modules(self, model_args):
                self.called = model_args
        """,
}


@pytest.fixture
def fork(tmp_path):
    """Run a script beside a fork in which every attribute beyond the seams raises."""
    for name, source in FORK.items():
        path = tmp_path / "myfork" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))

    def run(script):
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        environment["LLAVA_PROJECTORS_PACKAGES"] = "myfork"
        preamble = """
        from types import SimpleNamespace
        from myfork.model import arch
        class Config:
            def __init__(self, projector_type):
                self.mm_projector_type, self.mm_hidden_size, self.hidden_size = projector_type, 4, 8
            def __getattr__(self, name):
                if name == 'mm_projector_options':  # a setting of ours
                    raise AttributeError(name)
                raise RuntimeError(f'the config was asked for {name}')
        """
        command = [sys.executable, "-c", textwrap.dedent(preamble) + textwrap.dedent(script)]
        done = warm.run(command, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().splitlines()

    return run


def test_a_model_of_another_type_meets_nothing_of_ours(fork):
    """Every attribute of config, model and tower beyond the seams raises, and the arguments arrive as they were."""
    out = fork("""
    config = Config('mlp2x_gelu')
    model = arch.ForkMetaModel(config)
    print(hasattr(arch.ForkMetaModel.__init__, '__wrapped__'), type(model.vision_tower).__name__)
    arguments = SimpleNamespace(mm_projector_type='mlp2x_gelu')
    model.initialize_vision_modules(arguments, fsdp='full')
    print(model.called[0] is arguments, model.called[1])
    try:
        arch.build_vision_projector()
    except TypeError as error:
        print(error)
    """)
    assert out == [
        "True Tower",
        "True full",
        "build_vision_projector() missing 1 required positional argument: 'config'",
    ]


def test_an_inherited_constructor_is_missing_and_never_patched(fork):
    """As NVlabs/VILA's LlavaMetaModel, which has no `__init__`: `object.__init__` was patched in its place."""
    out = fork("""
    print('__init__' in vars(arch.InheritedMetaModel), hasattr(arch.Base.__init__, '__wrapped__'))
    model = arch.InheritedMetaModel()
    """)
    assert out == ["False False"]


def test_what_adds_further_readers_is_a_seam(fork):
    """As VCoder's initialize_seg_modules: another type's model gets the very call."""
    out = fork("""
    print(hasattr(arch.SegMetaModel.initialize_seg_modules, '__wrapped__'))
    model = arch.SegMetaModel()
    model.config = Config('mlp2x_gelu')
    model.initialize_seg_modules('arguments')
    print(model.called)
    """)
    assert out == ["True", "arguments"]


def test_names_that_the_fork_knows_are_the_forks(fork):
    out = fork("""
    print(arch.build_vision_projector(Config('resampler')))
    print(arch.build_vision_projector(Config('ldpv2')))
    print(type(arch.build_vision_projector(Config('saep:layers=-1'))).__name__)
    print(type(arch.build_vision_projector(Config('llava_projectors.resampler:num_queries=4'))).__name__)
    """)
    assert out == ["the resampler of the fork", "the ldpv2 of the fork", "SAEP", "Resampler"]


def test_the_gate_reads_one_setting():
    def builder(config):
        return {"saep": 1}.get(config.mm_projector_type) or config.mm_projector_type == "tokenpacker"

    class Config:
        def __init__(self, value):
            self.mm_projector_type = value

        def __getattr__(self, name):
            raise RuntimeError(name)

    stock, knowing = Package("llava", lambda: None), Package("fork", lambda: None, [builder])
    for value, ours in (("saep", True), ("saep:stride=3", True), ("mlp2x_gelu", False), (None, False), (3, False)):
        assert is_ours(Config(value), stock) is ours
    assert not is_ours(Config("tokenpacker:scale_factor=3"), knowing)
    assert is_ours(Config("llava_projectors.tokenpacker"), knowing)
    assert is_ours(Config("avg_pool"), knowing)
    assert not is_ours(SimpleNamespace(), stock)
    assert not is_ours({"mm_projector_type": "saep"}, stock)
    assert not is_ours(None, stock)
