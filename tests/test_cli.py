"""The command line as a user meets it: in this process for speed, with a real process where that matters."""

import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from tests.support import Tiny, know_tiny
from whorl.cli import main
from whorl.loop import train
from whorl.run import start_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        know_tiny(monkeypatch)
        path = tmp_path_factory.mktemp("runs") / "tiny"
        train(start_run("tiny", Tiny(), path))
        yield path


def refused(capsys, *words) -> str:
    """The one sentence with which a wrong command is refused; exit code 2, no traceback."""
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "expected one of train, resume"),
        (["train"], "which recipe?"),
        (["train", "quikstart"], "did you mean quickstart?"),
        (["train", "quickstart", "--environment", "countdwn"], "did you mean countdown?"),
        (["train", "quickstart", "--environment", "countdown,num_number=3"], "did you mean num_numbers?"),
        (["train", "quickstart", "--environment", "countdown,num_numbers=many"], "expects int"),
        (["train", "quickstart", "--environment", "reasoning_gym"], "needs its task"),
        (["train", "quickstart", "--environment", "data:no_such_file.jsonl"], "no such file"),
        (["train", "quickstart", "--algorithm", "GRPOO"], "did you mean GRPO?"),
        (["train", "quickstart", "--algorithm", "CISPO,ratio_mx=4"], "did you mean ratio_max?"),
        (["train", "quickstart", "--algorithm", "RLOO", "--rollouts-per-problem", "1"], "at least 2 rollouts"),
        (["train", "quickstart", "--model", "m2-nano"], "unknown model"),
        (["train", "quickstart", "--curriculum", "hard"], "unknown curriculum"),
        (["train", "quickstart", "--num-steps", "0"], "num_steps must be at least 1"),
        (["train", "quickstart", "--updates-per-batch", "99"], "exceeds problems_per_step"),
        (["train", "quickstart", "--sampling.max-tokens", "64"], "leaves no room for a prompt"),
        (["train", "quickstart", "--max-context", "11", "--sampling.max-tokens", "4"], "leaves no room for an answer"),
        (["resume", "no/such/run"], "no run directory"),
        (["evaluate", "no/such/run"], "no run directory"),
        (["play", "no/such/run"], "no run directory"),
        (["report", "no/such/run"], "no run directory"),
        (["check", "countdwn"], "did you mean countdown?"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_sentence_before_anything_is_written(
    capsys, tmp_path, monkeypatch, words, said
):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--num-stepz", "3"], ["--num-steps", "three"], ["--sampling.top-p", "0"]])
def test_an_unknown_or_mistyped_override_exits_with_2_and_help(capsys, words):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "quickstart", *words])
    assert exit_.value.code == 2
    assert "whorl train quickstart --help" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b'{"question": "1+1?", "answer": "2"}\n',
            "no column 'prompt'; its columns are 'question', 'answer'",
        ),
        (b'{"prompt": "1+1?", "answer": "2"}\n{"prompt": oops\n', "row 2"),
        (b'{"prompt": "1+1?", "answer": "2"}\n{"prompt": 7, "answer": "2"}\n', "row 2"),
        (
            b"".join(b'{"prompt": "%d+1?", "answer": "2"}\n' % n for n in range(4410))
            + b'{"prompt": "?", "answer": ["2"]}\n',
            "row 4411, column 'answer': expected an answer as text or a number; got list",
        ),
        (
            b'{"prompt": "1?", "answer": "2"}\n' * 2 + b'{"prompt": "\xff", "answer": "2"}\n',
            "row 3: byte 13 is not UTF-8",
        ),
        (b"", "expected at least one row; the file is empty"),
        (b"\n \n", "the file is empty"),
        (b"\x00\xff\xfe", "row 1: byte 2 is not UTF-8"),
    ],
)
def test_a_broken_data_file_is_refused_by_row(capsys, tmp_path, content, said):
    file = tmp_path / "problems.jsonl"
    file.write_bytes(content)
    error = refused(capsys, "train", "minimax_m1", "--environment", f"data:{file}", "--run", tmp_path / "run")
    assert said in error
    assert [path.name for path in tmp_path.iterdir()] == ["problems.jsonl"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "the file is empty"),
        ([{"question": "?", "answer": "1"}], "there is no column 'prompt'"),
        ([{"prompt": f"{n}?", "answer": 1.0 if n != 7 else float("nan")} for n in range(20)], "row 8, column 'answer'"),
        (None, "not a readable Parquet file"),
    ],
)  # fmt: skip
def test_a_broken_parquet_file_is_refused_too(capsys, tmp_path, rows, said):
    file = tmp_path / "problems.parquet"
    if rows is None:
        file.write_bytes(b"PAR1 and nothing else")
    else:
        schema = pyarrow.schema([("prompt", pyarrow.string()), ("answer", pyarrow.string())])
        table = pyarrow.Table.from_pylist(rows) if rows else schema.empty_table()
        pyarrow.parquet.write_table(table, file)
    error = refused(capsys, "train", "minimax_m1", "--environment", f"data:{file}", "--run", tmp_path / "run")
    assert said in error
    assert [path.name for path in tmp_path.iterdir()] == ["problems.parquet"]


def test_a_prompt_longer_than_the_context_is_refused_by_name(capsys, tmp_path):
    file = tmp_path / "problems.jsonl"
    rows = [{"prompt": "x" * (600 if i == 13 else 5) + str(i), "answer": "1"} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    error = refused(capsys, "train", "minimax_m1", "--environment", f"data:{file}", "--run", tmp_path / "run")
    assert "leaves no room for an answer in the context of 512" in error


def test_an_existing_run_is_never_overwritten(capsys, finished):
    before = sorted((f.name, f.stat().st_mtime_ns) for f in finished.rglob("*"))
    assert "already holds a run" in refused(capsys, "train", "quickstart", "--run", finished)
    assert before == sorted((f.name, f.stat().st_mtime_ns) for f in finished.rglob("*"))


def test_a_checkpoint_of_another_shape_is_refused_with_both_shapes(capsys, finished, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(finished, other)
    config = json.loads((other / "config.json").read_text())
    config["model"]["width"] = 24
    (other / "config.json").write_text(json.dumps(config))
    error = refused(capsys, "evaluate", other)
    assert "(16,)" in error or "16)" in error or "[16" in error
    assert "24" in error


def test_resuming_a_finished_run_says_so(capsys, finished):
    assert main(["resume", str(finished)]) == 0
    assert "is finished: step 3 of 3" in capsys.readouterr().out


def test_evaluate_prints_accuracy_with_its_interval(capsys, finished):
    assert main(["evaluate", str(finished), "--problems", "6", "--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert "eval_accuracy_low" in out
    assert "eval_pass_at_k" in out
    assert (
        main(["evaluate", str(finished), "--problems", "4", "--temperature", "0", "--checkpoint", "2"]) == 0
    )
    assert "no checkpoint of step 77; it has 2, 3" in refused(
        capsys, "evaluate", finished, "--checkpoint", "77"
    )
    task = "chain_arithmetic,num_terms=3"
    assert main(["evaluate", str(finished), "--problems", "4", "--environment", task]) == 0


def test_play_shows_problems_answers_and_verdicts(capsys, finished, monkeypatch):
    lines = iter(["", "1+2=", "hello", "q"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    assert main(["play", str(finished)]) == 0
    out = capsys.readouterr().out
    assert "reward" in out
    assert "no verdict: a prompt of your own has no gold answer" in out
    assert "'h' (U+0068) is not in the alphabet" in out


def test_report_is_written_again(capsys, finished):
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.html").exists()
    assert "report.html" in capsys.readouterr().out


def test_list_names_recipes_algorithms_and_environments(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("quickstart", "minimax_m1", "CISPO", "REINFORCE_PP_BASELINE", "countdown", "reasoning_gym"):
        assert name in out


def test_check_proves_an_environment_and_fails_with_1_where_it_does_not_hold(capsys, monkeypatch):
    assert main(["check", "reverse_digits", "--problems", "5"]) == 0
    from whorl.environments.reverse_digits import ReverseDigits

    monkeypatch.setattr(ReverseDigits, "gold", lambda self, problem: ("0",))
    assert main(["check", "reverse_digits", "--problems", "5"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_who_runs_programs_of_the_model_is_told_once_how_safe_that_is(capsys, tmp_path):
    file = tmp_path / "programs.jsonl"
    rows = [{"prompt": f"f({n})?", "answer": f"assert f({n}) == {n}"} for n in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["check", f"data:{file},verifier=program", "--problems", "2"]) == 0
    assert capsys.readouterr().out.count("Programs of the model run ") == 1
    assert main(["check", "reverse_digits", "--problems", "2"]) == 0
    assert "Programs" not in capsys.readouterr().out


def test_no_command_shows_the_usage():
    assert main([]) == 2
    assert main(["--help"]) == 0


def test_importing_whorl_and_its_cli_does_not_import_torch():
    code = "import sys, whorl, whorl.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
