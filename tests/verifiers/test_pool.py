import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from whorl.verifiers.pool import Failure, Pool

WORKERS = Path(__file__).with_name("workers.py")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(WORKERS, "work", num_workers=2, memory_mib=512) as pool:
        yield pool


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_call_returns_what_the_function_returns_and_reuses_its_worker(pool: Pool) -> None:
    assert pool.call("add", 2, 3, deadline_seconds=60) == 5
    first = pool.call("process_id", deadline_seconds=60)
    assert pool.call("process_id", deadline_seconds=60) == first != os.getpid()


def test_a_call_that_overruns_its_deadline_is_killed_and_the_pool_goes_on(pool: Pool) -> None:
    before = pool.call("process_id", deadline_seconds=60)
    start = time.monotonic()
    result = pool.call("sleep", 600, deadline_seconds=0.3)
    assert isinstance(result, Failure)
    assert result.kind == "timed out"
    assert time.monotonic() - start < 60
    assert not is_alive(before)
    assert pool.call("add", 1, 1, deadline_seconds=60) == 2


@pytest.mark.parametrize(
    ("arguments", "kind", "detail"),
    [
        (("fail",), "raised", "KeyError: 'no such key'"),
        (("exhaust_memory", 4 << 30), "raised", "MemoryError"),
        (("vanish",), "worker died", "exit status 7"),
        (("lie",), "worker died", "nonsense"),
    ],
)
def test_a_call_without_a_result_says_why(pool: Pool, arguments: tuple, kind: str, detail: str) -> None:
    result = pool.call(*arguments, deadline_seconds=60)
    assert isinstance(result, Failure)
    assert result.kind == kind
    assert detail in str(result)
    assert pool.call("add", 20, 3, deadline_seconds=60) == 23


def test_what_a_function_prints_does_not_disturb_the_answers(pool: Pool) -> None:
    assert pool.call("shout", deadline_seconds=60) == "quiet"
    assert pool.call("add", 1, 2, deadline_seconds=60) == 3


def test_messages_larger_than_a_pipe_arrive_whole_up_to_a_limit_on_answers(pool: Pool) -> None:
    long = "b" * 500_000
    assert pool.call("add", long, "c", deadline_seconds=60) == long + "c"
    too_long = pool.call("add", "b" * (2 << 20), "c", deadline_seconds=60)
    assert too_long == Failure("worker died", "it answered more than 1 MiB")


def test_a_worker_has_neither_torch_nor_our_environment_nor_the_run_of_the_machine(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("swordfish")
    loaded = pool.call("modules", deadline_seconds=60)
    assert not {"torch", "numpy", "whorl"} & set(loaded)
    monkeypatch.setenv("A_SECRET_KEY", "swordfish")
    with Pool(WORKERS, "work", num_workers=1) as fresh:
        assert "A_SECRET_KEY" not in fresh.call("environment", deadline_seconds=60)
        assert fresh.call("misdeeds", str(secret), deadline_seconds=60) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret"]


def test_many_threads_share_a_pool_and_each_gets_its_own_answer(pool: Pool) -> None:
    def one(i: int) -> object:
        if i % 20 == 7:
            return pool.call("vanish", deadline_seconds=60)
        return pool.call("add", i, 1000, deadline_seconds=60)

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(one, range(60)))
    for i, result in enumerate(results):
        assert isinstance(result, Failure) if i % 20 == 7 else result == i + 1000
    assert len(pool.process_ids) <= 2


def test_closing_a_pool_kills_its_workers_also_a_busy_one() -> None:
    pool = Pool(WORKERS, "work", num_workers=2)
    idle = pool.call("process_id", deadline_seconds=60)
    with ThreadPoolExecutor(1) as thread:
        busy = thread.submit(pool.call, "sleep", 600, deadline_seconds=600)
        time.sleep(0.3)
        pool.close()
        assert isinstance(busy.result(60), Failure)
    assert pool.process_ids == []
    assert not is_alive(idle)
    with pytest.raises(ValueError, match="closed"):
        pool.call("add", 1, 1, deadline_seconds=60)


def test_a_function_that_cannot_be_loaded_is_a_failure_that_says_so(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import a_package_that_is_not_there")
    with Pool(broken, "work", num_workers=1) as pool:
        result = pool.call(deadline_seconds=60)
    assert isinstance(result, Failure)
    assert "a_package_that_is_not_there" in result.detail


def ends(process_id: int, seconds: float = 30) -> bool:
    """Whether a process ends within the time. One without a parent that waits for it stays as a zombie."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("busy_with", ["('sleep', 600)", "('compute',)", "('spin',)"])
def test_no_worker_outlives_a_run_that_is_killed_while_it_is_busy(tmp_path: Path, busy_with: str) -> None:
    """Asleep, deep in C where no Python runs, or in an endless loop: long before its deadline of ten minutes."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
            import threading, time
            from pathlib import Path
            from whorl.verifiers.pool import Pool
            pool = Pool(Path({str(WORKERS)!r}), "work", num_workers=1)
            print(pool.call("process_id", deadline_seconds=60), flush=True)
            threading.Thread(target=lambda: pool.call(*{busy_with}, deadline_seconds=600)).start()
            time.sleep(0.5)
            print("busy", flush=True)
            time.sleep(600)
        """)
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment) as run:
        assert run.stdout is not None
        worker = int(run.stdout.readline())
        assert run.stdout.readline() == b"busy\n"
        assert not ends(worker, 0.1)
        run.kill()
    assert ends(worker)


def test_what_arrives_on_the_request_pipe_does_not_end_a_busy_worker() -> None:
    """The signal of a write to a pipe can come after its reader has read it: a writer may be interrupted in between."""
    with Pool(WORKERS, "work", num_workers=1) as pool, ThreadPoolExecutor(1) as thread:
        pool.call("add", 1, 1, deadline_seconds=60)
        (worker,) = pool._all
        busy = thread.submit(pool.call, "sleep", 0.5, deadline_seconds=60)
        time.sleep(0.2)
        os.write(worker.requests, bytes(8))
        assert busy.result(60) is None


def test_a_pool_whose_worker_was_killed_from_outside_goes_on(pool: Pool) -> None:
    worker = pool.call("process_id", deadline_seconds=60)
    os.kill(worker, signal.SIGKILL)  # idle: the next call finds it dead
    assert ends(worker)
    assert pool.call("add", 1, 2, deadline_seconds=60) == 3
    with ThreadPoolExecutor(1) as thread:
        busy = thread.submit(pool.call, "sleep", 600, deadline_seconds=600)
        time.sleep(0.5)
        workers = pool.process_ids  # the busy one and perhaps an idle one
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        assert all(map(ends, workers))
        assert busy.result(60) == Failure("worker died", "signal 9")
    assert pool.call("add", 3, 4, deadline_seconds=60) == 7


@pytest.mark.parametrize("ending", ["exit", "crash", "kill -9"])
def test_no_worker_outlives_the_run(tmp_path: Path, ending: str) -> None:
    """At an orderly exit, and by the end of file on its pipe when the run is killed."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
            import os, signal, sys
            from pathlib import Path
            from whorl.verifiers.pool import Pool
            pool = Pool(Path({str(WORKERS)!r}), "work", num_workers=1)
            print(pool.call("process_id", deadline_seconds=60), flush=True)
            if {ending!r} == "crash":
                raise RuntimeError
            if {ending!r} == "kill -9":
                os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert run.returncode == {"exit": 0, "crash": 1, "kill -9": -signal.SIGKILL}[ending]
    worker = int(run.stdout)
    deadline = time.monotonic() + 30
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(worker)
