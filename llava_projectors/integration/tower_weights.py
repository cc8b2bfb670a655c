"""No vision tower on random weights in silence: what transformers reports of loading one is looked at.

LLaVA makes a CLIP of every folder that exists, transformers only warns about weights that are not
there, and training runs. Only the loading call gives the report, and LLaVA's towers make that call
themselves. So `PreTrainedModel.from_pretrained` is watched while a tower of ours is loaded, in that
thread, and is itself again afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn

from llava_projectors.files import ProjectorWeightsError
from llava_projectors.integration.truncated_encoder import keeping


@dataclass(frozen=True)
class LoadingReport:
    """What transformers reports of loading a model.

    Attributes:
        source: folder or hub name.
        model: its class.
        without_weights: parameters that the source lacks, or has in another shape.
    """

    source: str
    model: str
    without_weights: list[nn.Parameter]


_reports: ContextVar[Optional[list[LoadingReport]]] = ContextVar("reports", default=None)
_lock = threading.Lock()
_watchers = 0
_original: Any = None
_wrapper: Any = None


@contextmanager
def watched() -> Iterator[list[LoadingReport]]:
    """Within it, in this thread, models that transformers loads with weights missing are reported in the list."""
    reports: list[LoadingReport] = []
    token = _reports.set(reports)
    _install()
    try:
        yield reports
    finally:
        _uninstall()
        _reports.reset(token)


def _install() -> None:
    global _watchers, _original, _wrapper
    from transformers import PreTrainedModel

    with _lock:
        _watchers += 1
        if _watchers == 1:
            _original = vars(PreTrainedModel)["from_pretrained"]
            _wrapper = classmethod(_reporting(_original.__func__))
            PreTrainedModel.from_pretrained = _wrapper


def _uninstall() -> None:
    global _watchers
    from transformers import PreTrainedModel

    with _lock:
        _watchers -= 1
        # What somebody else has put over it meanwhile stays; the wrapper below does nothing any more.
        if _watchers == 0 and vars(PreTrainedModel)["from_pretrained"] is _wrapper:
            PreTrainedModel.from_pretrained = _original


def _reporting(original: Any) -> Any:
    def from_pretrained(cls: Any, source: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        reports = _reports.get()
        if reports is None:
            return original(cls, source, *args, output_loading_info=output_loading_info, **kwargs)
        model, info = original(cls, source, *args, output_loading_info=True, **kwargs)
        names = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
        lacking = [parameter for name, parameter in model.named_parameters() if name in names]
        if lacking:
            reports.append(LoadingReport(str(source), type(model).__name__, lacking))
        return (model, info) if output_loading_info else model

    return from_pretrained


def refuse_random_weights(tower: Any, reports: list[LoadingReport]) -> None:
    """Raise when the features of a loaded tower pass through weights that were reported as not there.

    Raises:
        ProjectorWeightsError: names them, and what the tower was made of.
    """
    for report in reports:
        ids = {id(parameter) for parameter in report.without_weights}
        lacking = {name for name, parameter in tower.named_parameters() if id(parameter) in ids}
        used = sorted(lacking & _read_by_features(tower, lacking)) if lacking else []
        if used:
            shown = ", ".join(used[:3]) + (f" and {len(used) - 3} more" if len(used) > 3 else "")
            raise ProjectorWeightsError(
                f"the vision tower would see with random weights: {report.source} was loaded as a {report.model}, "
                f"and {len(used)} of its weights are missing there or of another shape: {shown}."
                f"{_kind_of(report.source)} Pass a --vision_tower that is whole and of the tower's own kind"
            )


def _kind_of(source: str) -> str:
    from transformers import PretrainedConfig

    try:
        kind = PretrainedConfig.get_config_dict(source)[0].get("model_type")
    except (OSError, ValueError):
        return ""
    return f" Its config.json says model_type {kind!r}." if kind else ""


def _read_by_features(tower: Any, names: set[str]) -> set[str]:
    """Those of a tower's parameters that the features it returns depend on; what cannot be told is not among them.

    Autograd knows, on the device meta, where nothing is computed.
    """
    model = tower.vision_tower
    own = {name: name.removeprefix("vision_tower.") for name in names}
    values: dict[str, Any] = {
        name: torch.empty(getattr(p, "ds_shape", p.shape), device="meta", requires_grad=True)
        for name, p in model.named_parameters()
    }
    values.update({name: buffer.to("meta") for name, buffer in model.named_buffers()})
    side = tower.config.image_size
    try:
        with torch.enable_grad(), keeping(tower.projector_layers):
            pixels = torch.empty(1, 3, side, side, device="meta")
            states = torch.func.functional_call(model, values, (pixels,), {"output_hidden_states": True}).hidden_states
            total = sum(states[layer].sum() for layer in tower.projector_layers)
            gradients = torch.autograd.grad(total, [values[own[name]] for name in own], allow_unused=True)
    except (RuntimeError, TypeError, AttributeError, KeyError, NotImplementedError):  # quantised, or built otherwise
        return set()
    return {name for name, gradient in zip(own, gradients) if gradient is not None}
