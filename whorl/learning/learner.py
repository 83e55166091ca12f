"""The learner: log-probabilities, gradients and updates of one model, whatever algorithm made the batch.

It knows an algorithm by its terms alone: for each, which columns the objective reads and which column
holds its weights. Here, and only here, objectives are negated:

    loss = - sum over terms  coefficient * sum_n weight_n * objective_n   +   router loss

The weights were fixed on the global batch, so the loss is a sum over sequences and its gradient does not
depend on how they are cut into micro-batches.

A prompt that sequences of a micro-batch share is computed once and counts as often as it is shared: what the
learner returns is what it would return for each sequence alone, at the cost of the distinct tokens.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from whorl.algorithms.algorithm import LIVE, Term
from whorl.algorithms.objectives import MAX_LOG_RATIO
from whorl.data import Batch, Metrics, apply, columns_read_by
from whorl.kernels.logprob import token_logprobs
from whorl.learning.checkpoint import check_tensors
from whorl.learning.optimizer import Optimizer, OptimizerSettings
from whorl.learning.packing import layout_of, micro_batches, with_prefixes
from whorl.learning.reference import Reference
from whorl.model.experts import Routing, load_balance_loss
from whorl.model.heads import ScalarHead
from whorl.model.layout import Fork, Layout
from whorl.model.lora import policy_parameters
from whorl.model.transformer import Hidden, Transformer

Result = TypeVar("Result")


@dataclass
class _Seen:
    """What one micro-batch adds: its gradient (None: already added), sums, choices of experts `[L, E]`, its
    largest ratio, and the learner's and the sampler's log-probs of its trained tokens `[2, M]`."""

    gradients: tuple[Tensor | None, ...] | None
    sums: dict[str, Tensor]
    chosen_LE: Tensor
    largest_ratio: Tensor | None
    compared: Tensor | None


class Learner:
    """One model with its optimizer, and on request a value head and a frozen reference.

    `temperature` is the one the policy samples at. `token_budget` bounds the padded tokens of a
    micro-batch and changes memory and speed, not results. Batches come on the CPU; columns go to the
    model's device as they are needed and results come back.

    `router_aux_coefficient` multiplies the load-balance loss of expert layers. The value of MiniMax-M1's RL
    stage is not published; 0.001 is the released configuration's for this form of the loss (which there
    counts each of a token's k choices and so is k times as strong).

    `num_threads` micro-batches are worked on at once (for a CPU). Gradients are added in the order of
    micro-batches, so a run repeats to the bit with the same number of threads; with another number the batch
    is cut otherwise and the sums are rounded otherwise.
    """

    def __init__(
        self,
        model: Transformer,
        settings: OptimizerSettings,
        *,
        temperature: float = 1.0,
        token_budget: int = 8192,
        value_head: bool = False,
        reference: bool = False,
        router_aux_coefficient: float = 0.001,
        num_threads: int = 1,
    ):
        if num_threads < 1:
            raise ValueError(f"num_threads must be at least 1; got {num_threads}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0 (there is no gradient at 0); got {temperature}")
        self.model, self.temperature, self.token_budget = model, temperature, token_budget
        self.router_aux_coefficient = router_aux_coefficient
        self.num_threads = num_threads
        self._threads: ThreadPoolExecutor | None = None
        weight = model.embed_tokens.weight
        self.device, self.dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
        self.value_head: ScalarHead | None = None
        if value_head:
            self.value_head = ScalarHead(model.config.width, self.device, self.dtype)
        self.reference: Reference | None = None
        if reference:
            self.set_reference()
        self.optimizer = Optimizer(self._parameters().items(), settings)
        self.version = 0
        layers, experts = (model.config.num_layers, model.config.num_experts)
        self._share_LE = torch.full((layers, experts), 1 / max(experts, 1), dtype=torch.float64)
        self._share_LE = self._share_LE.to(self.device)
        self._chosen_LE = torch.zeros(layers, experts, dtype=torch.int64, device=self.device)
        self._pending = False

    # Reading: nothing here changes the learner.

    def logprobs(self, batch: Batch) -> Float[Tensor, " N"]:
        """log pi of each token given those before it, in nats at the sampling temperature.

        Over the whole vocabulary, in fp32 (float64 for a float64 model), without gradient; 0 where
        `policy_N` is False.
        """
        return self._read(batch, self.model, self._logp)

    def reference_logprobs(self, batch: Batch) -> Float[Tensor, " N"]:
        """As `logprobs`, under the frozen reference policy."""
        if self.reference is None:
            raise ValueError("this learner keeps no reference policy; build it with reference=True")
        with self.reference.model() as model:
            return self._read(batch, model, self._logp)

    def values(self, batch: Batch) -> Float[Tensor, " N"]:
        """The critic's estimate before each token is written (from the state after the token before it).

        Without gradient; 0 where `policy_N` is False.
        """
        return self._read(batch, self.model, lambda model, hidden_MD, target_M: self._value(hidden_MD))

    def weights(self) -> dict[str, Tensor]:
        """The policy's parameters by name, for a sampler: the live tensors, which the next update changes.

        Of a model with adapters only those: the base is what the sampler has.
        """
        return {name: p.detach() for name, p in policy_parameters(self.model).items()}

    # Learning.

    def set_reference(self) -> None:
        """Make the present policy the reference."""
        self.reference = Reference(self.model)

    def forward_backward(
        self, batch: Batch, terms: Sequence[Term], *, compare_sampler: bool = False
    ) -> Metrics:
        """Add the gradient of the batch's loss to what `optim_step` will apply, and say what was seen.

        `batch` is the whole batch of the update: it holds `tokens_N`, `trained_N`, a weight column for each
        term and what the objectives read. Per-token metrics of the objectives become means over its
        trained tokens; `ratio_max` is there if the batch holds `logp_old_N`. With `compare_sampler`, the
        metrics of `sampler_gap` come at no extra pass: meaningful as long as the weights are those that
        sampled the batch.
        """
        self._check(batch, terms)
        wanted = {name for term in terms for name in (*columns_read_by(term.objective), term.weight_column)}
        live = wanted & set(LIVE)
        wanted |= {"tokens_N", "trained_N"} | ({"logp_old_N"} if "logp_old_N" in batch else set())
        wanted |= {"logp_sampler_N"} if compare_sampler else set()
        slim = Batch(batch.cu_seqlens, {name: c for name, c in batch.columns.items() if name in wanted})
        read_N = torch.stack([batch["trained_N"], *(batch[t.weight_column] != 0 for t in terms)]).any(dim=0)
        written_N = batch.columns.get("policy_N", read_N)
        slim = with_prefixes(slim.with_columns(read_N=read_N), read_N | written_N)

        totals: defaultdict[str, Tensor | float] = defaultdict(float)
        largest: list[Tensor] = []
        both: list[Tensor] = []
        chosen_LE = torch.zeros_like(self._chosen_LE)
        names = wanted | {"read_N"}
        for seen in self._each_part(
            slim, lambda p: self._learn_from(p, names, terms, live, batch.num_tokens)
        ):
            self._add_gradient(seen.gradients)
            chosen_LE += seen.chosen_LE
            for name, value in seen.sums.items():
                totals[name] = totals[name] + value
            largest += [] if seen.largest_ratio is None else [seen.largest_ratio]
            both += [] if seen.compared is None else [seen.compared]
        self._pending = True
        self._chosen_LE += chosen_LE
        num_trained = int(batch["trained_N"].sum())
        metrics = {
            name.removeprefix("mean:"): float(value) / (num_trained if name.startswith("mean:") else 1)
            for name, value in totals.items()
        }
        metrics["trained_tokens"] = float(num_trained)
        if largest:
            metrics["ratio_max"] = float(torch.stack(largest).max())
        if both:
            learner_M, sampler_M = torch.cat(both, dim=1)
            metrics |= sampler_gap(learner_M, sampler_M, torch.ones_like(learner_M, dtype=torch.bool))
        return metrics | _expert_load(chosen_LE)

    def _learn_from(
        self, part: Batch, names: set[str], terms: Sequence[Term], live: set[str], num_tokens: int
    ) -> _Seen:
        """Gradient and sums of one micro-batch, from the named columns of it; `num_tokens` of the whole batch."""
        columns = {name: part[name].to(self.device) for name in names if name in part}
        hidden, layout = self._run(part, self.model)
        columns |= self._live(columns, hidden.hidden_ND, layout, live)
        loss, sums = _sum_terms(columns, terms)
        chosen_LE = torch.zeros_like(self._chosen_LE)
        router_loss, router_sums = self._router(hidden.routing, layout, chosen_LE, num_tokens)
        loss = loss + self.router_aux_coefficient * router_loss
        gradients = None
        if self.num_threads == 1:
            loss.backward()  # adds to .grad in place, without a second copy of all gradients
        else:
            gradients = torch.autograd.grad(loss, self.optimizer.parameters, allow_unused=True)
        logp_N, trained_N = columns["logp_N"].detach(), columns["trained_N"]
        largest_ratio = compared = None
        if "logp_old_N" in columns:
            gap_N = torch.where(trained_N, logp_N - columns["logp_old_N"], -torch.inf)
            largest_ratio = gap_N.clamp(max=MAX_LOG_RATIO).max().double().exp()
        if "logp_sampler_N" in columns:
            compared = torch.stack([logp_N, columns["logp_sampler_N"]])[:, trained_N]
        return _Seen(gradients, sums | router_sums, chosen_LE, largest_ratio, compared)

    def _add_gradient(self, gradients: tuple[Tensor | None, ...] | None) -> None:
        """Add a micro-batch's gradient to the sum. Always in the order of micro-batches, whoever was first."""
        if gradients is None:
            return
        for parameter, gradient in zip(self.optimizer.parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient

    def _each_part(self, batch: Batch, work: Callable[[Batch], Result]) -> Iterator[Result]:
        """What `work` makes of each micro-batch, in order; several at once if the learner has threads.

        The threads are Python's, each with one torch thread: torch runs outside Python's lock, so two cores are
        1.8 times as fast as one, and unlike OpenMP's they do not spin while they wait.
        """
        parts = micro_batches(batch, self.token_budget, self.num_threads)
        if self.num_threads == 1 or len(parts) == 1:
            yield from map(work, parts)
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.num_threads, "learner", torch.set_num_threads, (1,))
        yield from self._threads.map(work, parts)

    def optim_step(self) -> Metrics:
        """Apply the accumulated gradient; the version grows by one.

        A gradient that is not finite is dropped and changes nothing (`skipped_updates` is 1).
        """
        metrics = self.optimizer.update()
        if not metrics["skipped_updates"]:
            self.version += 1
            if self._chosen_LE.numel():
                self._share_LE = self._chosen_LE.double() / self._chosen_LE.sum(dim=1, keepdim=True)
        self._chosen_LE.zero_()
        self._pending = False
        metrics["weight_norm"] = float(torch.nn.utils.get_total_norm(list(self.weights().values())))
        return metrics

    # Keeping.

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that decides how learning goes on: named tensors (live ones, not copies) and JSON values."""
        if self._pending:
            raise ValueError("a gradient is waiting to be applied; call optim_step before saving the learner")
        moments = {f"optimizer/{name}": value for name, value in self.optimizer.tensors().items()}
        return self._kept() | moments, {"version": self.version, "updates": self.optimizer.step}

    def load_state_dict(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave, bit for bit. ValueError if it belongs to another model."""
        moments = {n.removeprefix("optimizer/"): t for n, t in tensors.items() if n.startswith("optimizer/")}
        found = {name: t for name, t in tensors.items() if not name.startswith("optimizer/")}
        kept = self._kept()
        check_tensors(kept, found)
        self.optimizer.load(moments, state["updates"])
        with torch.no_grad():
            for name, tensor in kept.items():
                tensor.copy_(found[name])
        self.version = state["version"]
        self.optimizer.zero_grad()
        self._chosen_LE.zero_()
        self._pending = False

    def _parameters(self) -> dict[str, nn.Parameter]:
        trained = {f"model/{name}": p for name, p in policy_parameters(self.model).items()}
        if self.value_head is not None:
            trained |= {f"value_head/{name}": p for name, p in self.value_head.named_parameters()}
        return trained

    def _kept(self) -> dict[str, Tensor]:
        """Everything but the moments, and the base of adapters. Parameters by name: a tied head is stored once."""
        kept: dict[str, Tensor] = {name: p.detach() for name, p in self._parameters().items()}
        if self.reference is not None:
            kept |= {f"reference/{name}": p for name, p in self.reference.tensors().items()}
        if self._share_LE.numel():
            kept["router/share_LE"] = self._share_LE
        return kept

    # The forward pass and the heads.

    def _run(self, batch: Batch, model: Transformer) -> tuple[Hidden, Layout | Fork]:
        """Hidden states of the tokens of the layout's rows, in which a shared prefix stands once."""
        layout = layout_of(batch, self.device)
        return model(batch["tokens_N"].to(self.device)[layout.source_U], layout), layout

    def _read(self, batch: Batch, model: Transformer, head: Callable[..., Tensor]) -> Float[Tensor, " N"]:
        """head(model, hidden before the token, token) at the policy's tokens, 0 elsewhere; on the CPU."""
        _check_first_tokens(batch, batch["policy_N"], "policy_N")
        slim = Batch(batch.cu_seqlens, {name: batch[name] for name in ("tokens_N", "policy_N")})
        slim = slim.with_columns(place_N=torch.arange(batch.num_tokens))
        slim = with_prefixes(slim, slim["policy_N"])
        result_N = torch.zeros(batch.num_tokens, dtype=self.dtype)

        @torch.no_grad()  # grad mode belongs to a thread
        def read(part: Batch) -> tuple[Tensor, Tensor]:
            index_M = part["policy_N"].nonzero().flatten()
            hidden, layout = self._run(part, model)
            hidden_MD = hidden.hidden_ND[layout.place_N[index_M.to(self.device) - 1]]
            scores_M = head(model, hidden_MD, part["tokens_N"][index_M].to(self.device))
            return part["place_N"][index_M], scores_M.cpu()

        for place_M, scores_M in self._each_part(slim, read):
            result_N[place_M] = scores_M
        return result_N

    def _live(
        self, columns: Mapping[str, Tensor], hidden_ND: Tensor, layout: Layout | Fork, live: set[str]
    ) -> dict[str, Tensor]:
        """The live columns, with gradient where a term reads them, 0 at tokens that nothing trains on."""
        index_M = columns["read_N"].nonzero().flatten()
        # Sequences of one prefix read the same state for their first token. (Indexing adds up their
        # gradients in a fixed order on every device.)
        hidden_MD = hidden_ND[layout.place_N[index_M - 1]]

        def spread(values_M: Tensor) -> Tensor:
            return values_M.new_zeros(len(columns["read_N"])).index_copy(0, index_M, values_M)

        made = {}
        logp_M, entropy_M = token_logprobs(
            self.model.head_products(hidden_MD), columns["tokens_N"][index_M], self.temperature
        )
        made["logp_N"], made["entropy_N"] = spread(logp_M), spread(entropy_M)
        if "value_N" in live:
            made["value_N"] = spread(self._value(hidden_MD))
        return made

    def _value(self, hidden_MD: Tensor) -> Float[Tensor, " M"]:
        if self.value_head is None:
            raise ValueError("this learner has no critic; build it with value_head=True")
        return self.value_head(hidden_MD)

    def _logp(
        self, model: Transformer, hidden_MD: Tensor, target_M: Int[Tensor, " M"]
    ) -> Float[Tensor, " M"]:
        return token_logprobs(model.head_products(hidden_MD), target_M, self.temperature)[0]

    def _router(
        self, routing: list[Routing], layout: Layout | Fork, chosen_LE: Tensor, num_tokens: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The load-balance loss of these tokens as their part of the batch's; adds to the counts.

        A token of a shared prefix counts once for each sequence that begins with it, as it does in the batch.
        """
        if not routing:
            return torch.zeros((), device=self.device), {}
        weight_U = layout.copies_U.double() / num_tokens
        loss = load_balance_loss(routing, self._share_LE, weight_U)
        with torch.no_grad():
            for layer, chosen_E in zip(routing, chosen_LE, strict=True):
                chosen_E.index_add_(
                    0, layer.chosen.T.flatten(), layout.copies_U.repeat(layer.chosen.shape[1])
                )
            entropy = sum(
                weight_U @ torch.special.entr(layer.probs_NE).sum(dim=1).double() for layer in routing
            )
            spread = entropy / len(routing)
        return loss, {"router_aux_loss": loss.detach(), "router_entropy_nats": torch.as_tensor(spread)}

    def _check(self, batch: Batch, terms: Sequence[Term]) -> None:
        if not terms:
            raise ValueError("forward_backward needs at least one term")
        for name in ("trained_N", *(term.weight_column for term in terms)):
            if name not in batch:
                raise ValueError(f"the batch has no column {name}; make it with assemble or supervised_batch")
            _check_first_tokens(batch, batch[name] != 0, name)
        if not batch["trained_N"].any():
            raise ValueError("no token of the batch is trained")


def _sum_terms(columns: Mapping[str, Tensor], terms: Sequence[Term]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one micro-batch, and what it adds to the metrics.

    A name that begins with "mean:" is a sum over trained tokens, still to be divided by their number.
    """
    trained_N = columns["trained_N"]
    loss = torch.zeros((), dtype=torch.float64, device=trained_N.device)
    sums = {"mean:entropy_nats": columns["entropy_N"].detach()[trained_N].sum(dtype=torch.float64)}
    for number, term in enumerate(terms):
        weight_N = columns[term.weight_column]
        objective_N, metrics = apply(term.objective, columns)
        # A token without weight counts nothing, even where its objective overflowed to inf.
        weighted_N = torch.where(weight_N != 0, weight_N * objective_N, 0.0)
        total = weighted_N.sum(dtype=torch.float64)
        loss = loss - term.coefficient * total
        sums["objective" if number == 0 else f"term/{term.name}"] = total.detach()
        for name, metric_N in metrics.items():
            sums[f"mean:{name}"] = metric_N[trained_N].sum(dtype=torch.float64)
    sums["loss"] = loss.detach()
    return loss, sums


def _check_first_tokens(batch: Batch, marked_N: Tensor, name: str) -> None:
    first = marked_N[batch.cu_seqlens[:-1]].nonzero().flatten()
    if len(first):
        raise ValueError(
            f"{name} marks the first token of sequence {int(first[0])}, which has no log-probability: "
            "nothing stands before it. Begin every sequence with a prompt token"
        )


def _expert_load(chosen_LE: Tensor) -> Metrics:
    """E times the largest and the smallest share of choices that one expert got, averaged over layers."""
    if not chosen_LE.numel():
        return {}
    load_LE = chosen_LE.double() / chosen_LE.sum(dim=1, keepdim=True) * chosen_LE.shape[1]
    return {
        "expert_load_max": float(load_LE.amax(dim=1).mean()),
        "expert_load_min": float(load_LE.amin(dim=1).mean()),
    }


def sampler_gap(
    logp_learner_N: Float[Tensor, " N"], logp_sampler_N: Float[Tensor, " N"], mask_N: Bool[Tensor, " N"]
) -> Metrics:
    """How far two computations of the same tokens' log-probabilities are apart, over the masked tokens.

    |difference| in nats: mean, 99th percentile, largest; and the Pearson correlation of the
    probabilities, the figure MiniMax-M1 reports (arXiv:2506.13585 section 3.2). The correlation is left
    out where it is not defined, with fewer than two different probabilities on a side.
    """
    if not mask_N.any():
        raise ValueError("sampler_gap compares the masked tokens, and the mask selects none")
    learner_M, sampler_M = logp_learner_N[mask_N].double(), logp_sampler_N[mask_N].double()
    gap_M = (learner_M - sampler_M).abs()
    metrics = {
        "sampler_gap_mean_nats": float(gap_M.mean()),
        "sampler_gap_p99_nats": float(gap_M.kthvalue(math.ceil(0.99 * len(gap_M))).values),
        "sampler_gap_max_nats": float(gap_M.max()),
    }
    probs = torch.stack([learner_M, sampler_M]).exp()
    if (probs != probs[:, :1]).any(dim=1).all():
        metrics["sampler_prob_correlation"] = float(torch.corrcoef(probs)[0, 1])
    return metrics
