"""The house: imports run one way, public functions show how they are used, the wheel holds what users run."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest
from test_spec import BUILT_IN

import llava_projectors

ROOT = Path(llava_projectors.__file__).parent
# What a part of the package may import of the others, besides itself.
MAY_IMPORT = {
    "seam_names": set(),
    "spec": set(),
    "slicing": {"spec"},
    "files": {"spec"},
    "projectors": {"spec"},
    "registry": {"projectors", "spec"},
    "integration": {"registry", "projectors", "slicing", "files", "spec", "seam_names", ""},
    "autoload": {"integration", "seam_names", "serving"},
    "serving": {"registry", "slicing"},
    "export": {"registry", "projectors", "integration", "files", "serving", "slicing"},
    "tiny": set(),
}
# Whatever a command needs: it runs beside training, and nothing imports it.
MAY_IMPORT["commands"] = {*MAY_IMPORT, "commands"}


def imports_of(path):
    """Dotted names below the package that a file imports, `from x import module` resolved."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] == "llava_projectors":
                yield name.partition(".")[2]


def part_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def is_module(name):
    return (ROOT / name).is_dir() or (ROOT / f"{name}.py").exists()


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_run_one_way(part):
    for path in (p for p in ROOT.rglob("*.py") if part_of(p) == part):
        for name in imports_of(path):
            top = name.partition(".")[0]
            if top and not is_module(top):
                top = ""  # a name of the package itself
            assert top == part or top in MAY_IMPORT[part] or top == "", f"{path.name} imports {name}"


def test_every_part_of_the_house_has_a_floor():
    assert {part_of(path) for path in ROOT.rglob("*.py")} == {*MAY_IMPORT, "__init__", "__main__"}


@pytest.mark.parametrize("part", ["integration", "registry"])
def test_nothing_above_the_projectors_names_one(part):
    for path in (p for p in ROOT.rglob("*.py") if part_of(p) == part):
        assert not {name.split(".")[1] for name in imports_of(path) if name.count(".")} & {*BUILT_IN}, path


def test_projectors_know_no_llava():
    for path in (ROOT / "projectors").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None) or node.names[0].name
                assert module.split(".")[0] not in ("llava", "transformers", "peft", "deepspeed"), path


@pytest.mark.parametrize(
    "folder", [ROOT, ROOT.parent / "benchmarks", ROOT.parent / "tests"], ids=lambda path: path.name
)
def test_no_file_is_unpickled_with_its_classes(folder):
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in map(ast.unparse, node.keywords), f"{path}, line {node.lineno}"


@pytest.mark.parametrize("name", [name for name in llava_projectors.__all__ if not name.endswith("Error")])
def test_what_is_public_shows_how_it_is_used(name):
    assert ">>> " in getattr(llava_projectors, name).__doc__


@pytest.mark.parametrize("path", [p for p in ROOT.rglob("*.py") if ">>> " in p.read_text()], ids=lambda path: path.stem)
def test_examples_in_docstrings(path):
    name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted > 0
    assert failed == 0
