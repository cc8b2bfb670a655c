"""A drawing: the picture with its patch grid, and for some visual tokens what they were made from."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import ImageOps

from llava_projectors.commands.show import colours
from llava_projectors.commands.show.view import View

PANEL = 3.2  # inches
OUTLINE = "#0060ff"


def draw(view: View) -> Any:
    """A matplotlib figure: the picture, then one panel per token, all maps on one scale."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.figure import Figure

    panels = len(view.tokens) + 1
    columns = min(4, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(PANEL * columns + 1, (PANEL + 0.2) * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    _draw_overview(axes[0], view)
    percent = ScalarMappable(
        Normalize(0, 100 * view.scale), ListedColormap(np.array(colours.table()) / 255, name="share")
    )
    grey = ImageOps.grayscale(view.picture).point(colours.faded)
    for axis, token, shares in zip(axes[1:], view.tokens, view.maps):
        left, top = view.places[token // view.count]
        right, bottom = left + view.edge, top + view.edge
        axis.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=(0, grey.width, grey.height, 0))
        overlay = axis.imshow(100 * shares, extent=(left, right, bottom, top), cmap=percent.cmap, norm=percent.norm)
        overlay.set_interpolation("nearest")
        _outline(axis, view, token, OUTLINE)
        axis.set_xlim(left, right)
        axis.set_ylim(bottom, top)
        axis.set_title(view.name(token), fontsize=9)
    bar = figure.colorbar(percent, ax=axes.tolist(), aspect=30, fraction=0.03)
    bar.set_label("share of the token that comes from a patch, %", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle(view.title, fontsize=8, wrap=True)
    return figure


def _draw_overview(axis: Any, view: View) -> None:
    """The picture in colour, with its tiles, or the patches of a single one, and the tokens that are drawn."""
    from matplotlib.patches import Rectangle

    axis.imshow(view.picture, extent=(0, view.picture.width, view.picture.height, 0))
    if len(view.places) > 1:
        axis.set_title(f"{len(view.places)} tiles, the last one the thumbnail", fontsize=9)
        for left, top in view.places:
            axis.add_patch(Rectangle((left, top), view.edge, view.edge, fill=False, edgecolor="black", linewidth=0.8))
    else:
        axis.set_title(f"{view.side}x{view.side} patches", fontsize=9)
        for line in range(view.side + 1):
            at = line * view.edge / view.side
            axis.axhline(at, color="white", linewidth=0.3)
            axis.axvline(at, color="white", linewidth=0.3)
    for token in view.tokens:
        _outline(axis, view, token, "white", linewidth=2.4)
        _outline(axis, view, token, OUTLINE)


def _outline(axis: Any, view: View, token: int, colour: str, linewidth: float = 1.4) -> None:
    """A line around the token's own region, where it has one."""
    from matplotlib.patches import Rectangle

    if view.regions is None:
        return
    (left, top), region = view.places[token // view.count], view.regions[token % view.count]
    patch = view.edge / view.side
    corner = left + region.left * patch, top + region.top * patch
    width, height = (region.right - region.left) * patch, (region.bottom - region.top) * patch
    axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=linewidth))
