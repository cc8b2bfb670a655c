"""On PYTHONPATH of a fork's process: lets CUDA-only packages be imported where there is no CUDA.

torchvision's CUDA wheel registers its operators in a library that a CPU torch cannot load; they are
declared, never called. `stand_in_for` takes packages that a fork imports and these checks never call;
every attribute of theirs is an empty class.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
import types
from pathlib import Path


class Empty(type):
    """A class whose attributes are such classes too: packages hold modules."""

    def __getattr__(cls, name):
        return empty_class(cls, name)


class StandIn(types.ModuleType):
    def __getattr__(self, name):
        return empty_class(self, name)


def empty_class(owner, name):
    if name.startswith("__"):
        raise AttributeError(name)
    value = Empty(name, (), {"__init__": lambda self, *args, **kwargs: None})
    setattr(owner, name, value)
    return value


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages):
        self.packages = set(packages)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = StandIn(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        pass


class TorchVision(importlib.abc.MetaPathFinder):
    """Declares torchvision's operators before it is imported, and gives an old module back its name."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            self.declare(importlib.machinery.PathFinder.find_spec(name))
        if name == "torchvision.transforms.functional_tensor":  # pytorchvideo asks for the old name
            import torchvision.transforms._functional_tensor as new

            return importlib.util.spec_from_file_location(name, new.__file__)
        return None

    def declare(self, spec):
        if spec is None or not spec.origin:
            return
        import torch

        text = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
        self.library = torch.library.Library("torchvision", "DEF")
        registered = re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"', text)
        for operator in sorted({*registered, *re.findall(r"torchvision::(\w+)", text)}):
            self.library.define(f"{operator}(Tensor a) -> Tensor")


sys.meta_path.insert(0, TorchVision())


def stand_in_for(packages):
    sys.meta_path.insert(0, StandIns(packages))
