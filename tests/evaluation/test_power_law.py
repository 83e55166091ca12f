"""The fit against laws whose numbers are known, with and without noise, and against a search over all three numbers."""

import numpy as np
import pytest

from whorl.evaluation.power_law import fit_power_law


def test_a_law_worked_by_hand_is_found_again():
    # 1/2 - 1/4 / C: 1/4, 3/8, 7/16, 15/32
    law = fit_power_law([1, 2, 4, 8], [1 / 4, 3 / 8, 7 / 16, 15 / 32])
    assert law.scale == pytest.approx(-1 / 4, rel=0.01)
    assert law.exponent == pytest.approx(1, rel=0.01)
    assert law.limit == pytest.approx(1 / 2, rel=0.01)
    assert law.r2 == pytest.approx(1, abs=1e-6)
    assert law.at(16) == pytest.approx(1 / 2 - 1 / 64, abs=1e-3)


def test_random_laws_are_found_whatever_the_unit_of_compute():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scale, exponent, limit = -rng.uniform(0.1, 1), rng.uniform(0.2, 2), rng.uniform(0.3, 1)
        compute = np.geomspace(1, 30, 8)
        accuracy = scale / compute**exponent + limit
        found = fit_power_law(compute, accuracy)
        assert found.exponent == pytest.approx(exponent, rel=0.01)
        assert found.limit == pytest.approx(limit, abs=0.03)
        assert found.r2 > 1 - 1e-6
        flops = fit_power_law(compute * 1e15, accuracy)
        assert (flops.exponent, flops.limit) == pytest.approx((found.exponent, found.limit))
        assert flops.at(2e15) == pytest.approx(found.at(2), abs=1e-6)
        assert flops.scale == pytest.approx(found.scale * 1e15**found.exponent)


def test_no_other_numbers_leave_smaller_residuals():
    """Noisy points; the reference is a random search over scale, exponent and limit at once, near and far."""
    rng = np.random.default_rng(1)
    compute = np.geomspace(1, 10, 7)
    accuracy = 0.6 - 0.3 / compute**0.7 + rng.normal(0, 0.02, 7)
    law = fit_power_law(compute, accuracy)

    def squares(scale, exponent, limit):
        return ((accuracy - scale / compute**exponent - limit) ** 2).sum()

    ours = squares(*law[:3])
    assert law.r2 == pytest.approx(1 - ours / ((accuracy - accuracy.mean()) ** 2).sum())
    for _ in range(5_000):
        near = np.array(law[:3]) * (1 + rng.normal(0, 0.05, 3))
        far = (-rng.uniform(0, 1), rng.uniform(0.02, 9), rng.uniform(0, 1))
        assert squares(*near) >= ours - 1e-7 and squares(*far) >= ours - 1e-7


def test_r2_of_a_law_is_high_and_of_noise_is_not():
    rng = np.random.default_rng(2)
    compute = np.geomspace(1, 10, 12)
    law = [fit_power_law(compute, 0.6 - 0.3 / compute**0.7 + rng.normal(0, 0.01, 12)).r2 for _ in range(50)]
    noise = [fit_power_law(compute, 0.4 + rng.normal(0, 0.01, 12)).r2 for _ in range(50)]
    assert np.mean(law) > 0.97
    assert np.mean(noise) < 0.5
    assert min(noise) >= 0  # a constant is a law whose scale is 0


@pytest.mark.parametrize(
    ("compute", "accuracy", "said"),
    [
        ([1, 2, 3], [0.1, 0.2, 0.3], "at least 4"),
        ([1, 2, 3, 4], [0.1, 0.2, 0.3], "as many accuracies"),
        ([0, 1, 2, 3], [0.1, 0.2, 0.3, 0.4], "above 0"),
        ([1, 2, 3, 4], [0.1, 0.2, np.nan, 0.4], "finite"),
        ([1, 2, 3, 4], [0.1, 0.1, 0.1, 0.1], "no law to fit"),
        ([2, 2, 2, 2], [0.1, 0.2, 0.2, 0.2], "no law to fit"),
    ],
)
def test_what_no_law_can_be_fitted_to_is_refused(compute, accuracy, said):
    with pytest.raises(ValueError, match=said):
        fit_power_law(compute, accuracy)
