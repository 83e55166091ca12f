"""One conversation with the engine, recorded token by token: what an environment's episode talks to."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from whorl.data import Message, Problem, Rollout, Turn, role_code
from whorl.model.state import Snapshot
from whorl.model.tokenizer import ChatTokenizer
from whorl.sampling.draw import Sampling
from whorl.sampling.request import Completion, Request


@runtime_checkable
class Sampler(Protocol):
    """What completes requests: the engine, or a script that says given replies."""

    @property
    def max_context(self) -> int: ...

    async def complete(self, request: Request) -> Completion: ...


class Script:
    """A sampler that says given replies, turn by turn: demonstrations with the real tokens and roles.

    Its log-probs are 0, since nobody drew the tokens: train on them by imitation only.
    """

    def __init__(self, tokenizer: ChatTokenizer, replies: Sequence[str], max_context: int):
        self._tokenizer, self._replies, self.max_context = tokenizer, list(replies), max_context

    async def complete(self, request: Request) -> Completion:
        if not self._replies:
            raise ValueError("the episode asks for more turns than the demonstration has replies")
        tokens = np.array([*self._tokenizer.encode(self._replies.pop(0)), self._tokenizer.end_id])
        zeros = np.zeros(len(tokens), dtype=np.float32)
        return Completion(tokens, zeros, zeros, np.zeros(len(tokens), dtype=np.int32), "stop_token")


@dataclass(frozen=True)
class Mark:
    """A point of a conversation to which `rewind` returns."""

    num_tokens: int
    num_turns: int
    num_routed: int
    heard: tuple[Message, ...]
    unread: tuple[int, ...]
    snapshot: Snapshot | None
    stop: str | None


class Dialogue:
    """A conversation that grows by reading messages and writing turns; at the end, a Rollout.

    Tokens are only ever appended, and nothing is tokenised twice: what the policy drew is what is kept. Messages
    are rendered together when the policy is to answer, since a chat template may join neighbours (two answers of
    tools in one turn). After each turn the model's state is kept if `keep_state` (environments with several
    turns), so a further turn reads only what is new. `key` is the stream of the sample's draws, `shared_key` that
    of the turns that it shares with the other samples of its group.
    """

    def __init__(
        self,
        sampler: Sampler,
        tokenizer: ChatTokenizer,
        problem: Problem,
        *,
        key: int,
        shared_key: int | None = None,
        group: int = 0,
        sample: int = 0,
        sampling: Sampling | None = None,
        keep_state: bool = False,
    ):
        self._sampler, self._tokenizer, self._problem = sampler, tokenizer, problem
        self._key, self._group, self._sample = key, group, sample
        self._shared_key = key if shared_key is None else shared_key
        self._sampling, self._keep_state = sampling or Sampling(), keep_state
        self._tokens, self._version = array("i"), array("i")
        self._policy, self._role = array("b"), array("b")
        self._logp, self._raw_logp = array("f"), array("f")
        self._transcript: list[Turn] = []
        self._heard: tuple[Message, ...] = ()  # messages that were read and have no tokens yet
        self._experts: np.ndarray | None = None  # of the tokens from the first on, as far as they were read
        self._unread: tuple[int, ...] = ()  # tokens the model has not consumed yet
        self._snapshot: Snapshot | None = None
        self._stop: str | None = None
        self._has_own_turn = False
        self.sampler_error: Exception | None = None
        """What the sampler raised, so that who plays the episode can tell it from the environment's errors."""

    @property
    def sample(self) -> int:
        return self._sample

    @property
    def done(self) -> bool:
        """Whether no further turn can be written."""
        return self._stop in ("context", "repetition")

    def read(self, *messages: Message) -> None:
        """Messages from outside the policy, to be appended to the conversation."""
        self._heard += messages

    async def write(
        self,
        role: str = "assistant",
        *,
        max_tokens: int | None = None,
        stop_strings: Sequence[str] = (),
        shared: bool = False,
    ) -> str:
        """Let the model write one turn; its text without the stop token or string.

        A `shared` turn is the same in all samples of the group: it is drawn from the group's stream. ValueError if a
        turn of the sample's own stands before it, since the samples then have no common text to go on from.
        """
        if shared and self._has_own_turn:
            raise ValueError(
                "a turn that the samples of a group share has to stand before the turns of their own; got one after"
            )
        if self.done:
            return ""
        self._has_own_turn |= not shared
        segments = self._rendered(generation=True)
        has_spoken = any(turn.by_policy for turn in self._transcript)
        num_tokens = len(self._tokens) + sum(len(ids) for _, ids in segments)
        if has_spoken and num_tokens >= self._sampler.max_context:
            self._stop = "context"
            return ""
        self._append_heard(segments)
        self._append(segments[-1][1], role)
        sampling = replace(
            self._sampling,
            max_tokens=min(self._sampling.max_tokens, max_tokens or self._sampling.max_tokens),
            stop_strings=(*self._sampling.stop_strings, *stop_strings),
        )
        key = self._shared_key if shared else self._key
        request = Request(self._unread, key, sampling, self._snapshot, self._keep_state)
        try:
            completion = await self._sampler.complete(request)
        except Exception as error:
            self.sampler_error = error
            raise
        if completion.experts is not None:
            self._note_experts(completion.experts, first=len(self._tokens) - len(self._unread))
        start, count = len(self._tokens), len(completion.tokens)
        for column, values in (
            (self._tokens, completion.tokens), (self._version, completion.version),
            (self._logp, completion.logp), (self._raw_logp, completion.raw_logp),
        ):  # fmt: skip
            column.frombytes(values.astype(column.typecode).tobytes())
        self._policy += array("b", [True]) * count
        self._role += array("b", [role_code(role)]) * count
        self._snapshot, self._unread = completion.snapshot, completion.unread
        if not self._keep_state:
            self._unread = tuple(self._tokens)  # a further turn would read everything again
        self._stop = completion.stop
        text = self._tokenizer.decode(completion.tokens)
        if completion.stop == "stop_string":
            text = text[: min(i for s in sampling.stop_strings if (i := text.find(s)) >= 0)]
        self._transcript.append(Turn(role, text, True, start, len(self._tokens), completion.stop))
        return text

    def mark(self) -> Mark:
        """A point to come back to (the state is kept only with `keep_state`; otherwise it is recomputed)."""
        return Mark(
            len(self._tokens),
            len(self._transcript),
            0 if self._experts is None else len(self._experts),
            self._heard,
            self._unread,
            self._snapshot,
            self._stop,
        )

    def rewind(self, mark: Mark) -> None:
        """Forget everything after `mark`."""
        for column in (
            self._tokens, self._policy, self._role, self._logp, self._raw_logp, self._version,
        ):  # fmt: skip
            del column[mark.num_tokens :]
        del self._transcript[mark.num_turns :]
        if self._experts is not None:
            self._experts = self._experts[: mark.num_routed]
        self._heard, self._unread = mark.heard, mark.unread
        self._snapshot, self._stop = mark.snapshot, mark.stop

    def rollout(self, stop: str | None = None, error: str | None = None) -> Rollout:
        """The conversation so far as a rollout, without a score."""
        here = self.mark()
        if self._heard:
            self._append_heard(self._rendered(generation=False))
        rollout = Rollout(
            problem=self._problem,
            group=self._group,
            sample=self._sample,
            tokens_T=np.array(self._tokens, dtype=np.int32),
            policy_T=np.array(self._policy, dtype=bool),
            role_T=np.array(self._role, dtype=np.int8),
            logp_T=np.array(self._logp, dtype=np.float32),
            raw_logp_T=np.array(self._raw_logp, dtype=np.float32),
            version_T=np.array(self._version, dtype=np.int32),
            experts_T=self._experts_of_all(),
            transcript=tuple(self._transcript),
            stop=stop or self._stop or "environment",
            error=error,
        )
        self.rewind(here)  # more may be said, and what is read next may belong to the same turn
        return rollout

    def _rendered(self, generation: bool) -> list[tuple[str, list[int]]]:
        """Tokens of what was read since the policy's last turn, and (`generation`) of the opening of its next one.

        Before them, those that close the last turn: it ends with a stop token of its own, or was cut short.
        """
        said = [Message(turn.role, turn.text) for turn in self._transcript]
        ended = not said or self._transcript[-1].stop == "stop_token"
        return self._tokenizer.render(self._heard, generation, after=said, ended=ended)

    def _append_heard(self, segments: Sequence[tuple[str, list[int]]]) -> None:
        if self._transcript:
            (role, closing), *segments = segments
            self._append(closing, role)
        for message, (role, ids) in zip(self._heard, segments, strict=False):
            start = len(self._tokens)
            self._append(ids, role)
            self._transcript.append(Turn(message.role, message.text, False, start, len(self._tokens)))
        self._heard = ()

    def _note_experts(self, experts: np.ndarray, first: int) -> None:
        """Experts of the tokens from `first` on. Where tokens were read again, the first reading counts: it is
        the one under which the log-probs after them were told."""
        known = experts[:0] if self._experts is None else self._experts
        self._experts = np.concatenate([known, experts[len(known) - first :]])

    def _experts_of_all(self) -> np.ndarray | None:
        """With -1 for the tokens at the end that nobody has read."""
        if self._experts is None:
            return None
        missing = len(self._tokens) - len(self._experts)
        return np.pad(self._experts, ((0, missing), (0, 0), (0, 0)), constant_values=-1)

    def _append(self, ids: Sequence[int], role: str) -> None:
        """Tokens from outside the policy: never trained on, no log-prob."""
        count = len(ids)
        self._tokens += array("i", ids)
        self._policy += array("b", [False]) * count
        self._role += array("b", [role_code(role)]) * count
        self._logp += array("f", [0.0]) * count
        self._raw_logp += array("f", [0.0]) * count
        self._version += array("i", [-1]) * count
        self._unread += tuple(ids)
