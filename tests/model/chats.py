"""Tokenizers as Hugging Face models bring them, trained on a few sentences, with the templates of known families.

The templates are the families' own forms, written anew and shortened: default system message, trimming, roles that
are refused, tool answers joined in one turn, thinking that is dropped from earlier turns, texts as lists of parts.
"""

import functools
import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from whorl.data import Message
from whorl.model.huggingface import HuggingFaceTokenizer

QWEN2 = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) or message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

QWEN3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and index < messages|length and not ns.found %}
        {%- set ns.last_query = index %}{%- set ns.found = true %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or thought) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {{- message.content | tojson + "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
"""

MINIMAX = """\
{{ '<begin_of_document>' -}}
{% set ns = namespace(system='') -%}
{% for message in messages -%}
{% if message['role'] == 'system' -%}
{% set ns.system = ns.system + message['content'][0]['text'] -%}
{% endif -%}
{%- endfor -%}
{% if ns.system != '' -%}
{{ '<beginning_of_sentence>system ai_setting=assistant\\n' + ns.system + '<end_of_sentence>\\n' -}}
{%- endif -%}
{% for message in messages -%}
{% if message['role'] == 'user' -%}
{{ '<beginning_of_sentence>user name=user\\n' + message['content'][0]['text'] + '<end_of_sentence>\\n' -}}
{% elif message['role'] == 'assistant' -%}
{{ '<beginning_of_sentence>ai name=assistant\\n' -}}
{% for content in message['content'] | selectattr('type', 'equalto', 'text') -%}
{% generation -%}{{ content['text'] }}{%- endgeneration -%}
{% endfor -%}
{{ '<end_of_sentence>\\n' -}}
{% elif message['role'] == 'tool' -%}
{{ '<beginning_of_sentence>tool name=tools\\n' + 'tool result: ' + message['content'][0]['text'] + '\\n\\n' -}}
{{ '<end_of_sentence>\\n' -}}
{% endif -%}
{% endfor -%}
{% if add_generation_prompt -%}
{{ '<beginning_of_sentence>ai name=assistant\\n' -}}
{%- endif -%}
"""

FAMILIES = {
    "qwen2": (QWEN2, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "qwen3": (QWEN3, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "llama3": (LLAMA3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}),
    "mistral": (MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}),
    "minimax": (MINIMAX, {"bos_token": "<beginning_of_sentence>", "eos_token": "<end_of_sentence>"}),
}
END = {"qwen2": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>"}
END["minimax"] = "<end_of_sentence>"

SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>", "<begin_of_document>", "<beginning_of_sentence>",
    "<end_of_sentence>",
)  # fmt: skip
PLAIN_ADDED = ("<think>", "</think>", "<tool_response>", "</tool_response>")
"""Added tokens that are not special, as in Qwen3: text with an id of its own."""

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen cuts a text before merging (Llama 3 differs in the digits)."""

SENTENCES = (
    "You are a helpful assistant. What is the sum of two and three? The answer is five.\n\n",
    "user assistant system tool name ai_setting The weather is fine today, thank you very much. Größe 😀😀\n\n\n",
)


@functools.cache
def trained(kind: str = "bytes") -> tokenizers.Tokenizer:
    """Byte-level BPE (Qwen, Llama 3, MiniMax), or BPE over metaspaces with bytes to fall back on (Mistral)."""
    if kind == "bytes":
        inner = tokenizers.Tokenizer(models.BPE())
        inner.normalizer = normalizers.NFC()
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()
        inner.post_processor = processors.ByteLevel(trim_offsets=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        inner.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        alphabet = []
    fallback = [] if kind == "bytes" else ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*SPECIAL, *fallback],
        initial_alphabet=alphabet,
        show_progress=False,
        max_token_length=12,
    )
    inner.train_from_iterator(SENTENCES * 20, trainer)
    if fallback:  # the trainer marks them all; bytes are no special tokens
        spec = json.loads(inner.to_str())
        spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
        inner = tokenizers.Tokenizer.from_str(json.dumps(spec))
    inner.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_ADDED])
    return inner


def write_folder(folder: Path, family: str, kind: str = "bytes", **config) -> Path:
    """A model folder's tokenizer files."""
    template, named = FAMILIES[family]
    folder.mkdir(exist_ok=True)
    trained(kind).save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(template)
    return folder


@functools.cache
def tokenizer_of(family: str, kind: str = "bytes") -> HuggingFaceTokenizer:
    template, named = FAMILIES[family]
    return HuggingFaceTokenizer(
        {
            "tokenizer.json": trained(kind).to_str(),
            "tokenizer_config.json": json.dumps(named),
            "chat_template.jinja": template,
        }
    )


def dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.text} for message in messages]
