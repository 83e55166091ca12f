from collections import Counter

import numpy as np
import pytest

from whorl.data import Problem
from whorl.environments.looping_arithmetic import LoopingArithmetic, loops
from whorl.environments.scripted import play_scripted

# 3 + 8 + 5 + 4 = 20, so the digit is 0.
TERMS = [3, 8, 5, 4]
TABLE = "3+0=3,3+1=4,3+2=5,3+3=6,3+4=7,3+5=8,3+6=9,3+7=0,3+8=1,3+9=2#"
SUM = Problem("p", "3+8+5+4=", "0", extra={"terms": TERMS, "table": False})
ASKED = Problem("p", "3+8+5+4:", TABLE, extra={"terms": TERMS, "table": True})


def test_a_loop_repeats_the_last_step_and_has_no_answer() -> None:
    task = LoopingArithmetic(loop_frac=1.0, loop_tokens=40)
    (loop,) = task.traces(SUM, np.random.default_rng(0))
    assert loop == "3+8=1,1+5=6,6+4=0,6+4=0,6+4=0,6+4=0,6+4="
    assert len(loop) == 40 and loops(loop)
    assert LoopingArithmetic(loop_frac=0.0).traces(SUM, np.random.default_rng(0)) == ("3+8=1,1+5=6,6+4=0#0",)


def test_the_shares_of_loops_and_of_tables_are_the_settings() -> None:
    task, rng = LoopingArithmetic(), np.random.default_rng(0)
    problems = [task.problem("train", i) for i in range(800)]
    kinds = Counter(
        "table" if p.extra["table"] else "loop" if loops(task.traces(p, rng)[0]) else "sum" for p in problems
    )
    # A quarter tables, a fifth of the rest loops: four standard deviations of each binomial.
    assert abs(kinds["table"] - 200) < 4 * 150**0.5
    assert abs(kinds["loop"] - (800 - kinds["table"]) / 5) < 4 * 96**0.5


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("", False),
        ("3+8=1,1+5=6,6+4=0#0", False),
        (TABLE, False),  # as predictable as a loop, and none
        ("6+4=0,6+4=0#0", False),  # a step that is checked once more
        ("6+4=0,6+4=0,6+4=0", True),
        ("3+8=1,6+4=0,6+4=0,6+4=0,6+", True),
        ("1,2,1,2,1,2", False),
    ],
)
def test_a_loop_is_a_step_that_stands_three_times_in_a_row(reply: str, expected: bool) -> None:
    assert loops(reply) == expected


def test_a_table_is_right_if_all_of_it_is_and_a_sum_as_in_chain_arithmetic() -> None:
    task = LoopingArithmetic()
    assert task.table(3) == TABLE and len(TABLE) == 60
    tables = [
        play_scripted(task, ASKED, [reply]).reward for reply in (TABLE, TABLE[:-1], TABLE + "2", "#0", "")
    ]
    assert tables == [1.0, 0.0, 0.0, 0.0, 0.0]
    sums = [play_scripted(task, SUM, [reply]).reward for reply in ("3+8=1,1+5=6,6+4=0#0", "#0", "#1", TABLE)]
    assert sums == [1.0, 1.0, 0.0, 0.0]
    score = play_scripted(task, SUM, ["6+4=0,6+4=0,6+4=0,6+"]).score
    assert score is not None and score.reward == 0.0 and score.parts == {"worked": 0.0, "looped": 1.0}


def test_no_sum_is_trained_on_in_one_form_and_held_out_in_the_other() -> None:
    task = LoopingArithmetic(num_terms=2, table_frac=0.5)
    sums = {split: {task.problem(split, i).prompt[:-1] for i in range(300)} for split in ("train", "test")}
    assert sums["train"] and sums["test"] and not sums["train"] & sums["test"]
