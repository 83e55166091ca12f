"""Chats with real templates: what the policy wrote is what is trained on, and turns end where they should."""

import asyncio

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.chats import SPECIAL, tokenizer_of
from tests.sampling.support import Engine, model
from whorl.algorithms.algorithm import assemble
from whorl.algorithms.catalog import CISPO
from whorl.data import Group, Message, Problem, Score, role_code
from whorl.model.tokenizer import _BYTE_LETTERS, Tokenizer
from whorl.sampling.dialogue import Dialogue, Script
from whorl.sampling.draw import Sampling
from whorl.sampling.engine import Completion, Request

TOKENIZERS = {name: tokenizer_of(name) for name in ("qwen2", "qwen3", "llama3", "minimax")}
TOKENIZERS["bytes"] = Tokenizer.byte_level()
each_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)
PROBLEM = Problem("p", "two and three?")
TEXT = st.sampled_from(
    ["The answer", "five\n", "\n\n", "<|im_end|>", "<end>", "é😀", " x ", "<think>", "</think>"]
)


class Parrot:
    """A sampler that writes the ids it is given, and remembers what it had read by then."""

    max_context = 10**6

    def __init__(self, stop_ids):
        self.next: list[int] = []
        self.stop_ids = stop_ids
        self.read: list[list[int]] = []

    async def complete(self, request: Request) -> Completion:
        self.read.append(list(request.tokens))
        tokens = np.array(self.next)
        stop = "stop_token" if self.next[-1] in self.stop_ids else "max_tokens"
        logp = -tokens.astype(np.float32) - 1
        return Completion(tokens, logp, logp, np.zeros(len(tokens), dtype=np.int32), stop)


@st.composite
def events(draw, tokenizer):
    """Reads, turns of random ids (not the canonical ones of any text), marks and returns to them."""
    ids = st.integers(0, tokenizer.vocab_size - 1).filter(lambda i: i not in tokenizer.stop_ids)
    turn = st.tuples(st.just("write"), st.lists(ids, min_size=1, max_size=6), st.booleans())
    read = st.tuples(st.just("read"), st.sampled_from(["user", "tool", "user"]), TEXT)
    other = st.sampled_from([("mark",), ("rewind",), ("peek",)])
    return [
        ("read", "user", "hi"),
        *draw(st.lists(st.one_of(turn, turn, read, other), min_size=1, max_size=12)),
    ]


@each_tokenizer
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_the_tokens_the_policy_wrote_are_exactly_the_tokens_trained_on(name, data):
    tokenizer = TOKENIZERS[name]
    parrot = Parrot(tokenizer.stop_ids)
    talk = Dialogue(parrot, tokenizer, PROBLEM, key=0)
    wrote: list[list[int]] = []
    marks = []

    async def play():
        for event in data.draw(events(tokenizer)):
            if event[0] == "read":
                talk.read(Message(event[1], event[2]))
            elif event[0] == "write":
                parrot.next = [*event[1], *([tokenizer.stop_ids[-1]] if event[2] else [])]
                text = await talk.write(("assistant", "reflection", "retry")[len(wrote) % 3])
                assert text == bytes_of(tokenizer, parrot.next).decode(errors="replace")
                wrote.append(parrot.next)
            elif event[0] == "mark":
                marks.append((talk.mark(), len(wrote)))
            elif event[0] == "rewind" and marks:
                mark, count = marks.pop()
                talk.rewind(mark)
                del wrote[count:]
                del parrot.read[count:]
            else:
                talk.rollout()  # to look at a conversation does not change how it goes on

    asyncio.run(play())
    rollout = talk.rollout()
    turns = [turn for turn in rollout.transcript if turn.by_policy]
    assert [rollout.tokens_T[turn.start : turn.end].tolist() for turn in turns] == wrote
    assert rollout.tokens_T[rollout.policy_T].tolist() == [i for ids in wrote for i in ids]
    for turn, read in zip(turns, parrot.read, strict=True):
        assert rollout.tokens_T[: turn.start].tolist() == read, "the policy saw what is kept"
        assert (rollout.role_T[turn.start : turn.end] == role_code(turn.role)).all()
    heard = [turn for turn in rollout.transcript if not turn.by_policy]
    ends = [turn.end for turn in rollout.transcript]
    assert ends == sorted(ends) and len(heard) + len(turns) == len(rollout.transcript)
    if not wrote:
        return

    other = Dialogue(parrot, tokenizer, PROBLEM, key=0)
    other.read(*PROBLEM.messages)
    asyncio.run(other.write())
    group = Group(PROBLEM, [rollout, other.rollout()])
    for place, played in enumerate(group.rollouts):
        played.score = Score(float(place))
    batch = assemble([group], CISPO)
    assert batch.unpack("tokens_N")[0].tolist() == rollout.tokens_T.tolist()
    trained = batch.unpack("trained_N")[0]
    assert trained.tolist() == rollout.policy_T.tolist()
    own = batch.unpack("tokens_N")[0][trained]
    assert own.tolist() == [i for ids in wrote for i in ids]
    assert batch.unpack("logp_sampler_N")[0][trained].tolist() == (-own.float() - 1).tolist()


def bytes_of(tokenizer, ids) -> bytes:
    """The bytes of the tokens, from the names that byte-level tokens have; special ones have none."""
    if isinstance(tokenizer, Tokenizer):
        return bytes(i for i in ids if i < 256)
    special = set(tokenizer._special.values())
    names = [tokenizer._inner.id_to_token(i) for i in ids if i not in special]
    letters = {letter: bytes([byte]) for byte, letter in enumerate(_BYTE_LETTERS)}
    return b"".join(b"".join(letters[letter] for letter in name) for name in names)


@each_tokenizer
def test_a_demonstration_is_what_a_script_that_says_it_leaves_behind(name):
    """Two ways to the same tokens: the whole chat at once, and an episode turn by turn."""
    tokenizer = TOKENIZERS[name]
    replies = ["The answer is five.", "fine, thank you"]
    if name == "qwen3":
        replies = replies[:1]  # the template drops the (empty) thinking of the last turn from earlier ones
    talk = Dialogue(Script(tokenizer, replies, 1000), tokenizer, PROBLEM, key=0)
    said: list[Message] = []

    async def play():
        for reply in replies:
            said.extend([Message("user", "two and three?"), Message("assistant", reply)])
            talk.read(said[-2])
            await talk.write()

    asyncio.run(play())
    rollout = talk.rollout()
    ids, mask = tokenizer.demonstrate(said)
    if name == "qwen3":  # the finished chat shows the empty thinking that the opening did not
        own = [i for i, m in zip(ids, mask, strict=True) if m]
        assert rollout.tokens_T[rollout.policy_T].tolist() == own[-rollout.num_response_tokens :]
        return
    length = len(rollout)
    assert ids[:length] == rollout.tokens_T.tolist()
    assert mask[:length] == rollout.policy_T.tolist()
    assert tokenizer.decode(ids[length:]).strip() == "" and not any(mask[length:])


class Scripted:
    """An engine whose model wants given tokens, one after the other."""

    def __init__(self, tokenizer, wanted: list[int]):
        self.engine = Engine(
            model(vocab_size=tokenizer.vocab_size),
            stop_tokens=tokenizer.stop_ids,
            decode_text=tokenizer.decode,
        )
        left = list(wanted)

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            row = torch.zeros(len(hidden), tokenizer.vocab_size)
            row[:, left.pop(0)] = 1e4
            return row

        self.engine.model.logits = logits

    def run(self, **sampling) -> Completion:
        settings = Sampling(**({"max_tokens": 200, "temperature": 0.0} | sampling))
        return self.engine.generate([Request([0], 0, settings)])[0]


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_a_stop_string_ends_the_turn_with_the_token_that_completes_it(data):
    """Whatever the tokens: whole words, single bytes of a character, special ones in between."""
    tokenizer = TOKENIZERS["qwen2"]
    letters = {letter: byte for byte, letter in enumerate(_BYTE_LETTERS)}
    single = {letters[n]: i for n, i in tokenizer._inner.get_vocab().items() if n in letters}
    pads = [tokenizer._special[t] for t in SPECIAL if tokenizer._special[t] not in tokenizer.stop_ids]
    text = data.draw(st.text("ab é😀ж.", min_size=2, max_size=12))
    pieces = data.draw(st.lists(st.booleans(), min_size=len(text), max_size=len(text)))
    ids = []
    for character, as_bytes in zip(text, pieces, strict=True):
        ids += [single[b] for b in character.encode()] if as_bytes else tokenizer.encode(character)
        ids += data.draw(st.lists(st.sampled_from(pads), max_size=3))
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : data.draw(st.integers(start + 1, len(text)))]
    ends = next(k for k in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:k]))
    done = Scripted(tokenizer, ids).run(stop_strings=(stop,))
    assert (done.tokens.tolist(), done.stop) == (ids[:ends], "stop_string")


def test_the_length_of_a_decoded_tail_would_have_missed_a_stop_string():
    """ "😀cd" has 6 bytes. Of its last 6 tokens two are special, and the marks for half a character are long."""
    tokenizer = TOKENIZERS["qwen2"]
    letters = {letter: byte for byte, letter in enumerate(_BYTE_LETTERS)}
    single = {letters[n]: i for n, i in tokenizer._inner.get_vocab().items() if n in letters}
    pad = tokenizer._special["<s>"]
    ids = [*(single[b] for b in "😀c".encode()), pad, pad, single[ord("d")], single[ord("e")]]
    assert len(tokenizer.decode(ids[2:8]).encode()) >= 6
    assert Scripted(tokenizer, ids).run(stop_strings=("😀cd",)).tokens.tolist() == ids[:8]


@pytest.mark.parametrize("family", ["qwen2", "llama3", "mistral"])
def test_every_stop_token_ends_a_turn_and_what_follows_is_closed_alike(family):
    tokenizer = tokenizer_of(family)
    word = tokenizer.encode("five")
    followed = []
    for stop in tokenizer.stop_ids:
        scripted = Scripted(tokenizer, [*word, stop, *word])
        talk = Dialogue(scripted.engine, tokenizer, PROBLEM, key=0, sampling=Sampling(temperature=0.0))

        async def play(talk=talk):
            talk.read(*PROBLEM.messages)
            assert await talk.write() == "five"
            talk.read(Message("user", "and?"))

        asyncio.run(play())
        rollout = talk.rollout()
        turn = next(turn for turn in rollout.transcript if turn.by_policy)
        assert rollout.tokens_T[turn.start : turn.end].tolist() == [*word, stop]
        followed.append(rollout.tokens_T[turn.end :].tolist())
    assert all(rest == followed[0] for rest in followed)


def test_text_after_a_stop_string_is_cut_and_the_turn_closed_by_the_template():
    tokenizer = TOKENIZERS["qwen2"]
    scripted = Scripted(tokenizer, [*tokenizer.encode("five."), *tokenizer.encode(" is fine")])
    talk = Dialogue(scripted.engine, tokenizer, PROBLEM, key=0, sampling=Sampling(temperature=0.0))

    async def play():
        talk.read(*PROBLEM.messages)
        assert await talk.write(stop_strings=(".",)) == "five"
        talk.read(Message("tool", "1"), Message("tool", "2"))

    asyncio.run(play())
    rollout = talk.rollout()
    turn = next(turn for turn in rollout.transcript if turn.by_policy)
    rest = "".join(map(tokenizer.token_text, rollout.tokens_T[turn.end :].tolist()))
    assert rest.startswith(r"<|im_end|>\n<|im_start|>user\n<tool_response>\n1")
    assert rest.count("<|im_end|>") == 2, "two answers of tools, one turn"
    assert not rollout.policy_T[turn.end :].any()


def test_looking_at_a_conversation_does_not_change_how_it_goes_on():
    tokenizer = TOKENIZERS["qwen2"]
    tokens = []
    for peek in (False, True):
        talk = Dialogue(Script(tokenizer, ["five", "x"], 1000), tokenizer, PROBLEM, key=0)

        async def play(talk=talk, peek=peek):
            talk.read(*PROBLEM.messages)
            await talk.write()
            talk.read(Message("tool", "1"))
            if peek:
                assert talk.rollout().transcript[-1].text == "1"
            talk.read(Message("tool", "2"))
            await talk.write()

        asyncio.run(play())
        tokens.append(talk.rollout().tokens_T.tolist())
    assert tokens[0] == tokens[1]
