"""Checkpoints to break, and what has to become of them."""

import json
import shutil

import pytest

from llava_projectors.export.convert import export_checkpoint
from llava_projectors.export.errors import ExportError


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A copy to break, with its config as `edit` changes it; None removes a setting."""

    def make(**edit):
        folder = tmp_path / "in" / "llava-copy"
        shutil.copytree(trained("saep").checkpoint, folder)
        config = json.loads((folder / "config.json").read_text())
        config = {key: value for key, value in {**config, **edit}.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture
def refused(tmp_path):
    """Export a folder, which has to fail and to leave nothing behind."""

    def check(folder, match, error=ExportError, **arguments):
        target = tmp_path / "outputs" / "out"
        with pytest.raises(error, match=match):
            export_checkpoint(str(folder), target, **arguments)
        assert not target.parent.exists() or list(target.parent.iterdir()) == []

    return check
