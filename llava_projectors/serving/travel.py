"""The code that travels in an exported folder: this package's own modules, with their imports rewritten.

The files are found by following the imports of the projector's module, so there is no second copy
to keep. `registry_<type>.py` in the folder stands in for the registry; it knows the folder's one type.
Its name differs by type, because transformers keeps modules by folder name and file name.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Union

from llava_projectors.registry import projector_class

ROOT = "llava_projectors"
# What transformers looks for in a folder, and the files that it finds there.
ENTRIES = {
    f"{ROOT}.serving.modeling": "modeling_llava_projectors",
    f"{ROOT}.serving.image_processing": "image_processing_llava_projectors",
    f"{ROOT}.serving.processing": "processing_llava_projectors",
}
_WHOLE_MODEL = "modeling_llava_projectors.LlavaProjectorsForConditionalGeneration"
AUTO_MAP = {
    "AutoModel": "modeling_llava_projectors.LlavaProjectorsModel",
    "AutoModelForImageTextToText": _WHOLE_MODEL,
    "AutoModelForMultimodalLM": _WHOLE_MODEL,  # of transformers 5: pipeline("any-to-any"), `transformers serve`
}
# What `registry_<type>.py` stands in for.
STOOD_IN_FOR = (ROOT, f"{ROOT}.registry", f"{ROOT}.projectors.registration", f"{ROOT}.serving.travel")
# Beyond these a user's module needs something installed.
STANDARD = ("__future__", "collections", "dataclasses", "functools", "math", "typing")  # Python 3.9 has no list
AVAILABLE = {"torch", *getattr(sys, "stdlib_module_names", STANDARD)}

STAND_IN_SOURCE = '''"""Stands in for the registry of llava_projectors: it knows the one type of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from .{base} import Projector


def register_projector(name):
    """As in llava_projectors, without the registering."""

    def register(cls):
        cls.name = name
        return cls

    return register


def projector_class(type_string):
    """The class of the folder's projector."""
    from .{module} import {cls}

    return {cls}


def write_code(type_string, folder):
    """Copy the code to another folder."""
    for file in Path(__file__).parent.glob("[!_]*.py"):
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
'''

# For versions of transformers that copy only the files that the file which they look for itself names.
NAMED = """

TYPE_CHECKING = False
if TYPE_CHECKING:  # never; transformers looks for these lines
"""

ImportNode = Union[ast.Import, ast.ImportFrom]


class DoesNotTravel(ValueError):
    """The type's code needs more than its file, torch and this package, or cannot lie beside it; says what."""


def write_code(type_string: str, folder: Path) -> None:
    """Write the model's and the processors' files, the projector's module and what they import into `folder`.

    Raises:
        DoesNotTravel: the type is defined in a notebook, or its module imports other packages.
    """
    for name, source in travelling_code(type_string).items():
        (folder / name).write_text(source, encoding="utf-8")


def travelling_code(type_string: str) -> dict[str, str]:
    """File name -> source of all that travels for a type."""
    cls = projector_class(type_string)
    if Path(_source_path(cls.__module__)).suffix != ".py" or "." in cls.__qualname__:
        raise DoesNotTravel(f"{cls.__qualname__} is not defined at the top of a file")
    base = next(c for c in cls.__mro__ if c.__name__ == "Projector")
    stand_in = f"registry_{cls.name}"
    modules = _by_file(_closure([*ENTRIES, cls.__module__, base.__module__]))
    files = {name: _rewrite(module, stand_in) for name, module in modules.items()}
    files[f"{stand_in}.py"] = STAND_IN_SOURCE.format(
        base=_file_stem(base.__module__), module=_file_stem(cls.__module__), cls=cls.__name__
    )
    stems = sorted(name[:-3] for name in files)
    for entry in ENTRIES.values():
        others = [stem for stem in stems if stem != entry]
        files[f"{entry}.py"] += NAMED + "".join(f"    from .{stem} import __name__ as _\n" for stem in others)
    return files


def _by_file(modules: list[str]) -> dict[str, str]:
    """File name -> module."""
    found: dict[str, str] = {}
    for module in modules:
        other = found.setdefault(_file_name(module), module)
        if other != module:
            raise DoesNotTravel(f"{module} and {other} would be one file, {_file_name(module)}; rename yours")
    return found


def _closure(start: list[str]) -> list[str]:
    """The modules and all of this package that they import, but for those that `registry_<type>.py` stands in for."""
    found: list[str] = []
    waiting = list(start)
    while waiting:
        module = waiting.pop()
        if module in found or module in STOOD_IN_FOR:
            continue
        found.append(module)
        for node, targets in _imports(module):
            ours = [target for target in targets if target.split(".")[0] == ROOT]
            waiting.extend(ours)
            foreign = {target.split(".")[0] for target in targets if target not in ours} - AVAILABLE
            if foreign and module.split(".")[0] != ROOT:
                raise DoesNotTravel(f"{module} imports {', '.join(sorted(foreign))} (line {node.lineno})")
    return found


def _source_path(module: str) -> str:
    return getattr(sys.modules.get(module), "__file__", None) or _origin(module)


def _origin(module: str) -> str:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # `__main__` of an interactive session
        spec = None
    return (spec and spec.origin) or ""


def _imports(module: str) -> Iterator[tuple[ImportNode, list[str]]]:
    """The import statements of a module, each with the modules that it names."""
    for node in ast.walk(ast.parse(Path(_source_path(module)).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield node, [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise DoesNotTravel(f"{module} has a relative import (line {node.lineno})")
            yield node, [_imported_module(str(node.module), alias.name) for alias in node.names]


def _imported_module(module: str, name: str) -> str:
    """`from module import name` names a submodule, or something in the module."""
    submodule = f"{module}.{name}"
    return submodule if module.split(".")[0] == ROOT and _origin(submodule) else module


def _rewrite(module: str, stand_in: str) -> str:
    """The module's source with every import of this package made relative."""
    lines = Path(_source_path(module)).read_text(encoding="utf-8").splitlines(keepends=True)
    for node, targets in _imports(module):
        if all(target.split(".")[0] != ROOT for target in targets):
            continue
        if len(set(targets)) > 1:
            raise DoesNotTravel(f"{module} imports several modules in one statement (line {node.lineno})")
        stem = stand_in if targets[0] in STOOD_IN_FOR else _file_stem(targets[0])
        lines[node.lineno - 1] = _relative(lines[node.lineno - 1], node, targets[0], stem, module)
    notice = "# From llava_projectors, MIT licence.\n" if module.split(".")[0] == ROOT else ""
    return notice + "".join(lines)


def _relative(line: str, node: ImportNode, target: str, stem: str, module: str) -> str:
    """The line of an import of `target`, which lies beside it as `stem`; `module` is for messages."""
    if isinstance(node, ast.ImportFrom) and target == node.module:
        return line.replace(f"from {target} import", f"from .{stem} import", 1)
    name = node.names[0]
    if isinstance(node, ast.Import) and target != ROOT and not name.asname:
        raise DoesNotTravel(f"{module} imports {target} without a name for it (line {node.lineno})")
    bound = name.asname or (ROOT if isinstance(node, ast.Import) else name.name)
    renamed = "" if bound == stem else f" as {bound}"
    return line[: node.col_offset] + f"from . import {stem}{renamed}\n"


def _file_name(module: str) -> str:
    return f"{_file_stem(module)}.py"


def _file_stem(module: str) -> str:
    """`llava_projectors.projectors.tokenpacker` -> `tokenpacker`."""
    if module in ENTRIES:
        return ENTRIES[module]
    if module.split(".")[0] != ROOT:
        return module.split(".")[-1]
    inside = module[len(ROOT) + 1 :]
    return (inside[len("projectors.") :] if inside.startswith("projectors.") else inside).replace(".", "_")
