import asyncio

import numpy as np
import pytest

from tests.sampling.support import Engine, model, teacher_forced
from whorl.data import Message, Problem, role_code
from whorl.model.tokenizer import Tokenizer
from whorl.sampling.dialogue import Dialogue, Script
from whorl.sampling.draw import Sampling

TOKENIZER = Tokenizer.characters("0123456789+-=#? ")
PROBLEM = Problem("p", "1+1=")


def network(**changes):
    return model(vocab_size=TOKENIZER.vocab_size, **changes)


def engine(**changes) -> Engine:
    return Engine(network(**changes), stop_tokens=[TOKENIZER.end_id], decode_text=TOKENIZER.decode)


def dialogue(sampler, **changes) -> Dialogue:
    settings = {"key": 5, "sampling": Sampling(max_tokens=12), "keep_state": True}
    return Dialogue(sampler, TOKENIZER, PROBLEM, **(settings | changes))


async def three_turns(talk: Dialogue) -> None:
    talk.read(Message("system", "0"), *PROBLEM.messages)
    await talk.write()
    talk.read(Message("user", "? 12"))
    await talk.write("reflection", max_tokens=7)
    await talk.write("retry")


def test_the_tokens_the_policy_wrote_are_exactly_those_marked_as_its_own():
    talk = dialogue(engine())
    asyncio.run(three_turns(talk))
    rollout = talk.rollout()
    for turn in rollout.transcript:
        span = slice(turn.start, turn.end)
        assert rollout.policy_T[span].all() == turn.by_policy == rollout.policy_T[span].any()
        assert (rollout.role_T[span] == role_code(turn.role)).all()
    assert [turn.role for turn in rollout.transcript if turn.by_policy] == [
        "assistant",
        "reflection",
        "retry",
    ]
    own = sum(turn.end - turn.start for turn in rollout.transcript if turn.by_policy)
    assert rollout.num_response_tokens == own
    assert (rollout.logp_T[~rollout.policy_T] == 0).all()
    assert (rollout.version_T[~rollout.policy_T] == -1).all()


@pytest.mark.parametrize("keep_state", [True, False])
def test_every_turn_is_drawn_from_the_whole_conversation(keep_state):
    sampler = engine()
    talk = dialogue(sampler, keep_state=keep_state)
    asyncio.run(three_turns(talk))
    rollout = talk.rollout()
    for turn in rollout.transcript:
        if turn.by_policy:
            before = rollout.tokens_T[: turn.start].tolist()
            expected = teacher_forced(sampler.model, before, rollout.tokens_T[turn.start : turn.end])
            assert np.abs(rollout.logp_T[turn.start : turn.end] - expected).max() <= 1e-5


def test_keeping_the_state_reads_less_and_says_the_same():
    rollouts, read = [], []
    for keep_state in (True, False):
        sampler = engine()
        talk = dialogue(sampler, keep_state=keep_state)
        asyncio.run(three_turns(talk))
        rollouts.append(talk.rollout())
        read.append(sampler.num_prefilled_tokens)
    assert rollouts[0].tokens_T.tolist() == rollouts[1].tokens_T.tolist()
    assert read[0] < read[1]


def test_a_turn_that_was_cut_short_is_closed_before_anything_follows():
    talk = dialogue(engine(), sampling=Sampling(max_tokens=2))

    async def play():
        talk.read(*PROBLEM.messages)
        await talk.write()
        talk.read(Message("user", "3"))

    asyncio.run(play())
    rollout = talk.rollout()
    first = next(turn for turn in rollout.transcript if turn.by_policy)
    if first.stop == "max_tokens":
        assert rollout.tokens_T[first.end] == TOKENIZER.end_id
        assert not rollout.policy_T[first.end]


def test_rewinding_forgets_what_came_after_and_draws_it_again_alike():
    talk = dialogue(engine())

    async def play():
        talk.read(*PROBLEM.messages)
        await talk.write()
        mark = talk.mark()
        talk.read(Message("user", "7"))
        first = await talk.write()
        tokens = talk.rollout().tokens_T.tolist()
        talk.rewind(mark)
        assert len(talk.rollout()) == mark.num_tokens
        talk.read(Message("user", "8"))
        await talk.write()
        talk.rewind(mark)
        talk.read(Message("user", "7"))
        assert await talk.write() == first
        assert talk.rollout().tokens_T.tolist() == tokens

    asyncio.run(play())


def test_a_conversation_that_fills_the_context_is_done_and_writes_nothing_more():
    talk = dialogue(engine(max_context=24), sampling=Sampling(max_tokens=100))

    async def play():
        talk.read(*PROBLEM.messages)
        while not talk.done:
            await talk.write()
        assert await talk.write() == ""

    asyncio.run(play())
    rollout = talk.rollout()
    assert rollout.stop == "context"
    assert len(rollout) <= 24 + 2


def test_a_script_says_its_replies_with_the_tokens_that_would_be_sampled():
    talk = dialogue(Script(TOKENIZER, ["5", "#2"], 100))

    async def play():
        talk.read(*PROBLEM.messages)
        assert await talk.write() == "5"
        talk.read(Message("user", "?"))
        assert await talk.write() == "#2"
        with pytest.raises(ValueError, match="more turns than the demonstration has replies"):
            await talk.write()

    asyncio.run(play())
    rollout = talk.rollout()
    own = rollout.tokens_T[rollout.policy_T].tolist()
    assert own == [*TOKENIZER.encode("5"), TOKENIZER.end_id, *TOKENIZER.encode("#2"), TOKENIZER.end_id]


def test_a_stop_string_is_part_of_the_tokens_and_not_of_the_text():
    sampler = engine(seed=3)
    free = dialogue(sampler, sampling=Sampling(max_tokens=40))
    asyncio.run(_one_turn(free))
    text = free.rollout().reply
    assert len(text) > 8, "choose another seed: the free reply is too short to cut"
    wanted = text[4:6]
    cut = dialogue(sampler, sampling=Sampling(max_tokens=40, stop_strings=(wanted,)))
    asyncio.run(_one_turn(cut))
    rollout = cut.rollout()
    assert rollout.stop == "stop_string"
    assert rollout.reply == text[: text.index(wanted)]
    assert TOKENIZER.decode(rollout.tokens_T[rollout.policy_T]) == text[: text.index(wanted) + 2]


async def _one_turn(talk: Dialogue) -> None:
    talk.read(*PROBLEM.messages)
    await talk.write()
