"""Tokenizers: exact round trips, untrusted text, the chat format, files."""

import pickle

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from whorl.data import Message
from whorl.model.tokenizer import SPECIAL_TOKENS, Tokenizer

DIGITS = "0123456789+=#\n "
BYTES = Tokenizer.byte_level()
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def test_characters_are_numbered_by_code_point_and_followed_by_the_special_tokens():
    tokenizer = Tokenizer.characters("cabba")
    assert tokenizer.encode("abc") == [0, 1, 2]
    assert (tokenizer.pad_id, tokenizer.end_id, tokenizer.vocab_size) == (3, 4, 3 + 6)
    assert [tokenizer.token_text(i) for i in range(9)] == ["a", "b", "c", *SPECIAL_TOKENS]


def test_byte_ids_are_the_bytes_of_utf8():
    for text in ("a", "é\n", "\x00\x7f", "😀", "".join(map(chr, range(256)))):
        assert BYTES.encode(text) == list(text.encode())
    assert (BYTES.pad_id, BYTES.end_id, BYTES.vocab_size) == (256, 257, 262)


@settings(deadline=None)
@given(ANY_TEXT)
def test_bytes_round_trip(text):
    assert BYTES.encode(text) == list(text.encode())
    assert BYTES.decode(BYTES.encode(text)) == text


@settings(deadline=None)
@given(ANY_TEXT.filter(bool))
def test_characters_round_trip(text):
    tokenizer = Tokenizer.characters(text)
    assert len(tokenizer.encode(text)) == len(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["  two  spaces\n\n", "\r\n\t\v\f\x85\u2028", "e\u0301 is not é", "\ufeffmark", "İIıi"]
)
def test_no_kind_normalises_text(text):
    for tokenizer in (BYTES, Tokenizer.characters(text)):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(st.lists(st.integers(0, 261), max_size=40))
def test_bytes_that_are_not_utf8_are_replaced_as_python_does(ids):
    expected = bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
    assert BYTES.decode(ids) == expected


def test_half_a_character_decodes_to_the_replacement_mark():
    assert BYTES.decode("é".encode()[:1]) == "\ufffd"


@pytest.mark.parametrize("loaded", ["made", "pickled", "from a file"])
@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_text_that_spells_a_special_token_gets_no_special_id(kind, loaded, tmp_path):
    tokenizer = BYTES if kind == "bytes" else Tokenizer.characters("".join(SPECIAL_TOKENS))
    if loaded == "pickled":
        tokenizer = pickle.loads(pickle.dumps(tokenizer))
    elif loaded == "from a file":
        tokenizer.save(tmp_path)
        tokenizer = Tokenizer.load(tmp_path)
    special = tokenizer.vocab_size - len(SPECIAL_TOKENS)
    for text in (*SPECIAL_TOKENS, "a<end>p<user>".replace("a", "<"), "<<end>>"):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text)
        assert max(ids) < special
        assert tokenizer.decode(ids) == text


def test_the_library_alone_would_have_turned_text_into_special_ids(tmp_path):
    """The control of the test above: the saved file read without our layer is open to injection."""
    BYTES.save(tmp_path)
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert plain.encode("<end>").ids == [BYTES.end_id]


def test_decode_skips_special_ids_and_reads_arrays():
    ids = np.array([BYTES.pad_id, ord("4"), BYTES.end_id, ord("2"), BYTES.end_id])
    assert BYTES.decode(ids) == "42"
    assert BYTES.decode([]) == ""


def test_an_unknown_character_is_named():
    with pytest.raises(ValueError, match=r"character 'é' \(U\+00E9\) is not in the alphabet"):
        Tokenizer.characters(DIGITS).encode("1+é")


def test_what_is_not_unicode_text_is_refused():
    for tokenizer in (BYTES, Tokenizer.characters("a")):
        with pytest.raises(ValueError, match="ud800"):
            tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match="surrogate"):
        Tokenizer.characters("a\udfff")
    with pytest.raises(ValueError, match="at least one character"):
        Tokenizer.characters("")


@pytest.mark.parametrize("index", [-1, 262])
def test_an_id_outside_the_vocabulary_is_an_error(index):
    with pytest.raises(ValueError, match=f"token id {index} is outside the vocabulary of 262 tokens"):
        BYTES.decode([index])
    with pytest.raises(ValueError, match="outside"):
        BYTES.token_text(index)


def test_token_text_shows_every_token_on_one_line():
    assert [BYTES.token_text(i) for i in (0x41, 0x20, 0x0A, 0xE2, 0x7F, 257)] == [
        "A", " ", r"\n", r"\xe2", r"\x7f", "<end>",
    ]  # fmt: skip
    tokenizer = Tokenizer.characters("é\n\u2028")
    assert [tokenizer.token_text(i) for i in range(3)] == [r"\n", "é", r"\u2028"]


def test_a_conversation_renders_as_role_text_end_per_message():
    tokenizer = Tokenizer.characters(DIGITS)
    messages = [Message("system", ""), Message("user", "1+1="), Message("assistant", "2")]
    segments = tokenizer.render(messages, generation=False)
    shown = [(role, "".join(map(tokenizer.token_text, ids))) for role, ids in segments]
    assert shown == [
        ("system", "<system><end>"),
        ("user", "<user>1+1=<end>"),
        ("assistant", "<assistant>2<end>"),
    ]


def test_the_generation_prompt_is_the_assistants_role_token():
    tokenizer = Tokenizer.characters(DIGITS)
    prompt = tokenizer.render([Message("user", "1")], generation=True)
    assert [role for role, _ in prompt] == ["user", "assistant"]
    # What the policy then writes, closed by <end>, is the rendered reply: no token is shifted or doubled.
    (_, reply), (_, opened) = tokenizer.render([Message("assistant", "2")], generation=False)[0], prompt[1]
    assert reply == [*opened, *tokenizer.encode("2"), tokenizer.end_id]


def test_reflection_and_retry_are_written_as_the_assistant_and_keep_their_role():
    (first, ids), (second, more), (third, tool) = BYTES.render(
        [Message("reflection", "a"), Message("retry", "a"), Message("tool", "a")], generation=False
    )
    assert (first, second, third) == ("reflection", "retry", "tool")
    assert ids == more == BYTES.render([Message("assistant", "a")], generation=False)[0][1]
    assert BYTES.token_text(tool[0]) == "<tool>"


@pytest.mark.parametrize("tokenizer", [BYTES, Tokenizer.characters(DIGITS + "é\u2028")])
def test_a_saved_tokenizer_comes_back_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.kind, loaded.fingerprint) == (tokenizer.kind, tokenizer.fingerprint)
    text = "12+30=\n é"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert plain.encode(text).ids == tokenizer.encode(text)
    assert plain.decode([tokenizer.end_id, *tokenizer.encode(text)], skip_special_tokens=True) == text


def test_the_fingerprint_follows_the_alphabet_as_a_set():
    assert Tokenizer.characters("ab").fingerprint == Tokenizer.characters("bab").fingerprint
    marks = {t.fingerprint for t in (BYTES, Tokenizer.characters("ab"), Tokenizer.characters("abc"))}
    assert len(marks) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is not a tokenizer.json"),
        ("not json", "is not a tokenizer.json"),
        (
            tokenizers.Tokenizer(tokenizers.models.WordLevel({"ab": 0, "c": 1})).to_str(),
            "holds another vocabulary",
        ),
        (tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).to_str(), "holds another vocabulary"),
    ],
)
def test_a_foreign_file_is_refused(content, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path / "missing")
