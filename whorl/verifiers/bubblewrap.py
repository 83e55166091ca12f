"""Namespaces of its own for a program, by bubblewrap (`bwrap`) where that is installed and may work.

Inside, nothing exists but the program: no other process, no network (not even a loopback interface that is up),
no file but Python, the system's libraries and a private directory in memory, which has a size and is gone with
the program. Around and within it `confine.py` holds as it does without bubblewrap. The whole tree of processes
dies with its first one, however deep a daemon has hidden.

Where we are root, the program becomes a user whom nobody else is: the kernel exempts root from limits on the
number of tasks, also a root that a user namespace calls by another name.
"""

import functools
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

DIRECTORY = "/program"
"""The program's private directory, as it sees it. Not /tmp, where Whorl or Python may lie."""
_NOBODY = "65534"
_FIRST_UNUSED_USER, _NUM_UNUSED_USERS = 0x70000000, 0x0FFFFFFF
"""User numbers far above those of people, services and containers. Each run takes one at random."""
_NAMESPACES = ("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")


@dataclass(frozen=True)
class Bubblewrap:
    """How it is called here: `other_user` where root lets the program become somebody else."""

    path: str
    other_user: bool

    @property
    def user(self) -> int | None:
        """For `confine`: whom the next program becomes."""
        return _FIRST_UNUSED_USER + secrets.randbelow(_NUM_UNUSED_USERS) if self.other_user else None

    def command(
        self, readable: Sequence[str], directory_mib: int, files: dict[str, int], info: int
    ) -> list[str]:
        """The words before the command that is to run inside.

        `readable` paths keep their place, read-only. `files` are put into the directory from the descriptors
        given for their names. What bubblewrap did is written to the descriptor `info`, as JSON.
        """
        if self.other_user:
            words = ["--cap-drop", "ALL"]
            for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):  # given up in `confine`
                words += ["--cap-add", capability]
        else:
            words = ["--unshare-user", "--uid", _NOBODY, "--gid", _NOBODY]
        words += [*_NAMESPACES, "--die-with-parent", "--new-session", "--info-fd", str(info)]
        kept = _outermost(readable)
        parents = {str(parent) for path in kept for parent in PurePath(path).parents[:-1]}
        for path in sorted(parents):  # made by bubblewrap on its own, they would be root's alone
            words += ["--perms", "0755", "--dir", path]
        for path in kept:
            device = path.startswith("/dev/")
            words += ["--dev-bind-try" if device else "--ro-bind-try", path, path]
        words += ["--perms", "0777", "--size", str(directory_mib << 20), "--tmpfs", DIRECTORY]
        for name, descriptor in files.items():
            words += ["--perms", "0444", "--file", str(descriptor), f"{DIRECTORY}/{name}"]
        return [self.path, *words, "--remount-ro", "/", "--chdir", DIRECTORY, "--"]


def _outermost(paths: Sequence[str]) -> list[str]:
    """The paths without those that lie in another one of them."""
    return sorted(p for p in set(paths) if not any(p.startswith(f"{q}/") for q in paths))


@functools.cache
def find(python: str, readable: tuple[str, ...]) -> tuple[Bubblewrap | None, str]:
    """Bubblewrap as it works on this machine, found out by starting `python` in it; else None and why not."""
    if sys.platform != "linux":
        return None, "bubblewrap needs Linux"
    path = shutil.which("bwrap")
    if path is None:
        return None, "bubblewrap is not installed"
    reason = ""
    for other_user in [True, False] if os.geteuid() == 0 else [False]:
        bubblewrap = Bubblewrap(path, other_user)
        reason = _fault(bubblewrap, python, readable)
        if not reason:
            return bubblewrap, ""
    return None, f"bubblewrap is installed but does not work here: {reason}"


def _fault(bubblewrap: Bubblewrap, python: str, readable: Sequence[str]) -> str:
    """Why Python does not start as it should; empty if it does."""
    user = bubblewrap.user
    become = f"import os; os.setgroups([]); os.setresgid({user}, {user}, {user}); os.setresuid({user}, {user}, {user})"
    again = f"os.execv({python!r}, [{python!r}, '-S', '-c', 'print(1)'])"
    script = f"{become}; {again}" if user is not None else "print(1)"
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        run = subprocess.run(
            [*bubblewrap.command(readable, 1, {}, null), python, "-S", "-c", script],
            capture_output=True, text=True, timeout=60, env={}, stdin=subprocess.DEVNULL, pass_fds=(null,),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    finally:
        os.close(null)
    return "" if run.stdout == "1\n" else (run.stderr.strip() or f"exit {run.returncode}")[-200:]
