"""Starts stage scripts without paying for ``import torch`` each time.

Reads requests as JSON lines from stdin. For each it forks a process that has all modules imported already and runs the
real script as ``__main__``; that process can be signalled and killed like any other. This process itself computes
nothing, so that the children start with fresh random state and no threads.
"""

import atexit
import gc
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import av  # noqa: F401
import jiwer  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import num2words  # noqa: F401
import numpy  # noqa: F401
import PIL.Image  # noqa: F401
import pydantic.main  # noqa: F401
import soundfile  # noqa: F401
import soxr  # noqa: F401
import tokenizers  # noqa: F401
import torch
import torch._dynamo
import torch.utils.tensorboard
import torchaudio.functional  # noqa: F401

import omni.export.bundle
import omni.stages
import omni.train.cli
import omni.train.loop  # noqa: F401

ROOT = str(Path(__file__).resolve().parent.parent)


def use_modules_of(root: str) -> None:
    """Import our modules from another copy of the repository."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "omni"]:
        del sys.modules[name]
    sys.path[:] = [root] + [path for path in sys.path if path != ROOT]


def child(request: dict) -> None:
    os.setsid()
    for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(name, flags, 0o644), number)
    sys.stdin = open(0)
    sys.stdout = open(1, "w", buffering=1)
    sys.stderr = open(2, "w", buffering=1)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = request["argv"]
    if (root := request["root"]) != ROOT:
        use_modules_of(root)
    torch.set_num_threads(1)
    exec(compile(request["prelude"], "<prelude>", "exec"), {"__name__": "prelude"})
    try:
        if sys.argv[0] == "-c":
            exec(compile(sys.argv.pop(1), "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking a thousand torch modules apart would take longer than the run


def main() -> None:
    # A short run would spend most of its time on this, which shows after a power cut only. Tests that look at it see
    # the calls.
    os.fsync = lambda descriptor: None
    gc.freeze()  # the children share these pages as long as no process writes to them
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            ended, status = os.waitpid(request["wait"], request["options"])
            print(json.dumps(os.waitstatus_to_exitcode(status) if ended else None), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            child(request)
        print(json.dumps(pid), flush=True)


if __name__ == "__main__":
    main()
