import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.environments.test_data_files import write
from whorl.data import Message
from whorl.environments.chats import Chats
from whorl.environments.data_files import DataFile
from whorl.environments.scripted import play_scripted


def chat(prompt: str, *replies: str) -> dict:
    said = [{"role": "user", "content": prompt}]
    for reply in replies:
        said += [{"role": "assistant", "content": reply}, {"role": "user", "content": "and?"}]
    return {"messages": said[:-1]}


def prompts(file: Chats, split: str) -> list[str]:
    return [file.problem(split, i).messages[0].text for i in range(file.num_problems(split))]


def test_a_chat_is_a_list_of_messages_or_a_prompt_with_its_completion(tmp_path: Path) -> None:
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    rows = [
        {"messages": [*asked, {"role": "assistant", "content": "b"}]},
        {"prompt": "a", "completion": " b\n"},
        {"prompt": asked, "completion": "b"},
    ]  # fmt: skip
    file = Chats(write(tmp_path / "a.jsonl", rows))
    wanted = (Message("system", "s"), Message("user", "a"), Message("assistant", "b"))
    got = [file.problem("train", i) for i in range(3)]
    assert [p.extra["messages"] for p in got] == [wanted, (wanted[1], Message("assistant", " b\n")), wanted]
    assert (got[0].prompt, got[0].answer) == (wanted[:2], "b")
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), table)
    assert Chats(str(table)).problem("train", 0).extra["messages"] == wanted


def test_all_chats_of_a_prompt_are_in_one_split_and_none_is_lost(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "completion": str(reply)} for i in range(200) for reply in (1, 2)]
    file = Chats(write(tmp_path / "a.jsonl", rows))
    train, test = prompts(file, "train"), prompts(file, "test")
    assert len(train) + len(test) == 400
    assert not set(train) & set(test)
    assert 2 * 5 < len(test) < 2 * 50
    assert file.num_problems("validation") == 0


def test_a_question_that_is_held_out_here_is_held_out_of_data_files_too(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + {i}?", "completion": str(2 * i), "answer": 2 * i} for i in range(300)]
    path = write(tmp_path / "a.jsonl", rows)
    data = DataFile(path)
    asked = [data.problem("test", i).messages[0].text for i in range(data.num_problems("test"))]
    assert sorted(prompts(Chats(path), "test")) == sorted(asked)


def test_a_file_of_held_out_chats_is_not_trained_on(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [chat(f"{i}?", "x") for i in range(20)])
    test = write(tmp_path / "b.jsonl", [chat("3?", "y"), chat("new?", "z")])
    file = Chats(train, held_out=test)
    assert prompts(file, "test") == ["3?", "new?"]
    assert "3?" not in prompts(file, "train") and len(prompts(file, "train")) == 19
    with pytest.raises(ValueError, match="nothing is left to train on"):
        Chats(test, held_out=test)


def test_few_chats_are_all_for_training(tmp_path: Path) -> None:
    file = Chats(write(tmp_path / "a.jsonl", [chat(f"{i % 3}?", "x") for i in range(9)]))
    assert (file.num_problems("train"), file.num_problems("test")) == (9, 0)
    with pytest.raises(IndexError, match="no chat 0 in test; it has 0"):
        file.problem("test", 0)


def test_nobody_judges_an_answer_to_a_chat(tmp_path: Path) -> None:
    file = Chats(write(tmp_path / "a.jsonl", [chat("a", "b", "c")]))
    problem = file.problem("train", 0)
    assert [m.text for m in problem.messages] == ["a", "b", "and?"]
    score = play_scripted(file, problem, ["d"]).score
    assert score is not None and score.reward is None
    assert "'c'" in score.why


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"row 2: expected a column 'messages', or 'prompt' and 'completion'; its columns are 'text'"),
        ({"messages": "a"}, r"row 2, column 'messages': expected a list of messages; got str 'a'"),
        ({"messages": [{"role": "user"}]}, r"row 2, column 'messages', message 1: expected \{\"role\""),
        ({"messages": [{"role": "assistant", "content": None}]}, "expected content as text; got nothing"),
        ({"messages": [{"role": "user", "content": "a"}]}, "row 2: no message has the role assistant"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the chat begins with its only reply"),
        ({"prompt": "a", "completion": 7}, r"row 2, column 'completion': expected a reply as text; got int '7'"),
        ({"prompt": "a", "completion": " "}, "expected a reply as text"),
        ({"prompt": "", "completion": "a"}, "the prompt is empty"),
        ([1], r"row 2: expected \{\"prompt\""),
    ],
)  # fmt: skip
def test_what_is_no_chat_is_refused_by_row_and_column(tmp_path: Path, row, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(chat("a", "b")) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        Chats(str(path))
    path.write_text("")
    with pytest.raises(ValueError, match="the file is empty"):
        Chats(str(path))
