"""What `make cuda-kit` runs: everything that a machine with a GPU and no network has to be given, in one archive."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_MIB = 32
DEEPSPEED = "deepspeed==0.16.9"  # has no wheels, and its setup imports torch
# manylinux platforms are matched one by one.
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_24_x86_64", "manylinux_2_28_x86_64")
# bitsandbytes has a library for every version of CUDA and ROCm; the one kept is for CUDA 13.0.
LIBRARIES, KEPT = "bitsandbytes/libbitsandbytes_*.so", "libbitsandbytes_cuda130.so"


def main() -> None:
    """Download, build, trim, pack, and say how large it is."""
    kit = Path(sys.argv[1])
    shutil.rmtree(kit, ignore_errors=True)
    site, built = kit / "site", kit / "built"
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, DEEPSPEED, ROOT)
    target = ["--target", site, "--only-binary", ":all:", "--python-version", "3.12"]
    for platform in PLATFORMS:
        target += ["--platform", platform]
    requirements = ROOT / "tests" / "gpu" / "requirements.txt"
    pip("install", "--no-deps", "--no-compile", *target, "-r", requirements, *sorted(built.glob("*.whl")))
    for library in site.glob(LIBRARIES):
        if library.name != KEPT:
            library.unlink()
    archive = kit / "site.tar.xz"
    with tarfile.open(archive, "w:xz") as packed:
        packed.add(site, "site")
    shutil.rmtree(site)
    shutil.rmtree(built)
    size = archive.stat().st_size / 2**20
    print(f"{archive}: {size:.1f} MiB")
    if size > LIMIT_MIB:
        sys.exit(f"that is over {LIMIT_MIB} MiB")


def pip(*arguments: object) -> None:
    """Run pip of this interpreter."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
