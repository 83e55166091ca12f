"""How fast verdicts are: answers per second, programs per second, and what a hang costs.

    python benchmarks/verifiers.py

**Answers.** An ordinary mix on two worker processes: six of ten are whole numbers, one a decimal or percentage, one a
fraction and two expressions in LaTeX, four of ten are wrong, and no two are alike (in training the samples of a
group often agree, and a verdict is remembered, so a run sees more). Neighbours on the machine disturb the rate on
the clock, so the rate by CPU time stands beside it: answers per second of CPU time of all processes, times two cores.

**Programs.** Seconds from a source to its verdict for one example, of which most is starting Python twice, for each
way to keep a program in that works here, and for Python alone.

**Hangs.** Seconds until an endless answer is given up, beyond its deadline, and until the next answer has its verdict
from a new worker.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from whorl.verifiers import answer, sandbox
from whorl.verifiers.answer import math_answer
from whorl.verifiers.pool import Pool
from whorl.verifiers.program import Example, verify_program

NUM_THREADS = 4  # as many as wait for verdicts in a run
NUM_CORES = 2


def ordinary(number: int, rng: random.Random) -> tuple[str, str, bool]:
    """Gold answer, answer and whether it is right: the `number`-th of the mix."""
    n, m = 1000 + number, rng.randint(2, 99)
    right = rng.random() < 0.6
    kind = rng.random()
    if kind < 0.6:
        return str(n), str(n if right else n + m), right
    if kind < 0.7:
        return f"{n / 100}", f"{n}\\%" if right else f"{n}", right
    if kind < 0.8:
        return f"\\frac{{{n}}}{{{m}}}", f"{n}/{m}" if right else f"{n}/{m + 1}", right
    wrong = rng.randint(1, 9) * (not right)
    pairs = (
        (f"{n}x + {m}", f"{m + wrong} + {n}x"),
        (f"x^2 + {2 * n}x + {n * n}", f"(x + {n + wrong})^2"),
        (f"\\frac{{{n}\\pi}}{{{m}}}", f"\\frac{{\\pi}}{{{m + wrong}}} \\cdot {n}"),
        (f"({n}, {m})", f"({n},{m + wrong})"),
        (f"\\{{{n}, {m}\\}}", f"\\{{{m + wrong}, {n}\\}}"),
        (f"{n}\\sqrt{{{m}}}", f"{n + wrong} \\cdot \\sqrt{{{m}}}"),
        (f"[{n}, \\infty)", f"[{n + wrong}, \\infty)"),
    )
    gold, said = rng.choice(pairs)
    return gold, said, right


def cpu_seconds(pool: Pool) -> float:
    """Of this process and of the workers of a pool that are alive."""
    ticks = 0
    for process_id in pool.process_ids:
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def time_answers(count: int) -> tuple[float, float]:
    """Answers per second, by the clock and by CPU time."""
    rng = random.Random(0)
    mix = [ordinary(number, rng) for number in range(2 * count)]
    pool = Pool(Path(answer.__file__).with_name("worker_math.py"), "math_equal", num_workers=NUM_CORES)
    answer._math_pool = lambda: pool

    def judge(item: tuple[str, str, bool]) -> None:
        gold, said, right = item
        score = math_answer(f"So it is \\boxed{{{said}}}.", gold, deadline_seconds=60)
        assert score.reward == float(right), (item, score)

    with pool, ThreadPoolExecutor(NUM_THREADS) as threads:
        list(threads.map(judge, mix[:count]))  # starts the workers and fills the parser's tables
        clock, cpu = time.monotonic(), cpu_seconds(pool)
        list(threads.map(judge, mix[count:]))
        return count / (time.monotonic() - clock), NUM_CORES * count / (cpu_seconds(pool) - cpu)


def milliseconds(action: Callable[[], object], count: int) -> float:
    taken = []
    for _ in range(count):
        start = time.monotonic()
        action()
        taken.append(time.monotonic() - start)
    return 1000 * median(taken)


def time_programs(count: int) -> dict[str, float]:
    """Median milliseconds by what the program runs in."""
    best = sandbox.backend()
    ways = {"confined, without bubblewrap": sandbox.Backend(None, "measured without")}
    if best.wrapper is not None:
        ways["bubblewrap"] = best
        if best.wrapper.other_user:
            ways["bubblewrap, the same user"] = best._replace(wrapper=replace(best.wrapper, other_user=False))
    python = [sandbox._python(), "-S", "-s", "-c", "print(1)"]
    taken = {
        "Python alone, not confined": milliseconds(lambda: subprocess.run(python, capture_output=True), count)
    }

    def judge() -> None:
        score = verify_program("print(int(input()) * 2)", [Example("3", "6")])
        assert score.reward == 1.0, score

    for name, backend in ways.items():
        sandbox.backend = lambda backend=backend: backend
        judge()
        taken[name] = milliseconds(judge, count)
    return taken


def time_hang(deadline_seconds: float) -> tuple[float, float]:
    """Seconds beyond the deadline until a hang is None, and until the answer after it is judged."""
    with Pool(Path(answer.__file__).with_name("worker_math.py"), "math_equal", num_workers=1) as pool:
        answer._math_pool = lambda: pool
        math_answer("Answer: 2x", "x + x", deadline_seconds=60)
        start = time.monotonic()
        score = math_answer(r"Answer: \sum_{n=1}^{10^{10}} n^n", "3x", deadline_seconds=deadline_seconds)
        hung = time.monotonic()
        assert score.reward is None
        assert math_answer("Answer: 3y", "y + 2y", deadline_seconds=60).reward == 1.0
        return hung - start - deadline_seconds, time.monotonic() - hung


def main(
    answers: Annotated[int, tyro.conf.arg(help="answers of the mix")] = 2000,
    programs: Annotated[int, tyro.conf.arg(help="runs of each sandbox")] = 40,
) -> None:
    table = Table("what", "measured")
    clock, cpu = time_answers(answers)
    table.add_row("ordinary answers per second, by the clock", f"{clock:,.0f}")
    table.add_row(f"ordinary answers per second of {NUM_CORES} cores, by CPU time", f"{cpu:,.0f}")
    for name, taken in time_programs(programs).items():
        table.add_row(f"a program's verdict: {name}", f"{taken:.0f} ms")
    late, again = time_hang(1.0)
    table.add_row("a hang is None, after its deadline", f"{1000 * late:.0f} ms")
    table.add_row("the next verdict, from a new worker", f"{again:.1f} s")
    table.add_row("load average of the last minute", f"{os.getloadavg()[0]:.1f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
