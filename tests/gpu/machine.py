"""The first step of `run.py`: whether the packages are there, the hook is armed, and the device answers."""

import importlib
import platform
import sys
from importlib import metadata

import torch

# Distribution -> what is imported of it.
PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "numpy": "numpy",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "peft": "peft",
    "deepspeed": "deepspeed",
    "bitsandbytes": "bitsandbytes",
    "flash-attn": "flash_attn",
    "llava-torch": "llava.train.train",
    "llava-projectors": "llava_projectors",
}
OPTIONAL = ("bitsandbytes", "flash-attn")  # the tests that need them skip, and say so


def main(device: str) -> int:
    """Print a line for each; the exit status is 1 where something needed is missing."""
    print(f"Python {platform.python_version()} on {platform.platform()}")
    armed = "llava_projectors.autoload" in sys.modules
    print(f"start-up file of llava-projectors: {'ran' if armed else 'DID NOT RUN'}")
    found = {name: is_usable(name, module) for name, module in PACKAGES.items()}
    if device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        print(f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    square = torch.ones(64, 64, device=device)
    assert (square @ square).sum().item() == 64**3
    return int(not armed or not all(found[name] for name in PACKAGES if name not in OPTIONAL))


def is_usable(name: str, module: str) -> bool:
    """Print the version, or why the package cannot be imported."""
    try:
        version = metadata.version(name)
        importlib.import_module(module)
    except Exception as error:  # whatever a package does at import
        print(f"{name}: {type(error).__name__}: {error}")
        return False
    print(f"{name} {version}")
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
