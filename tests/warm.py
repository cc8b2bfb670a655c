"""LLaVA's training script in forks of one process that has imported torch and transformers: most of a run's time.

That process neither imports LLaVA nor has the plugin armed. A fork arms it as the start-up file does, and
runs the script as `python -m` would. Tests of the start itself, and runs in another environment, take
processes of their own.
"""

import json
import os
import runpy
import subprocess
import sys
import traceback

from llava_projectors import autoload


class WarmProcess:
    """Runs commands one after the other; started by the first."""

    def __init__(self):
        self.process = None

    def run(self, command, log):
        """`[python, "-m", module, *arguments]` with its output in `log`; returns the exit status."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "TRANSFORMERS_OFFLINE": "1", autoload.DISABLE_VARIABLE: "1"},
            )
        _, _, module, *arguments = command
        disabled = os.environ.get(autoload.DISABLE_VARIABLE, "")
        job = {"module": module, "arguments": arguments, "log": str(log), "disabled": disabled}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return int(next(line for line in self.process.stdout if line.startswith("status ")).split()[1])

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def serve():
    """One line of JSON on stdin for each job, its exit status on stdout."""
    import transformers.models.clip.modeling_clip
    import transformers.models.llama.modeling_llama
    import transformers.trainer  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(perform(json.loads(line)))
        _, status = os.waitpid(child, 0)
        print("status", os.waitstatus_to_exitcode(status), flush=True)


def perform(job):
    """Run the module as a script; returns its exit status."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ[autoload.DISABLE_VARIABLE] = job["disabled"]
    autoload.arm_from_environment()
    sys.argv, sys.path[0] = [job["module"], *job["arguments"]], ""
    status = 0
    try:
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    serve()
