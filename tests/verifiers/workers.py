"""Functions for the workers of `test_pool.py`. Loaded in a worker by path: no imports of Whorl."""

import os
import socket
import subprocess
import sys
import time

LOADED_AT_START = sorted(sys.modules)


def work(what: str, *arguments):
    return globals()[what](*arguments)


def add(a, b):
    return a + b


def sleep(seconds):
    time.sleep(seconds)


def compute():
    return len(str(3**30_000_000 % 7)) + compute()


def spin():
    while True:
        pass


def exhaust_memory(num_bytes):
    return len(bytearray(num_bytes))


def vanish():
    os._exit(7)


def fail():
    raise KeyError("no such key")


def lie():
    """Answers for this call and, in advance, for the next."""
    for descriptor in range(3, 10):
        try:
            os.write(descriptor, (2).to_bytes(8, "little") + b"42")
        except OSError:
            continue
    return 0


def shout():
    print("this must not reach the protocol")
    os.write(1, b"nor this")
    return "quiet"


def modules():
    return LOADED_AT_START


def environment():
    return dict(os.environ)


def process_id():
    return os.getpid()


def misdeeds(secret):
    """Forbidden things that succeeded."""
    done = []
    for name, action in {
        "read": lambda: os.open(secret, os.O_RDONLY),
        "write": lambda: os.open(secret, os.O_WRONLY),
        "create": lambda: os.open(secret + ".new", os.O_WRONLY | os.O_CREAT),
        "shell": lambda: subprocess.run(["true"]),
        "socket": lambda: socket.socket(),
        "kill": lambda: os.kill(os.getppid(), 0),
        "environ": lambda: os.open(f"/proc/{os.getppid()}/environ", os.O_RDONLY),
    }.items():
        try:
            action()
        except OSError:
            continue
        done.append(name)
    return done
