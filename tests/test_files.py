"""The one reader of what lies on disk: shapes from headers, and one line for every file that cannot be used."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from llava_projectors import ProjectorSpecError, ProjectorWeightsError, build_projector, files
from llava_projectors.commands.check import check
from llava_projectors.commands.cli import main

TENSORS = {
    "half": torch.arange(12.0).reshape(3, 4).half(),
    "brain": torch.ones(2, dtype=torch.bfloat16),
    "number": torch.tensor(3.0),
    "nothing": torch.zeros(0, 5, dtype=torch.int64),
    "truth": torch.tensor([True, False]),
}


def save(folder, name, tensors):
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    return folder / name


def shard(folder, form, tensors):
    """Two shards and their index."""
    names = sorted(tensors)
    stem, extension = form.split(".")
    shard_of = {}
    for number, part in enumerate((names[0::2], names[1::2]), 1):
        file = f"{stem}-{number:05d}-of-00002.{extension}"
        save(folder, file, {name: tensors[name] for name in part})
        shard_of.update(dict.fromkeys(part, file))
    index = folder / f"{form}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return index


@pytest.mark.parametrize("form", files.STEMS)
@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_are_those_that_were_saved(tmp_path, form, sharded):
    (shard if sharded else save)(tmp_path, form, TENSORS)
    found = files.checkpoint_tensors(tmp_path)
    assert found.keys() == TENSORS.keys()
    for name, stored in found.items():
        assert (stored.shape, stored.dtype) == (tuple(TENSORS[name].shape), TENSORS[name].dtype)
        assert torch.equal(stored.read(), TENSORS[name])


def test_numbers_are_not_read(tmp_path):
    """A terabyte, of which the disk holds the header alone: neither read nor mapped into memory."""
    size = 10**12
    header = json.dumps({"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    stored = files.checkpoint_tensors(tmp_path)["w"]
    assert (stored.shape, stored.dtype) == ((size // 2,), torch.bfloat16)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", ["model.safetensors", "mm_projector.bin"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "it is empty; copy it again"),
        (lambda data: data[:4], "it is truncated or of another format (4 bytes; "),
        (lambda data: data[: len(data) // 2], "it is truncated or of another format ("),
        (lambda data: data[:-1], "it is truncated or of another format ("),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer, not the file itself"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, damage, message):
    path = save(tmp_path, name, TENSORS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ProjectorWeightsError) as error:
        files.stored_tensors(path)
    assert one_line(error).startswith(f"cannot read {path}: {message}")


def test_a_missing_file_is_named(tmp_path):
    for name in ("model.safetensors", "mm_projector.bin"):
        with pytest.raises(ProjectorWeightsError, match=f"cannot read .*{name}: No such file or directory"):
            files.stored_tensors(tmp_path / name)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "cannot read .*model.safetensors.index.json: Expecting property name"),
        ("[]", "cannot read .*model.safetensors.index.json: it holds a list, not an object"),
        ("{}", "model.safetensors.index.json has no weight_map of names"),
        ('{"weight_map": []}', "has no weight_map of names"),
        ('{"weight_map": {"half": 1}}', "has no weight_map of names"),
        ('{"weight_map": {"half": "b"}}', "lacks b, 1 of the 1 shards that model.safetensors.index.json names"),
    ],
)
def test_a_broken_index_is_named(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ProjectorWeightsError, match=message) as error:
        files.checkpoint_tensors(tmp_path)
    one_line(error)


def test_shards_are_all_looked_at(tmp_path):
    index = shard(tmp_path, "model.safetensors", TENSORS)
    shard_of = json.loads(index.read_text())
    shard_of["weight_map"]["lost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(shard_of))
    with pytest.raises(ProjectorWeightsError, match="says that model-00001-of-00002.safetensors has 'lost', but it"):
        files.checkpoint_tensors(tmp_path)
    index.unlink()
    with pytest.raises(ProjectorWeightsError, match="its shards have no index"):
        files.checkpoint_tensors(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "cannot read .*config.json: it holds a list, not an object of settings; copy it again"),
        ("null", "it holds a NoneType, not"),
        ("{", "cannot read .*config.json: Expecting"),
        ("[" * 100_000, "cannot read .*config.json: "),
        ("\0", "cannot read .*config.json: "),
        (None, "cannot read .*config.json: there is no such file; pass a folder that has one"),
    ],
)
def test_configs_that_are_none(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ProjectorSpecError, match=message) as error:
        files.read_config(tmp_path)
    one_line(error)
    picture, folder = tmp_path / "picture.png", str(tmp_path)
    Image.new("RGB", (8, 8)).save(picture)
    for command in (
        ["check", "saep", "--model-path", folder],
        ["export", folder, str(tmp_path / "out")],
        ["show", str(picture), "--model-path", folder],
    ):
        assert main(command) == 1
        printed = capsys.readouterr().err.strip()
        assert str(tmp_path / "config.json") in printed
        assert len(printed.splitlines()) == 1


# `check` on what was read


@pytest.fixture
def checkpoint(trained, tmp_path):
    folder = tmp_path / "llava"
    shutil.copytree(trained("saep").checkpoint, folder)
    return folder


def test_check_sees_that_a_shard_of_the_llm_is_missing(checkpoint):
    whole = {name: stored.read() for name, stored in files.checkpoint_tensors(checkpoint).items()}
    (checkpoint / "model.safetensors").unlink()
    ours = {name: value for name, value in whole.items() if "mm_projector" in name}
    save(checkpoint, "model-00001-of-00002.safetensors", ours)
    shard_of = {name: f"model-0000{1 if name in ours else 2}-of-00002.safetensors" for name in whole}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    with pytest.raises(ProjectorWeightsError, match="lacks model-00002-of-00002.safetensors, 1 of the 2 shards"):
        check(None, str(checkpoint))


@pytest.mark.parametrize(("channels", "width"), [(1152, 3584), (1024, 4096), (32, 80), (768, 768)])
@pytest.mark.parametrize("type_string", ["saep", "tokenpacker", "c_abstractor", "avg_pool", "saep:layers=1+2+3"])
def test_an_adapter_tells_its_own_sizes(tmp_path, channels, width, type_string):
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build_projector(type_string, channels, width).named_parameters()}
    small = {f"model.mm_projector.{name}": torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    path = save(tmp_path, "mm_projector.bin", small)
    assert check(type_string, adapter=str(path))[-1] == f"adapter: {path}, fits, and all its numbers are finite"
    other = {"saep": "saep:stride=4", "saep:layers=1+2+3": "saep:layers=2+3"}.get(type_string)
    if other:
        with pytest.raises(ProjectorWeightsError, match="no vision tower and LLM give weights of these shapes"):
            check(other, adapter=str(path))
