"""Starts scripts at once: it has imported what takes seconds, and each script runs in a copy of it (a fork).

Reads a JSON line for each, {"argv", "cwd", "env", "out", "err"}, and answers with its exit status.
"""

import atexit
import json
import os
import runpy
import sys
import threading
import traceback

import numpy  # noqa: F401
import soundfile  # noqa: F401
import torch
import torch.distributed  # noqa: F401
import torch.nn.parallel  # noqa: F401
import torch.utils.data  # noqa: F401
import torchaudio  # noqa: F401


def run(argv: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> int:
    """Run a script as Python does, up to its exit status; output goes to files."""
    for fd, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.path[0], status = argv, os.path.dirname(argv[0]), 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int) and end.code is not None:
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            os._exit(run(**json.loads(line)) & 255)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
