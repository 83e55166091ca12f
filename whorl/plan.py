"""`whorl model plan`: what a model, or a whole run, will need before anything is made or loaded.

Of a run the largest micro-batch is laid out as the learner would cut it, with every rollout as long as the settings
allow, and the peak of memory follows from it (`whorl/learning/memory.py` says what is counted).
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from rich.table import Table

from whorl.data import Batch, columns_read_by, cu_seqlens_of
from whorl.environments.catalog import make
from whorl.environments.chats import Chats
from whorl.learning.memory import OptimizerState, Peak, Workload, parts, predict_peak, rank_of
from whorl.learning.packing import layout_of, micro_batches, with_prefixes
from whorl.learning.supervised import supervised_batch
from whorl.model.config import ModelConfig, is_preset, preset
from whorl.model.layout import Fork
from whorl.model.plan import config_named, tables
from whorl.model.tokenizer import ChatTokenizer
from whorl.origin import tokenizer_for
from whorl.run import num_cores, on_cuda
from whorl.settings import AnySettings, Settings, SupervisedSettings
from whorl.supervised_run import examples_of, updates_of

PLAIN, SCALED, TRUNCATED = 24, 32, 80
"""Bytes for each entry of the vocabulary that drawing takes: at temperature 1, at another, with top-p and its kin."""


def tables_of_model(name: str, gpus: int, dtype: torch.dtype, state: OptimizerState) -> list[Table]:
    """Parameters by part and by layer of a model, and memory of each of so many GPUs that train it."""
    config = config_named(name)
    rank, words = rank_of(config, gpus, dtype, state), str(dtype).removeprefix("torch.")
    title = f"memory of each of {gpus} GPU{'s' if gpus > 1 else ''} (FSDP split), without activations"
    table = Table("", "GiB", title=title, title_justify="left")
    table.add_row(f"weights ({words})", _gib(rank.weights))
    table.add_row("gradients (float32)", _gib(rank.gradients))
    table.add_row(f"Adam's moments ({state})", _gib(rank.moments))
    if rank.masters:
        table.add_row("masters (float32)", _gib(rank.masters))
    if rank.gathered:
        table.add_row("largest layer, gathered", _gib(rank.gathered))
    table.add_row("all", _gib(rank.total), style="bold")
    if rank.sampler:
        table.add_row(f"to play rollouts: the whole policy ({words})", _gib(rank.sampler))
    table.add_row("one sequence: lightning states (float32)", _gib(rank.lightning_state))
    table.add_row(f"one sequence: keys and values of 1,024 tokens ({words})", _gib(rank.kv_per_1k_tokens))
    return [*tables(config, name), table]


def table_of_run(name: str, settings: AnySettings) -> Table:
    """The peak of memory of a run with these settings, by part."""
    config, work = workload_of(settings)
    peak = predict_peak(config, work)
    title = f"{name}: memory when most is alive, predicted"
    caption = "not counted: Python and its libraries (0.3 GiB a process), and what an allocator keeps of what was freed"
    table = Table("", "GiB", "", title=title, title_justify="left", caption=caption, caption_justify="left")
    about = _about(settings, config, work, peak)
    for part, size in parts(peak):
        table.add_row(part, _gib(size), about.get(part, ""), style="bold" if part == "total" else "")
    return table


def _about(settings: AnySettings, config: ModelConfig, work: Workload, peak: Peak) -> dict[str, str]:
    words = str(work.dtype).removeprefix("torch.")
    recomputed = ", recomputed" if work.checkpoint_activations else ""
    state = "float32" if work.optimizer_state == "float32" else "8 bits a number"
    activations = f"of {work.threads * work.row_tokens:,} tokens{recomputed}"
    return {
        "weights": words,
        "optimizer": f"moments in {state}" + (", masters in float32" if work.dtype.itemsize < 4 else ""),
        "reference": "adapters" if work.lora.rank else f"a second model in {words}",
        "sampling": f"states of {work.running} sequences of up to {work.context} tokens",
        "gradients": "float32" + (f", {work.threads} threads" if work.threads > 1 else ""),
        "activations": activations if peak.gradients else "probabilities, while tokens are drawn",
        "head": f"of {work.threads * work.scored_tokens:,} scored tokens",
        "total": f"{settings.model}, {'GPU' if on_cuda(settings) else f'{num_cores(settings)} of the CPU cores'}",
    }


def workload_of(settings: AnySettings) -> tuple[ModelConfig, Workload]:
    """The model's shape, and the most work that the settings allow at once. ValueError for what cannot be run."""
    if isinstance(settings, SupervisedSettings):
        return _of_fine_tuning(settings)
    return _of_reinforcement_learning(settings)


def _of_fine_tuning(settings: SupervisedSettings) -> tuple[ModelConfig, Workload]:
    """The chats are read: lengths decide, and the first epoch's updates are those of the run."""
    tokenizer = tokenizer_for(settings, None)
    config = _config(settings, tokenizer)
    examples, _ = examples_of(Chats(settings.data, settings.held_out), tokenizer, _context(settings, config))
    return config, _largest(settings, map(supervised_batch, updates_of(settings, examples["train"], 0)))


def _of_reinforcement_learning(settings: Settings) -> tuple[ModelConfig, Workload]:
    """Rollouts to as many problems as a step has, each answer as long as it may be."""
    environment, algorithm = make(settings.environment), settings.resolve_algorithm()
    tokenizer = tokenizer_for(settings, environment.alphabet)
    config = _config(settings, tokenizer)
    context = _context(settings, config)
    size, wanted = environment.num_problems("train"), settings.problems_per_step
    prompts = []
    for index in range(wanted if size is None else min(wanted, size)):
        rendered = tokenizer.render(environment.problem("train", index).messages, generation=True)
        prompts.append([token for _, ids in rendered for token in ids])
    # Each part of a batch that is learned from at once has this many groups.
    groups = [prompts[i % len(prompts)] for i in range(-(-wanted // settings.updates_per_batch))]
    lengths = [min(len(prompt) + settings.sampling.max_tokens, context) for prompt in groups]
    batch = _rollouts(groups, lengths, settings.rollouts_per_problem)
    work = _largest(settings, [batch])
    sampled = wanted * settings.rollouts_per_problem
    evaluated = settings.evaluation.num_problems * settings.evaluation.samples_per_problem
    running = min(settings.max_running * num_cores(settings), max(sampled, evaluated))
    longest = max(map(len, groups))
    if settings.max_cached_tokens:
        running = min(running, max(settings.max_cached_tokens // max(lengths), 1) * num_cores(settings))
    chosen = settings.sampling
    plain = PLAIN if chosen.temperature == 1 else SCALED
    live = {column for term in algorithm.terms for column in columns_read_by(term.objective)}
    return config, replace(
        work,
        reference="logp_ref_N" in algorithm.needs,
        entropy_gradient="entropy_N" in live,
        running=running,
        prompt=longest,
        context=max(lengths),
        probabilities=TRUNCATED if chosen.truncates else plain,
    )


def _largest(settings: AnySettings, batches: Iterable[Batch]) -> Workload:
    """The work of the largest micro-batch of these updates."""
    cores, found = num_cores(settings), []
    for batch in batches:
        cut = micro_batches(with_prefixes(batch, batch["policy_N"]), settings.token_budget, cores)
        found += [_work(part, min(cores, len(cut)), len(cut) > 1) for part in cut]
    return replace(
        max(found, key=lambda work: (work.padded_tokens, work.scored_tokens)),
        checkpoint_activations=settings.checkpoint_activations,
        optimizer_state=settings.optimizer.state,
        dtype=getattr(torch, settings.dtype),
        lora=settings.lora,
    )


def _work(part: Batch, threads: int, several: bool) -> Workload:
    """What the learner will do with a micro-batch."""
    layout, scored = layout_of(part, torch.device("cpu")), int(part["policy_N"].sum())
    if not isinstance(layout, Fork):
        padded = layout.num_sequences * layout.max_length
        return Workload(layout.num_tokens, padded, scored, several_micro_batches=several, threads=threads)
    prefixes, rests = layout.prefixes, layout.rests
    return Workload(
        row_tokens=layout.num_tokens,
        padded_tokens=sum(rows.num_sequences * rows.max_length for rows in (prefixes, rests)),
        scored_tokens=scored,
        copied_tokens=rests.num_sequences * prefixes.max_length,
        several_micro_batches=several,
        threads=threads,
    )


def _rollouts(prompts: list[list[int]], lengths: list[int], num_samples: int) -> Batch:
    """A batch as sampling would give it, where every answer is as long as these lengths say."""
    tokens, written, sizes = [], [], []
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        # The same problem in two groups would be laid out once; a run has another in each.
        own = [number, *prompt[1:]]
        for _ in range(num_samples):
            tokens += own + [0] * (length - len(own))
            written += [False] * len(own) + [True] * (length - len(own))
            sizes.append(length)
    columns = {"tokens_N": torch.tensor(tokens), "policy_N": torch.tensor(written)}
    return Batch(cu_seqlens_of(sizes), columns)


def _config(settings: AnySettings, tokenizer: ChatTokenizer) -> ModelConfig:
    if is_preset(settings.model):
        return preset(settings.model, tokenizer.vocab_size, settings.max_context)
    config = config_named(settings.model)
    return replace(config, max_context=_context(settings, config))


def _context(settings: AnySettings, config: ModelConfig) -> int:
    return min(settings.max_context, config.max_context)


def _gib(number: int) -> str:
    return f"{number / 2**30:,.3f}" if number < 2**30 else f"{number / 2**30:,.1f}"
