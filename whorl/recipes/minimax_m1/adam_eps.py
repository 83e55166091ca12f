"""Adam's eps against the scale of the loss.

The paper (section 3.2): gradients spanned 1e-18 to 1e-5, most of them below 1e-14, and with the usual beta2 =
0.999 and eps = 1e-8 training did not converge; beta2 = 0.95 and eps = 1e-15 did. Divided by its root mean
square an update does not depend on the scale of the gradient, until that falls below eps. Here the same loss
is multiplied by 1, 1e-4, 1e-8 and 1e-10, as happens when a sum is divided by one count instead of another. The
model is dense: a router's loss has a scale of its own and would take over. It has 707,520 weights, so a gradient of
norm 0.07 has entries of 8e-5 (root mean square); at 1e-8 of 8e-13, and at 1e-10 of 8e-15, as small as the paper's.
"""

from whorl.experiments.plan import Arm, Claim, Experiment, Measure
from whorl.experiments.readings import area, mean_of_last
from whorl.learning.optimizer import OptimizerSettings
from whorl.recipes.minimax_m1.recipe import MinimaxM1
from whorl.sampling.draw import Sampling
from whorl.settings import ColdStart, Evaluation


def arms() -> tuple[Arm, ...]:
    """Three settings of Adam at four scales of the loss."""
    found = []
    for adam, settings in {
        "m1": {"optimizer.eps": 1e-15, "optimizer.beta2": 0.95},
        "usual": {"optimizer.eps": 1e-8, "optimizer.beta2": 0.999},
        "usual_beta2": {"optimizer.eps": 1e-15, "optimizer.beta2": 0.999},
    }.items():
        for exponent in (0, 4, 8, 10):
            # `constant_length` divides by a number that is given: 40 is the longest answer.
            algorithm = f"CISPO,average=constant_length,max_tokens={40 * 10**exponent},dynamic_sampling=False"
            role = "method" if adam == "m1" else "baseline" if adam == "usual" else "control"
            found.append(Arm(f"{adam}_1e-{exponent}", role, {"algorithm": algorithm, **settings}))
    return tuple(found)


EXPERIMENT = Experiment(
    name="adam_eps",
    question="Does learning depend on the scale of the loss, and is Adam's eps the reason?",
    cpu=MinimaxM1(
        environment="chain_arithmetic",
        model="m1-nano,num_experts=0,ffn_width=512",
        max_context=64,
        cold_start=ColdStart(max_updates=2000, until_accuracy=0.45, check_every_updates=10),
        sampling=Sampling(max_tokens=40),
        # No limit on the gradient: clipping would undo a large scale and leave a small one.
        optimizer=OptimizerSettings(2e-4, max_grad_norm=1e9),
        num_steps=30,
        updates_per_batch=1,
        evaluation=Evaluation(5, 128, 2),
        stop_after_steps_without_signal=0,
        checkpoint_every_steps=1000,
        rollouts_every_steps=1000,
    ),
    arms=arms(),
    measures=(
        Measure("final", "held-out accuracy at the end", mean_of_last("eval_accuracy", 2), unit="fraction"),
        Measure("area", "mean held-out accuracy over all steps", area("eval_accuracy"), unit="fraction"),
        Measure(
            "grad_norm", "gradient norm at the end", mean_of_last("grad_norm", 3),
            higher_is_better=False, compare="ratio",
        ),
    ),
    claims=(
        Claim(
            "At gradients as small as the paper's, the usual settings of Adam do not learn and M1's do",
            "section 3.2: the usual settings did not converge; most gradients below 1e-14",
            "final", "m1_1e-10", "usual_1e-10", "higher",
        ),
        Claim(
            "So it is at gradients a hundred times as large", "section 3.2: gradients from 1e-18 to 1e-5",
            "final", "m1_1e-8", "usual_1e-8", "higher",
        ),
        Claim(
            "With eps 1e-15 the scale of the loss does not matter, down to 1e-8", "section 3.2, no figure",
            "final", "m1_1e-8", "m1_1e-0", "equal", margin=0.05,
        ),
        Claim(
            "nor down to 1e-10", "section 3.2, no figure",
            "final", "m1_1e-10", "m1_1e-0", "equal", margin=0.05,
        ),
        Claim(
            "beta2 = 0.95 learns more than 0.999: gradients of neighbouring steps are weakly correlated",
            "section 3.2, no figure", "area", "m1_1e-0", "usual_beta2_1e-0", "higher",
        ),
    ),
    curves=("eval_accuracy", "grad_norm", "entropy_nats"),
)  # fmt: skip
