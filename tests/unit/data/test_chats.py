"""Lists of messages: how a chat template writes them, and that assistant turns alone are learnt."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken, Tokenizer

from megatron_dlm.conversion.export_tokenizer import write_tokenizer
from megatron_dlm.data.loading.prompt_rows import PromptRows
from megatron_dlm.data.preprocessing.chat_template import load_chat_template
from megatron_dlm.data.preprocessing.index import IndexConfig, build_shards
from megatron_dlm.data.shards.shard import Shard
from megatron_dlm.data.tokenizers.tokenizer import load_tokenizer
from megatron_dlm.interfaces import InputError
from tests.helpers.prompts import write

transformers = pytest.importorskip("transformers")

TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>\n' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


CHATS = [
    chat(("user", "the model"), ("assistant", "of the data")),
    chat(
        ("system", "in short"),
        ("user", "the model"),
        ("assistant", "of the data and a step"),
        ("user", "and then?"),
        ("assistant", "the next"),
    ),
    chat(("user", "a"), ("assistant", "the"), ("assistant", "loss"), ("user", "thanks")),
]


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory):
    """The corpus's, with the marks of the template as special tokens, and the template."""
    directory = tmp_path_factory.mktemp("tokenizer")
    shutil.copytree(corpus.tokenizer, directory, dirs_exist_ok=True)
    library = Tokenizer.from_file(str(directory / "tokenizer.json"))
    library.add_special_tokens([AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>")])
    library.save(str(directory / "tokenizer.json"))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return directory


@pytest.fixture
def index(tokenizer, tmp_path):
    def run(records, name="shard", **fields):
        path = records if hasattr(records, "suffix") else write(tmp_path / f"{name}.jsonl", records)
        fields = {"chat_key": "messages", "workers": 1, "tokenizer": tokenizer} | fields
        config = IndexConfig(input=(str(path),), output=tmp_path / name, **fields)
        build_shards(config, lambda progress: None)
        return Shard(tmp_path / name)

    return run


def documents_of(shard):
    """Tokens of each document and which of them are scored, as training reads them."""
    rows = PromptRows(shard, int(shard.document_lengths.sum()))
    assert rows.num_rows == 1
    tokens, mask, documents = (
        read(np.zeros(1, np.int64))[0] for read in (rows.read, rows.read_loss_mask, rows.read_documents)
    )
    numbers = range(len(shard.document_lengths))
    return [(tokens[documents == n].tolist(), mask[documents == n].tolist()) for n in numbers]


def test_tokens_and_scored_ones_are_those_of_transformers(index, tokenizer):
    """Of chats up to their last assistant turn, with <eos> behind it."""
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(tokenizer))
    shard = index(CHATS)
    eos = shard.manifest.vocabulary.eos_token_id
    found = documents_of(shard)
    for (tokens, scored), record in zip(found, CHATS, strict=True):
        messages = record["messages"][: -1 if record["messages"][-1]["role"] == "user" else None]
        expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert tokens == [*expected["input_ids"], eos]
        assert scored == [bool(m) for m in [*expected["assistant_masks"], 1]]
    manifest = shard.manifest
    assert manifest.num_prompt_tokens == sum(mask.count(False) for _, mask in found)
    turns = [m["content"] for record in CHATS for m in record["messages"] if m["role"] == "assistant"]
    assert manifest.num_text_bytes == sum(len(f"{turn}<|im_end|>\n") for turn in turns)
    assert manifest.chat_template == TEMPLATE and not manifest.special_tokens_as_text


def test_a_turn_apart_is_a_prompt_and_a_response(index):
    together = documents_of(index(CHATS))
    apart = documents_of(index(CHATS, "apart", chat_turns="apart"))
    assert len(apart) == sum(m["role"] == "assistant" for record in CHATS for m in record["messages"])
    eos = apart[0][0][-1]
    for tokens, mask in apart:
        assert sorted(mask) == mask and tokens[-1] == eos
    whole, mask = together[1]
    last = apart[2]
    assert last == (whole, [False] * last[1].count(False) + [True] * last[1].count(True))
    assert mask.count(True) > last[1].count(True) > 0
    assert apart[1][0][:-1] == whole[: len(apart[1][0]) - 1]


def test_parquet_is_read_alike(index, tmp_path):
    """Also where one message of a file has a member that the others have not."""
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ 'by ' if 'name' in m }}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}"
    )
    records = [*CHATS[:2], {"messages": [CHATS[0]["messages"][0] | {"name": "Ann"}, CHATS[0]["messages"][1]]}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "chats.parquet")
    columns = index(tmp_path / "chats.parquet", "columns", chat_template=template)
    assert documents_of(columns) == documents_of(index(records, chat_template=template))


def test_an_eos_of_the_template_is_not_repeated(index, tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else ' ' }}\n{% endfor %}"
    )
    shard = index(CHATS[:2], chat_template=template)
    eos = shard.manifest.vocabulary.eos_token_id
    assert [tokens.count(eos) for tokens, _ in documents_of(shard)] == [1, 2]


BAD = {
    "the chat is not a list of messages": {"messages": "hello"},
    "message 0 is not an object": {"messages": ["hello"]},
    "message 1 has no role": {"messages": [CHATS[0]["messages"][0], {"content": "a"}]},
    "message 0 has no content": {"messages": [{"role": "user", "content": None}]},
    "message 0: content is list, not a text": {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    "the chat begins with an assistant turn": chat(("assistant", "the")),
    "the chat has no assistant turn": chat(("user", "the")),
    "no key 'messages'": {"chat": []},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_record_that_is_no_chat_is_named(index, reason):
    with pytest.raises(InputError, match=rf"shard\.jsonl:2: {reason}"):
        index([CHATS[0], BAD[reason]])
    assert len(index([BAD[reason], CHATS[0]], "again", max_rejects=1).document_lengths) == 1


TEMPLATES = {
    "the chat template: TemplateError: turns must alternate": "{{ raise_exception('turns must alternate') }}",
    "the chat template changes what is before message 1": "{{ messages | length }}{{ messages[-1].content }}",
    "a prompt or response without tokens": "{{ messages[0].content }}",
}


@pytest.mark.parametrize("reason", TEMPLATES)
def test_a_template_that_does_not_fit_is_named(index, tmp_path, reason):
    template = tmp_path / "t.jinja"
    template.write_text(TEMPLATES[reason])
    with pytest.raises(InputError, match=rf"shard\.jsonl:1: {reason}"):
        index(CHATS[:1], chat_template=template)


def test_a_tokenizer_of_the_local_cache_has_its_template(index, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_dlm.data.tokenizers.tokenizer._in_cache", lambda path: tokenizer)
    assert len(index(CHATS, tokenizer=tmp_path / "owner" / "name").document_lengths) == len(CHATS)


def test_an_export_carries_the_template(tokenizer, tmp_path):
    vocabulary = load_tokenizer(tokenizer).vocabulary
    for number, (template, expected) in enumerate((("", TEMPLATE), ("{{ messages }}", "{{ messages }}"))):
        output = tmp_path / str(number)
        output.mkdir()
        write_tokenizer(tokenizer, vocabulary, 32, output, template)
        loaded = transformers.PreTrainedTokenizerFast.from_pretrained(str(output))
        assert loaded.chat_template == expected
    other = tmp_path / "other"
    shutil.copytree(tokenizer, other)
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "of-file").mkdir()
    write_tokenizer(other, vocabulary, 32, tmp_path / "of-file")
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "of-file"))
    assert loaded.chat_template == "{{ messages[0].content }}"


def test_what_cannot_be_is_refused(index, corpus, tmp_path):
    with pytest.raises(InputError, match="takes the place of json_keys and prompt_key"):
        index(CHATS, prompt_key="question")
    with pytest.raises(InputError, match="nothing is a chat without chat_key"):
        index(CHATS, chat_key="", chat_turns="apart")
    with pytest.raises(InputError, match="plain text has no messages"):
        index(write(tmp_path / "t.txt", CHATS))
    with pytest.raises(InputError, match="no chat template"):
        index(CHATS, tokenizer=corpus.tokenizer)
    with pytest.raises(InputError, match=r"chat_template: .*none\.jinja"):
        index(CHATS, chat_template=tmp_path / "none.jinja")
    with pytest.raises(InputError, match="no directory of a Hugging Face tokenizer"):
        load_chat_template(tmp_path / "bytes", None, "together")
