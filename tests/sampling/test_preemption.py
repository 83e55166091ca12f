"""Sequences that give way when memory is short, and requests that nobody waits for any more."""

import asyncio

import numpy as np
import pytest
import torch

from tests.sampling.support import Engine, model, prompts, requests, same, teacher_forced
from whorl.model.state import State
from whorl.sampling.draw import Sampling, stream_key
from whorl.sampling.request import Completion, Request
from whorl.sampling.table import UNIFORM_CHUNK, Table

LENGTHS = [3, 60, 1, 64, 65, 17, 130, 8]


def tokens_held(engine: Engine) -> int:
    """Rows times room of the running state, as allocated."""
    return engine._state.num_slots * engine._state.capacity


@pytest.mark.parametrize(
    ("period", "experts"), [(2, 4), (1, 0), (0, 0)], ids=["hybrid", "softmax", "lightning"]
)
@pytest.mark.parametrize("limit", [700, 300, 40])
def test_preempted_sequences_write_what_they_would_have_written(period, experts, limit):
    network = model(period, experts)
    wave = requests(prompts(LENGTHS), max_tokens=150)
    free = Engine(network).generate(wave)
    engine = Engine(network, max_cached_tokens=limit, prefill_chunk_tokens=50)
    done = engine.generate(wave)
    assert all(same(a, b) for a, b in zip(free, done, strict=True))
    assert not engine.busy
    if limit >= 300:  # below, even two of the shortest are not begun together
        assert engine.num_preemptions > 0
    for request, completion in zip(wave, done, strict=True):
        expected = teacher_forced(network, list(request.tokens), completion.tokens)
        assert np.abs(completion.logp - expected).max() <= 1e-5


def test_a_sequence_is_preempted_in_the_middle_of_its_random_numbers_and_of_a_repetition():
    """Put back after 10, 25, ... tokens, never after a whole chunk of random numbers."""
    network = model()
    wave = requests(
        prompts([20, 30, 40]), max_tokens=150, repetition_run_tokens=4, repetition_probability=0.3
    )
    free = Engine(network).generate(wave)
    engine = Engine(network)
    results: dict[int, Completion] = {}
    for index, request in enumerate(wave):
        engine._submit(request, lambda done, index=index: results.__setitem__(index, done))
    counts = []
    with torch.inference_mode():
        for step in range(400):
            engine.step()
            if step % 15 == 9 and len(engine._rows) > 1:
                counts += engine._table.count[: len(engine._rows)].tolist()
                engine.max_cached_tokens = 1  # as if memory were short for once
                engine._preempt()
                engine.max_cached_tokens = 0
    assert any(count % UNIFORM_CHUNK for count in counts)
    assert engine.num_preemptions >= 2
    assert all(same(a, results[i]) for i, a in enumerate(free))


def test_control_a_preempted_sequence_that_takes_other_random_numbers_is_seen(monkeypatch):
    """The bug: the chunk of random numbers is made when its first one is needed, and never after a return."""
    wave = requests(prompts(LENGTHS), max_tokens=150)
    free = Engine(model()).generate(wave)
    original = Table.admit

    def admit(self, slot, request, written, max_context):
        original(self, slot, request, written, max_context)
        self.random[slot] = 0.5 if written is not None else self.random[slot]

    monkeypatch.setattr(Table, "admit", admit)
    engine = Engine(model(), max_cached_tokens=700)
    done = engine.generate(wave)
    assert engine.num_preemptions > 0
    assert not all(same(a, b) for a, b in zip(free, done, strict=True))


def test_control_a_preempted_sequence_that_does_not_read_what_it_wrote_is_seen(monkeypatch):
    wave = requests(prompts(LENGTHS), max_tokens=150)
    free = Engine(model()).generate(wave)
    monkeypatch.setattr(
        "whorl.sampling.request.Running.unread", property(lambda self: tuple(self.request.tokens))
    )
    engine = Engine(model(), max_cached_tokens=700)
    done = engine.generate(wave)
    assert engine.num_preemptions > 0
    assert not all(same(a, b) for a, b in zip(free, done, strict=True))


def test_the_cache_keeps_to_its_limit_and_grows_with_use():
    network = model()
    wave = requests(prompts([30] * 8), max_tokens=130)
    for limit in (700, 200):
        engine = Engine(network, max_running=32, max_cached_tokens=limit)
        largest = []
        for request in wave:
            engine._submit(request, lambda done: None)
            assert tokens_held(engine) == 64  # nothing is allocated for what only waits
        while engine.busy:
            engine.step()
            rows = len(engine._rows)
            used = rows * (engine._table.longest(rows) - 1) + engine._waiting.num_held_tokens
            largest.append(max(used, tokens_held(engine)))
        assert limit / 2 < max(largest) <= limit


def test_a_state_is_allocated_for_the_rows_that_run_and_not_for_those_that_might():
    engine = Engine(model(), max_running=512)
    assert engine._state.num_slots == 1
    engine.generate(requests(prompts([5] * 20)))
    assert 20 <= engine._state.num_slots <= 32
    assert engine._state.capacity == 64


def test_a_sequence_longer_than_the_limit_runs_alone():
    network = model()
    wave = requests(prompts([200, 10, 10]), max_tokens=100)
    free = Engine(network).generate(wave)
    engine = Engine(network, max_cached_tokens=50)
    order = []
    for index, request in enumerate(wave):
        engine._submit(request, lambda done, index=index: order.append((index, done)))
    alone = []
    while engine.busy:
        engine.step()
        alone.append(len(engine._rows))
    assert max(alone) == 1
    assert [index for index, _ in order] == [0, 1, 2]  # in the order in which they came
    assert all(same(done, free[index]) for index, done in order)
    assert engine._state.capacity <= 300 + 64


def test_the_first_to_come_is_never_put_back():
    engine = Engine(model(), max_cached_tokens=400)
    running = [
        engine._submit(request, lambda done: None) for request in requests(prompts([40] * 6), max_tokens=150)
    ]
    first = running[0]
    seen = 0
    while first.written is None and engine.busy:
        engine.step()
        seen += 1
        if first not in engine._rows:
            break
    assert first.written is None
    assert seen == 149  # the first step draws two
    assert engine.num_preemptions > 0


def test_a_preempted_turn_goes_on_from_the_snapshot_it_was_asked_to_continue():
    network = model()
    first_turn = [Request(p, stream_key(i), Sampling(max_tokens=10), keep_state=True)
                  for i, p in enumerate(prompts([40, 50, 60]))]  # fmt: skip

    def second(done: list[Completion]) -> list[Request]:
        return [
            Request([*c.unread, 7, 8], stream_key(i), Sampling(max_tokens=150), c.snapshot, keep_state=True)
            for i, c in enumerate(done)
        ]

    free, tight = Engine(network), Engine(network, max_cached_tokens=420)
    kept = tight.generate(first_turn)
    before = [snapshot_values(c) for c in kept]
    read = tight.num_prefilled_tokens
    done = tight.generate(second(kept))
    expected = free.generate(second(free.generate(first_turn)))
    assert tight.num_preemptions > 0
    assert all(same(a, b) for a, b in zip(done, expected, strict=True))
    # A state that was handed out stays as it is, and what it holds is not read again.
    assert all(np.array_equal(a, snapshot_values(c)) for a, c in zip(before, kept, strict=True))
    assert tight.num_prefilled_tokens - read <= 3 * 3 + tight.num_preemptions * (3 + 150)


def snapshot_values(completion: Completion) -> np.ndarray:
    assert completion.snapshot is not None
    tensors = (*completion.snapshot.lightning, *completion.snapshot.keys, *completion.snapshot.values)
    return torch.cat([tensor.flatten() for tensor in tensors]).numpy().copy()


def test_a_group_larger_than_the_limit_shares_its_prompt_as_far_as_it_can():
    network = model()
    prompt = prompts([60])[0]
    group = [Request(prompt, stream_key("group", i), Sampling(max_tokens=40)) for i in range(12)]
    free = Engine(network).generate(group)
    engine = Engine(network, max_cached_tokens=400)
    done = engine.generate(group)
    assert all(same(a, b) for a, b in zip(free, done, strict=True))
    assert engine.num_prefilled_tokens < 12 * 60


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match=r"max_cached_tokens must be 0 \(no limit\) or more; got -1"):
        Engine(model(), max_cached_tokens=-1)


# Requests that nobody waits for.


def test_a_cancelled_request_leaves_the_engine_and_the_others_go_on():
    network = model()
    wave = requests(prompts([10] * 6), max_tokens=40)
    alone = Engine(network).generate(wave)
    engine = Engine(network, max_running=3)

    async def some() -> list:
        tasks = [asyncio.create_task(engine.complete(request)) for request in wave]
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(engine._rows) == 3
        tasks[1].cancel()  # runs
        tasks[4].cancel()  # waits
        return await asyncio.gather(*tasks, return_exceptions=True)

    done = asyncio.run(some())
    assert [isinstance(d, asyncio.CancelledError) for d in done] == [i in (1, 4) for i in range(6)]
    for i in (0, 2, 3, 5):
        assert same(done[i], alone[i])
    assert not engine.busy
    assert engine.num_generated_tokens < 5 * 40


@pytest.mark.parametrize("chunk", [4, 4096], ids=["while it is read", "while it runs"])
def test_a_play_that_is_cancelled_leaves_nothing_behind(chunk):
    engine = Engine(model(), max_running=4, prefill_chunk_tokens=chunk)
    wave = requests(prompts([30] * 8), max_tokens=50)

    async def cancelled() -> bool:
        play = asyncio.gather(*(engine.complete(request) for request in wave))
        for _ in range(5):
            await asyncio.sleep(0)
        was_busy = engine.busy
        play.cancel()
        with pytest.raises(asyncio.CancelledError):
            await play
        return was_busy

    assert asyncio.run(cancelled())
    assert not engine.busy
    generated = engine.num_generated_tokens
    again = requests(prompts([5]), max_tokens=3)
    assert same(engine.generate(again)[0], Engine(model()).generate(again)[0])
    assert engine.num_generated_tokens - generated == 3  # nothing of the lost play is written meanwhile


def test_control_an_engine_that_keeps_cancelled_requests_writes_on(monkeypatch):
    monkeypatch.setattr(Engine, "_drop", lambda self, running: None)
    with pytest.raises(AssertionError):
        test_a_play_that_is_cancelled_leaves_nothing_behind(4096)


def test_a_failed_step_forgets_the_requests_of_everyone_who_waited(monkeypatch):
    engine = Engine(model(), max_running=2)
    wave = requests(prompts([10] * 5), max_tokens=20)

    def fails(tokens_S, state):
        raise MemoryError("no more")

    with monkeypatch.context() as broken:
        broken.setattr(engine.model, "decode", fails)
        with pytest.raises(MemoryError):
            engine.generate(wave)
        assert not engine.busy

        async def everyone() -> list:
            return await asyncio.gather(*map(engine.complete, wave), return_exceptions=True)

        assert all(isinstance(error, MemoryError) for error in asyncio.run(everyone()))
        assert not engine.busy
    expected = Engine(model()).generate(wave)
    assert all(same(a, b) for a, b in zip(engine.generate(wave), expected, strict=True))


def test_a_prompt_is_read_to_its_end_if_one_of_two_requests_is_taken_back():
    engine = Engine(model(), prefill_chunk_tokens=5)
    prompt = prompts([20])[0]
    pair = [Request(prompt, stream_key(i), Sampling(max_tokens=4)) for i in range(2)]

    async def play() -> Completion:
        tasks = [asyncio.create_task(engine.complete(request)) for request in pair]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.wait(tasks)
        return tasks[1].result()

    assert same(asyncio.run(play()), Engine(model()).generate(pair)[1])
    assert engine.num_prefilled_tokens == 20


def test_resizing_forgets_no_running_sequence():
    """Rows of very different lengths while the limit makes the state wider and narrower."""
    network = model()
    wave = requests(prompts([300, 5, 5, 5, 150, 5, 5]), max_tokens=30)
    sizes = set()
    original = State.resize

    def resize(self, num_slots, capacity):
        sizes.add((num_slots, capacity))
        original(self, num_slots, capacity)

    engine = Engine(network, max_cached_tokens=1200)
    State.resize = resize  # type: ignore[method-assign]
    try:
        done = engine.generate(wave)
    finally:
        State.resize = original  # type: ignore[method-assign]
    assert len({slots for slots, _ in sizes}) > 1
    assert all(same(a, b) for a, b in zip(done, Engine(network).generate(wave), strict=True))
