"""Tables and plots from the CSV of the study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy
from adjustText import adjust_text

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.spatial import cost, vision
from benchmarks.spatial.probe import WHAT
from benchmarks.spatial.questions import FAMILIES, POSITION_FAMILIES
from benchmarks.spatial.scenes import NUM_PATCHES_PER_SIDE
from benchmarks.spatial.study import DEEP_SAEP, DEPTH, PLAIN_SAEP, RATE, STUDIES, TEST, from_hex, kind
from benchmarks.speed.models import STOCK
from llava_projectors import registry
from llava_projectors.spec import format_value

DRAWS = 2000
OURS = ("saep", "tokenpacker")
# What plots call a form of SAEP, whose type string is long; other forms are named by what differs from the nearest.
FORMS = {"saep": "saep", "plain saep": PLAIN_SAEP, "deep saep": DEEP_SAEP}
# Options that a panel, a row's number of tokens, or the tower decides.
DECIDED = ("stride", "scale_factor", "num_queries")
# A colour for the full grid, for a quarter and for a ninth of the tokens.
COLOURS = {1: "0.35", 4: "C0", 9: "C1"}
Interval = tuple[float, float, float]  # estimate, lower and upper end of the 95 % interval

# What is averaged: every family by itself, all of them, and those about position.
METRICS: dict[str, tuple[str, ...]] = {
    "all": tuple(FAMILIES),
    "position": POSITION_FAMILIES,
    **{family: (family,) for family in FAMILIES},
}


class Results:
    """The answers of one study: type -> family -> right or wrong, bool [seeds, questions]."""

    def __init__(self, rows: Sequence[dict[str, str]], study: str) -> None:
        chosen = [row for row in rows if row["study"] == study]
        # Runs at another learning rate than the study's are no further seeds.
        tried: dict[str, list[float]] = {}
        for row in chosen:
            tried.setdefault(row["type"], []).append(float(row["learning_rate"]))
        own = {one.type_string: one.learning_rate for one in STUDIES[study].configurations}
        # The CSV of another scale has other rates, and may have one alone.
        rates = {name: own[name] if own.get(name) in found else found[-1] for name, found in tried.items()}
        chosen = [row for row in chosen if float(row["learning_rate"]) == rates[row["type"]]]
        found = {row["type"] for row in chosen}
        self.study = study
        self.split = chosen[0]["split"]
        # In the order of the study; what another scale alone compares comes last.
        order = {one.type_string: place for place, one in enumerate(STUDIES[study].configurations)}
        self.types = sorted(found, key=lambda name: (order.get(name, len(order)), name))
        self.tokens = {row["type"]: int(row["visual_tokens"]) for row in chosen}
        self.correct = {
            name: {
                family: numpy.array(
                    [
                        from_hex(row["correct"], int(row["questions"]))
                        for row in chosen
                        if row["type"] == name and row["family"] == family
                    ]
                )
                for family in FAMILIES
            }
            for name in self.types
        }
        self._drawn = self._bootstrap()

    def _bootstrap(self) -> dict[str, dict[str, Any]]:
        """type -> family -> accuracies when seeds and questions are drawn anew; every type is asked the same ones."""
        rng = numpy.random.default_rng(0)
        sizes = {family: right.shape[1] for family, right in self.correct[self.types[0]].items()}
        # How often each question is in a draw, so that an accuracy is a weighted mean.
        weights = {
            family: rng.multinomial(size, numpy.full(size, 1 / size), size=DRAWS) / size
            for family, size in sizes.items()
        }
        drawn: dict[str, dict[str, Any]] = {}
        for name in self.types:
            number = len(next(iter(self.correct[name].values())))
            seeds = rng.integers(number, size=(DRAWS, number))
            drawn[name] = {
                family: numpy.take_along_axis(weights[family] @ right.T.astype(float), seeds, axis=1).mean(1)
                for family, right in self.correct[name].items()
            }
        return drawn

    def accuracy(self, name: str, metric: str) -> Interval:
        """Mean over seeds, and its interval."""
        families = METRICS[metric]
        estimate = float(numpy.mean([self.correct[name][family].mean() for family in families]))
        return estimate, *_interval(numpy.mean([self._drawn[name][family] for family in families], axis=0))

    def difference(self, name: str, other: str, metric: str) -> Interval:
        """How much more often `name` is right than `other`, on the same questions."""
        families = METRICS[metric]
        ours, theirs = self._drawn[name], self._drawn[other]
        estimate = self.accuracy(name, metric)[0] - self.accuracy(other, metric)[0]
        return estimate, *_interval(numpy.mean([ours[family] - theirs[family] for family in families], axis=0))


def _interval(drawn: Any) -> tuple[float, float]:
    low, high = numpy.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def write_report(rows: Sequence[dict[str, str]], path: Path) -> str:
    """Tables as Markdown (returned as well) and, where types were compared, plots, beside the CSV of this path."""
    found = [study for study in STUDIES if study != RATE and any(row["study"] == study for row in rows)]
    results = [Results(rows, study) for study in found]
    tables = [_table(one) for one in results]
    tables += [_lead_table(one) for one in results if one.study == "comparison"]
    times = cost.times()
    report = _depth_table(rows) + _rate_table(rows) + "\n".join(tables) + _cost_table(results, times)
    path.with_suffix(".md").write_text(report)
    if results:
        _plot(results, path.with_suffix(".png"))
    for one in results:
        if one.study == "comparison":
            _plot_trade(one, times, path.with_name(f"{path.stem}-trade.png"))
    return report


def _depth_table(rows: Sequence[dict[str, str]]) -> str:
    found = {(row["type"], row["family"]): float(row["accuracy"]) for row in rows if row["study"] == DEPTH}
    states = dict.fromkeys(name for name, _ in found)
    lines = [
        "### What the hidden states know: a linear probe on the validation split",
        "",
        f"| | {' | '.join(f'{what}: {meaning}' for what, meaning in WHAT.items())} |",
        f"|---|{'---|' * len(WHAT)}",
        *(f"| {state} | {' | '.join(f'{found[state, what]:.1%}' for what in WHAT)} |" for state in states),
    ]
    return "\n".join([*lines, "", ""])


def _rate_table(rows: Sequence[dict[str, str]]) -> str:
    """Mean accuracy of the families for every type and rate of the study of learning rates, the best in bold."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row["study"] == RATE:
            by_rate = found.setdefault(row["type"], {})
            by_rate.setdefault(float(row["learning_rate"]), []).append(float(row["accuracy"]))
    if not found:
        return ""
    rates = sorted({rate for by_rate in found.values() for rate in by_rate})
    lines = [
        f"### Learning rate of stage 1: right answers after it, mean of families, {STUDIES[RATE].split} split, "
        f"seeds: {STUDIES[RATE].seeds}",
        "",
        f"| type | {' | '.join(f'{rate:g}' for rate in rates)} |",
        f"|---|{'---|' * len(rates)}",
    ]
    for name, by_rate in found.items():
        means = {rate: sum(values) / len(values) for rate, values in by_rate.items()}
        best = max(means, key=lambda rate: means[rate])
        cells = {rate: f"**{mean:.1%}**" if rate == best else f"{mean:.1%}" for rate, mean in means.items()}
        lines.append(f"| `{name}` | {' | '.join(cells.get(rate, '') for rate in rates)} |")
    return "\n".join([*lines, "", ""])


def _table(results: Results) -> str:
    first = results.types[0]
    lines = [
        f"### {results.study}, {results.split} split",
        "",
        f"| type | seeds | tokens | FLOPs in 7B against `{STOCK}` | mean of families | against `{first}` "
        f"| position families | {' | '.join(FAMILIES)} |",
        f"|---|---|---|---|---|---|---|{'---|' * len(FAMILIES)}",
    ]
    for name in results.types:
        versus = "" if name == first else _points(results.difference(name, first, "all"))
        families = (f"{results.accuracy(name, family)[0]:.1%}" for family in FAMILIES)
        whole, position = (_percent(results.accuracy(name, metric)) for metric in ("all", "position"))
        seeds, operations = str(len(results.correct[name]["relative"])), f"{cost.part_of_stock(name):.2f}"
        cells = (f"`{name}`", seeds, str(results.tokens[name]), operations, whole, versus, position, *families)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _lead_table(results: Results) -> str:
    """How far our two types are ahead of the others with as many tokens, on the position families."""
    others = [name for name in dict.fromkeys(map(kind, results.types)) if name not in (STOCK, *OURS)]
    lines = [
        f"### {results.study}: points ahead on the position families, of the types with as many tokens",
        "",
        f"| type | tokens | {' | '.join(f'`{other}`' for other in others)} |",
        f"|---|---|{'---|' * len(others)}",
    ]
    for name in sorted((name for name in results.types if kind(name) in OURS), key=kind):
        rivals = {kind(rival): rival for rival in results.types if results.tokens[rival] == results.tokens[name]}
        # An interrupted study may lack a rival.
        leads = (
            _points(results.difference(name, rivals[other], "position")) if other in rivals else "" for other in others
        )
        lines.append(f"| {' | '.join([f'`{name}`', str(results.tokens[name]), *leads])} |")
    return "\n".join([*lines, ""])


def _cost_table(found: Sequence[Results], times: cost.Times) -> str:
    """Operations and times of what was compared, for a model of a real size."""
    names = {cost.in_7b(name): name for results in found if results.study in cost.TIMED for name in results.types}
    measures = [f"time, {what}, batch {batch}" for what, batch in cost.MEASURES]
    lines = [
        f"### The projector alone in LLaVA-1.5 7B, against `{STOCK}`",
        "",
        f"| type there | FLOPs | {' | '.join(measures)} |",
        f"|---|---|{'---|' * len(measures)}",
    ]
    for large, name in names.items():
        measured = ("{:.2f} ({:.2f} to {:.2f})".format(*times[large, what, batch]) for what, batch in cost.MEASURES)
        lines.append(f"| `{large}` | {' | '.join([f'{cost.part_of_stock(name):.2f}', *measured])} |")
    return "\n".join(["", *lines, ""]) if names else ""


def _percent(interval: Interval) -> str:
    estimate, low, high = interval
    return f"{estimate:.1%} ({low:.1%} to {high:.1%})"


def _points(interval: Interval) -> str:
    estimate, low, high = (100 * value for value in interval)
    return f"{estimate:+.1f} ({low:+.1f} to {high:+.1f})"


def short_name(name: str) -> str:
    """What a plot calls a type: without the options that say its number of tokens, SAEP by the nearest of `FORMS`."""
    if name == STOCK:
        return name
    candidates = FORMS if kind(name) == "saep" else {kind(name): kind(name)}
    options = _options(name)
    differing = {
        form: [f"{key}={format_value(options[key])}" for key, value in _options(own).items() if options[key] != value]
        for form, own in candidates.items()
    }
    nearest = min(differing, key=lambda form: len(differing[form]))
    return ", ".join([nearest, *differing[nearest]])


def _options(name: str) -> dict[str, Any]:
    """Of a type, what makes a difference between rows of one plot; layers as they are on the study's tower."""
    resolved = registry.resolve(name)
    options = {key: value for key, value in resolved.options.items() if key not in DECIDED}
    if "layers" in options:
        options["layers"] = options["layers"] or tuple(resolved.cls.default_layers(vision.SELECTED))
    return options


def _colour(results: Results, name: str) -> str:
    """Of a number of tokens: the same in every panel of every plot."""
    return COLOURS[round(NUM_PATCHES_PER_SIDE**2 / results.tokens[name])]


def _split_name(split: str) -> str:
    return "test" if split == TEST else split


def _plot(found: Sequence[Results], target: Path) -> None:
    """Accuracy with intervals, a row of panels per study."""
    heights = [0.26 * len(results.types) + 1.1 for results in found]
    size = (1.7 * len(METRICS) + 4.5, sum(heights) + 0.6)
    figure, axes = pyplot.subplots(
        len(found),
        len(METRICS),
        squeeze=False,
        figsize=size,
        height_ratios=heights,
        layout=ConstrainedLayoutEngine(h_pad=0.2),
        sharey="row",
    )
    for panels, results in zip(axes, found):
        for axis, name in zip(panels, METRICS):
            _dots(axis, results, name)
        labels = [f"{short_name(name)} ({results.tokens[name]})" for name in results.types]
        panels[0].set_yticks(range(len(labels)), labels, fontsize=10)
        panels[0].invert_yaxis()
        heading = f"{results.study}, {_split_name(results.split)} split"
        above = {"xy": (0, 1), "xycoords": "axes fraction", "xytext": (0, 22), "textcoords": "offset points"}
        # Its width is none of the first panel's.
        panels[0].annotate(heading, **above, fontsize=12, weight="bold").set_in_layout(False)
    figure.suptitle(
        "Right answers, %, by family of questions. Dots: mean of the seeds; bars: 95 % interval; "
        "grey line: the first type.\nIn brackets the visual tokens; "
        "grey: the full grid, blue: a quarter of its tokens, orange: a ninth.\n"
        "Plain saep: no blocks, no norm of the layers, the mean of each region, four layers. "
        "Deep saep: four blocks on each side of the stride, no norm, the mean, one layer.",
        fontsize=11,
    )
    figure.savefig(target, dpi=90)
    pyplot.close(figure)


def _plot_trade(results: Results, times: cost.Times, target: Path) -> None:
    """Accuracy against time, a column for each number of tokens; a line from each type to the next better one."""
    what, batch = cost.MEASURES[-1]
    whole = max(results.tokens.values())
    counts = sorted(set(results.tokens.values()) - {whole}, reverse=True)
    figure, axes = pyplot.subplots(
        2,
        len(counts),
        squeeze=False,
        figsize=(6 * len(counts) + 1, 10),
        sharey="row",
        sharex=True,
        layout="constrained",
    )
    titles = {"all": "all questions", "position": "questions about position"}
    for row, (metric, title) in zip(axes, titles.items()):
        for axis, count in zip(row, counts):
            names = [name for name in results.types if results.tokens[name] in (count, whole)]
            points = [
                (times[cost.in_7b(name), what, batch][0], *results.accuracy(name, metric), name) for name in names
            ]
            _trade(axis, points)
            axis.set_title(f"{title}: {count} visual tokens, {STOCK} {whole}", fontsize=11)
    figure.supxlabel(
        f"time of the projector in LLaVA-1.5 7B ({what}, batch {batch}), {STOCK} = 1, on {cost.machine()}", fontsize=11
    )
    figure.supylabel(f"right answers, %, {_split_name(results.split)} split (bars: 95 % interval)", fontsize=11)
    figure.draw_without_rendering()  # which labels cover each other depends on the layout
    numpy.random.seed(0)  # adjust_text moves them at random at first
    line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6}
    for axis in axes.flat:
        bars = [end for bar in axis.containers for end in bar.lines[2][0].get_segments()[0]]
        adjust_text(
            list(axis.texts),
            x=[x for x, _ in bars],
            y=[y for _, y in bars],
            ax=axis,
            expand=(1.2, 1.5),
            arrowprops=line,
            iter_lim=1000,
        )
    figure.savefig(target, dpi=90)
    pyplot.close(figure)


def _trade(axis: Any, points: Sequence[tuple[float, float, float, float, str]]) -> None:
    """Draw one panel, whose labels may cover each other until they are moved."""
    frontier: list[tuple[float, float]] = []
    for time, *interval, name in sorted(points):
        estimate, low, high = (100 * value for value in interval)
        spread = [[estimate - low], [high - estimate]]
        colour = "0.35" if name == STOCK else f"C{int(kind(name) in OURS)}"
        axis.errorbar(time, estimate, spread, fmt="s" if name == STOCK else "o", markersize=5, color=colour, alpha=0.8)
        axis.text(time, estimate, trade_name(name), size=10, color=colour)
        if not frontier or estimate > frontier[-1][1]:
            frontier.append((time, estimate))
    axis.plot(*zip(*frontier), color="0.6", linewidth=0.8, zorder=0)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.margins(x=0.15)


def trade_name(name: str) -> str:
    """`short_name`, without the layers, which the tower decides."""
    return ", ".join(part for part in short_name(name).split(", ") if not part.startswith("layers="))


def _dots(axis: Any, results: Results, metric: str) -> None:
    for place, name in enumerate(results.types):
        estimate, low, high = (100 * value for value in results.accuracy(name, metric))
        spread = [[estimate - low], [high - estimate]]
        axis.errorbar(estimate, place, xerr=spread, fmt="o", markersize=4, color=_colour(results, name))
        if place == 0:
            axis.axvline(estimate, color="0.6", linewidth=0.8)
    axis.set_title(metric, fontsize=10)
    axis.tick_params(labelsize=9)
