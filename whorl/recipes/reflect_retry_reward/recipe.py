"""The settings: GRPO on the tokens of the reflection alone."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int

from whorl.algorithms.algorithm import Algorithm
from whorl.learning.optimizer import OptimizerSettings
from whorl.sampling.draw import Sampling
from whorl.settings import ColdStart, Evaluation, Settings

ONCE = "chain_arithmetic,num_terms=4,modulus=5"
TASK = f"reflect_retry:{ONCE},first_right_frac=0.3"


@dataclass(frozen=True)
class ReflectRetryReward(Settings):
    """GRPO on the tokens of the reflection alone; its reward is the verdict on the retry."""

    claim: ClassVar[str] = (
        "Rewarding only reflections whose retry succeeds raises second-try accuracy, and first-try accuracy too, "
        "though no answer token is rewarded (arXiv:2505.24726 Tables 1 and 2: on average +9.0 points in function "
        "calling and +16.0 in countdown)."
    )
    scaled: ClassVar[tuple[str, ...]] = (
        "a hybrid of 1.2M parameters made here (24M on a GPU) in place of 1.5 to 8 billion, taught to try, to reflect "
        "in four ways of mixed use and to try again; reinforcement learning selects among them",
        "on a CPU sums of four digits modulo five in place of countdown and function calling: after 600 updates of 64 "
        "demonstrations in countdown 12 to 16% of first tries were right, and 9 to 20% of retries, whatever the "
        "reflection was, so there was nothing to select",
        "one failed attempt of each of at most 1,000 problems (on a GPU 2,000 of countdown, 600 calls), of 8 samples "
        "in place of up to 64; no quarter of the pass rates has more than a quarter of the problems",
        "some 25 steps (60 and 40 on a GPU) in place of 1,750; learning rate 3e-4 (1e-4 on a GPU, where it harms "
        "calls) in place of 5e-7, without its cosine",
    )
    unsaid: ClassVar[tuple[str, ...]] = (
        "group size and the clip's bounds: 8, and PPO's 0.8 and 1.2",
        "the wording of the messages: `wrong`, then the task again; instructions=True writes sentences",
        "whether the end of a reflection belongs to it: it does, as the policy wrote it",
        "how reflections are averaged: each rollout weighs the same, as in GRPO's Eq. 3",
    )

    environment: str = TASK
    max_context: int = 96
    cold_start: ColdStart = field(
        default_factory=lambda: ColdStart(
            # Before the working of sums is learned, in a jump, about 0.36 are right at either try, by luck.
            max_updates=2000,
            until_accuracy=0.5,
            check_problems=256,
        )
    )
    algorithm: str = "GRPO,minus_kl_k3=0.001"  # Sec. 4.3: beta = 0.001
    trained_roles: tuple[str, ...] = ("reflection",)
    """Turns whose tokens are trained. A control adds "retry", which makes it ordinary reinforcement on answers."""
    rewards_of: str = "own retry"
    """ "own retry", or "another problem" (a control): reflections get the rewards of the next problem of the batch."""
    failed_queries: int = 1000
    """Training problems that the start model is asked for failures of its own."""
    answers_per_query: int = 16
    """How often each; the paper: up to 64."""
    collected_failures: bool = True
    """Of an experiment's trial: it first collects failures of its start and trains on those. False: as in
    `whorl train`, every step has fresh attempts of the policy, and a group whose attempt is right teaches nothing."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=24))
    # Sec. 4.3 has 5e-7 for pretrained models; the other numbers are AdamW's usual ones.
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(3e-4, beta2=0.999, eps=1e-8, warmup_steps=5)
    )
    num_steps: int = 60
    problems_per_step: int = 32  # x 8 = 256, the paper's effective batch
    rollouts_per_problem: int = 8
    # One sample: were there several, they would share their attempt.
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(20, 400, 1))

    def __post_init__(self) -> None:
        if self.rewards_of not in ("own retry", "another problem"):
            raise ValueError(f'rewards_of is "own retry" or "another problem"; got {self.rewards_of!r}')
        super().__post_init__()

    def resolve_algorithm(self) -> Algorithm:
        row = replace(super().resolve_algorithm(), roles=self.trained_roles)
        return row if self.rewards_of == "own retry" else replace(row, shaping=(rewards_of_the_next_problem,))


def rewards_of_the_next_problem(
    reward_S: Float[torch.Tensor, " S"], group_S: Int[torch.Tensor, " S"]
) -> Float[torch.Tensor, " S"]:
    """r_i of the group after one's own, the last group's of the first: every link of reflection and retry is cut.

    Rewards keep their distribution within a group, so advantages are as large as ever and mean nothing. A group that
    is longer than the next gets its rewards once more from the first.
    """
    groups = [reward_S[group_S == group] for group in group_S.unique_consecutive()]
    others = [*groups[1:], *groups[:1]]
    shared = [other[torch.arange(len(own)) % len(other)] for own, other in zip(groups, others, strict=True)]
    return torch.cat(shared)
