"""Setuptools' build backend, plus the start-up file in every wheel it makes.

Setuptools has no setting that puts a `.pth` at the top of site-packages, in a wheel and in an
editable install alike. Both are wheel files by the time the standard build interface (PEP 517,
PEP 660) hands them over, so the file is added there and listed in RECORD; pip then installs it
and uninstalls it like any other.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import zipfile
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  the rest of the build interface
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

PTH_NAME = "llava_projectors.pth"
# A line of a .pth file runs only when it starts with `import`. It must stay silent and harmless
# when the package is half removed, whatever the reason.
PTH_TEXT = """\
import sys; exec("try:\\n    import llava_projectors.autoload\\nexcept Exception:\\n    pass")
"""


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: Any = None) -> str:
    """Build the wheel and add the start-up file."""
    return _add_pth(wheel_directory, build_meta.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: Any = None) -> str:
    """Build the editable wheel and add the start-up file."""
    return _add_pth(wheel_directory, build_meta.build_editable(wheel_directory, config_settings, metadata_directory))


def _add_pth(wheel_directory: str, wheel_name: str) -> str:
    path = os.path.join(wheel_directory, wheel_name)
    with zipfile.ZipFile(path) as wheel:
        entries = [(info, wheel.read(info)) for info in wheel.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for info, data in entries:
            if info.filename.endswith(".dist-info/RECORD"):
                wheel.writestr(PTH_NAME, PTH_TEXT)
                data += _record_row(PTH_NAME, PTH_TEXT.encode())
            wheel.writestr(info, data)
    return wheel_name


def _record_row(name: str, data: bytes) -> bytes:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    row = io.StringIO()
    csv.writer(row, lineterminator="\n").writerow([name, f"sha256={digest}", len(data)])
    return row.getvalue().encode()
