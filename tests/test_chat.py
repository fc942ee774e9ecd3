"""A conversation: documents are read once, turns evaluate what is new, nothing is lost when it ends early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from chats import chatting, counted, hidden, no_progress, said, text_of, turn
from pyfasa.chat.conversation import ChatFullError, Conversation, Document, read_document
from pyfasa.documents import Document as Hidden
from pyfasa.documents import is_right


@pytest.fixture(scope="module")
def document(tiny_model_path: Path) -> Hidden:
    return hidden(tiny_model_path, 3000, 15)


@pytest.fixture(scope="module")
def shared(tiny_model_path: Path) -> Iterator[Conversation]:
    with chatting(tiny_model_path) as conversation:
        yield conversation


@pytest.fixture
def chat(shared: Conversation) -> Conversation:
    """A conversation that begins, on a model that all tests share."""
    shared.turns, shared.pending, shared.last = [], [], None
    return shared


def test_a_document_is_read_once_and_its_facts_are_found(
    chat: Conversation, document: Hidden
) -> None:
    chat.add(text_of(document))
    with counted(chat) as sizes:
        reading = chat.read(no_progress)
    assert sum(sizes) == reading.n_evaluated == reading.n_tokens
    assert reading.n_tokens == pytest.approx(document.n_tokens, abs=20)
    assert not reading.from_disk

    found = 0
    for fact in document.facts[::3]:
        with counted(chat) as sizes:
            found += is_right(said(chat, fact.question), fact)
        assert all(n < 60 for n in sizes)
        assert chat.last is not None
        assert chat.last.dense == {}
        assert chat.last.cells_read == pytest.approx(1024 / 3100, rel=0.1)
    assert found >= 3  # of 5
    assert [len(one.documents) for one in chat.turns] == [1, 0, 0, 0, 0]

    chat.clear()
    assert [one.text for one in chat.documents] == [document.text]
    with counted(chat) as sizes:
        said(chat, document.facts[0].question)
    assert all(n < 60 for n in sizes)


def test_turns_are_seen_by_those_that_follow(chat: Conversation) -> None:
    chat.turns = [turn("The secret code for amber falcon is 7148213.", "Noted.")]
    assert said(chat, "What is the secret code for amber falcon?").strip()
    tokens = chat.llm.input_ids[: chat.llm.n_tokens].tolist()
    text = chat.llm.detokenize(tokens, special=True).decode()
    roles = [part.split("\n")[0] for part in text.split("<|im_start|>")[1:]]
    assert roles == ["user", "assistant", "user", "assistant"]


def test_an_answer_stopped_by_its_reader_stays(chat: Conversation, document: Hidden) -> None:
    chat.add(Document("notes", document.facts[0].sentence))
    with closing(chat.ask("What?", no_progress)) as pieces:
        next(pieces)
    [kept] = chat.turns
    assert kept.stopped
    assert kept.answer
    assert chat.last is not None
    assert chat.last.text == kept.answer
    assert chat.pending == []

    going_on = said(chat, document.facts[0].question)
    turns = chat.turns
    chat.turns, chat.pending = [turns[0]], []
    chat.llm.reset()
    assert said(chat, document.facts[0].question) == going_on


def test_a_question_that_got_no_word_is_taken_back(
    chat: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat.add(Document("notes", "key amber falcon: 12345"))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat.llm, "generate", interrupted)
        pieces = chat.ask("What is the value of key amber falcon?", no_progress)
        with pytest.raises(KeyboardInterrupt):
            next(pieces)
    assert chat.turns == []
    assert [one.name for one in chat.pending] == ["notes"]
    assert said(chat, "What is the value of key amber falcon?")


def test_reading_that_was_interrupted_goes_on(chat: Conversation, document: Hidden) -> None:
    chat.llm.reset()
    chat.add(Document("part", document.text[:6000]))

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.read(stop)
    done = chat.llm.n_tokens
    assert 0 < done < 3000
    with counted(chat) as sizes:
        n_tokens = chat.read(no_progress).n_tokens
    assert sum(sizes) == n_tokens - done


def test_outgrowing_the_context_loses_nothing(tiny_model_path: Path, document: Hidden) -> None:
    with chatting(tiny_model_path, n_ctx=512) as chat:
        with pytest.raises(ChatFullError, match=r"document.txt .* 512; nothing .* -c \d+ or more"):
            chat.add(text_of(document))
        assert chat.documents == []

        chat.add(Document("notes", "key amber falcon: 12345"))
        answer = said(chat, "What is the value of key amber falcon?")
        before = list(chat.turns)
        with pytest.raises(ChatFullError, match=r"/save FILE.*/clear.*-c \d+ or more"):
            said(chat, document.text[:4000])
        assert chat.turns == before
        assert chat.last is not None
        assert chat.last.text == answer

        chat.clear()
        assert said(chat, "What is the value of key amber falcon?") == answer


def test_an_answer_says_why_it_was_cut(tiny_model_path: Path, document: Hidden) -> None:
    with chatting(tiny_model_path, n_ctx=512) as chat:
        chat._max_tokens = 2
        said(chat, document.facts[0].question)
        assert "2 tokens" in (chat.cut or "")
        chat.clear()
        chat._max_tokens = 400
        said(chat, document.facts[0].question)
        assert chat.cut is None
        chat.clear()
        long = "word"
        while len(chat._tokens([turn(long + " word", "")])) < 509:
            long += " word"
        said(chat, long)
        assert "where the context does, at 512 tokens" in (chat.cut or "")


def test_a_model_without_a_template(one: Path) -> None:
    with chatting(one, profile=False) as chat:
        said(chat, "Once upon a time")
        first = chat.llm.n_tokens
        with counted(chat) as sizes:
            said(chat, "and then")
        assert chat.llm.n_tokens > first
        assert sizes


def test_documents_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "document.txt"
    with pytest.raises(OSError, match=r"document\.txt"):
        read_document(path)
    path.write_text(" \n")
    with pytest.raises(ValueError, match=r"document\.txt is empty"):
        read_document(path)
    path.write_bytes(b"PK\0\0")
    with pytest.raises(ValueError, match="not text"):
        read_document(path)
