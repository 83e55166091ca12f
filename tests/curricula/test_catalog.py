import pytest

from whorl.curricula.catalog import POOL, make_curriculum
from whorl.curricula.difficulty_band import DifficultyBand
from whorl.curricula.mixture import Mixture
from whorl.curricula.uniform import Uniform


def test_a_name_makes_a_curriculum_over_the_problems_there_are() -> None:
    assert make_curriculum("uniform", [10], seed=2) == Uniform(10, seed=2)
    assert make_curriculum("difficulty_band,low=0.1", [None], seed=0) == DifficultyBand(POOL, low=0.1)


def test_several_environments_get_equal_shares() -> None:
    curriculum = make_curriculum("uniform", [4, None], seed=0)
    assert isinstance(curriculum, Mixture)
    assert [pick.environment for pick in curriculum.choose(6)] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("unifrom", "unknown curriculum 'unifrom'; expected one of uniform, difficulty_band"),
        ("difficulty_band,lo=0.1", "no setting 'lo'; it has high, low"),
        ("difficulty_band,low=some", "low expects a number; got 'some'"),
        ("difficulty_band,low=2", "expected 0 <= low <= high <= 1"),
    ],
)
def test_a_mistake_is_answered_with_what_is_valid(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_curriculum(spec, [10], seed=0)
