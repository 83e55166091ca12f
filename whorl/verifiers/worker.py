"""The loop of a worker process: read a request, call the function, answer; started by `pool.py` as a script.

Requests are pickles (they come from the run, which is trusted), answers are JSON (they come from a process
that has handled model text, which is not). Imports nothing of Whorl, so that no worker pays for torch.
"""

import fcntl
import importlib.util
import json
import os
import pickle
import select
import signal
import sys


def main() -> None:
    settings = json.loads(sys.argv[1])
    sys.path[:] = settings["path"]
    end_with_the_other_end_of(settings["lifeline"])
    replies = os.fdopen(os.dup(1), "wb")
    requests = os.fdopen(os.dup(0), "rb")
    # What the function prints, or tries to read, must not touch the protocol.
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)

    def reply(**fields: object) -> None:
        text = json.dumps(fields).encode()
        replies.write(len(text).to_bytes(8, "little") + text)
        replies.flush()

    try:
        function = getattr(load("target", settings["file"]), settings["function"])
        load("confine", settings["confine"]).confine(**settings["limits"])
    except Exception as error:
        reply(call="ready", error=describe(error))
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    reply(call="ready", value=True)
    while header := requests.read(8):
        call, arguments, deadline_seconds = pickle.loads(requests.read(int.from_bytes(header, "little")))
        # If the run dies, nobody is left to kill us. Where pipes send no signals, the unhandled alarm does.
        signal.setitimer(signal.ITIMER_REAL, deadline_seconds + 5)
        try:
            fields = {"value": function(*arguments)}
        except Exception as error:
            fields = {"error": describe(error)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(call=call, **fields)


def end_with_the_other_end_of(pipe: int) -> None:
    """Let the kernel end this process, whatever is running, when the run that holds the other end is gone.

    It sends SIGIO, which nobody handles. Nothing may ever be written to that pipe: a write signals too, and as
    late as the writer is scheduled, perhaps after what it wrote was read. So the requests have another one.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(pipe, 0)
    if poll.poll(0):  # it was closed before we listened
        os._exit(0)


def load(name: str, file: str):
    """A module from a file, without importing the package it lies in."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, f"{file} is not a Python file"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


if __name__ == "__main__":
    main()
