"""A tiny random model of a package's own LLM classes, built and run once, to see whether our projectors work in it.

`doctor` starts this module in a process of its own, in an empty folder: whatever the package does when it
is imported and run stays there. All that the package itself offers is used: its classes, the
`ModelArguments` of its training script, its `initialize_vision_modules` and its forward. Only the
weights are tiny and random: a CLIP tower and an LLM of two layers.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import traceback
import typing
from collections.abc import Iterator, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Optional, Union

import torch
from torch import nn

from llava_projectors import autoload, seam_names
from llava_projectors.commands.trial_siglip import SIGLIP, make_siglip, siglip_at_hand
from llava_projectors.files import ProjectorWeightsError
from llava_projectors.integration import seams
from llava_projectors.integration.tower import ReducedTower, find_tower, picture_size
from llava_projectors.projectors.base import Projector
from llava_projectors.spec import ProjectorSpecError

WORKS, CANNOT_WORK, NOT_CHECKED = "works", "cannot work", "not checked"

# Relative, so that builders that look for the name of OpenAI's model, or for a folder, are both content.
TOWER = "openai/clip-vit-large-patch14-336"
STOCK_TYPE = "linear"
WITH_SIGLIP = " with SigLIP"  # behind the name of a class
SECONDS = 600

IMAGE_TOKEN_INDEX = -200
TEXT_TOKENS = (1, 5, 6, 7)  # around one picture
TINY_LLM = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}

OUR_ERRORS = (ProjectorSpecError, ProjectorWeightsError, seams.PatchError)


@dataclasses.dataclass
class Trial:
    """What became of one class of a package, or of the package before any class could be built.

    Attributes:
        verdict: WORKS, CANNOT_WORK or NOT_CHECKED.
        reason: in one line; of what works, what was seen.
        model: the LLM class, if it came so far.
        foreign: the error is not one of ours, so the package may be unable by itself.
    """

    verdict: str
    reason: str
    model: Optional[str] = None
    foreign: bool = False


@dataclasses.dataclass
class Report:
    """What the process of a trial hands back.

    Attributes:
        seams: the state of every seam of the package.
        trials: one of each class, or a single one.
        armed: whether the package was patched when it had been imported, by the hook or by a call of its own.
        type_string: by which the projector is meant in the package; its own builder may keep the bare name.
    """

    seams: list[seams.SeamReport]
    trials: list[Trial]
    armed: bool = False
    type_string: str = ""


class CannotWork(Exception):
    """What was seen in the model rules our projectors out; the message is the reason."""


# In the process that asks


def run_trial(
    package: str,
    type_string: str,
    arguments: Mapping[str, str],
    folder: str,
    stock: bool = False,
    models: Optional[list[str]] = None,
) -> Report:
    """Try a package in a process of its own.

    Args:
        package: the name it is imported by, from where this process would import it.
        type_string: the projector to build.
        arguments: further settings of the package's training script.
        folder: an empty one.
        stock: without this plugin, to see what the package does by itself.
        models: what to try, as `Trial.model` has it; default all.
    """
    request: dict[str, Any] = {"package": package, "type_string": type_string, "arguments": dict(arguments)}
    request.update(stock=stock, models=models)
    environment = {**os.environ, "TRANSFORMERS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    if stock:
        environment[autoload.DISABLE_VARIABLE] = "1"
    command = [sys.executable, "-m", __name__, json.dumps(request)]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return Report([], [Trial(NOT_CHECKED, f"it took longer than {SECONDS} s")])
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Report([], [Trial(NOT_CHECKED, f"its process ended with status {done.returncode}: {last}")])
    return Report(
        [seams.SeamReport(s["seam"], s["state"], tuple(s["where"])) for s in answer["seams"]],
        [Trial(**trial) for trial in answer["trials"]],
        answer["armed"],
        answer["type_string"],
    )


# In the process of the trial


def note_first_errors(package: str) -> dict[str, BaseException]:
    """From now on, note which module of a package cannot be executed, and why: module -> error.

    LLaVA imports its models under a bare `except: pass` and fails later, on a name that is not there.
    """
    found: dict[str, BaseException] = {}
    execute = SourceFileLoader.exec_module

    def exec_module(loader: Any, module: ModuleType) -> None:
        try:
            execute(loader, module)
        except BaseException as error:
            is_of_package = module.__name__ == package or module.__name__.startswith(f"{package}.")
            if is_of_package and not any(error is known for known in found.values()):
                found.setdefault(module.__name__, error)
            raise

    SourceFileLoader.exec_module = exec_module  # type: ignore[assignment]
    return found


def cause_of(error: BaseException, first_errors: Mapping[str, BaseException]) -> BaseException:
    """The first error that was hidden, when the one given says only that a name is not there."""
    if type(error) is ImportError and "cannot import name" in str(error) and first_errors:
        return next(iter(first_errors.values()))
    return error


def try_package(
    package: str,
    type_string: str,
    arguments: Mapping[str, str],
    stock: bool = False,
    models: Optional[list[str]] = None,
) -> Report:
    """Import a package, build its classes with tiny parts, run each once; see `run_trial`."""
    first_errors = note_first_errors(package)
    try:
        importlib.import_module(package)
    except Exception as error:
        return Report([], [Trial(NOT_CHECKED, import_failure(package, cause_of(error, first_errors)))])
    armed = package in autoload.armed_packages()
    if stock:
        autoload.unpatch(package)  # it may have called patch() by itself
    elif not armed:
        autoload.patch(package)
    classes, failures = find_models(package)
    rows = seams.report(package)
    if not stock:
        missing = missing_seams(package, rows, failures)
        if missing is not None:
            return Report(rows, [missing])
        type_string = seams.our_name(package, type_string)
    with_siglip, with_clip = chosen_classes(classes, models)
    trials = [] if "vision_tower" in arguments else [*try_siglip(with_siglip, package, type_string, arguments, stock)]
    make_tower()
    trials += [try_model(cls, name, package, type_string, arguments, stock) for name, cls in with_clip.items()]
    if not trials:
        causes = [cause_of(error, first_errors) for error in failures.values()]
        reason = import_failure(package, causes[0]) if causes else f"{package} has no class that ends in ForCausalLM"
        trials = [Trial(NOT_CHECKED, reason)]
    return Report(seams.report(package), trials, armed, type_string)


def chosen_classes(
    classes: Mapping[str, type[nn.Module]], models: Optional[list[str]]
) -> tuple[dict[str, type[nn.Module]], dict[str, type[nn.Module]]]:
    """Of a package's classes those to try with SigLIP, and those to try with CLIP: all where no models are named."""
    if models is None:
        return dict(classes), dict(classes)
    with_siglip = {name: cls for name, cls in classes.items() if f"{name}{WITH_SIGLIP}" in models}
    return with_siglip, {name: cls for name, cls in classes.items() if name in models}


def import_failure(package: str, error: BaseException) -> str:
    """Why a package cannot be imported, with or without this plugin, and what to do."""
    shown = f"{package} cannot be imported, with or without this plugin: {one_line(error)}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = error.name.split(".")[0]
        if missing == package.split(".")[0] or missing in sys.modules:
            return f"{shown}: {missing} is there, without this module"
        return f"{shown}: install {missing}, as {package}'s own requirements say"
    if "is already used by a Transformers" in str(error):
        return f"{shown}: install a transformers before 4.36, as its own requirements say"
    return shown


def one_line(error: BaseException) -> str:
    """`Kind: message`, its first line, and the next ones where one ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    count = next((i for i, line in enumerate(lines, 1) if not line.endswith(":")), len(lines))
    message = " ".join(lines[:count]).rstrip(":")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def missing_seams(package: str, rows: list[seams.SeamReport], failures: Mapping[str, BaseException]) -> Optional[Trial]:
    """Why the package's layout rules our types out, if it does."""
    required = [row for row, seam in zip(rows, seams.SEAMS) if seam.required]
    absent = [row.seam for row in required if row.state == "missing"]
    if absent and failures:
        name, error = next(iter(failures.items()))
        return Trial(NOT_CHECKED, import_failure(name, error))
    if absent:
        return Trial(
            CANNOT_WORK,
            f"{package} has no {' and no '.join(absent)} of LLaVA's kind: its layout is another, which this plugin "
            "cannot patch",
        )
    wrong = seams.wrong_signatures(package)
    return Trial(CANNOT_WORK, f"{'; '.join(wrong)}: not as LLaVA's are called") if wrong else None


def find_models(package: str) -> tuple[dict[str, type[nn.Module]], dict[str, BaseException]]:
    """The package's LLM classes that see pictures by name, and the modules of such that could not be imported.

    Where two classes have one name, the names of their modules stand before it.
    """
    classes: list[type[nn.Module]] = []
    failures: dict[str, BaseException] = {}
    for name in modules_with_models(package):
        try:
            module = importlib.import_module(name)
        except Exception as error:
            failures[name] = error
            continue
        for value in vars(module).values():
            if is_model(value) and value.__module__ == name:
                classes.append(value)
    names = [cls.__name__ for cls in classes]
    doubled = {name for name in names if names.count(name) > 1}
    return {f"{c.__module__}.{c.__name__}" if c.__name__ in doubled else c.__name__: c for c in classes}, failures


def modules_with_models(package: str) -> Iterator[str]:
    """Names of the modules below a package that define a class ending in ForCausalLM with LLaVA's mixin."""
    pattern = re.compile(r"^class \w+ForCausalLM\([^)]*Meta\w*ForCausalLM", re.MULTILINE)
    for folder in importlib.import_module(package).__path__:
        for path in sorted(Path(folder).glob("**/*.py")):
            if pattern.search(path.read_text(encoding="utf-8", errors="replace")):
                parts = path.relative_to(folder).with_suffix("").parts
                yield ".".join((package, *parts))


def is_model(value: Any) -> bool:
    """Whether it is a class of transformers' kind whose inner model has vision modules."""
    return (
        isinstance(value, type)
        and issubclass(value, nn.Module)
        and value.__name__.endswith(seam_names.SEAM_CLASS_ENDING)
        and hasattr(value, "get_model")
        and getattr(value, "config_class", None) is not None
    )


def try_siglip(
    classes: Mapping[str, type[nn.Module]], package: str, type_string: str, arguments: Mapping[str, str], stock: bool
) -> Iterator[Trial]:
    """A trial with SigLIP of each class that runs with it and a projector of LLaVA's own."""
    if not classes:
        return
    cache = Path("hub").absolute()
    try:
        make_siglip(cache)
    except ImportError:  # of an older transformers, in which no package's SigLIP runs either
        return
    settings = {**arguments, "vision_tower": SIGLIP}
    with siglip_at_hand(package, cache):
        for name, cls in classes.items():
            try:
                run_once(build(cls, package, STOCK_TYPE, settings))
            except Exception:  # it knows no such tower, or cannot be run on tiny parts
                continue
            yield try_model(cls, f"{name}{WITH_SIGLIP}", package, type_string, settings, stock)


def try_model(
    cls: type[nn.Module], name: str, package: str, type_string: str, arguments: Mapping[str, str], stock: bool
) -> Trial:
    """Build and run one class; every error becomes a verdict."""
    try:
        model = build(cls, package, type_string, arguments)
        seen = run_once(model)
        if stock:
            return Trial(WORKS, "by itself", name)
        return Trial(WORKS, judge(model, seen), name)
    except CannotWork as reason:
        return Trial(CANNOT_WORK, str(reason), name)
    except OUR_ERRORS as error:
        return Trial(CANNOT_WORK, str(error), name)
    except Exception as error:
        traceback.print_exc()
        return Trial(CANNOT_WORK, f"{one_line(error)}{place_of(error)}", name, foreign=True)


def place_of(error: BaseException) -> str:
    """` (FILE:LINE)`, where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({'/'.join(Path(frames[-1].filename).parts[-3:])}:{frames[-1].lineno})" if frames else ""


def make_tower(channels: int = 32) -> None:
    """Write a CLIP vision checkpoint with the usual grid and depth, where the trial looks for it."""
    from llava_projectors.tiny.assets import make_vision_tower  # which imports transformers, as the package has by now

    make_vision_tower(Path(TOWER), channels, num_layers=24)


def build(cls: Any, package: str, type_string: str, arguments: Mapping[str, str]) -> Any:
    """A tiny model of the class, its vision modules initialised as for training; float32, on the CPU."""
    torch.manual_seed(0)
    model = cls(cls.config_class(**TINY_LLM))
    model.get_model().initialize_vision_modules(training_arguments(package, type_string, arguments))
    return model.float().train()


class _Anything(SimpleNamespace):
    """Arguments that answer None to what was not set."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def training_arguments(package: str, type_string: str, given: Mapping[str, str]) -> Any:
    """What the package's training script would hand to `initialize_vision_modules`."""
    own = own_arguments(package)
    arguments = _Anything() if own is None else own()
    settings: dict[str, Any] = {
        "vision_tower": TOWER,
        "mm_vision_tower": TOWER,
        "image_tower": TOWER,
        "mm_projector_type": type_string,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
    }
    for name, value in settings.items():
        if own is None or hasattr(arguments, name):
            setattr(arguments, name, value)
    for name, text in given.items():
        setattr(arguments, name, literal(text))
    return arguments


def literal(text: str) -> Any:
    """A number, None or True where the text is one; else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def own_arguments(package: str) -> Any:
    """The class `ModelArguments` of the package's training script, or None.

    The class alone is executed: the script imports much that is not needed here.
    """
    folders = [Path(folder) for folder in importlib.import_module(package).__path__]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    for path in sorted(files, key=lambda path: (path.name != "train.py", path)):
        text = path.read_text(encoding="utf-8", errors="replace")
        for node in ast.parse(text).body if "class ModelArguments" in text else ():
            if isinstance(node, ast.ClassDef) and node.name == "ModelArguments":
                names = {**vars(typing), **vars(dataclasses), "dataclasses": dataclasses, "__name__": __name__}
                try:
                    exec(compile(ast.Module([node], []), str(path), "exec"), names)
                    names["ModelArguments"]()
                except Exception:  # it needs more than a dataclass does
                    return None
                return names["ModelArguments"]
    return None


@dataclasses.dataclass
class Seen:
    """What passed through a model in one forward.

    Attributes:
        towers: what the tower returned, call by call.
        projectors: the positional arguments, the names of the keyword arguments and the output of each call.
        positions: of one sample at the LLM's first layer.
        loss: of the forward, gradients run back through it.
    """

    towers: list[Any] = dataclasses.field(default_factory=list)
    projectors: list[tuple[tuple[Any, ...], list[str], Any]] = dataclasses.field(default_factory=list)
    positions: int = 0
    loss: float = math.nan


def run_once(model: Any) -> Seen:
    """Forward and backward of two samples with a picture each, in the first form of pictures that the model takes.

    Raises:
        Exception: what the first form raised, when no form is taken.
    """
    first: Optional[Exception] = None
    for pictures in forms_of_pictures(find_tower(model)):
        model.zero_grad()
        try:
            return forward_and_backward(model, pictures)
        except OUR_ERRORS:
            raise
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def forms_of_pictures(tower: Any) -> Iterator[Union[torch.Tensor, list[torch.Tensor]]]:
    """Two pictures: one tensor, a list, samples of one each; of the processor's size, then of the embedding's."""
    for size in dict.fromkeys((picture_size(tower) or 336, embedded_size(tower))):
        if size is not None:
            pictures = torch.randn(2, 3, size, size)
            yield pictures
            yield list(pictures)
            yield pictures.unsqueeze(1)


def embedded_size(tower: Any) -> Optional[int]:
    """Side in pixels for which a CLIP tower has position embeddings; some forks resample them."""
    for module in tower.modules():
        table, patches = getattr(module, "position_embedding", None), getattr(module, "patch_embedding", None)
        if isinstance(table, nn.Embedding) and isinstance(patches, nn.Conv2d):
            return math.isqrt(table.num_embeddings) * patches.stride[0]
    return None


def forward_and_backward(model: Any, pictures: Any) -> Seen:
    """One step of training, less the update."""
    seen = Seen()
    tower, projector = find_tower(model), model.get_model().mm_projector
    handles = [
        tower.register_forward_hook(lambda _, inputs, output: seen.towers.append(output)),
        projector.register_forward_hook(
            lambda _, inputs, named, output: seen.projectors.append((inputs, sorted(named), output)), with_kwargs=True
        ),
        first_layer(model, tower).register_forward_pre_hook(
            lambda _, inputs, named: setattr(seen, "positions", (*inputs, *named.values())[0].shape[1]),
            with_kwargs=True,
        ),
    ]
    ids = torch.tensor([[TEXT_TOKENS[0], IMAGE_TOKEN_INDEX, *TEXT_TOKENS[1:]]] * len(pictures))
    labels = ids.masked_fill(ids < 0, -100)
    mask = torch.ones_like(ids, dtype=torch.bool)
    try:
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, images=pictures).loss
        loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    seen.loss = float(loss)
    return seen


def first_layer(model: Any, tower: nn.Module) -> nn.Module:
    """The first layer of the LLM, which is the first list of as many modules outside the tower."""
    inside = set(tower.modules())
    for module in model.modules():
        is_stack = isinstance(module, nn.ModuleList) and len(module) == TINY_LLM["num_hidden_layers"]
        if is_stack and module not in inside:
            layer: nn.Module = module[0]
            return layer
    raise LookupError(f"{type(model).__name__} has no list of layers")


def judge(model: Any, seen: Seen) -> str:
    """What is to be seen when a projector of ours works.

    Raises:
        CannotWork: it does not; the message says what was seen instead.
    """
    tower, projector = find_tower(model), model.get_model().mm_projector
    name = type(model).__name__
    if not isinstance(projector, Projector) or not isinstance(tower, ReducedTower):
        raise CannotWork(
            f"{name} built a {type(projector).__name__} and a {type(tower).__name__}, though --mm_projector_type asks "
            "for one of ours: it chooses its projector by another setting, or builds it in line"
        )
    check_features(name, seen)
    tokens = seen.positions - len(TEXT_TOKENS)
    if tokens != tower.num_patches:
        raise CannotWork(f"{name} gives its LLM {tokens} visual tokens, and the projector made {tower.num_patches}")
    check_gradients(name, seen.loss, [parameter.grad for parameter in projector.parameters()])
    before = (tower.patch_side or 0) ** 2
    return f"{before} -> {tokens} visual tokens at the first layer of its LLM, gradients in the projector"


def check_features(name: str, seen: Seen) -> None:
    """Raise CannotWork unless what the tower gives, and nothing else, goes to the projector of the model `name`."""
    for inputs, named, _ in seen.projectors:
        if len(inputs) != 1 or named:
            further = f"{len(inputs)} arguments" + (f" and {', '.join(named)}" if named else "")
            raise CannotWork(f"{name} calls its projector with {further}: ours takes the features alone")
    given, taken = joined_rows(seen.towers), joined_rows([inputs[0] for inputs, _, _ in seen.projectors])
    if given.shape != taken.shape:
        raise CannotWork(
            f"{name} calls its projector {len(seen.projectors)} times for {len(seen.towers)} calls of its vision "
            f"tower, on features {list(taken.shape)} where the tower gave {list(given.shape)}: it does more with it "
            "than turn patches into visual tokens"
        )
    if not torch.equal(given, taken):
        raise CannotWork(f"{name} changes the features on their way from its vision tower to its projector")


def check_gradients(name: str, loss: float, gradients: list[Optional[torch.Tensor]]) -> None:
    """Raise CannotWork unless the projector of the model `name` would learn."""
    if not math.isfinite(loss) or any(g is None or not g.isfinite().all() for g in gradients):
        raise CannotWork(f"{name} gives its projector no gradients; the loss is {loss}")
    if gradients and not any(g.any() for g in gradients if g is not None):
        raise CannotWork(f"{name} gives its projector gradients of zero")


def joined_rows(values: list[Any]) -> torch.Tensor:
    """The features [..., C] of several calls, joined to [rows, C]; of a pair its first."""
    parts = []
    for value in values:
        first = value[0] if isinstance(value, tuple) else value
        parts += first if isinstance(first, list) else [first]
    if not all(isinstance(part, torch.Tensor) for part in parts):
        return torch.empty(0)
    return torch.cat([part.flatten(0, -2) for part in parts])


def main() -> None:
    """Read a request, answer in one line of JSON on stdout; what the package prints goes to stderr."""
    request = json.loads(sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr):
        report = try_package(**request)
    print(json.dumps(dataclasses.asdict(report)))


if __name__ == "__main__":
    # As a module of its own name, not as __main__: what is compared by class is compared once.
    importlib.import_module(__spec__.name).main()
