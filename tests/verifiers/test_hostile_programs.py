"""Hostile programs on real processes: none earns a reward, does harm, outlasts its limit or leaves anything."""

import contextlib
import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.verifiers.conftest import use
from tests.verifiers.hostile import ESCAPE, FORGERY, HARM, VANDALISM
from whorl.verifiers import sandbox
from whorl.verifiers.program import Assertion, Example, verify_program
from whorl.verifiers.sandbox import Backend, Limits, run_program

LIMITS = Limits(wall_seconds=5.0, cpu_seconds=1, memory_mib=256)
SHORT = replace(LIMITS, wall_seconds=0.5)
"""For programs that do not end by themselves."""
GRACE_SECONDS = 20.0
"""What a busy machine may need on top of the limit."""


class Scene:
    """What there is to find and to break."""

    def __init__(self, folder: Path) -> None:
        self.secret, self.mark = f"SECRET-{secrets.token_hex(16)}", f"mark-{secrets.token_hex(8)}"
        self.outside = folder / "outside"
        (self.outside / "folder").mkdir(parents=True)
        (self.outside / "secret").write_text(self.secret)
        (self.outside / "folder" / "more").write_text("more")
        self.servers = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
        self.servers[1].bind(f"\0whorl-{self.mark}")
        self.servers[1].listen()
        for server in self.servers:
            threading.Thread(target=self._serve, args=(server,), daemon=True).start()

    def _serve(self, server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.sendall(self.secret.encode())

    def program(self, source: str) -> str:
        port = str(self.servers[0].getsockname()[1])
        for name, value in {
            "OUTSIDE": str(self.outside), "OURS": str(os.getpid()), "PORT": port, "MARK": self.mark,
        }.items():  # fmt: skip
            source = source.replace(name, value)
        return source

    def state(self) -> list[tuple]:
        paths = [self.outside, *sorted(self.outside.rglob("*"))]
        told = [(str(p), os.lstat(p)) for p in paths]
        content = [p.read_bytes() for p in paths if stat.S_ISREG(os.lstat(p).st_mode)]
        return [*((p, s.st_mode, s.st_uid, s.st_size, s.st_mtime_ns) for p, s in told), tuple(content)]

    def left_behind(self) -> list[str]:
        """Processes of a program, given the time to die, and its files."""
        deadline = time.monotonic() + 10
        while (found := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        places = ("/usr/lib", "/etc", "/", "/dev/shm", "/var/tmp")
        return found + [f"{p}/whorl-{self.mark}" for p in places if Path(p, f"whorl-{self.mark}").exists()]

    def _processes(self) -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    told = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if self.mark.encode() in told:
                    found.append(entry.name)
        return found


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    monkeypatch.setenv("A_SECRET_KEY", scene.secret)
    monkeypatch.setenv("HOME", str(scene.outside))
    original = sandbox.environment_of_children
    # On everything that is started for a program, so that what is left of it can be found.
    monkeypatch.setattr(sandbox, "environment_of_children", lambda: {**original(), "A_MARK": scene.mark})
    yield scene
    for server in scene.servers:
        server.close()


def judge(scene: Scene, source: str, limits: Limits = LIMITS) -> str:
    """The verdict on a program, and that it did and left nothing."""
    before, temporary, affinity = scene.state(), set(os.listdir("/tmp")), os.sched_getaffinity(0)
    start = time.monotonic()
    tests = [Example("3\n" * 100_000, scene.secret), Example("4\n", scene.secret)]
    score = verify_program(scene.program(source), tests, limits)
    seconds = time.monotonic() - start
    assert score.reward == 0.0, score
    assert score.parts == {"passed_frac": 0.0}
    assert scene.secret not in score.why.partition("got ")[2]
    # One run, or two if the program ends by itself.
    assert seconds < 2 * limits.wall_seconds + GRACE_SECONDS
    assert scene.left_behind() == []
    assert scene.state() == before
    left = {name for name in set(os.listdir("/tmp")) - temporary if name.startswith("whorl-program-")}
    assert left == set()
    assert os.sched_getaffinity(0) == affinity
    return score.why


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", HARM)
def test_no_program_can_take_more_than_it_is_given(scene: Scene, name: str) -> None:
    why = judge(scene, HARM[name], SHORT)
    if "allocated" in why:
        assert int(why.partition("allocated ")[2].split("\\")[0]) < LIMITS.memory_mib << 20


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ESCAPE)
def test_no_program_can_reach_what_it_is_not_given(scene: Scene, name: str) -> None:
    judge(scene, ESCAPE[name])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", VANDALISM)
def test_no_program_can_change_what_is_not_its_own(scene: Scene, name: str) -> None:
    judge(scene, VANDALISM[name])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", FORGERY)
def test_no_program_can_talk_its_way_to_a_reward(scene: Scene, name: str) -> None:
    judge(scene, FORGERY[name])


@pytest.mark.parametrize("name", ["reads files", "reads through another program", "talks to the network"])
def test_the_same_programs_find_the_secret_when_nothing_holds_them(
    scene: Scene, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The negative control: the suite can fail."""
    (tmp_path / "confine.py").write_text("import os, sys; os.execv(sys.argv[2], sys.argv[2:])")
    monkeypatch.setattr(sandbox, "_HERE", tmp_path)
    use(monkeypatch, Backend(None, "a test took it away"))
    assert run_program(scene.program(ESCAPE[name]), limits=Limits(60.0)).stdout.strip() == scene.secret


def test_what_a_program_leaves_is_found_when_nothing_holds_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The negative control of `left_behind` and `state`."""
    (tmp_path / "confine.py").write_text("import os, sys; os.execv(sys.argv[2], sys.argv[2:])")
    monkeypatch.setattr(sandbox, "_HERE", tmp_path)
    use(monkeypatch, Backend(None, "a test took it away"))
    before = scene.state()
    run_program(scene.program(HARM["daemon"].replace("600", "12")), limits=Limits(60.0))
    left = scene._processes()
    assert left
    source = f"open({str(scene.outside / 'secret')!r}, 'a').write('was here')"
    run_program(source, limits=Limits(60.0))
    assert scene.state() != before
    for process_id in map(int, left):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)


RIGGED = {
    "an error that reads like a verdict": 'def f(x): raise AssertionError(\'\\x1e["passed", ""]\\x1epassed\\x1f\')',
    "a number that equals everything": """
class T(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
def f(x): return T(0)""",
    "a number that changes its mind": """
class T(float):
    def __float__(self): return 1.0
    def __eq__(self, other): return True
def f(x): return T(0)""",
    "text that equals everything": "class T(str):\n    __eq__ = lambda s, o: True\ndef f(x): return T('')",
    "a list that lies about itself": """
class T(list):
    def __eq__(self, other): return True
    def __len__(self): return 1
    def __iter__(self): return iter([self])
def f(x): return T()""",
    "an object of every class": """
class T:
    __class__ = int
    def __eq__(self, other): return True
    def __rsub__(self, other): return 0
    def __abs__(self): return 0
def f(x): return T()""",
    "an object that explains itself at length": "class T:\n    __repr__ = lambda s: 'x' * 10**9\ndef f(x): return T()",
    "a huge number": "def f(x): return 1 << (1 << 26)",
    "a number of too many digits to read": "def f(x): return 10**90_000 + 1",
    "a list nested without end": "def f(x):\n    x = []\n    x.append(x)\n    return x",
    "a list nested deeply": "def f(x):\n    x = []\n    for n in range(900): x = [x]\n    return x",
    "numbers that collide": "def f(x): return {n * (2**61 - 1): 0 for n in range(90_000)}",
    "half a character": "def f(x): return '\\ud800'",
    "not a number": "def f(x): return float('nan')",
    "endless output of its own": "import sys\ndef f(x):\n    while True: sys.stdout.write('x' * 1000)",
    "answers without being asked": """
import os, threading
def flood():
    while True:
        for fd in range(3, 20):
            try: os.write(fd, b'{"value": 1}\\n')
            except OSError: pass
threading.Thread(target=flood, daemon=True).start()
def f(x): return 1""",
    "a line without end": """
import os
def f(x):
    while True:
        for fd in range(3, 20):
            try: os.write(fd, b'[' * 65536)
            except OSError: pass""",
    "an object that is called for ever": """
class T:
    def __call__(self, *a): return T()
    def __iter__(self):
        while True: yield 0
    def __getattr__(self, name): return T()
def f(x): return T()""",
    "searches for what is expected": """
import gc, re, sys
def f(x):
    told = [repr(found)[:10000] for found in gc.get_objects()]
    frame = sys._getframe()
    while frame:
        told += [repr(frame.f_locals), repr(frame.f_globals)]
        frame = frame.f_back
    for path in ("/proc/self/cmdline", "/proc/self/environ", "/proc/self/mem", "program.py", "test"):
        try: told.append(open(path).read())
        except OSError: pass
    found = re.search(r"f\\(7\\) == (\\d+)", " ".join(told + sys.argv))
    return int(found[1]) if found else 0""",
    "leaves in the middle of a call": "import os\ndef f(x): os._exit(0)",
    "replaces the names of the test": """
class M:
    def isclose(self, *a, **k): return True
math = M()
def abs(x): return 0
def len(x): return 1
def __eq__(a, b): return True
__builtins__ = {'abs': abs}
def f(x): return 0""",
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", RIGGED)
def test_no_object_of_a_program_passes_for_the_right_one(scene: Scene, name: str) -> None:
    """f(7) should be 46341, by four ways to ask for it."""
    before = scene.state()
    for snippet in (
        "assert f(7) == 46341",
        "assert abs(f(7) - 46341) < 1e-9",
        "y = f(7)\nassert isinstance(y, int) and y in {46341} and not y != 46341",
        "assert [f(7)] == [46341] and str(f(7)) == '46341'",
    )[: 4 if name in list(RIGGED)[:6] else 2]:
        score = verify_program(RIGGED[name], [Assertion(snippet)], replace(LIMITS, wall_seconds=1.0))
        assert score.reward == 0.0, (snippet, score)
    assert scene.left_behind() == []
    assert scene.state() == before


def test_a_program_that_has_to_be_stopped_is_not_tried_again() -> None:
    """Else ten tests of a program that hangs would take ten times its limit."""
    tests = [Example("", str(n)) for n in range(10)]
    start = time.monotonic()
    score = verify_program("import time; time.sleep(600)", tests, Limits(wall_seconds=0.7))
    assert (score.reward, score.parts["passed_frac"]) == (0.0, 0.0)
    assert time.monotonic() - start < 0.7 * 3 + GRACE_SECONDS
    source = "n = input()\nif n == '3':\n    while True: pass\nprint(n)"
    score = verify_program(
        source, [Example(str(n), str(n)) for n in range(1, 9)], Limits(60.0, cpu_seconds=1)
    )
    assert (score.parts["passed_frac"], score.why) == (2 / 8, "test 3: out of CPU time")


@pytest.mark.parametrize("source", ["import time; time.sleep(600)", "while True: pass"])
def test_no_program_outlives_a_run_that_is_killed(scene: Scene, backend: Backend, source: str) -> None:
    alone = (
        "" if backend.wrapper else "sandbox.backend = lambda: sandbox.Backend(None, 'a test asked for it')"
    )
    run = textwrap.dedent(f"""
        from whorl.verifiers import sandbox
        original = sandbox.environment_of_children
        sandbox.environment_of_children = lambda: {{**original(), "A_MARK": {scene.mark!r}}}
        {alone}
        sandbox.run_program({source!r}, limits=sandbox.Limits(wall_seconds=600.0, cpu_seconds=600))
    """)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", run], env=environment) as process:
        deadline = time.monotonic() + 60
        while not scene._processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        assert scene._processes()
        process.kill()
    assert scene.left_behind() == []
