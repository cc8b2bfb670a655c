"""The spatial study: its ground truth against the pixels, its hidden states against LLaVA's tower, a run end to end."""

import dataclasses
import os
import random
import statistics
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
import warm
from PIL import Image
from prose import says
from safetensors.torch import load_file

from benchmarks.spatial import __main__ as command
from benchmarks.spatial import contrastive, cost, language, optimize, report, scenes, sizes, study, vision
from benchmarks.spatial.probe import WHAT
from benchmarks.spatial.questions import CELLS, FAMILIES, ask, caption
from benchmarks.spatial.scenes import COLOURS, GLYPHS, IMAGE_SIZE, draw, make_scene
from benchmarks.spatial.store import CachedTower, LookingTower, Split
from benchmarks.speed import flops
from benchmarks.speed.candidates import Subject
from benchmarks.table import read_rows

ROOT = Path(__file__).parents[1]
SCENES = [make_scene(random.Random(seed)) for seed in range(60)]


def picture(scene):
    return numpy.array(draw(scene, random.Random(0))).astype(int)


def pixels_of(image, thing):
    """Where the picture has the object's colour, within its bounding box."""
    mask = (image == COLOURS[thing.colour]).all(-1)
    box = numpy.zeros_like(mask)
    box[thing.y - thing.radius : thing.y + thing.radius + 1, thing.x - thing.radius : thing.x + thing.radius + 1] = True
    return mask & box


@pytest.mark.parametrize("scene", SCENES[:20])
def test_every_object_is_where_the_scene_says(scene):
    image = picture(scene)
    seen = numpy.zeros(image.shape[:2], dtype=bool)
    for thing in scene:
        rows, columns = numpy.nonzero(pixels_of(image, thing))
        assert (columns.min() + columns.max()) / 2 == pytest.approx(thing.x, abs=1)
        assert (rows.min() + rows.max()) / 2 == pytest.approx(thing.y, abs=1)
        seen |= pixels_of(image, thing)
    coloured = numpy.any([(image == colour).all(-1) for colour in COLOURS.values()], axis=0)
    assert (coloured == seen).all()  # nothing else has an object's colour
    assert len({thing.name for thing in scene}) == len(scene)


@pytest.mark.parametrize("scene", SCENES[:20])
def test_every_letter_can_be_read_off_the_picture(scene):
    image = picture(scene)
    for thing in scene:
        window = image[thing.y - 3 : thing.y + 4, thing.x - 2 : thing.x + 3].sum(-1) == 0
        found = [
            letter
            for letter, rows in GLYPHS.items()
            if (window == [[row >> (4 - column) & 1 for column in range(5)] for row in rows]).all()
        ]
        assert found == [thing.letter]


def answers(family, count=400):
    for seed in range(count):
        scene = SCENES[seed % len(SCENES)]
        turn = ask(scene, random.Random(seed)).get(family)
        if turn is not None:
            yield scene, *turn


def named(scene, text):
    return [thing for thing in scene if thing.name in text]


def test_answers_about_position():
    for scene, question, answer in answers("absolute"):
        (thing,) = named(scene, question)
        row, column = map(int, answer.split())
        cell = IMAGE_SIZE / CELLS
        assert (row - 1) * cell <= thing.y < row * cell
        assert (column - 1) * cell <= thing.x < column * cell
    for scene, question, answer in answers("relative"):
        words = question.split()
        first, second = (next(t for t in scene if t.name == " ".join(words[at : at + 2])) for at in (3, 8))
        angle = numpy.degrees(numpy.arctan2(first.y - second.y, first.x - second.x))
        expected = {"right": 0, "below": 90, "left": 180, "above": -90}[answer]
        assert abs((angle - expected + 180) % 360 - 180) <= 34
    for scene, question, answer in answers("distance"):
        (thing,) = (t for t in scene if question.endswith(f"the {t.name}"))
        far = {t.name: numpy.hypot(t.x - thing.x, t.y - thing.y) for t in scene if t is not thing}
        assert answer == (max if "farthest" in question else min)(far, key=far.get)


def test_other_answers():
    for scene, question, answer in answers("counting"):
        word = question.split()[-1]
        assert int(answer) == sum(word in (t.colour, t.shape) for t in scene) > 0
    for scene, question, answer in answers("existence"):
        assert answer == ("yes" if named(scene, question) else "no")
    for scene, question, answer in answers("detail"):
        (thing,) = named(scene, question)
        assert answer == thing.letter


def test_no_answer_is_right_most_of_the_time():
    for family in FAMILIES:
        given = [answer for _, _, answer in answers(family, 2000)]
        assert max(map(given.count, set(given))) < 0.62 * len(given), family


def test_splits_share_no_picture(tmp_path):
    pictures = [Split(name, 50, tmp_path).scenes for name in ("train", "validation", "test", study.TEST)]
    assert len({scene for scenes in pictures for scene in scenes}) == 200


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick study of one kind of projector, run by its command, which is cut off wherever it can be."""
    folder = tmp_path_factory.mktemp("spatial")
    for left in ("vision/config.json", "language/config.json", "quick.md"):
        run_command("--folder", str(folder), "--minutes", "0")
        assert not (folder / left).exists()
    run_command("--folder", str(folder), "--workers", "1")
    return folder


def run_command(*arguments):
    import sys

    before = sys.argv
    sys.argv = ["spatial", "--quick", "--studies", "tokenpacker", *arguments]
    try:
        command.main()
    finally:
        sys.argv = before


@pytest.mark.slow
def test_a_study_from_start_to_plot(quick, capsys):
    everything = read_rows(quick / "quick.csv", "stage1_loss")
    depth = [row for row in everything if row["study"] == study.DEPTH]
    assert len(depth) == len(WHAT) * (vision.SELECTED + 1)
    rows = [row for row in everything if row["study"] != study.DEPTH]
    assert {row["type"] for row in rows} == {one.type_string for one in study.STUDIES["tokenpacker"].configurations}
    assert {row["family"] for row in rows} == set(FAMILIES)
    assert all(row["split"] == "validation" and row["visual_tokens"] == "36" for row in rows)
    for row in everything:
        right = study.from_hex(row["correct"], int(row["questions"]))
        assert statistics.mean(right) == pytest.approx(float(row["accuracy"]), abs=1e-4)
    assert "| hidden state 7 |" in (quick / "quick.md").read_text()
    assert "### tokenpacker, validation split" in (quick / "quick.md").read_text()
    with Image.open(quick / "quick.png") as drawn:
        assert len(drawn.convert("RGB").getcolors(2**24)) > 50
    before = (quick / "quick.csv").read_text()
    run_command("--folder", str(quick))  # nothing is left to run
    assert (quick / "quick.csv").read_text() == before
    assert "| `tokenpacker:layers=7` | 1 | 36 |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_study_that_was_cut_off_is_as_one_that_was_not(quick, tmp_path):
    study.prepare(study.QUICK, tmp_path)
    for name in ("vision", "language"):
        (whole,), (cut_off,) = ([load_file(p) for p in (f / name).glob("*.safetensors")] for f in (tmp_path, quick))
        assert whole.keys() == cut_off.keys()
        for key, value in whole.items():
            torch.testing.assert_close(cut_off[key], value, rtol=1e-5, atol=1e-6)
    job = next(study.jobs(study.QUICK, ("tokenpacker",)))
    everything = read_rows(quick / "quick.csv", "stage1_loss")
    rows = [row for row in everything if row["type"] == job.configuration.type_string]
    assert len(rows) == len(FAMILIES)
    for found, expected in zip(rows, study._work(study.QUICK, tmp_path, job)):
        assert [found[key] for key in ("family", "correct")] == [expected[key] for key in ("family", "correct")]
        assert float(found["stage1_loss"]) == pytest.approx(float(expected["stage1_loss"]), rel=1e-3)


def train_a_little(path, stops_at=None):
    """Four steps of a regression whose data are drawn on the way, killed at the step `stops_at` if that is given."""
    torch.manual_seed(0)
    rng = random.Random(0)
    weight = torch.nn.Parameter(torch.ones(3))

    def loss_of(step):
        if step == stops_at:
            raise KeyboardInterrupt
        return (weight * torch.randn(3) - rng.random()).square().sum()

    pause = optimize.Pause(path / "training.unfinished", rng)
    return optimize.minimize(loss_of, [weight], 4, 0.1, pause=pause), pause.path


def test_a_killed_training_goes_on_where_it_was_last_saved(tmp_path, monkeypatch):
    expected, _ = train_a_little(tmp_path)
    monkeypatch.setattr(optimize, "SAVE_EVERY", -1.0)
    with pytest.raises(KeyboardInterrupt):
        train_a_little(tmp_path, stops_at=2)
    monkeypatch.setattr(optimize, "SAVE_EVERY", 3600.0)
    values, path = train_a_little(tmp_path, stops_at=0)  # the first step is not taken again
    assert values == expected
    assert not path.exists()


@pytest.mark.slow
def test_pictures_that_are_looked_at_give_the_cached_hidden_states(quick):
    from transformers import CLIPVisionModel

    split = study.splits(study.QUICK, quick)["validation"]
    model = CLIPVisionModel.from_pretrained(quick / "vision")
    indices, layers = torch.tensor([3, 1, 3]), (4, 7)
    looked = LookingTower(split, layers, model)(indices)
    torch.testing.assert_close(looked, CachedTower(split, layers)(indices), rtol=2e-3, atol=2e-3)
    assert not list(LookingTower(split, layers, model).parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pictures", "tokens"), [("medium", 6000, 324), ("large", 60000, 576)])
def test_a_larger_study_runs(name, pictures, tokens, tmp_path):
    """Sizes are read at the import, so in a process of its own: the tower, one step of a run, and one question."""
    code = f"""
        import dataclasses
        from pathlib import Path
        import transformers
        from benchmarks.spatial import language, scenes, store, study, train
        assert study.FULL.name == {name!r} and study.FULL.pictures[0] == ("train", {pictures})
        assert study.visual_tokens(study.STOCK) == {tokens}
        here = Path("models")
        here.mkdir()
        # The most points of the fullest scene have a place each, in however few.
        for places in range(language.FEWEST_PLACES, language.MOST_PLACES + 1):
            assert scenes.MOST_OBJECTS * (2 + places // 16) <= places, places
        once = dataclasses.replace(study.QUICK, vision_steps=1, matching_steps=min(1, study.QUICK.matching_steps))
        study.pretrain_vision(once, here)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**language.config_values())).save_pretrained(
            here / "language"
        )
        seen, asked = store.Split("train", 2, here), store.Split(study.TEST, 1, here)
        found = train.run("saep", 0, here / "vision", here / "language", seen, asked, (1, 1), 2, (1e-3, 1e-3))
        assert all(0 < loss < 20 for loss in found.losses), found
        assert sum(map(len, found.correct.values())) >= 5
    """
    environment = {**os.environ, sizes.VARIABLE: name, "PYTHONPATH": str(ROOT)}
    done = warm.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    # Where captions train the upper half, labels trained the lower one by itself.
    assert (tmp_path / "models" / "lower").exists() == (name == "medium")


def test_a_photograph_can_be_the_background(monkeypatch):
    """No two pictures have the same part of it, and the objects are on top."""
    monkeypatch.setattr(scenes, "SIZES", dataclasses.replace(sizes.SIZES, has_photographs=True))
    images = [numpy.array(draw(SCENES[0], random.Random(seed))).astype(int) for seed in range(4)]
    covered = sum(pixels_of(images[0], thing).sum() for thing in SCENES[0])
    for image in images[1:]:
        same = (image == images[0]).all(-1)
        assert covered <= same.sum() < 0.5 * same.size


@pytest.mark.slow
def test_hidden_states_are_those_of_llavas_tower(quick):
    from llava.constants import IMAGE_TOKEN_INDEX

    from benchmarks.spatial.train import IMAGE, build

    assert IMAGE == IMAGE_TOKEN_INDEX
    split = study.splits(study.QUICK, quick)["validation"]
    model = build("tokenpacker:layers=4+7", quick / "vision", quick / "language")
    tower = model.get_vision_tower().float()
    images = tower.image_processor([split.picture(index) for index in range(3)], return_tensors="pt")["pixel_values"]
    cached = CachedTower(split, tower.projector_layers)(torch.arange(3))
    assert cached.shape == (3, 144, 2 * vision.WIDTH)
    torch.testing.assert_close(cached, tower(images), rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_the_export_is_what_llava_reads(quick, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["spatial", "--quick", "--export", str(tmp_path)])
    command.main()
    import json

    records = json.loads((tmp_path / f"{study.TEST}-questions.json").read_text())
    assert len(records) == 8
    with Image.open(tmp_path / "images" / records[0]["image"]) as drawn:
        assert drawn.size == (IMAGE_SIZE, IMAGE_SIZE)
    turns = records[0]["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    assert turns[0]["value"].startswith("<image>\n")


def test_dialogues_are_learned_where_the_assistant_speaks():
    scene = SCENES[0]
    turns = list(ask(scene, random.Random(0)).values())
    ids, labels = language.encode_dialogue(language.encode(caption(scene)), turns)
    words = {number: word for word, number in language.VOCABULARY.items()}
    learned = " ".join(words[label] for label in labels if label != language.IGNORE)
    assert learned == " ".join(f"{answer} </s>" for _, answer in turns)
    assert all(label in (language.IGNORE, number) for number, label in zip(ids, labels))


@pytest.mark.parametrize("difficulty", [0.0, 1.0])
def test_the_llm_is_told_what_the_scene_holds(difficulty):
    embed = torch.nn.Embedding(len(language.VOCABULARY), 64)
    model = SimpleNamespace(get_input_embeddings=lambda: embed)
    scene = SCENES[0]
    batch = language.scene_batch(model, [scene], [[("", caption(scene))]], random.Random(0), difficulty)
    told = batch["inputs_embeds"][0]
    assert len(told) == batch["labels"].shape[1] == batch["attention_mask"].shape[1]
    for thing in scene:
        expected = sum(embed.weight[language.VOCABULARY[word]] for word in (thing.colour, thing.shape, thing.letter))
        for axis, value in (("x", thing.x), ("y", thing.y)):
            exact = 4 * value / IMAGE_SIZE
            near = [embed.weight[language.VOCABULARY[f"{axis}{number}"]] for number in range(5)]
            expected = expected + sum(max(0.0, 1 - abs(exact - number)) * near[number] for number in range(5))
        distance = (told - expected).norm(dim=1).min()
        assert distance < 1e-3 if difficulty == 0 else distance > 1e-3


def test_right_answers_are_right_to_the_last_token():
    labels = torch.tensor([[-100, -100, 4, 5], [-100, -100, 4, 5]])
    logits = torch.zeros(2, 4, 8)
    logits[:, 1, 4] = logits[:, 2, 5] = 1.0
    logits[1, 2, 6] = 2.0
    assert language.answered_right(logits, labels).tolist() == [True, False]


@pytest.mark.parametrize("right", [[True], [False] * 5, [True, False, True, True, False, False, True, False, True]])
def test_answers_survive_the_csv(right):
    assert study.from_hex(study.to_hex(right), len(right)) == right


def rows_with(accuracy, seeds=3, questions=600, of="tokenpacker"):
    """Rows as of runs whose types are right so often, each answer by itself."""
    rng = numpy.random.default_rng(0)
    return [
        {
            "study": of, "split": "test", "type": name, "seed": str(seed), "visual_tokens": "36", "family": family,
            "learning_rate": "0.004", "questions": str(questions),
            "correct": study.to_hex((rng.random(questions) < rate).tolist()),
        }
        for name, rate in accuracy.items()
        for seed in range(seeds)
        for family in FAMILIES
    ]  # fmt: skip


def test_intervals_are_as_wide_as_they_should_be():
    results = report.Results(rows_with({"tokenpacker": 0.8, "tokenpacker:layers=7": 0.8}), "tokenpacker")
    estimate, low, high = results.accuracy("tokenpacker", "all")
    assert low < 0.8 < high
    # Answers are independent: 3 seeds x 6 families x 600 questions; seeds and questions are both drawn.
    expected = 2 * 1.96 * (0.8 * 0.2 / (3 * 6 * 600)) ** 0.5
    assert expected < high - low < 2 * expected
    assert estimate == pytest.approx(0.8, abs=0.02)
    difference, low, high = results.difference("tokenpacker:layers=7", "tokenpacker", "position")
    assert low < 0 < high
    assert abs(difference) < 0.04


def test_a_real_difference_is_seen():
    results = report.Results(rows_with({"tokenpacker": 0.8, "tokenpacker:layers=7": 0.7}), "tokenpacker")
    _, low, high = results.difference("tokenpacker:layers=7", "tokenpacker", "all")
    assert -0.13 < low < high < -0.07


@pytest.mark.parametrize("study_has", [0.00025, 0.004])
def test_runs_at_another_rate_are_no_further_seeds(study_has):
    """The study's own rate counts, whatever came first; else the last."""
    other, own = (rows_with({"tokenpacker": accuracy}, seeds=1) for accuracy in (0.2, 0.8))
    rows = (
        [{**row, "learning_rate": "0.002"} for row in other],
        [{**row, "learning_rate": str(study_has)} for row in own],
    )
    in_order = rows if study_has == 0.004 else reversed(rows)  # TokenPacker's rate in the study is 2.5e-4
    results = report.Results([row for part in in_order for row in part], "tokenpacker")
    assert len(results.correct["tokenpacker"]["relative"]) == 1
    assert results.accuracy("tokenpacker", "all")[0] == pytest.approx(0.8, abs=0.05)


def test_mixed_precision_keeps_weights_and_states_in_float32(monkeypatch):
    tower = vision.make_model(layers=1)
    images = torch.randint(256, (2, 3, scenes.IMAGE_SIZE, scenes.IMAGE_SIZE), dtype=torch.uint8)
    states = {}
    for is_mixed in (False, True):
        monkeypatch.setattr(optimize, "_has_bfloat16", lambda device, is_mixed=is_mixed: is_mixed)
        states[is_mixed] = vision.see(tower, images).hidden_states[-1]
    assert states[True].dtype == torch.float32
    assert not torch.equal(states[True], states[False])
    torch.testing.assert_close(states[True], states[False], rtol=0.05, atol=0.05)
    states[True].sum().backward()
    assert {p.grad.dtype for p in tower.parameters() if p.grad is not None} == {torch.float32}


def test_matching_asks_for_the_right_pairs():
    """A matcher that knows the pictures has no loss, one that takes them for their neighbours has a large one."""
    scenes = SCENES[:4]

    class Knowing(torch.nn.Module):
        def forward(self, pixels, named):
            return 50 * F.normalize(named, dim=-1) @ F.normalize(named.roll(self.shift, 0), dim=-1).T

    matcher, rng = Knowing(), random.Random(0)
    matcher.shift = 0
    assert contrastive.loss(matcher, scenes, rng).item() < 0.01
    matcher.shift = 1
    assert contrastive.loss(matcher, scenes, rng).item() > 5


def test_captions_name_kinds_and_neither_letters_nor_places():
    scene = SCENES[0]
    moved = tuple(dataclasses.replace(thing, x=thing.x + 1, letter="A") for thing in scene)
    named = vision.kind_labels(scene)
    assert [kind for kind, there in zip(scenes.KINDS, named) if there] == sorted(
        (thing.name for thing in scene), key=scenes.KINDS.index
    )
    assert torch.equal(vision.kind_labels(moved), named)
    assert not torch.equal(vision.kind_labels(scene[1:]), named)


def test_only_the_upper_half_learns_from_captions():
    lower = vision.make_model(vision.DENSE_LAYER).eval()
    tower = contrastive.on_top_of(lower).eval()
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    states = tower(pixels, output_hidden_states=True).hidden_states
    below = lower(pixels, output_hidden_states=True).hidden_states
    for index, expected in enumerate(below):
        torch.testing.assert_close(states[index], expected)
        assert not states[index].requires_grad
    assert all(state.requires_grad for state in states[len(below) :])
    # What the upper half writes outweighs what it was given.
    assert (states[vision.SELECTED] - states[vision.DENSE_LAYER]).norm() > 5 * states[vision.DENSE_LAYER].norm()


def test_smaller_hidden_states_are_all_that_a_smaller_stream_changes():
    torch.manual_seed(0)
    tower = contrastive.on_top_of(vision.make_model(vision.DENSE_LAYER)).eval()
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    growth = contrastive.growth(tower, SCENES[:2], random.Random(0))
    assert growth > 5
    before = tower(pixels, output_hidden_states=True)
    contrastive.scale_stream(tower, 0.5)
    after = tower(pixels, output_hidden_states=True)
    for large, small in zip(before.hidden_states, after.hidden_states):
        assert (2 * small - large).norm() < 0.01 * large.norm()
    assert (after.pooler_output - before.pooler_output).norm() < 0.01 * before.pooler_output.norm()


def test_what_a_type_would_cost_is_what_the_benchmark_counts():
    stock = flops.mlp2x_gelu(24, 1024, 4096).forward
    for name, large in (
        ("saep", "saep"),
        ("saep:stride=3,blocks_before=2", "saep:stride=3,blocks_before=2"),
        (study.PLAIN_SAEP, "saep:blocks_before=0,blocks_after=0,layers=12+16+22+23"),
        (f"saep:readout_size={sizes.SIZES.llm_width // 2}", "saep:readout_size=2048"),
        ("tokenpacker:scale_factor=3", "tokenpacker:scale_factor=3"),
    ):
        expected = flops.projector(Subject(large), 24, 1024, 4096).forward / stock
        assert cost.part_of_stock(name) == pytest.approx(expected, rel=1e-6)
    # As many queries as patches per region of 2x2, and eight layers in place of one.
    assert cost.part_of_stock("resampler:num_queries=36") > cost.part_of_stock("resampler:num_queries=16")
    assert cost.part_of_stock(study.STF) > cost.part_of_stock("stf:layers=4+7")
    assert cost.part_of_stock("mlp2x_gelu") == 1


def test_a_type_in_7b_has_the_depth_and_the_sizes_of_7b():
    assert cost.in_7b("mlp2x_gelu") == "mlp2x_gelu"
    assert cost.in_7b("resampler:num_queries=36") == "resampler:num_queries=144"
    narrow = study.with_options(study.MAX_SAEP, stride=3, **study.NARROW)
    assert cost.in_7b(narrow) == "saep:blocks_before=4,inner_size=512,layers=23,level_norm=none,stride=3"
    # Written in two ways, it is measured once.
    assert cost.in_7b("saep:stride=2") == cost.in_7b("saep") == "saep"
    assert cost.in_7b(study.STF) == "stf:layers=0+3+6+9+13+16+19+23"


@pytest.mark.slow
def test_every_compared_type_was_timed(tmp_path, monkeypatch, capsys):
    times = cost.times()
    for name in cost.compared():
        for what, batch in cost.MEASURES:
            middle, low, high = times[name, what, batch]
            assert 0 < low <= middle <= high, name
    path, types = tmp_path / "times.csv", ["avg_pool"]
    monkeypatch.setattr(cost, "compared", lambda: types)
    monkeypatch.setattr(cost, "MEASURES", (("forward", 1), ("forward+backward", 1)))
    monkeypatch.setattr(cost, "GROUP", 1)
    monkeypatch.setattr(sys, "argv", ["cost", "--csv", str(path), "--seconds", "0"])
    cost.main()
    once = path.read_text()
    # What the CSV has is not measured again.
    types.append("pixel_shuffle")
    cost.main()
    assert path.read_text().startswith(once)
    found = cost.times(path)
    assert set(found) == {(name, what, 1) for name in ("mlp2x_gelu", *types) for what, _ in cost.MEASURES}
    assert len(read_rows(path, "ratio")) == 4
    assert found["mlp2x_gelu", "forward", 1] == (1, 1, 1)
    # Times of two machines are never one table.
    path.write_text(path.read_text().replace(cost.machine(path), "another machine"))
    with pytest.raises(SystemExit):
        cost.main()
    assert "has times of another machine" in capsys.readouterr().err


def test_every_type_has_a_learning_rate_that_was_tried():
    for one in study.STUDIES.values():
        for name, rate in one.configurations:
            assert any(rate in rates for tried, rates in study.RATES.items() if study.kind(tried) == study.kind(name))
    for name, tried in (
        ("saep:stride=3,blocks_after=1", "saep"),
        ("saep:stride=3,blocks_after=0,blocks_before=0", study.PLAIN_SAEP),
        ("saep:level_norm=none,shortcut=average", study.DEEP_SAEP),
        (study.with_stride(study.UNNORMED, 3), study.UNNORMED),
        (study.ONE_BEFORE, study.MAX_SAEP),
    ):
        assert study.at_best_rate(name) == ((name, study.BEST_RATE[tried]),)


def test_options_of_a_type_are_replaced_and_sorted():
    name = study.with_options("saep:stride=3,layers=4+7,shortcut=none", layers=(7,), shortcut=None, blocks_after=2)
    assert name == "saep:blocks_after=2,layers=7,stride=3"


@pytest.mark.parametrize(("scale", "results"), [("small", "spatial.csv"), ("medium", "spatial-medium.csv")])
def test_the_learning_rates_are_those_that_the_results_show(scale, results):
    found = {}
    for row in read_rows(command.RESULTS / results, "stage1_loss"):
        if row["study"] == study.RATE and row["type"] in study.ALL_RATES[scale]:
            by_rate = found.setdefault(row["type"], {})
            by_rate.setdefault(float(row["learning_rate"]), []).append(float(row["accuracy"]))
    assert {name: tuple(sorted(by_rate)) for name, by_rate in found.items()} == study.ALL_RATES[scale]
    chosen = study.ALL_BEST_RATES[scale]
    assert chosen == {name: max(found[name], key=lambda rate: sum(found[name][rate])) for name in chosen}
    near_chance = {"avg_pool", "pixel_shuffle"} if scale == "medium" else set()
    assert found.keys() - chosen.keys() == near_chance


def test_the_best_learning_rates_of_the_small_scale_have_neighbours():
    for name, rates in study.ALL_RATES["small"].items():
        assert min(rates) < study.ALL_BEST_RATES["small"][name] < max(rates)


def test_a_report_of_learning_rates_alone(tmp_path):
    rows = [
        row
        for row in read_rows(command.RESULTS / "spatial.csv", "stage1_loss")
        if row["study"] in (study.DEPTH, study.RATE)
    ]
    # The best in bold, rates that were not tried left empty.
    assert "| `tokenpacker` | 65.1% | **66.0%** | 64.9% |  |" in report.write_report(rows, tmp_path / "rates.csv")
    assert not (tmp_path / "rates.png").exists()


def test_a_report_of_a_comparison_that_was_interrupted(tmp_path):
    rates = {"mlp2x_gelu": 0.8, "saep:stride=2": 0.8, "avg_pool:stride=2": 0.7, "tokenpacker:scale_factor=3": 0.6}
    rows = rows_with(rates, of="comparison")
    for row in rows:
        row["visual_tokens"] = {"mlp2x_gelu": "144", "tokenpacker:scale_factor=3": "16"}.get(row["type"], "36")
    depth = [row for row in read_rows(command.RESULTS / "spatial.csv", "stage1_loss") if row["study"] == study.DEPTH]
    lines = report.write_report([*depth, *rows], tmp_path / "part.csv").splitlines()
    leads = lines[lines.index("| type | tokens | `avg_pool` |") + 2 :]
    assert leads[0].startswith("| `saep:stride=2` | 36 | +")
    assert leads[1] == "| `tokenpacker:scale_factor=3` | 16 |  |"


@pytest.mark.parametrize("document", ["benchmarks/README.md", "docs/choosing.md"])
def test_documents_say_what_the_comparison_found(document):
    results = comparison()
    text = (command.RESULTS.parents[1] / document).read_text()
    for name in results.types:
        estimate, *interval = (f"{100 * value:.1f}" for value in results.accuracy(name, "all"))
        if document.startswith("docs"):
            assert f"{estimate} ({' to '.join(interval)})" in text, name
        elif study.kind(name) in ("saep", "tokenpacker") and "level_norm=none,stride" not in name:
            points = "{:+.1f} ({:+.1f} to {:+.1f})".format(
                *(100 * value for value in results.difference(name, "mlp2x_gelu", "all"))
            )
            assert f"| {estimate} % | {points} |" in text, name


def comparison():
    rows = [row for row in read_rows(command.RESULTS / "spatial.csv", "stage1_loss") if row["study"] == "comparison"]
    assert {row["split"] for row in rows} == {study.TEST}
    return report.Results(rows, "comparison")


@pytest.mark.parametrize("stride", [2, 3])
def test_saep_leads_as_documents_say(stride):
    results = comparison()
    best = study.with_stride("saep", stride)
    without_norm = study.with_stride(study.UNNORMED, stride)
    counts = (results.tokens[best], results.tokens["mlp2x_gelu"])
    for other in {name for name in results.types if results.tokens[name] in counts} - {best, without_norm}:
        assert results.difference(best, other, "all")[1] > 0, other
    assert results.accuracy(best, "detail")[0] > results.accuracy("mlp2x_gelu", "detail")[0] - 0.05
    operations = cost.part_of_stock(best)
    assert operations < {2: 0.6, 3: 0.4}[stride]
    assert f"{operations:.2f}" in (command.RESULTS.parents[1] / "docs" / "choosing.md").read_text()


def test_documents_say_what_the_harder_scale_found():
    rows = read_rows(command.RESULTS / "spatial-medium.csv", "stage1_loss")
    text = (command.RESULTS.parent / "spatial" / "README.md").read_text().partition("## The harder scale")[2]
    probed = {(row["type"], row["family"]): float(row["accuracy"]) for row in rows if row["study"] == study.DEPTH}

    def falls(what):
        return tuple(round(100 * probed[f"hidden state {layer}", what]) for layer in (4, 7))

    found = [f"{value} %" for what in ("position", "letter", "contents") for value in falls(what)]
    assert says(text, "position", *found[:2], "letters", *found[2:4], "contents", *found[4:])
    finalists = report.Results(rows, "finalists")
    for name in ("saep", study.with_options("saep", layers=study.ONE_LAYER)):
        found = [
            f"{100 * finalists.accuracy(study.with_stride(name, 2), metric)[0]:.1f} %" for metric in ("all", "detail")
        ]
        assert all(figure in text for figure in found), found
    results = report.Results(rows, "comparison")
    for name in results.types:
        row = [f"{100 * results.accuracy(name, metric)[0]:.1f} %" for metric in ("all", "position", "detail")]
        line = next(line for line in text.splitlines() if f"| {results.tokens[name]} | {' | '.join(row)} |" in line)
        assert line.split(" | ")[1] == str(len(results.correct[name]["relative"])), name
    rates = {}
    for row in rows:
        if row["study"] == study.RATE:
            rates.setdefault((row["type"], float(row["learning_rate"])), []).append(float(row["accuracy"]))
    tried = {"avg_pool": 2e-3, "pixel_shuffle": 2e-3}
    for name, rate in {**study.ALL_BEST_RATES["medium"], **tried}.items():
        assert f"{100 * sum(rates[name, rate]) / len(FAMILIES):.1f} %" in text, name
    whole = report.Results([row for row in rows if row["learning_rate"] == "0.002"], "comparison")
    for name in ("avg_pool", "pixel_shuffle"):
        found = [100 * whole.accuracy(study.with_stride(name, stride), "all")[0] for stride in (2, 3)]
        assert "{:.1f} % and {:.1f} %".format(*found) in text, name


@pytest.mark.parametrize("stride", [2, 3])
def test_saep_leads_at_the_harder_scale(stride):
    rows = read_rows(command.RESULTS / "spatial-medium.csv", "stage1_loss")
    results = report.Results(rows, "comparison")
    assert results.split == study.TEST
    best = study.with_stride("saep", stride)
    assert len(results.correct[best]["relative"]) == 3
    both = {study.with_stride("saep", either) for either in (2, 3)}
    for other in {name for name in results.types if results.tokens[name] >= results.tokens[best]} - both:
        for metric in ("all", "position", "detail"):
            assert results.difference(best, other, metric)[1] > 0, (other, metric)
    text = (command.RESULTS.parent / "spatial" / "README.md").read_text().partition("## The harder scale")[2]
    leads = [
        "{:.1f} ({:.1f} to {:.1f})".format(
            *(100 * value for value in results.difference(best, study.with_stride(study.STF, stride), metric))
        )
        for metric in ("all", "position")
    ]
    assert all(lead in text for lead in leads), leads


def test_documents_say_what_the_options_gave():
    rows = [row for row in read_rows(command.RESULTS / "spatial.csv", "stage1_loss") if row["study"] == "options"]
    results = report.Results(rows, "options")
    plain, deep, deepest = study.PLAIN_SAEP, study.DEEP_SAEP, study.MAX_SAEP
    with_max = study.with_options(plain, shortcut=None)

    def percent(name, metric="all"):
        return round(100 * results.accuracy(name, metric)[0])

    def points(name, other):
        return 100 * results.difference(name, other, "all")[0]

    text = (command.RESULTS.parent / "spatial" / "README.md").read_text()
    letters = [percent(study.with_options(name, stride=s), "detail") for s in (None, 3) for name in (plain, with_max)]
    before, with_it, before_3, with_it_3 = (f"{rate} %" for rate in letters)
    assert says(text, "letters", before, with_it, "a quarter", before_3, with_it_3, "a ninth")
    assert percent(deepest) == percent(study.with_stride(deepest, 3))
    lead = f"{points(deepest, plain):.0f} points"
    assert says(text, f"{percent(deepest)} %", "a quarter", "a ninth", lead, "plain SAEP", "a quarter")
    after = points(study.with_options(plain, blocks_after=8, layers=study.ONE_LAYER), plain)
    assert says(text, "Blocks behind the stride alone", f"({after:.1f})")
    narrow = points(deep, study.with_options(deep, readout_size=sizes.SIZES.llm_width // 2))
    assert says(text, "Half the readout's width", f"{narrow:.1f} points")
    one, narrow = (
        [percent(name), percent(study.with_stride(name, 3))]
        for name in (study.ONE_BEFORE, study.with_options(deepest, **study.NARROW))
    )
    other = percent("c_abstractor"), percent("c_abstractor:stride=3")
    one, narrow, other = ([f"{rate} %" for rate in rates] for rates in (one, narrow, other))
    assert says(text, one[0], "a quarter", one[1], "a ninth", "half the inner width", *narrow, "`c_abstractor`", *other)


def test_documents_say_what_the_finalists_gave():
    rows = [row for row in read_rows(command.RESULTS / "spatial.csv", "stage1_loss") if row["study"] == "finalists"]
    results = report.Results(rows, "finalists")
    assert {len(results.correct[name]["relative"]) for name in results.types} == {3}
    text = (command.RESULTS.parent / "spatial" / "README.md").read_text()
    text = text.partition("**What was chosen on validation**")[2].partition("\n- ")[0]
    half = len(results.types) // 2
    for both in zip(results.types[:half], results.types[half:]):
        assert "{:.1f} % and {:.1f} %".format(*(100 * results.accuracy(name, "all")[0] for name in both)) in text, both

    def points(name, other):
        return [
            100 * value
            for stride in (2, 3)
            for value in results.difference(study.with_stride(name, stride), study.with_stride(other, stride), "all")
        ]

    with_max = study.with_options(study.PLAIN_SAEP, shortcut=None)
    for name, other in ((with_max, study.PLAIN_SAEP), ("saep", study.UNNORMED), ("saep", "c_abstractor")):
        assert "{:.1f} ({:.1f} to {:.1f}) and {:.1f} ({:.1f} to {:.1f}) points".format(*points(name, other)) in text
    _, low, high, _, low_3, high_3 = points("saep", study.with_options("saep", layers=study.ONE_LAYER))
    # "within the interval"
    assert low < 0 < high
    assert low_3 < 0 < high_3


def test_documents_say_what_small_widths_want():
    rows = [row for row in read_rows(command.RESULTS / "spatial.csv", "stage1_loss") if row["study"] == "small_width"]
    results = report.Results(rows, "small_width")
    assert {len(results.correct[name]["relative"]) for name in results.types} == {3}
    published, more_heads, scaled, both = results.types

    def percent(name, metric="all"):
        return f"{100 * results.accuracy(name, metric)[0]:.1f} %"

    text = (command.RESULTS.parent / "spatial" / "README.md").read_text()
    points = "{:.1f} ({:.1f} to {:.1f})".format(*(100 * p for p in results.difference(more_heads, published, "all")))
    absolute = [percent(name, "absolute") for name in (more_heads, published)]
    heads = ("`head_size=32`", percent(more_heads), percent(published), f"{points} points")
    assert says(text, *heads, "absolute position", *absolute, "`init=scaled`", percent(scaled), percent(both))
