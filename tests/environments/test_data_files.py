import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from whorl.data import Message
from whorl.environments.base import SPLITS
from whorl.environments.catalog import make
from whorl.environments.data_files import DataFile
from whorl.environments.scripted import play_scripted
from whorl.verifiers.sandbox import statement


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sums(count: int) -> list[dict]:
    return [{"prompt": f"{i} + {i}?", "answer": 2 * i} for i in range(count)]


def contents(file: DataFile, split: str) -> set[str]:
    return {file.problem(split, i).content_key for i in range(file.num_problems(split))}


@pytest.mark.parametrize("verifier", ["math", "exact", "numeric"])
@pytest.mark.parametrize(
    "answer", ["1/2", 7, 0.25, "3.", "So 3 + 4 = 7.\n#### 7", r"Thus \boxed{12}.", "1,000"]
)
def test_gold_scores_1_and_babble_0(tmp_path: Path, verifier: str, answer: object) -> None:
    file = DataFile(write(tmp_path / "a.jsonl", [{"prompt": "?", "answer": answer}]), verifier=verifier)
    problem = file.problem("train", 0)
    gold = play_scripted(file, problem, file.gold(problem)).score
    babble = play_scripted(file, problem, ["I do not know."]).score
    assert gold is not None
    assert babble is not None
    assert (gold.reward, babble.reward) == (1.0, 0.0)
    assert "no final answer" in babble.why


@pytest.mark.parametrize(
    ("answer", "stored"),
    [
        (7, "7"),
        ("3.", "3"),
        ("Yes.", "Yes"),
        ("So 3 + 4 = 7.\n#### 7", "7"),
        (r"Thus \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("{", "{"),
        ("two\nlines", "two\nlines"),
    ],
)
def test_the_final_answer_of_a_worked_solution_is_the_gold_answer(
    tmp_path: Path, answer: object, stored: str
) -> None:
    file = DataFile(write(tmp_path / "a.jsonl", [{"prompt": "?", "answer": answer}]), verifier="exact")
    problem = file.problem("train", 0)
    assert problem.answer == stored
    score = play_scripted(file, problem, file.gold(problem)).score
    assert score is not None
    assert score.reward == 1.0


def test_columns_are_named_by_the_user_and_messages_are_a_prompt(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    path = write(tmp_path / "a.jsonl", [{"question": messages, "gold": "2", "other": None}])
    problem = DataFile(path, prompt="question", answer="gold").problem("train", 0)
    assert problem.prompt == (Message("system", "Be brief."), Message("user", "1 + 1?"))
    assert problem.answer == "2"


def test_parquet_holds_the_same_problems_as_jsonl(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"{i} + {i}?"}], "answer": str(2 * i)} for i in range(30)]
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    parquet, lines = DataFile(str(table)), DataFile(write(tmp_path / "a.jsonl", rows))
    for split in SPLITS:
        assert contents(parquet, split) == contents(lines, split)


@pytest.mark.parametrize("count", [10, 11, 40, 300])
def test_from_ten_problems_on_every_split_has_some_and_they_share_none(tmp_path: Path, count: int) -> None:
    file = DataFile(write(tmp_path / "a.jsonl", sums(count)))
    parts = [contents(file, split) for split in SPLITS]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == count
    assert len(parts[0]) > count / 2


def test_the_split_of_a_problem_depends_neither_on_row_order_nor_on_the_other_rows(tmp_path: Path) -> None:
    file = DataFile(write(tmp_path / "a.jsonl", sums(300)))
    shuffled = DataFile(write(tmp_path / "b.jsonl", sums(300)[::-1]))
    longer = DataFile(write(tmp_path / "c.jsonl", sums(400)))
    for split in SPLITS:
        assert contents(file, split) == contents(shuffled, split) <= contents(longer, split)


def test_fewer_than_ten_problems_are_all_for_training_and_the_error_says_so(tmp_path: Path) -> None:
    file = DataFile(write(tmp_path / "a.jsonl", sums(9)))
    assert [file.num_problems(split) for split in SPLITS] == [9, 0, 0]
    with pytest.raises(IndexError, match=r"no problem 0 in test; it has train 9, .*give test=FILE"):
        file.problem("test", 0)


def test_a_test_file_is_the_test_split_and_its_problems_are_not_trained_on(tmp_path: Path) -> None:
    train, test = write(tmp_path / "a.jsonl", sums(50)), write(tmp_path / "b.jsonl", sums(8))
    with pytest.warns(UserWarning, match=r"8 problems of .*a\.jsonl are also in .*b\.jsonl"):
        file = DataFile(train, test=test)
    assert file.num_problems("test") == 8
    assert file.num_problems("train") + file.num_problems("validation") == 42
    assert file.num_problems("validation") > 0
    assert not contents(file, "test") & (contents(file, "train") | contents(file, "validation"))


def test_equal_rows_are_one_problem(tmp_path: Path) -> None:
    file = DataFile(write(tmp_path / "a.jsonl", sums(5) + sums(5)))
    assert file.num_problems("train") == 5


GOOD = '{"prompt": "1?", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected at least one row; the file is empty"),
        ("\n\n", "the file is empty"),
        (GOOD + "{", r"a\.jsonl, row 2: not one JSON object"),
        (GOOD + "\n[1]", r"row 3: expected \{\"prompt\""),
        (
            GOOD + '{"question": "?", "gold": 1}',
            r"row 2: there is no column 'prompt'; its columns are 'question', 'gold'",
        ),
        ('{"prompt": "?"}', "no column 'answer'"),
        (
            '{"prompt": 3, "answer": 1}',
            r"row 1, column 'prompt': expected text or a list of messages; got int '3'",
        ),
        ('{"prompt": " ", "answer": 1}', "the prompt is empty"),
        ('{"prompt": [], "answer": 1}', "expected text or a list"),
        ('{"prompt": [{"role": "user"}], "answer": 1}', 'message 1: expected {"role"'),
        ('{"prompt": [{"role": "robot", "content": "?"}], "answer": 1}', "a role among system, user"),
        ('{"prompt": [{"role": ["x"], "content": "?"}], "answer": 1}', "a role among system, user"),
        ('{"prompt": [{"role": "user", "content": 3}], "answer": 1}', "expected content as text; got int"),
        (
            '{"prompt": "?", "answer": null}',
            "column 'answer': expected an answer as text or a number; got nothing",
        ),
        ('{"prompt": "?", "answer": true}', "got bool 'True'"),
        ('{"prompt": "?", "answer": NaN}', "got float 'nan'"),
        ('{"prompt": "?", "answer": [1]}', "got list"),
        ('{"prompt": "?", "answer": " "}', "the answer is empty"),
        ('{"prompt": "?", "answer": "<answer>"}{', "not one JSON object"),
        ('{"prompt": "?", "answer": "{\\n}}"}', "no reply could declare this answer"),
        ('{"prompt": "\\ud800", "answer": "1"}', "half of a surrogate pair"),
        (
            GOOD + '{"prompt": "1?", "answer": "2"}',
            r"row 2: the prompt of row 1 again, with another answer \('2', there '1'\)",
        ),
        ("[" * 100_000, "row 1: not one JSON object"),
    ],
)
def test_every_row_is_checked_when_the_file_is_opened(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        DataFile(str(path))


def test_a_byte_that_is_not_utf8_is_found_by_row_and_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + '{"prompt": "é", "answer": 1}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"row 2: byte 13 is not UTF-8; save the file as UTF-8"):
        DataFile(str(path))


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert DataFile(str(path)).num_problems("train") == 1


def test_files_that_cannot_be_read_at_all_say_why(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    (tmp_path / "a.csv").write_text("prompt,answer")
    for name, message in {
        "a.parquet": "not a readable Parquet file",
        "a.csv": r"ends in \.jsonl or \.parquet",
        "absent.jsonl": "there is no such file",
    }.items():
        with pytest.raises(ValueError, match=message):
            DataFile(str(tmp_path / name))


def test_settings_are_checked_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "?", "answer": "about 3"}])
    with pytest.raises(ValueError, match="expected verifier math, exact, numeric, program; got 'guess'"):
        DataFile(path, verifier="guess")
    with pytest.raises(ValueError, match=r"row 1.*verifier=numeric needs a number"):
        DataFile(path, verifier="numeric")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_program_earns_its_reward_by_passing_the_tests_of_its_row(tmp_path: Path, kind: str) -> None:
    source = "```python\ndef double(n):\n    return 2 * n\n```"
    rows = [{"prompt": "Double it.", "answer": ["assert double(2) == 4", "assert double(-1) == -2"]}]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write(path, rows)
    file = DataFile(str(path), verifier="program")
    problem = file.problem("train", 0)
    assert file.gold(problem) is None
    for reply, reward, why in (
        (f"Like so:\n{source}", 1.0, "all 2 tests passed"),
        (source.replace("2 * n", "n + 2"), 0.0, "test 2: assertion failed"),
        ("def double(n): return 2 * n", 0.0, "no complete ```python block"),
        (source + "\n```python\nimport sys; sys.exit(0)\n```", 0.0, "test 1"),
    ):
        score = play_scripted(file, problem, [reply]).score
        assert score is not None
        assert score.reward == reward
        assert why in score.why


def test_a_program_can_be_judged_by_what_it_prints(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "?", "answer": {"stdin": "3", "stdout": "6"}}])
    file = DataFile(path, verifier="program")
    problem = file.problem("train", 0)
    for source, reward in (("print(2 * int(input()))", 1.0), ("print(5)", 0.0)):
        score = play_scripted(file, problem, [f"```python\n{source}\n```"]).score
        assert score is not None
        assert score.reward == reward


def test_who_runs_programs_says_so_once_and_how_safe_that_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "?", "answer": "assert f() == 1"}])
    programs = DataFile(path, verifier="program")
    assert programs.notice == statement()
    assert DataFile(write(tmp_path / "b.jsonl", sums(3))).notice is None
    both = make(f"data:{path},verifier=program + data:{path},verifier=program,prompt=prompt + reverse_digits")
    assert both.notice == statement()


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ([], "column 'answer': expected at least one test; the list is empty"),
        (7, "test 1: expected Python text with assertions, or .*; got int '7'"),
        ([" "], "test 1: expected Python text"),
        (["assert f() == 1", {"stdin": "3"}], "test 2: expected Python text"),
        ([{"stdin": 3, "stdout": "6"}], "test 1: expected Python text"),
        (["assert f() =="], r"row 1, column 'answer', test 1: not Python: invalid syntax"),
        (None, "test 1: expected .*; got nothing"),
    ],
)
def test_broken_tests_are_found_when_the_file_is_opened(tmp_path: Path, tests: object, message: str) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "?", "answer": tests}])
    with pytest.raises(ValueError, match=message):
        DataFile(path, verifier="program")
