"""What the class of a vision tower does, read off its code: which names its methods use, what they return.

Nothing is run here, because a tower is looked at before it has weights.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from typing import Any, Optional

from torch import nn


def names_in(tower_class: Any, method: str, seen: Optional[set[str]] = None) -> set[str]:
    """Attributes that a method of the class uses, and the methods that it calls, `feature_select` left out."""
    seen = set() if seen is None else seen
    seen.add(method)
    names: set[str] = set()
    for function in (vars(base)[method] for base in tower_class.__mro__ if method in vars(base)):
        names |= {*inspect.unwrap(function).__code__.co_names}
        if "super" not in names:
            break
    for name in names - seen - {"feature_select"}:
        if inspect.isfunction(inspect.getattr_static(tower_class, name, None)) and not hasattr(nn.Module, name):
            names |= names_in(tower_class, name, seen)
    return names


def mentions(tower_class: Any, word: str) -> bool:
    """Whether a method of the class, those of torch left out, names a keyword or attribute."""
    methods = [
        inspect.unwrap(value)
        for base in tower_class.__mro__
        if issubclass(base, nn.Module) and base is not nn.Module and not base.__module__.startswith("torch.")
        for value in vars(base).values()
        if inspect.isfunction(value)
    ]
    return any(word in str(method.__code__.co_consts) or word in method.__code__.co_names for method in methods)


def returns_tuple(function: Any) -> bool:
    """Whether any `return` of a function has a tuple."""
    return any(tuples_returned(function))


def tuples_returned(function: Any) -> list[bool]:
    """Of every `return` with a value, whether it is a tuple."""
    returned = [node.value for node in ast.walk(_parsed(function)) if isinstance(node, ast.Return)]
    return [isinstance(value, ast.Tuple) for value in returned if value is not None]


def dropped_layers(tower_class: Any) -> int:
    """Layers that are deleted and that the config still counts, `del ….layers[-1:]`.

    By `load_model`, or by the constructor of a class that it names (DenseConnector's and TinyLLaVABench's SigLIP).
    """
    load: Any = inspect.unwrap(getattr(tower_class, "load_model", None))  # type: ignore[arg-type]
    if not inspect.isfunction(load):
        return 0
    named = [load.__globals__.get(name) for name in load.__code__.co_names]
    constructors = [vars(value).get("__init__") for value in named if isinstance(value, type)]
    for function in (load, *constructors):
        found = re.search(r"del .*\.layers\[-(\d+):\]", _source(function))
        if found:
            return int(found[1])
    return 0


def further_models(tower: Any) -> list[str]:
    """Parts beside `vision_tower` whose weights the tower's forward uses: of one that joins SigLIP with a DINOv2.

    Those that hold weights, and of a tower that is not loaded those that loading will make.
    """
    tower_class: Any = type(tower)
    held = {name for name, value in (*vars(tower).items(), *tower.named_children()) if _has_weights(value)}
    awaited = {name for name in _built_by(tower_class, "load_model") if getattr(tower, name, None) is None}
    return sorted(names_in(tower_class, "forward") & (held | awaited) - {"vision_tower"})


def _has_weights(value: Any) -> bool:
    """Whether it is a module with parameters, or a list or dict of such, which keeps them out of the state dict."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(v, nn.Module) and next(v.parameters(), None) is not None for v in values)


def _built_by(tower_class: Any, method: str) -> set[str]:
    """Attributes to which a method of the class, or one that it calls, assigns what calls return, one or several."""
    functions = _own_functions(tower_class, {method, *names_in(tower_class, method)})
    nodes = [node for function in functions for node in ast.walk(_parsed(function))]
    targets = [
        target for node in nodes if isinstance(node, ast.Assign) and _calls(node.value) for target in node.targets
    ]
    parts = [part for target in targets for part in ast.walk(target)]
    return {part.attr for part in parts if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name)}


def _calls(value: ast.expr) -> bool:
    """Whether it is a call, or a list or dict that holds some."""
    is_one = isinstance(value, (ast.Call, ast.List, ast.Dict))
    return is_one and any(isinstance(part, ast.Call) for part in ast.walk(value))


def _own_functions(tower_class: Any, names: set[str]) -> list[Any]:
    """The functions of these names that the class and its bases define, `nn.Module`'s left out."""
    bases = [base for base in tower_class.__mro__ if base not in nn.Module.__mro__]
    found = [value for base in bases for name, value in vars(base).items() if name in names]
    return [value for value in found if inspect.isfunction(value)]


def _parsed(function: Any) -> ast.AST:
    return ast.parse(_source(function))


def _source(function: Any) -> str:
    try:
        return textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    except (OSError, TypeError):  # made at run time, or no source at hand
        return ""
