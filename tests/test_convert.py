"""`whorl convert`, `whorl model plan`, and runs that start from a checkpoint folder."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from tests.model.chats import write_folder
from tests.parity.families import gap, our_logits, saved, their_logits, theirs, tokens_of
from tests.support import Tiny, know_tiny
from whorl.cli import main
from whorl.data import Message, Score
from whorl.environments.chain_arithmetic import ChainArithmetic
from whorl.loop import train
from whorl.model.formats.pretrained import load_pretrained
from whorl.model.pretrained_tokenizer import load_tokenizer
from whorl.origin import load_trained
from whorl.run import start_run
from whorl.settings import ColdStart


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        know_tiny(monkeypatch)
        path = tmp_path_factory.mktemp("runs") / "tiny"
        train(start_run("tiny", Tiny(), path))
        yield path


def said(capsys, *words) -> str:
    """What a command prints; it must succeed."""
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def refused(capsys, *words) -> str:
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_a_runs_checkpoint_becomes_a_folder_and_a_run_starts_from_it(finished, tmp_path, capsys):
    assert "MiniMaxM1ForCausalLM (minimax_m1)" in said(capsys, "convert", finished, tmp_path / "model")
    trained, tokenizer = load_trained(finished)
    loaded = load_pretrained(tmp_path / "model")
    for name, parameter in trained.named_parameters():
        assert torch.equal(parameter, loaded.model.get_parameter(name))

    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "model")
    assert settings["eos_token_id"] == generation.eos_token_id == tokenizer.end_id
    assert settings["pad_token_id"] == generation.pad_token_id == tokenizer.pad_id
    other = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    assert (other.eos_token_id, other.pad_token_id) == (tokenizer.end_id, tokenizer.pad_id)
    messages = [Message("system", "1+2"), Message("user", "3=")]
    ours = [i for _, ids in tokenizer.render(messages, generation=True) for i in ids]
    chat = [{"role": message.role, "content": message.text} for message in messages]
    assert other.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == ours

    again = start_run("tiny", replace(Tiny(), model=str(tmp_path / "model")), tmp_path / "run")
    assert again.model.config.max_context == min(Tiny().max_context, trained.config.max_context)
    for name, parameter in trained.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name))
    train(again)


def test_a_checkpoint_changes_its_format_and_precision(tmp_path, capsys):
    model = theirs("minimax", rotary_dim=8)
    source = saved(model, tmp_path / "theirs")
    words = ("convert", source, tmp_path / "m1", "--format", "minimax_m1", "--dtype", "bfloat16")
    assert "MiniMaxM1ForCausalLM" in said(capsys, *words)
    narrow = load_pretrained(tmp_path / "m1").model
    wide = load_pretrained(source).model
    for name, parameter in wide.named_parameters():
        assert torch.equal(parameter.bfloat16(), narrow.get_parameter(name))
    assert "MiniMaxForCausalLM" in said(capsys, "convert", source, tmp_path / "same")
    [tokens] = tokens_of(20)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "same", attn_implementation="eager")
    assert torch.equal(their_logits(back.eval(), tokens), their_logits(model, tokens))
    assert gap(our_logits(wide, tokens)[0], their_logits(model, tokens)) <= 2e-5


def test_a_warning_of_what_transformers_gets_wrong_is_printed(finished, tmp_path, capsys):
    assert main(["convert", str(finished), str(tmp_path / "hf"), "--format", "minimax"]) == 0
    assert "warning: " in (err := capsys.readouterr().err) and "transformers ignores rotary_dim" in err


def test_what_cannot_be_converted_is_refused_in_one_sentence(finished, tmp_path, capsys):
    target = tmp_path / "model"
    for words, sentence in (
        ((finished, target, "--format", "llama"), "the format llama has no place for"),
        ((finished, target, "--format", "lama"), "unknown format 'lama' (nearest known: 'llama')"),
        ((finished, target, "--checkpoint", "77"), "has no checkpoint of step 77; it has"),
        ((tmp_path / "nothing", target), "no folder"),
        ((tmp_path, target), "is not a run directory"),
        ((finished, finished), "exists already"),
    ):
        error = refused(capsys, "convert", *words)
        assert sentence in error and error.count("\n") == 1
    assert not target.exists()


def test_the_plan_of_a_run_and_of_a_preset_are_printed(finished, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert "lightning attention" in said(capsys, "model", "plan", finished)
    assert "456.1B" in said(capsys, "model", "plan", "m1-456b", "--gpus", "512")
    assert "unknown model 'm2'" in refused(capsys, "model", "plan", "m2")


def test_a_run_does_not_start_from_a_folder_whose_tokenizer_it_cannot_read(tmp_path, monkeypatch):
    know_tiny(monkeypatch)
    source = saved(theirs("qwen2"), tmp_path / "theirs")
    settings = replace(Tiny(), model=str(source))
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        start_run("tiny", settings, tmp_path / "run")
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).save(
        str(source / "tokenizer.json")
    )
    with pytest.raises(ValueError, match=r"has no special token"):
        start_run("tiny", settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["qwen2", "minimax"])
def test_a_model_of_others_with_its_own_chat_template_is_trained_converted_and_answers_there(
    family, tmp_path, capsys, monkeypatch
):
    """From their folder to reinforcement learning and back: the same tokens, the learner's logits."""
    tokenizer = load_tokenizer(write_folder(tmp_path / "theirs", "qwen2"))
    saved(theirs(family, vocab_size=tokenizer.vocab_size), tmp_path / "theirs")
    settings = replace(
        Tiny(), model=str(tmp_path / "theirs"), max_context=200, cold_start=ColdStart(), num_steps=2
    )
    # A verdict that random answers differ in.
    monkeypatch.setattr(
        ChainArithmetic, "verify", lambda self, problem, rollout: Score(float(rollout.tokens_T[-1] % 2))
    )
    run = start_run("quickstart", settings, tmp_path / "run")
    assert train(run) is None
    assert run.learner.version == 2
    assert run.directory.history()[-1]["sampler_gap_max_nats"] <= 1e-5
    said(capsys, "convert", tmp_path / "run", tmp_path / "back", "--format", family)
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager"
    ).eval()
    chat = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    messages = [Message("user", "What is 3 + 4?")]
    ours = [i for _, ids in tokenizer.render(messages, generation=True) for i in ids]
    content = [{"role": "user", "content": "What is 3 + 4?"}]
    assert chat.apply_chat_template(content, add_generation_prompt=True, return_dict=False) == ours
    tokens = torch.tensor(ours)
    assert gap(our_logits(run.model, tokens)[0], their_logits(back, tokens)) <= 2e-5
