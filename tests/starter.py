"""Starts scripts at once: it has imported what takes seconds, and each script runs in a copy of it (a fork).

Reads JSON lines. {"argv", "cwd", "env", "out", "err"} starts a script; the answer is its process number.
{"pid"} asks how that script ended: null while it runs, else its exit status, or minus the signal that ended
it.
The program "torchrun" is PyTorch's, and the processes that it starts are copies, too.
"""

import atexit
import importlib
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback

# What the scripts import, and what torch imports when an optimizer is first made
PRELOADED = """numpy soundfile tqdm torch torch._dynamo torch.distributed.run torch.nn.parallel torchaudio
    torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler""".split()


def run(argv: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> int:
    """Run a script as Python does, up to its exit status; its output is added to files."""
    os.closerange(3, 1024)  # torchrun's sockets: a copy must not keep them open
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # as the environment says
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = argv
    status = 0
    try:
        if argv[0] == "torchrun":
            torchrun(out, err)
        else:
            sys.path[0] = os.path.dirname(argv[0])
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def fork(**request) -> int:
    """Start a script in a copy of this process, as a group of its own; returns its process number."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os._exit(run(**request) & 255)
    try:
        os.setpgid(child, child)  # also here: a signal to the group may come before the copy does anything
    except OSError:
        pass  # it has done so itself, and may even have ended
    return child


def status_of(pid: int) -> int | None:
    """How a child of this process ended, None while it runs."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    if not ended:
        return None
    return os.waitstatus_to_exitcode(status)


def torchrun(out: str, err: str) -> None:
    """PyTorch's torchrun, which starts copies where it would start Python anew."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
    from torch.distributed.run import main

    class Copy:
        """As much of subprocess.Popen as torchrun uses."""

        def __init__(self, args: tuple[str, ...], env: dict[str, str], **_):
            argv = list(args[args.index("-u") + 1 :])  # python -u script ...
            self.pid = fork(argv=argv, cwd=os.getcwd(), env=env, out=out, err=err)
            self.returncode = None

        def poll(self) -> int | None:
            if self.returncode is None:
                self.returncode = status_of(self.pid)
            return self.returncode

        def wait(self, timeout: float = math.inf) -> int:
            end = time.monotonic() + timeout
            while self.poll() is None:
                if time.monotonic() > end:
                    raise subprocess.TimeoutExpired("copy", timeout)
                time.sleep(0.01)
            return self.returncode

    subprocess_handler.Popen = Copy
    main(sys.argv[1:])


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    running = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            answer = status_of(request["pid"])
            if answer is not None:
                running.remove(request["pid"])
        else:
            answer = fork(**request)
            running.add(answer)
        print(json.dumps(answer), file=answers, flush=True)
    for pid in running:  # the tests have ended without them
        os.kill(pid, signal.SIGKILL)
