"""The sandbox itself, with programs that are harmless; hostile ones are in `test_hostile_programs.py`."""

import fcntl
import os
import shutil
import time
import warnings
from pathlib import Path

import pytest

from tests.verifiers.conftest import use
from whorl.verifiers import bubblewrap, program, sandbox
from whorl.verifiers.program import Assertion, Example, verify_program
from whorl.verifiers.sandbox import Backend, Limits, protections, run_program, statement

LIMITS = Limits(wall_seconds=60.0)
DOUBLE = "print(2 * int(input()))"
DOUBLES = [Example("3\n", "6\n"), Example("-1\n", "-2")]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("source", "limits", "ended"),
    [
        ("while True: pass", Limits(wall_seconds=60.0, cpu_seconds=1), "out of CPU time"),
        ("import time; time.sleep(600)", Limits(wall_seconds=0.5), "timed out"),
        ("import os; os.close(1); os.close(2)\nwhile True: pass", Limits(wall_seconds=0.5), "timed out"),
        ("while True: print('x' * 1000)", LIMITS, "too much output"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", LIMITS, "too much output"),
        ("x = bytearray(1 << 30)", LIMITS, "exit 1"),
        ("open('big', 'wb').write(bytes(9 << 20))", LIMITS, "exit 1"),
        ("import os\nwhile True: os.fork()", LIMITS, "exit 1"),
        ("import ctypes; ctypes.string_at(0)", LIMITS, "signal 11"),
        ("import sys; sys.exit(3)", LIMITS, "exit 3"),
    ],
)
def test_every_resource_has_a_limit(source: str, limits: Limits, ended: str) -> None:
    start = time.monotonic()
    assert run_program(source, limits=limits).ended == ended
    assert time.monotonic() - start < 60


def test_a_directory_has_a_size_and_a_number_of_files(backend: Backend) -> None:
    big = "for i in range(40): open(str(i), 'wb').write(bytes(1 << 20))\nprint('all written')"
    run = run_program(big, limits=LIMITS)
    # In memory the write that goes too far fails; on a disk the program is stopped.
    assert run.ended == ("too large files" if backend.wrapper is None else "exit 1"), run
    many = "import time\nfor i in range(1500): open(str(i), 'w')\ntime.sleep(60)"
    assert run_program(many, limits=LIMITS).ended == "too many files"
    fits = "for i in range(300): open(str(i), 'wb').write(bytes(1 << 14))\nprint('all written')"
    assert run_program(fits, limits=LIMITS).stdout == "all written\n"


def test_nothing_is_left_of_a_program_that_is_killed(backend: Backend) -> None:
    run = run_program(
        "import os, time\nprint(os.getpid(), os.getcwd(), flush=True)\ntime.sleep(600)", limits=Limits(2.0)
    )
    process_id, directory = run.stdout.split()
    assert run.ended == "timed out"
    if backend.wrapper is None:
        with pytest.raises(ProcessLookupError):
            os.kill(int(process_id), 0)
        assert not Path(directory).exists()
    else:
        assert (process_id, directory) == ("2", bubblewrap.DIRECTORY)


@pytest.mark.usefixtures("backend")
def test_a_program_may_use_threads_and_its_own_directory() -> None:
    source = (
        "import threading, os\n"
        "t = threading.Thread(target=lambda: open('note', 'w').write('hi'))\n"
        "t.start(); t.join(); print(open('note').read(), sorted(os.listdir('.')))"
    )
    run = run_program(source, limits=LIMITS)
    assert run.stdout == "hi ['note', 'program.py']\n", run


@pytest.mark.usefixtures("backend")
def test_a_program_knows_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET_KEY", "swordfish")
    run = run_program("import os, sys; print(dict(os.environ), sys.path)", limits=LIMITS)
    assert run.succeeded
    assert "swordfish" not in run.stdout
    assert "site-packages" not in run.stdout


def test_directories_of_killed_runs_are_removed_and_no_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "file").write_text("keep me")
    for name in ("abandoned", "in-use", "new"):
        (tmp_path / f"whorl-program-{name}" / "folder").mkdir(parents=True)
        if name != "new":
            os.utime(tmp_path / f"whorl-program-{name}", (0, 0))
    (tmp_path / "whorl-program-link").symlink_to(theirs)
    lock = os.open(tmp_path / "whorl-program-in-use", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    sandbox._remove_abandoned.cache_clear()
    use(monkeypatch, Backend(None, "a test asked for it"))
    assert run_program("print(1)", limits=LIMITS).succeeded
    os.close(lock)
    left = ["theirs", "whorl-program-in-use", "whorl-program-link", "whorl-program-new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert (theirs / "file").read_text() == "keep me"


@pytest.mark.usefixtures("backend")
def test_it_works_for_a_checkout_in_the_folder_for_temporary_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("confine.py", "program_talk.py"):
        shutil.copy(sandbox._HERE / name, tmp_path / name)
    monkeypatch.setattr(sandbox, "_HERE", tmp_path)
    monkeypatch.setattr(program, "_HERE", tmp_path)
    assert run_program("print(1)", limits=LIMITS).stdout == "1\n"
    assert verify_program("def f(): return 1", [Assertion("assert f() == 1")], LIMITS).reward == 1.0


def test_a_program_in_namespaces_is_alone(backend: Backend) -> None:
    if backend.wrapper is None:
        pytest.skip("without bubblewrap there are no namespaces")
    source = """
import os
def listing(path):
    try: return sorted(os.listdir(path))
    except OSError: return None
def is_open(fd):
    try: os.fstat(fd)
    except OSError: return False
    return True
print(os.uname().nodename == {!r}, [fd for fd in range(99) if is_open(fd)], listing("/proc"), listing("/home"))
"""
    run = run_program(source.format(os.uname().nodename), limits=LIMITS)
    assert run.stdout.endswith("[0, 1, 2] None None\n"), run


@pytest.mark.usefixtures("backend")
def test_on_linux_everything_that_a_program_might_try_is_refused() -> None:
    assert set(protections().values()) == {True}, protections()
    assert "Every forbidden thing tried was refused" in statement()


@pytest.mark.usefixtures("same_user")
def test_the_same_holds_in_a_user_namespace_as_those_use_it_who_are_not_root() -> None:
    refused = dict(protections())
    threads = refused.pop("starting hundreds of threads")
    assert set(refused.values()) == {True}
    # The kernel counts no tasks of root, also where a namespace calls it by another name.
    assert threads == (os.geteuid() != 0)
    assert ("NOT refused here: starting hundreds of threads." in statement()) == (not threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if not threads else "error")
        assert verify_program(DOUBLE, DOUBLES, LIMITS).reward == 1.0
        assert verify_program("def f(): return 1", [Assertion("assert f() == 1")], LIMITS).reward == 1.0


def test_the_probe_sees_what_is_allowed_when_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The negative control: without confinement the same probe finds the doors open, and a run warns."""
    toothless = tmp_path / "confine.py"
    toothless.write_text("import os, sys; os.execv(sys.argv[2], sys.argv[2:])")
    monkeypatch.setattr(sandbox, "_HERE", tmp_path)
    use(monkeypatch, Backend(None, "a test took it away"))
    try:
        found = protections()
        assert not found["starting processes"]
        assert not found["reading files outside"]
        assert not found["writing files outside"]
        assert "(a test took it away)" in statement()
        assert "NOT refused here: reading files outside, writing files outside" in statement()
        with pytest.warns(UserWarning, match="does not keep them from reading files outside"):
            verify_program(DOUBLE, DOUBLES, LIMITS)
    finally:
        for function in (sandbox.protections, program._warn_of_missing_protections):
            function.cache_clear()


def test_bubblewrap_that_may_not_work_here_is_passed_over_and_the_reason_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forbidden = tmp_path / "bwrap"
    forbidden.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    forbidden.chmod(0o755)
    for path, reason in (
        (str(tmp_path), "bubblewrap is installed but does not work here: bwrap: No permissions to create"),
        (str(tmp_path / "empty"), "bubblewrap is not installed"),
    ):
        monkeypatch.setenv("PATH", path)
        bubblewrap.find.cache_clear()
        found, why = bubblewrap.find(sandbox._python(), sandbox.readable_paths())
        assert found is None
        assert why.startswith(reason)
        use(monkeypatch, Backend(found, why))
        assert f"in no namespaces of their own ({reason}" in statement()
        assert verify_program(DOUBLE, DOUBLES, LIMITS).reward == 1.0
    bubblewrap.find.cache_clear()


def test_no_warning_where_all_protections_hold() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verify_program(DOUBLE, DOUBLES, LIMITS)
