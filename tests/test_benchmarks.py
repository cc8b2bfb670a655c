"""The benchmark: its FLOP model against torch's counter, its reference against ours, its command end to end."""

import csv
import itertools
import time
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from unittest.mock import Mock

import pytest
import torch
from test_projectors import equals_published
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import high_resolution, measure, profiles, recompute, variants
from benchmarks.speed import flops, models, report, suites
from benchmarks.speed import run as bench_run
from benchmarks.speed.__main__ import main
from benchmarks.speed.candidates import EAGER, NAIVE, PUBLISHED, REDUCING, TRITON, Subject, subjects
from benchmarks.speed.naive import NaiveTokenPacker, PublishedTokenPacker
from benchmarks.table import read_rows
from llava_projectors import build_projector
from llava_projectors.projectors.layers import DepthwiseConv2d

CPU = torch.device("cpu")
SIDE, WIDTH, HIDDEN = 12, 256, 48


SAEP_OPTIONS = (
    "order=depthwise_first",
    "inner_size=40",
    "blocks_before=0,blocks_after=2",
    "level_norm=none",
    "order=depthwise_first,blocks_after=1",
    "readout_size=80",
)


def counted(function):
    """What torch's counter sees, without the gradients of convolutions: there it forgets the groups."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    counts = dict(counter.get_flop_counts()["Global"])
    counts.pop(torch.ops.aten.convolution_backward, None)
    return sum(counts.values())


@contextmanager
def depthwise_gradients(module):
    """A list of what `counted` leaves out: of each depthwise convolution, the gradients of weight and input."""
    found = []

    def note(layer, inputs, output):
        work = 2 * output.numel() * layer.kernel_size[0] ** 2
        found.append(work * (1 + inputs[0].requires_grad))

    layers = [layer for layer in module.modules() if isinstance(layer, DepthwiseConv2d)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    yield found
    for handle in handles:
        handle.remove()


def test_a_dtype_that_is_only_emulated_is_left_out(monkeypatch):
    rates = {torch.float32: 1e11, torch.bfloat16: 4e10, torch.float16: 2e11}
    monkeypatch.setattr(measure, "matrix_rate", lambda device, dtype: rates[dtype])
    kept, (line,) = measure.without_slow_dtypes((torch.float32, torch.bfloat16, torch.float16), CPU)
    assert kept == (torch.float32, torch.float16)
    assert line == "torch.bfloat16: this device multiplies matrices of it at 40.0 GFLOP/s, of float32 at 100.0"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "subject",
    [
        *subjects(models.STOCK, *REDUCING, *(f"saep:{options}" for options in SAEP_OPTIONS)),
        *subjects(*suites.TOKENPACKERS, implementation=NAIVE),
        *subjects(*suites.TOKENPACKERS, implementation=PUBLISHED),
    ],
)
def test_projector_flops_are_those_of_torchs_counter(subject, batch):
    projector = suites.make_projector(subject, WIDTH, HIDDEN)
    work = flops.projector(subject, SIDE, WIDTH, HIDDEN) * batch
    features = torch.randn(batch, SIDE**2, getattr(projector, "num_levels", 1) * WIDTH)
    assert counted(lambda: projector(features)) == work.forward
    with depthwise_gradients(projector) as left_out:
        assert counted(lambda: projector(features).sum().backward()) == work.both - sum(left_out)


@pytest.fixture(scope="module")
def family():
    return models.Family(models.TINY_TOWER, models.TINY_LLAMA, CPU, torch.float32)


@pytest.mark.parametrize("type_string", [models.STOCK, "saep:stride=2", "tokenpacker:scale_factor=3"])
def test_model_flops_are_those_of_torchs_counter(family, type_string):
    """Tower, projector and LLM of a real LLaVA: prefill of two images, decoded tokens, what is trained in a step."""
    subject = Subject(type_string)
    llavas = {subject: family.make(type_string)}
    for group in (
        suites.prefill_group("model", family, llavas, batch=2, images=2),
        suites.prefill_group("model", family, llavas, batch=2, images=2, graph=True),
        suites.decode_group(family, llavas),
        suites.generate_group(family, llavas, batch=2),
    ):
        assert counted(group.candidates[subject].function) == group.candidates[subject].flops, group.measure
    for step, checkpointing in itertools.product((suites.STAGE_1, suites.LORA, suites.STAGE_2), (False, True)):
        with (
            suites.trained_part(family, step) as parameters,
            models.in_training(llavas.values(), checkpointing),
            depthwise_gradients(llavas[subject]) as left_out,
        ):
            group = suites.training_group(family, llavas, step, 2, parameters, checkpointing)
            found = counted(group.candidates[subject].function)
        assert found == group.candidates[subject].flops - sum(left_out), group.measure


@pytest.mark.parametrize("type_string", [models.STOCK, "tokenpacker:scale_factor=3"])
def test_prefill_of_one_shape_is_llavas(family, type_string):
    """What is captured as a graph gives the logits of LLaVA's own forward, and reads nothing back to the host."""
    llava = family.make(type_string)
    inputs = suites._prompt(family, 2, 3)
    with torch.no_grad():
        expected = llava(**inputs)
        with ReadsNothingBack():
            found = suites.prefill_of_one_shape(llava, **inputs, use_cache=True)
        with pytest.raises(AssertionError), ReadsNothingBack():
            llava(**inputs)
    torch.testing.assert_close(found.logits, expected.logits)
    assert found.past_key_values[0][0].shape == expected.past_key_values[0][0].shape


class ReadsNothingBack(TorchDispatchMode):
    """Fails at what a CUDA graph cannot hold: results that the host waits for, tensors made of Python's numbers."""

    FORBIDDEN = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.lift_fresh)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in self.FORBIDDEN, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("subject", [*suites.TOWERS])
def test_no_tower_of_the_suite_reads_back(family, subject):
    tower = suites.TOWERS[subject](family.vision_model)
    with torch.no_grad(), ReadsNothingBack():
        tower(torch.randn(1, 3, models.IMAGE_SIZE, models.IMAGE_SIZE))


@pytest.mark.parametrize("subject", subjects(models.STOCK, *REDUCING))
def test_no_projector_of_the_suite_reads_back(subject):
    projector = suites.make_projector(subject, 64, 32)
    run, _ = suites.forward_backward(projector, torch.randn(1, 24**2, 64 * getattr(projector, "num_levels", 1)))
    with ReadsNothingBack():
        run()


def test_generate_gives_as_many_tokens_as_are_counted(family):
    group = suites.generate_group(family, {Subject("saep"): family.make("saep")}, batch=2)
    (candidate,) = group.candidates.values()
    assert candidate.function().shape == (2, 1 + suites.GENERATED_TOKENS)  # the first opens the sequence
    assert candidate.generated == 2 * suites.GENERATED_TOKENS


def test_after_lora_the_model_is_as_before(family):
    before = [(name, id(module)) for name, module in family.shared.named_modules()]
    with suites.trained_part(family, suites.LORA) as parameters:
        assert len(parameters) == 2 * 7 * models.TINY_LLAMA.layers
        trained = {id(parameter) for parameter in parameters}
        assert {id(p) for p in family.shared.model.layers.parameters() if p.requires_grad} == trained
    assert [(name, id(module)) for name, module in family.shared.named_modules()] == before


def test_models_differ_in_the_projector_alone(family):
    stock, saep = family.make(models.STOCK), family.make("saep")
    assert saep.model.layers is stock.model.layers
    assert saep.model.vision_tower.vision_tower is stock.model.vision_tower.vision_tower
    assert type(saep.model.mm_projector).__name__ == "SAEP"
    assert not any(p.is_meta for p in saep.parameters())


@pytest.mark.parametrize("scale_factor", [2, 3, 4])
@pytest.mark.parametrize("make", [NaiveTokenPacker, PublishedTokenPacker])
def test_the_references_compute_the_same(make, scale_factor):
    torch.manual_seed(0)
    ours = build_projector(f"tokenpacker:scale_factor={scale_factor}", WIDTH, HIDDEN).double()
    naive = make(WIDTH, HIDDEN, scale_factor).double()
    naive.load_state_dict(ours.state_dict())  # the published names
    features = torch.randn(2, SIDE**2, 4 * WIDTH, dtype=torch.float64)
    # The reference interpolates in float32.
    torch.testing.assert_close(ours(features), naive(features), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale_factor", [2, 3, 4])
def test_the_published_reference_is_the_published_code(scale_factor):
    equals_published(PublishedTokenPacker(1024, 512, scale_factor), scale_factor)


def test_training_keeps_less_than_the_naive_reference():
    """The figure at CLIP-L's sizes is in the benchmark; here only that nothing large is kept again."""
    features = torch.randn(8, 24**2, 4 * WIDTH)
    peaks = {}
    for implementation in (EAGER, NAIVE):
        subject = Subject("tokenpacker:scale_factor=2", implementation)
        _, accumulate = suites.forward_backward(suites.make_projector(subject, WIDTH, 4 * WIDTH), features)
        accumulate()
        peaks[implementation] = measure.peak_bytes(accumulate, CPU)
    ours, naive = peaks.values()
    assert ours < 0.75 * naive


def test_peak_memory_is_what_was_held_at_once():
    def function():
        a = torch.ones(2**18)
        del a
        b, c = torch.ones(2**17), torch.ones(2**17)
        return b + c

    assert measure.peak_bytes(function, CPU) == 3 * 2**19


def test_what_is_measured_once_is_measured_again():
    """torch's profiler subtracts what a call frees of an earlier one; the calls measured free nothing."""
    features = torch.randn(1, 24**2, 4 * WIDTH)
    _, accumulate = suites.forward_backward(suites.make_projector(Subject("tokenpacker"), WIDTH, HIDDEN), features)
    accumulate()
    first, second, third = (measure.peak_bytes(accumulate, CPU) for _ in range(3))
    assert first == second == third


def test_ways_to_keep_less_keep_less():
    rows = {row["implementation"]: row for row in recompute.measurements("tokenpacker", CPU, (WIDTH, 4 * WIDTH), 0.0)}
    assert list(rows) == ["kept", "recomputed", "checkpoint", "whole"]
    peaks = {name: row["peak_mib"] for name, row in rows.items()}
    assert peaks["recomputed"] < peaks["kept"]
    assert rows["kept"]["ratio"] == "1.000"


@pytest.mark.parametrize("scale_factor", [2, 3, 4])
def test_the_variants_of_tokenpacker_compute_the_same(scale_factor):
    models = {name: variants.make(name, scale_factor, (WIDTH, HIDDEN)).double() for name in variants.VARIANTS}
    features = torch.randn(2, SIDE**2, 4 * WIDTH, dtype=torch.float64)
    expected = build_projector(f"tokenpacker:scale_factor={scale_factor}", WIDTH, HIDDEN).double()
    for model in models.values():
        model.load_state_dict(expected.state_dict())
        torch.testing.assert_close(model(features), expected(features), rtol=1e-6, atol=1e-8)


def test_rounds_are_interleaved_and_the_first_does_not_count():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = measure.interleave(functions, CPU, 0, min_rounds=2)
    assert calls == ["a", "b"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


class Clock:
    """torch.cuda's events on a host that runs what it is given at once."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, later):
        return (later.at - self.at) * 1000


def test_short_calls_are_queued_and_the_time_is_that_of_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    calls = []
    seconds = measure.seconds_of(lambda: calls.append(time.sleep(0.01)), torch.device("cuda"), 5)
    assert calls == ["synchronize", *[None] * 5, "synchronize"]
    assert 0.01 <= seconds < 0.05
    assert [measure.calls_to_queue(value) for value in (1.0, 0.01, 1e-6)] == [1, 2, measure.MOST_CALLS]


def row_of(**values):
    row = {"suite": "projector", "measure": "forward", "type": "saep:stride=2", "dtype": "float32", "batch": "1"}
    return {
        **row,
        "implementation": "eager",
        "images": "1",
        "visual_tokens": "144",
        "device": "cpu",
        "ratio": "0.5",
        **values,
    }


def test_targets_tell_best_worst_and_where():
    rows = [row_of(), row_of(batch="8", ratio="1.25"), row_of(type="mlp2x_gelu", ratio="1", visual_tokens="576")]
    (line,) = report.target_lines(rows)
    assert line == (
        "SAEP / mlp2x_gelu, time, s = 2",
        "<= 1.00",
        "0.50",
        "1.25",
        "saep:stride=2, forward, float32, batch 8",
        "met in 1 of 2",
    )
    assert [line[-1] for line in report.target_lines(rows[::2])] == ["met"]


@pytest.fixture
def plan(monkeypatch):
    """What runs on CUDA, every suite and candidate of it, at tiny sizes on the CPU."""
    tower = models.TowerShape(64, 64, 8)
    tiny = {
        "seconds": 0,
        "dtypes": (torch.float32,),
        "projector_widths": (64, 32),
        "prefills": ((1, 2), (2, 1)),
        "generate": (1,),
        "batches": (1, 2),
        "tower": tower,
        "tower_batches": (1,),
        "model_tower": tower,
        "model_llama": models.LlamaShape(128, 128, 1, 100),
        "model_dtype": torch.float32,
        "step_batch": 1,
        "scaling": (1, 2),
    }
    monkeypatch.setitem(suites.PLANS, "cpu", replace(suites.PLANS["cuda"], **tiny))
    square = torch.ones(64, 64)
    monkeypatch.setattr(measure, "matrix_rate_function", lambda *_: (lambda: square @ square, 2 * 64**3))


def test_a_candidate_that_does_not_fit_is_a_row_and_its_group_stays(plan, tmp_path, monkeypatch, capsys):
    """The baseline runs out of memory, another candidate fails: the others are measured, without ratios."""
    monkeypatch.setitem(suites.PLANS, "cpu", replace(suites.PLANS["cpu"], tokenpackers=(PUBLISHED,)))
    errors = {
        Subject(models.STOCK): torch.cuda.OutOfMemoryError("of 80 GiB"),
        **dict.fromkeys(subjects(*suites.TOKENPACKERS, implementation=PUBLISHED), RuntimeError("no kernel image")),
    }

    def make(subject, *widths, make=suites.make_projector):
        projector = make(subject, *widths)
        if subject in errors:
            projector.forward = Mock(side_effect=errors[subject])
        return projector

    monkeypatch.setattr(suites, "make_projector", make)
    path = tmp_path / "bench.csv"
    arguments = ["--device", "cpu", "--csv", str(path), "--suite", "projector"]
    assert main([*arguments, "--only", "measure"]) == 1
    rows = read_rows(path, "measured_to_bound")
    notes = {(row["type"], row["implementation"]): row["note"] for row in rows}
    assert notes[models.STOCK, EAGER] == "out of memory"
    assert {notes[name, PUBLISHED] for name in suites.TOKENPACKERS} == {"FAILED: RuntimeError: no kernel image"}
    measured = [row for row in rows if not row["note"]]
    assert {row["type"] for row in measured} == set(REDUCING)
    assert all(row["median_s"] and not row["ratio"] for row in measured)
    assert main([*arguments[2:], "--only", "report"]) == 0
    assert "out of memory" in capsys.readouterr().out
    assert main([*arguments[2:], "--only", "plot"]) == 0


def test_only_what_is_missing_is_measured(plan, tmp_path, monkeypatch, capsys):
    path = tmp_path / "bench.csv"
    run = ["--device", "cpu", "--csv", str(path), "--only", "measure", "--suite", "tower"]
    assert main(run) == 0
    before = read_rows(path, "measured_to_bound")
    monkeypatch.setitem(suites.PLANS, "cpu", replace(suites.PLANS["cpu"], tower_batches=(1, 2)))
    assert main([*run, "--missing"]) == 0
    rows = read_rows(path, "measured_to_bound")
    assert [row["batch"] for row in rows] == ["1", "1", "2", "2"]
    assert rows[:2] == before
    assert main([*run, "--missing"]) == 0
    assert read_rows(path, "measured_to_bound") == rows


def test_variants_are_written_group_by_group(tmp_path, monkeypatch):
    path = tmp_path / "variants.csv"
    found = []
    monkeypatch.setattr(variants, "write_rows", lambda path, rows: found.append(len(rows)))
    variants.main(["--quick", "--csv", str(path)])
    assert found == list(range(4, 4 * 6 + 1, 4))


@pytest.mark.slow
def test_profiles_have_a_table_for_each_candidate(plan, tmp_path, monkeypatch):
    path = tmp_path / "profile.txt"
    monkeypatch.setitem(profiles.COPIED_BYTES, "cpu", 2**20)
    profiles.main(["--device", "cpu", "--out", str(path)])
    text = path.read_text()
    assert "TB/s" in text
    for title in ("projector, forward+backward, batch 2", "tower, forward, batch 1", "model, prefill, batch 1"):
        assert f"{title}: {models.STOCK}, eager\n---" in text
    assert "tokenpacker:scale_factor=2, published" in text


@pytest.mark.slow
def test_command_writes_a_csv_and_a_picture(plan, tmp_path, monkeypatch, capsys):
    # Triton's interpreter takes a fifth of a second for each region.
    monkeypatch.setitem(suites.PLANS, "cpu", replace(suites.PLANS["cpu"], batches=(1,)))
    monkeypatch.setattr(suites, "TOKENPACKERS", suites.TOKENPACKERS[-1:])
    path = tmp_path / "new" / "bench.csv"
    assert main(["--device", "cpu", "--csv", str(path)]) == 0
    assert "x bound" in capsys.readouterr().out
    rows = read_rows(path, "measured_to_bound")
    assert {row["suite"] for row in rows} == set(suites.SUITES)
    steps = [f"training step, {step}, checkpointing" for step in (suites.STAGE_1, suites.LORA, suites.STAGE_2)]
    assert {row["measure"] for row in rows if row["suite"] == "model"} == {"prefill", "prefill, graph", *steps}
    assert {row["implementation"] for row in rows} == {EAGER, PUBLISHED, *[TRITON] * bool(find_spec("triton"))}
    assert all(float(row["tokens_per_s"]) > 0 for row in rows if row["suite"] == "generate")
    assert all(row["machine"] and row["torch"] == torch.__version__ for row in rows)
    assert {row["visual_tokens"] for row in rows} == {"576", "144", "64", "36"}
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_cut_off_loses_nothing(plan, tmp_path, monkeypatch, capsys):
    """What was measured is in the file, and what an earlier run had measured stays."""
    path = tmp_path / "bench.csv"
    run = ["--device", "cpu", "--csv", str(path)]
    monkeypatch.setitem(suites.PLANS, "cpu", replace(suites.PLANS["cpu"], tokenpackers=(PUBLISHED,)))
    assert main([*run, "--suite", "tower", "--suite", "projector"]) == 0
    before = read_rows(path, "measured_to_bound")

    def cut_off(group, *arguments, measure_group=bench_run.measure_group):
        if group.batch == 2:
            raise KeyboardInterrupt
        return measure_group(group, *arguments)

    monkeypatch.setattr(bench_run, "measure_group", cut_off)
    with pytest.raises(KeyboardInterrupt):
        main([*run, "--suite", "projector"])
    after = read_rows(path, "measured_to_bound")
    assert [report.group_name(row) for row in after] == [
        report.group_name(row)
        for row in sorted(before, key=lambda row: (row["suite"], row["batch"] == "1" and row["suite"] == "projector"))
    ]
    new = [row not in before for row in after]
    assert new == [row["suite"] == "projector" and row["batch"] == "1" for row in after]


def test_a_suite_that_fails_leaves_the_others(plan, tmp_path, monkeypatch, capsys):
    def broken(plan, device):
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(suites.SUITES, "projector", broken)
    path = tmp_path / "bench.csv"
    assert main(["--device", "cpu", "--csv", str(path), "--suite", "projector", "--suite", "tower"]) == 1
    output = capsys.readouterr()
    assert "LEFT OUT, the rest of suite projector, which FAILED: RuntimeError" in output.out
    assert "no kernel image" in output.err
    assert {row["suite"] for row in read_rows(path, "measured_to_bound")} == {"tower"}


@pytest.mark.parametrize("content", [None, "a,b\n1,2\n", ""])
def test_a_file_that_cannot_be_drawn_is_explained(tmp_path, capsys, content):
    path = tmp_path / "some.csv"
    if content is not None:
        path.write_text(content)
    assert main(["--only", "plot", "--csv", str(path)]) == 1
    error = capsys.readouterr().err
    assert str(path) in error
    assert "benchmarks.speed --quick" in error


def test_an_unknown_device_is_explained(tmp_path, capsys):
    assert main(["--quick", "--device", "gpu", "--csv", str(tmp_path / "x.csv")]) == 1
    assert "'gpu'" in capsys.readouterr().err
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.slow
def test_high_resolution_writes_its_csv(tmp_path, monkeypatch):
    """The quick plan: chunks hold less than all tiles at once, and training more than inference."""
    path = tmp_path / "high_resolution.csv"
    monkeypatch.setattr("sys.argv", ["high_resolution", "--quick", "--csv", str(path)])
    high_resolution.main()
    rows = {(row["type"], row["measure"], row["tiles"], row["chunk_size"]): row for row in csv.DictReader(path.open())}
    assert len(rows) == 2 * 2 * 3
    for projector_type in high_resolution.TYPES:
        whole, chunked = (rows[projector_type, "forward", "8", size] for size in ("8", "4"))
        assert float(chunked["peak_mib"]) < 0.8 * float(whole["peak_mib"])
        for tiles, size in (("1", "1"), ("8", "4"), ("8", "8")):
            inference, training = (rows[projector_type, name, tiles, size] for name in ("forward", "forward+backward"))
            assert float(inference["peak_mib"]) <= float(training["peak_mib"])
