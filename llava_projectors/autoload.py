"""The lazy import hook: patches LLaVA's modules right after Python has executed them.

The start-up file of the wheel imports this in every interpreter of the environment, so
it uses the standard library only, costs a millisecond or two, and never raises.

Python holds its global import lock while it asks a finder for a module. A finder that imports
there waits for ever when another thread is importing the same thing. So this one imports
nothing, and what it needs to know of LLaVA stands in `seam_names`. The rest of this package is
imported when a module with such a name has been executed.
"""

from __future__ import annotations

import os
import sys

from llava_projectors.seam_names import holds_seam

TYPE_CHECKING = False  # `typing` itself would cost an idle interpreter milliseconds
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from llava_projectors.integration.seams import SeamReport

DISABLE_VARIABLE = "LLAVA_PROJECTORS_DISABLE"
PACKAGES_VARIABLE = "LLAVA_PROJECTORS_PACKAGES"
# Their classes load what `llava-projectors export` wrote; see `serving.hook`.
TRANSFORMERS_LLAVA = ("transformers.models.llava.modeling_llava", "transformers.models.llava.processing_llava")


class SeamFinder:
    """A meta-path finder that lets the other finders work and attaches the patches to what they find."""

    def __init__(self) -> None:
        self._prefixes: tuple[str, ...] = ()  # all of its state, so that no thread sees half of a change

    @property
    def packages(self) -> tuple[str, ...]:
        """The packages that are watched; with none, no module is."""
        return tuple(prefix[:-1] for prefix in self._prefixes)

    @packages.setter
    def packages(self, packages: tuple[str, ...]) -> None:
        self._prefixes = tuple(f"{package}." for package in packages)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that another finder has, with a patching loader, for modules of the packages; else None."""
        prefixes = self._prefixes
        if not prefixes or not (fullname.startswith(prefixes) or fullname in TRANSFORMERS_LLAVA):
            return None
        package = next((prefix[:-1] for prefix in prefixes if fullname.startswith(prefix)), "transformers")
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                try:
                    _patch_after_execution(spec, package)
                except Exception as error:
                    _report(fullname, package, error)
                return spec
        return None


def _report(module_name: str, package: str, error: Exception) -> None:
    """Say on stderr that a module stays unpatched, instead of raising.

    LLaVA imports its models under a bare `except: pass`, which would turn an error of ours into a
    baffling "cannot import name" elsewhere.
    """
    print(
        f"llava_projectors: cannot patch {module_name}, it stays as it is: {type(error).__name__}: {error}\n"
        f"llava_projectors: `llava-projectors doctor --package {package}` says more",
        file=sys.stderr,
    )


def _patch_after_execution(spec: ModuleSpec, package: str) -> None:
    """Shadow `exec_module` on this loader object, which keeps its type and its other methods."""
    loader = spec.loader
    # A namespace package executes nothing; a loader that several modules share has its shadow already.
    if loader is None or "exec_module" in vars(loader):
        return
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        try:
            if module.__name__ in TRANSFORMERS_LLAVA:
                from llava_projectors.serving import hook

                hook.install(module)
            elif package in _finder.packages and holds_seam(module):
                from llava_projectors.integration import seams

                seams.patch_module(package, module)
        except Exception as error:
            _report(module.__name__, package, error)

    loader.exec_module = exec_module  # type: ignore[method-assign]


_finder = SeamFinder()


def armed_packages() -> tuple[str, ...]:
    """The packages that the hook of this process is armed for."""
    return _finder.packages if _finder in sys.meta_path else ()


def arm(package: str) -> None:
    """Patch `package` as it is imported. Does nothing when it is armed already."""
    if package not in _finder.packages:
        _finder.packages = (*_finder.packages, package)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def is_disabled() -> bool:
    """Whether the environment switches the automatic hook off."""
    return os.environ.get(DISABLE_VARIABLE, "").strip().lower() not in ("", "0", "false", "no")


def arm_from_environment() -> None:
    """Arm for `llava` and the packages the environment names, and patch those already imported."""
    if is_disabled():
        return
    extra = os.environ.get(PACKAGES_VARIABLE, "").split(",")
    for package in ("llava", *(name.strip() for name in extra)):
        if not package or package in _finder.packages:
            continue
        arm(package)
        if package in sys.modules:
            from llava_projectors.integration import seams

            seams.patch(package)
    _hook_transformers()


def _hook_transformers() -> None:
    """Hook into what is imported of transformers' LLaVA, as long as any package is armed."""
    for module in [sys.modules[name] for name in TRANSFORMERS_LLAVA if name in sys.modules]:
        from llava_projectors.serving import hook

        (hook.install if armed_packages() else hook.uninstall)(module)


def patch(package: str = "llava") -> list[SeamReport]:
    """Patch LLaVA, or a fork of it that has another package name, now.

    Modules that are imported already are patched on the spot, the others as they are
    imported; a second call changes nothing. Only models whose `mm_projector_type` is one
    of ours behave differently afterwards.

    Args:
        package: the importable name, for example `llava` or `share4v`.

    Returns:
        What was done, one entry per seam.

    Raises:
        PatchError: no such package can be imported.

    Example:
        >>> import llava_projectors
        >>> reports = llava_projectors.patch("llava")
        >>> [report.seam for report in reports][:2]
        ['tower builder', 'projector builder']
    """
    from llava_projectors.integration import seams

    seams.check_importable(package)
    arm(package)
    _hook_transformers()
    return seams.patch(package)


def unpatch(package: str = "llava") -> None:
    """Give every patched attribute of `package` its original object back and disarm the hook for it.

    What somebody else has put over ours stays, and ours below it does nothing any more.

    Models that were built before keep working with the projector they have. The finder stays on the
    meta path, where it watches no package any more. Its removal would shift the finders behind it,
    and an import in another thread could skip one of them.

    Example:
        >>> import llava_projectors
        >>> llava_projectors.unpatch("llava")
        >>> _ = llava_projectors.patch("llava")
    """
    _finder.packages = tuple(p for p in _finder.packages if p != package)
    _hook_transformers()
    if "llava_projectors.integration.seams" in sys.modules:
        from llava_projectors.integration import seams

        seams.unpatch(package)
