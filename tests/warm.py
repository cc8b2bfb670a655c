"""Python in forks of one process that has imported torch and transformers, which takes most of a short run's time.

That process neither imports LLaVA nor has the plugin armed. A fork arms it as the start-up file does, and
goes on as `python -c` or `python -m` would. Tests of the start itself, of what happens while torch is
imported, and runs with a `sitecustomize` of their own take fresh processes.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path
from types import ModuleType

from llava_projectors import autoload


def run(command, *, cwd=None, env=None, **_):
    """Stand in for `subprocess.run` with `[python, "-c", script]` or `[python, "-m", module, …]`.

    The output is always captured as text. Other arguments of `subprocess.run` have no effect.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder) / "stdout", Path(folder) / "stderr"
        status = call(command, *streams, cwd=cwd, env=env)
        stdout, stderr = (path.read_text(errors="replace") for path in streams)
    return subprocess.CompletedProcess(command, status, stdout, stderr)


def call(command, stdout, stderr, *, cwd=None, env=None):
    """Run a command with its output in two files, which may be one; returns the exit status."""
    for stream in (stdout, stderr):
        Path(stream).write_text("")
    job = {
        "arguments": list(map(str, command[1:])),
        "streams": [str(stdout), str(stderr)],
        "cwd": str(cwd or os.getcwd()),
        "environment": dict(os.environ if env is None else env),
    }
    process = warm_process()
    print(json.dumps(job), file=process.stdin, flush=True)
    return int(next(line for line in process.stdout if line.startswith("status ")).split()[1])


@cache
def warm_process():
    """The process that forks, one for each process of tests; it ends when that one closes its stdin."""
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, autoload.DISABLE_VARIABLE: "1"},
    )


def serve():
    """One line of JSON on stdin for each job, its exit status on stdout."""
    import transformers.models.clip.modeling_clip
    import transformers.models.llama.modeling_llama
    import transformers.trainer  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(perform(**json.loads(line)))
        _, status = os.waitpid(child, 0)
        print("status", os.waitstatus_to_exitcode(status), flush=True)


def perform(arguments, streams, cwd, environment):
    """Start as an interpreter does, and run a script or a module; returns the exit status."""
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[0:1] = ["", *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    importlib.invalidate_caches()
    autoload.arm_from_environment()
    kind, text, *rest = arguments
    sys.argv = [text if kind == "-m" else kind, *rest]
    status = 1
    try:
        if kind == "-m":
            runpy.run_module(text, run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(text, "<string>", "exec"), vars(sys.modules["__main__"]))
        status = 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            status = end.code or 0
        else:
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    serve()
