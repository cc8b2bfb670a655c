"""Do no harm: a program or model that does not use our types is as it was, in every thread and every fork."""

import gc
import inspect
import os
import random
import subprocess
import sys
import textwrap
import threading
import weakref
from types import SimpleNamespace

import numpy
import pytest
import torch
import warm

from llava_projectors.integration import gate
from llava_projectors.integration.gate import Package, is_ours, our_name

IN_THREADS = """
import sys, threading, time
failed = []

def run(script, awaited):
    while awaited not in sys.modules and not failed:
        time.sleep(0.001)
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
    """Run scripts in threads of a fresh interpreter, each once a module is there; returns the last line it prints."""
    script = before + IN_THREADS % ", ".join(map(repr, scripts))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("awaited", ["torch", "torch.nn", "torch.distributed"])
def test_another_thread_may_import_what_a_seam_needs(awaited):
    """Python holds its import lock while it asks a finder; importing torch there waited for ever."""
    assert in_threads(("import torch", "sys"), ("import llava.model.builder", awaited)) == "done"


def test_nothing_waits_for_ever_where_torch_itself_fails():
    """Torch cannot be imported by two threads that enter it at different places, with or without this plugin."""
    ended = in_threads(("import transformers", "sys"), ("import llava.model.builder", "torch"))
    assert ended.startswith(("done", "["))
    assert "llava_projectors" not in ended  # what fails is theirs


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
    scripts = ("import llava.model.builder", RELOAD, PATCH_AND_UNPATCH)
    threads = [*((script, "sys") for script in scripts), (PATCH_AND_UNPATCH, "llava.model")]
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


def package_of(source):
    """A package whose projector builder is defined by this source."""
    names = {}
    exec(HEAD + textwrap.dedent(source), names)
    package = Package("fork", lambda: None)
    package.add_builder(names["build_vision_projector"])
    return package


HEAD = """
import enum, functools, random, re
from types import SimpleNamespace
import numpy
import torch
from torch import nn
def build(config):
    return nn.Linear(config.mm_hidden_size, config.hidden_size)
def unknown(name):
    raise ValueError(f"Unknown projector type: {name}")
"""
LLAVAS = """
def build_vision_projector(config, delay_load=False, **kwargs):
    if config.mm_projector_type == "linear":
        return build(config)
    unknown(config.mm_projector_type)
"""
# What a builder is like -> its source, and the types that are its own.
BUILDERS = {
    "LLaVA's": (LLAVAS, []),
    "never reads the type, as TokenPacker's": ("def build_vision_projector(config): return build(config)", "all"),
    "never reads the type and needs a setting": (
        "def build_vision_projector(config): return nn.Linear(config.hidden_size, config.scale_factor)", "all"),
    "a default for unknown names": (
        """
        def build_vision_projector(config):
            return nn.Identity() if config.mm_projector_type == "linear" else build(config)
        """, "all"),
    "a default that needs a setting": (
        """
        def build_vision_projector(config):
            return build(config) if config.mm_projector_type == "linear" else nn.Linear(config.width, 1)
        """, "all"),
    "a default that is loaded from a folder of that name": (
        """
        def build_vision_projector(config):
            return build(config) if config.mm_projector_type == "linear" else open("/no/" + config.mm_projector_type)
        """, "all"),
    "a table elsewhere": (
        """
        TABLE = SimpleNamespace(kinds={"linear": build, "resampler": build})
        def build_vision_projector(config): return TABLE.kinds[config.mm_projector_type](config)
        """, ["resampler"]),
    "a table, asked with get, and nothing built": (
        """
        def build_vision_projector(config):
            made = {"linear": build, "resampler": build}.get(config.mm_projector_type)
            return made and made(config)
        """, ["resampler"]),
    "a helper with startswith": (
        """
        def is_token(name): return name.startswith("tokenp")
        def build_vision_projector(config):
            if config.mm_projector_type in ("linear",) or is_token(config.mm_projector_type): return build(config)
            unknown(config.mm_projector_type)
        """, ["tokenpacker"]),
    "a regular expression, with a number behind the name": (
        """
        def build_vision_projector(config):
            if config.mm_projector_type == "linear" or re.fullmatch(r"saep:stride=\\d", config.mm_projector_type):
                return build(config)
            unknown(config.mm_projector_type)
        """, ["saep:stride=3"]),
    "lower and strip before it compares": (
        """
        def build_vision_projector(config):
            kind = config.mm_projector_type.strip().lower().replace("_", "")
            if kind in ("linear", "avgpool"): return build(config)
            unknown(config.mm_projector_type)
        """, ["avg_pool"]),
    "an enumeration": (
        """
        class Kind(enum.Enum):
            LINEAR, DELTA = "linear", "delta"
        def build_vision_projector(config): return Kind(config.mm_projector_type) and build(config)
        """, ["delta"]),
    "attributes of a class": (
        """
        class Kinds:
            linear = stf = build
        def build_vision_projector(config): return getattr(Kinds, config.mm_projector_type)(config)
        """, ["stf"]),
    "match": (
        """
        def build_vision_projector(config):
            match config.mm_projector_type:
                case "linear" | "resampler": return build(config)
                case other: unknown(other)
        """, ["resampler"]),
    "a registry with a decorator, a type that needs a setting": (
        """
        KINDS = {"linear": build}
        def register(name): return lambda f: KINDS.setdefault(name, f)
        @register("tokenpacker")
        def packer(config): return nn.Linear(config.hidden_size, config.scale_factor)
        def build_vision_projector(config):
            try: return KINDS[config.mm_projector_type](config)
            except Exception as error: raise ValueError(f"cannot build {config.mm_projector_type}") from error
        """, ["tokenpacker"]),
    "a type that ends in nothing where a setting is missing": (
        """
        def build_vision_projector(config):
            if config.mm_projector_type in ("linear", "delta"):
                try: return nn.Linear(config.hidden_size, 8 if config.mm_projector_type == "linear" else config.width)
                except AttributeError: return None
        """, ["delta"]),
    "a type that computes on real numbers": (
        """
        def build_vision_projector(config):
            if config.mm_projector_type == "stf": return nn.Linear(1, int(torch.ones(1).item()))
            if config.mm_projector_type == "linear": return build(config)
            unknown(config.mm_projector_type)
        """, ["stf"]),
    "a type that is refused elsewhere, for another reason": (
        """
        def build_vision_projector(config):
            kind = config.mm_projector_type
            if kind == "linear": return build(config)
            if kind == "delta": raise ValueError(f"{kind} needs a GPU")
            unknown(kind)
        """, ["delta"]),
    "it says no without a name": (
        """
        def build_vision_projector(config):
            if config.mm_projector_type == "linear": return build(config)
            raise NotImplementedError
        """, "all"),
    "it wants an argument more": ("def build_vision_projector(config, tower): return build(config)", "all"),
    "it ends the program": ("def build_vision_projector(config): raise SystemExit(config.mm_projector_type)", "all"),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILDERS)
def test_what_a_builder_builds_is_its_own(name, monkeypatch):
    if name == "match" and sys.version_info < (3, 10):
        pytest.skip("Python 3.9 has no match")
    said = []
    monkeypatch.setattr(gate, "log", said.append)
    source, own = BUILDERS[name]
    package = package_of(source)
    asked = ["saep", "saep:stride=3", "tokenpacker", "avg_pool", "resampler", "delta", "stf"]
    kept = [one for one in asked if not is_ours(SimpleNamespace(mm_projector_type=one), package)]
    assert kept == (asked if own == "all" else own)
    for one in asked:
        assert is_ours(SimpleNamespace(mm_projector_type=f" llava_projectors.{one}"), package)
        assert our_name(one, package) == (f"llava_projectors.{one}" if one in kept else one)
    for one in kept:
        assert package.left(f" {one}").endswith(f" llava_projectors.{one}")
    assert len(said) == len(kept)  # one line each, however often it is asked
    for line, one in zip(said, kept):
        assert line.startswith(f"{one!r} is left to fork's own projector builder, which ")
        assert line.endswith(f"; for llava_projectors' own pass --mm_projector_type llava_projectors.{one}")


def test_a_package_without_a_projector_builder_keeps_every_name():
    package = Package("fork", lambda: None)
    assert not is_ours(SimpleNamespace(mm_projector_type="saep"), package)
    assert is_ours(SimpleNamespace(mm_projector_type="llava_projectors.saep"), package)


def test_asking_leaves_no_trace(capfd):
    """No number is drawn, nothing is printed, nothing of the size of a real projector is made."""
    package = package_of("""
    def build_vision_projector(config):
        print("building", config.mm_projector_type)
        made = build(config)
        made.bias.data = torch.from_numpy(numpy.random.rand(4096) * random.random()) * torch.rand(1, device="cpu")
        unknown(config.mm_projector_type)
    """)
    state = (torch.get_rng_state(), random.getstate(), numpy.random.get_state())
    assert not is_ours(SimpleNamespace(mm_projector_type="saep"), package)  # it refuses "linear" alike
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert all(numpy.array_equal(a, b) for a, b in zip(numpy.random.get_state(), state[2]))
    assert capfd.readouterr().out == ""


def test_threads_that_ask_print_and_draw_as_before(capfd):
    package = package_of(LLAVAS.replace("if config", "print('asked')\n    if config", 1))
    stdout, answers = sys.stdout, []

    def ask(number):
        sys.stdout.write(f"<thread {number}>")
        answers.append(is_ours(SimpleNamespace(mm_projector_type=f"saep:kernel_size={number}"), package))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sys.stdout is stdout
    assert answers == [True] * 20
    out = capfd.readouterr().out
    assert all(f"<thread {number}>" in out for number in range(20))


def test_a_builder_that_was_reloaded_is_forgotten():
    import importlib

    from llava.model.multimodal_projector import builder

    from llava_projectors.integration import seams

    before = weakref.ref(inspect.unwrap(builder.build_vision_projector))
    assert is_ours(SimpleNamespace(mm_projector_type="saep"), seams._packages["llava"])
    importlib.reload(builder)
    gc.collect()
    assert before() is None
    assert len(seams._packages["llava"].projector_builders) == 1
    assert is_ours(SimpleNamespace(mm_projector_type="saep"), seams._packages["llava"])


def test_a_builder_that_hands_on_to_another_modules(fork, tmp_path):
    """The other one is behind our gate as well."""
    (tmp_path / "myfork" / "model" / "first.py").write_text(
        "from . import projectors\n"
        "def build_image_projector(config):\n    return projectors.build_vision_projector(config)\n"
    )
    out = fork("""
    from myfork.model.first import build_image_projector
    print(build_image_projector(Config('resampler')))
    print(type(build_image_projector(Config('saep:layers=-1'))).__name__)
    """)
    assert out == ["the resampler of the fork", "SAEP"]


def test_a_type_that_was_left_to_a_fork_and_that_it_refuses(fork):
    out = fork("""
    try:
        arch.build_vision_projector(Config('resampler:num_queries=4'))
    except ValueError as error:
        print(error)
    """)
    assert out == [
        "Unknown projector type: resampler:num_queries=4. 'resampler:num_queries=4' is left to myfork's own projector "
        "builder, which builds a str; for llava_projectors' own pass --mm_projector_type "
        "llava_projectors.resampler:num_queries=4"
    ]


def test_the_gate_reads_one_setting():
    class Config:
        def __init__(self, value):
            self.mm_projector_type = value

        def __getattr__(self, name):
            raise RuntimeError(name)

    stock = package_of(LLAVAS)
    for value, ours in (("saep", True), ("saep:stride=3", True), ("mlp2x_gelu", False), (None, False), (3, False)):
        assert is_ours(Config(value), stock) is ours
    assert not is_ours(SimpleNamespace(), stock)
    assert not is_ours({"mm_projector_type": "saep"}, stock)
    assert not is_ours(None, stock)
