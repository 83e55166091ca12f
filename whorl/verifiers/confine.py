"""Give up, from inside a child process, every right that judging or running model text has no use for.

Standard library only, and nothing of Whorl, so that a child is confined a few milliseconds after it starts.
What it takes away, in this order, each step irrevocable and inherited over exec:

    resource limits     CPU seconds, address space, size of a file, open files, no core dumps; tasks on demand
    privileges          `no_new_privs`; for root also every capability (the mount, reboot and kill rights), and
                        on demand its user id
    files (Landlock)    only the named paths can be read or written, so no home, no /proc, no keys;
                        on recent kernels also no TCP and no signals to processes outside
    calls (seccomp)     no new process, no socket, no signal to another process, no ptrace, no mount, no
                        change of mode or owner, no shared memory that outlives the process (x86-64 only)

None of it needs root, a container or a user namespace. On other systems than Linux only the resource limits
hold; `whorl.verifiers.sandbox.protections` tells what a child on this machine is really refused. Programs get
namespaces of their own around this, where bubblewrap works (`bubblewrap.py`).

As a script, `python confine.py '{"cpu_seconds": 5, ...}' COMMAND...` confines itself and becomes COMMAND.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import struct
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
_CLONE_NEWUSER = 0x10000000
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture

# linux/landlock.h: bit 0 execute, 1 write file, 2 read file, 3 read directory, 4-12 remove and make,
# 13 refer (interface version 2), 14 truncate (3), 15 ioctl on devices (5).
_READ = 0b1101
_FILE_RIGHTS = 0b1100_0000_0000_0111
_RIGHTS_OF_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}

# asm/unistd_64.h. Calls that reach another process, the network, or state that outlives this process.
_DENIED_X86_64 = {
    "fork vfork": (57, 58),
    "kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo": (62, 200, 234, 129, 297),
    "pidfd_send_signal pidfd_open pidfd_getfd process_madvise kcmp": (424, 434, 438, 440, 312),
    "ptrace process_vm_readv process_vm_writev": (101, 310, 311),
    "setpriority sched_setparam sched_setscheduler sched_setaffinity": (141, 142, 144, 203),
    "sched_setattr ioprio_set migrate_pages move_pages": (314, 251, 256, 279),
    "socket socketpair": (41, 53),
    "shmget shmat semget msgget mq_open memfd_create memfd_secret": (29, 30, 64, 68, 240, 319, 447),
    "chmod fchmod chown fchown lchown fchownat fchmodat fchmodat2": (90, 91, 92, 93, 94, 260, 268, 452),
    "utime utimes futimesat utimensat": (132, 235, 261, 280),
    "setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr": (188, 189, 190, 197, 198, 199),
    "setxattrat removexattrat file_setattr": (463, 466, 469),
    "mount umount2 pivot_root chroot unshare setns swapon swapoff": (165, 166, 155, 161, 272, 308, 167, 168),
    "open_tree move_mount fsopen fsconfig fsmount fspick mount_setattr": (428, 429, 430, 431, 432, 433, 442),
    "add_key request_key keyctl bpf perf_event_open userfaultfd": (248, 249, 250, 321, 298, 323),
    "io_uring_setup io_uring_enter io_uring_register": (425, 426, 427),
    "reboot kexec_load kexec_file_load init_module finit_module delete_module": (
        169,
        246,
        320,
        175,
        313,
        176,
    ),
    "settimeofday clock_settime clock_adjtime adjtimex sethostname": (164, 227, 305, 159, 170),
    "acct quotactl syslog name_to_handle_at open_by_handle_at": (163, 179, 103, 303, 304),
}
_CLONE, _CLONE3, _PRLIMIT64, _CLONE_THREAD = 56, 435, 302, 0x00010000
_AUDIT_ARCH_X86_64, _X32_BIT = 0xC000003E, 0x40000000


def confine(
    *,
    memory_mib: int,
    file_mib: int,
    readable: Sequence[str],
    writable: Sequence[str] = (),
    cpu_seconds: int | None = None,
    num_tasks: int | None = None,
    user: int | None = None,
) -> None:
    """Confine the calling process, for good. What the system does not offer is skipped.

    `num_tasks` limits processes and threads together. The kernel counts them per user and user namespace and
    lets root have any number, so it is for a process in a namespace of its own, or that becomes `user`: a
    number that nobody has. OSError if it may not become that user.
    """
    limits = {"AS": memory_mib << 20, "FSIZE": file_mib << 20, "NOFILE": 128, "CORE": 0}
    if cpu_seconds is not None:
        limits["CPU"] = cpu_seconds
    if num_tasks is not None:
        limits["NPROC"] = num_tasks
    for name, limit in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        if name != "AS" or sys.platform == "linux":  # macOS refuses a limit on the address space
            # A second past the soft CPU limit, whose signal tells its cause, comes a kill without a name.
            resource.setrlimit(kind, (limit, limit + 1 if name == "CPU" and limit != hard else limit))
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        libc.unshare(_CLONE_NEWUSER)  # in which no number but its own exists, and that one has no name
    if user is not None or os.geteuid() == 0:
        _drop_capabilities(libc)
    _restrict_files(libc, readable, writable)
    _restrict_calls(libc)


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Empty all capability sets; the bounding set first, so that root's next exec regains nothing."""
    for capability in range(64):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    libc.capset(struct.pack("<Ii", 0x20080522, 0), bytes(24))


def _restrict_files(libc: ctypes.CDLL, readable: Sequence[str], writable: Sequence[str]) -> None:
    """Deny every path but the given ones, by Landlock."""
    version = libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return
    handled = _RIGHTS_OF_VERSION.get(version, (1 << 16) - 1)
    # Rights of files, then TCP (bind, connect), then what may not leave (abstract sockets, signals).
    attributes = struct.pack("<QQQ", handled, 0b11, 0b11)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = libc.syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0)
    if ruleset < 0:
        return
    for paths, rights in ((readable, _READ), (writable, handled)):
        for path in paths:
            try:
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue  # a path that is not there needs no permission
            allowed = rights & handled if os.path.isdir(path) else rights & handled & _FILE_RIGHTS
            libc.syscall(_LANDLOCK_ADD, ruleset, 1, struct.pack("<Qi", allowed, descriptor), 0)
            os.close(descriptor)
    libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def _restrict_calls(libc: ctypes.CDLL) -> None:
    """Refuse the system calls of the table (EPERM), and new processes though not new threads."""
    if platform.machine() != "x86_64":
        return
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06  # linux/bpf_common.h
    allow, kill, refuse, unknown = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    number_at, arch_at, argument_at = 0, 4, 16  # offsets in struct seccomp_data
    program = [
        (load, 0, 0, arch_at),
        (equal, 1, 0, _AUDIT_ARCH_X86_64),  # a 32-bit call has other numbers and would slip through
        (give, 0, 0, kill),
        (load, 0, 0, number_at),
        (at_least, 0, 1, _X32_BIT),
        (give, 0, 0, kill),
    ]
    for numbers in _DENIED_X86_64.values():
        for number in numbers:
            program += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    # clone3 hides its flags behind a pointer: "no such call" makes the C library use clone instead.
    program += [(equal, 0, 1, _CLONE3), (give, 0, 0, unknown)]
    program += [(equal, 0, 4, _CLONE), (load, 0, 0, argument_at), (any_bit, 1, 0, _CLONE_THREAD)]
    program += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    # prlimit on oneself is how getrlimit works; on another process it could starve the run that judges.
    program += [(equal, 0, 4, _PRLIMIT64), (load, 0, 0, argument_at), (equal, 1, 0, 0)]
    program += [(give, 0, 0, refuse), (give, 0, 0, allow), (give, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in program))
    header = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code))
    libc.prctl(_PR_SET_SECCOMP, 2, header, 0, 0)


def main() -> None:
    """Become the command on the command line, confined, and die with the thread that started us."""
    settings = json.loads(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)
    confine(**settings)
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
