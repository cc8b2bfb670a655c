"""Compile the fused kernels for GPUs that are not here: `python tests/compile_kernels.py WIDTH STRIDE`.

Prints one line for each kernel and architecture: its name, the architecture, bytes of spilled registers.
In a process of its own, because the tests run Triton's interpreter.
"""

import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from benchmarks.speed import region_attention
from llava_projectors.projectors.layers import head_count

ARCHITECTURES = (80, 90, 100)
INTEGERS = ("height", "width", "rows", "columns")


def spilled_bytes(kernel, architecture, constants):
    types = {name: "i32" if name in INTEGERS else "*bf16" for name in kernel.arg_names}
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): n for name, n in constants.items()})
    ptx = triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        name = re.search(r"\.target (\w+)", ptx)[1]
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", report)))


def main(width, stride):
    constants = region_attention.block_sizes(head_count(width), width, stride)
    for kernel in (region_attention._forward, region_attention._backward):
        for architecture in ARCHITECTURES:
            print(kernel.__name__, architecture, spilled_bytes(kernel, architecture, constants), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
