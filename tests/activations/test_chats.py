"""Chats become text by the tokenizer's template, and every token knows whose message it is in."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prolu import ActivationStream, HeldOut, LanguageModel, TokenMask, harvest, load_blocks
from prolu.activations.blocks_folder import copy_blocks
from prolu.activations.chats import ChatTemplate
from prolu.activations.packer import Packer
from prolu.activations.token_blocks import read_blocks
from prolu.cli.entry_point import main
from support.commands import text_flags
from support.models import CHAT_TEMPLATE, STORY, write_chat_model

ROLES = ("system", "user", "assistant")


def messages_of(i):
    words = STORY.split()
    return [
        {"role": role, "content": " ".join(words[(5 * i + 3 * j + k) % len(words)] for k in range(4 + (i + j) % 9))}
        for j, role in enumerate(ROLES if i % 3 == 0 else ROLES[1:] * 2)
    ]


CHATS = [messages_of(i) for i in range(300)]


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("chat-lm"))


@pytest.fixture(scope="module")
def lm(lm_folder):
    return LanguageModel(lm_folder, "blocks.1.hook_resid_pre")


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in CHATS))
    return file


@pytest.fixture(scope="module")
def blocks(lm, jsonl):
    return load_blocks(str(jsonl), lm.tokenizer, ctx=32, text_column="messages")


def by_hand(tokenizer, messages):
    """Tokens and roles of a chat, put together piece by piece: markers are special tokens, so no token spans two."""
    ids, roles = [tokenizer.bos_token_id], [""]
    for message in messages:
        for text, role in (
            ("<|start|>", ""), (message["role"], ""), ("<|sep|>", ""), (message["content"], message["role"]),
            ("<|end|>", ""),
        ):  # fmt: skip
            found = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += found
            roles += [role] * len(found)
    return ids, roles


def test_tokens_and_roles_are_those_put_together_by_hand(lm, blocks):
    assert set(blocks.roles) == set(ROLES)
    names = np.array(["", *blocks.roles])
    chats = [by_hand(lm.tokenizer, messages) for messages in CHATS]
    for tokens, roles in ((blocks.train, blocks.train_roles), (blocks.held_out, blocks.held_out_roles)):
        found = list(zip(tokens.ravel().tolist(), names[roles.ravel()].tolist(), strict=True))
        at = 0
        for ids, of_roles in chats:
            wanted = list(zip(ids, of_roles, strict=True))
            piece = found[at : at + len(wanted)]
            places = np.arange(at, at + len(piece)) % 32 > 0  # BOS overwrites the first token of each block
            if all(a == b for a, b, inside in zip(piece, wanted, places, strict=False) if inside):
                at += len(piece)
        assert at == len(found)  # every chat of this side was found, in order, and nothing else


def test_files_folders_and_copies_give_the_same(lm, jsonl, blocks, tmp_path):
    table = pa.table({"messages": CHATS})
    pq.write_table(table, tmp_path / "chats.parquet")
    for source, folder in ((tmp_path / "chats.parquet", None), (jsonl, tmp_path / "tokens")):
        other = load_blocks(str(source), lm.tokenizer, ctx=32, text_column="messages", folder=folder)
        assert_same(other, blocks)
    copy_blocks(blocks, tmp_path / "copy")
    assert_same(read_blocks(tmp_path / "copy"), blocks)
    file = tmp_path / "tokens" / "train_roles.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"\x09")
    with pytest.raises(ValueError, match="the roles of its tokens are not what was written"):
        read_blocks(tmp_path / "tokens")


def assert_same(a, b):
    for name in ("train", "held_out", "train_roles", "held_out_roles", "held_out_documents"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert (tuple(a.roles), a.chat_template) == (tuple(b.roles), b.chat_template)


def test_packing_that_was_interrupted_is_resumed_with_the_roles(lm, jsonl, blocks, tmp_path, monkeypatch):
    monkeypatch.setattr("prolu.activations.packer.TOKENS_BETWEEN_SAVES", 500)
    save, n_saves = Packer.save, []

    def dies(self):
        save(self)
        n_saves.append(1)
        if len(n_saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Packer, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        load_blocks(str(jsonl), lm.tokenizer, ctx=32, text_column="messages", folder=tmp_path / "tokens")
    again = load_blocks(str(jsonl), lm.tokenizer, ctx=32, text_column="messages", folder=tmp_path / "tokens")
    assert_same(again, blocks)


@pytest.mark.parametrize("roles", [("assistant",), ("user", "system")])
def test_only_messages_of_the_roles_are_trained_on_and_scored(lm, blocks, roles, tmp_path):
    mask = TokenMask(keep_roles=roles)
    kept = np.isin(np.array(["", *blocks.roles])[blocks.train_roles], roles)
    assert 0.1 < kept.mean() < 0.9
    stream = ActivationStream(lm, blocks, 64, 3, 2048, mask=mask)
    assert stream.n_train_tokens == kept.sum()
    assert stream.describe()["keep_roles"] == list(roles)
    norms = set(lm.activations(blocks.train).norm(dim=-1)[kept].tolist())
    found = {x for i in range(stream.batches_per_epoch) for x in stream[i].raw_norm.tolist()}
    assert all(min(abs(x - y) for y in norms) < 1e-4 for x in list(found)[::97])
    held_out = HeldOut(lm, blocks, blocks.held_out.size, mask=mask)
    assert np.array_equal(held_out.kept.numpy(), np.isin(np.array(["", *blocks.roles])[blocks.held_out_roles], roles))
    store = harvest(lm, blocks, tmp_path / "store", dtype="fp32", progress=False)
    kept_stream = ActivationStream(lm, store.blocks(), 64, 3, 2048, mask=mask, source=store)
    for i in (0, stream.batches_per_epoch + 1):
        assert stream[i].acts.equal(kept_stream[i].acts)


def test_a_message_that_names_its_markers_and_repeats_its_header_is_found(lm):
    odd = [{"role": "user", "content": "user"}, {"role": "assistant", "content": "  red <|end|> ball \n"}]
    chat = ChatTemplate(lm.tokenizer).render(odd)
    assert [(chat.text[span.start : span.stop], span.role) for span in chat.spans] == [
        ("user", "user"), ("red <|end|> ball", "assistant"),
    ]  # fmt: skip


def test_a_template_that_changes_contents_leaves_its_tokens_without_roles(lm_folder, jsonl, caplog):
    lm = LanguageModel(lm_folder, "blocks.1.hook_resid_pre")
    lm.tokenizer.chat_template = CHAT_TEMPLATE.replace("message['content'] | trim", "message['content'][:3]")
    blocks = load_blocks(str(jsonl), lm.tokenizer, ctx=32, text_column="messages")
    assert not blocks.train_roles.any()
    assert "of 300 chats it cannot be told which token is of which message" in caplog.text
    with pytest.raises(ValueError, match=r"keep_roles user: no token .* has a known role"):
        ActivationStream(lm, blocks, 64, mask=TokenMask(keep_roles=("user",)))


def test_what_is_no_chat_is_refused_or_left_out(lm, tiny_lm, tiny_blocks, jsonl, blocks, tmp_path):
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        load_blocks(str(jsonl), tiny_lm.tokenizer, ctx=32, text_column="messages")
    with pytest.raises(ValueError, match=r"keep_roles user: the text .* is no chats"):
        ActivationStream(tiny_lm, tiny_blocks, 64, mask=TokenMask(keep_roles=("user",)))
    with pytest.raises(ValueError, match=r"keep_roles tool: the text has the roles .*assistant"):
        ActivationStream(lm, blocks, 64, mask=TokenMask(keep_roles=("tool",)))
    file = tmp_path / "some.jsonl"
    odd = [[{"role": "user", "content": [{"type": "image"}]}], [{"role": "refused", "content": "x"}], []]
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in odd + CHATS))
    some = load_blocks(str(file), lm.tokenizer, ctx=32, text_column="messages")
    assert some.n_rows_left_out == 3
    assert np.array_equal(some.train, blocks.train)
    lm.tokenizer.chat_template, before = CHAT_TEMPLATE + " ", lm.tokenizer.chat_template
    load_blocks(str(jsonl), lm.tokenizer, ctx=32, text_column="messages", folder=tmp_path / "tokens")
    lm.tokenizer.chat_template = before
    with pytest.raises(ValueError, match="holds chats in another chat template"):
        load_blocks(str(jsonl), lm.tokenizer, ctx=32, text_column="messages", folder=tmp_path / "tokens")


def test_commands_train_on_what_the_assistant_says(lm_folder, jsonl, tmp_path, capsys):
    out = tmp_path / "a"
    asked = text_flags(lm_folder, jsonl, out=out, d_sae=32, n_tokens=1280, batch_size=64, text_column="messages")
    asked += ["--threads", "1", "--eval-tokens", "320", "--latent-pages", "none", "--keep-roles", "assistant"]
    assert main(["train", *asked]) == 0
    stream = json.loads((out / "config.json").read_text())["stream"]
    assert stream["keep_roles"] == ["assistant"]
    assert len(stream["chat_template"]) == 64
    assert "all but the messages of assistant" in (out / "report.html").read_text()
    (run,) = (p.parent for p in out.glob("*/sae.safetensors"))
    record = json.loads((out / "results.jsonl").read_text())
    capsys.readouterr()
    assert main(["eval", str(run), "--json", "--eval-tokens", "320"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["degradation"] == record["degradation"]
