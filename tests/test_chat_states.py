"""Documents on disk: a second start evaluates the question only; whatever is wrong with a file, it is read again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chats import chatting, counted, hidden, no_progress, said, text_of
from pyfasa.chat.conversation import Conversation, Document
from pyfasa.chat.states import States, default_folder
from pyfasa.documents import Document as Hidden
from pyfasa.errors import WriteError

GIB = 2**30


def states_in(folder: Path, model: Path, max_bytes: int = GIB) -> States:
    return States(folder, model, "f16", "f16", max_bytes)


@pytest.fixture(scope="module")
def document(tiny_model_path: Path) -> Hidden:
    return hidden(tiny_model_path, 3000, 15)


@pytest.fixture(scope="module")
def shared(tiny_model_path: Path) -> Iterator[Conversation]:
    with chatting(tiny_model_path, n_ctx=1024) as conversation:
        yield conversation


@pytest.fixture
def chat(shared: Conversation, tiny_model_path: Path, tmp_path: Path) -> Conversation:
    """A conversation about a short document, with an empty folder of states."""
    shared.turns, shared.pending, shared.last = [], [], None
    shared._states = states_in(tmp_path / "states", tiny_model_path)
    shared.llm.reset()
    return shared


@pytest.fixture(scope="module")
def short(tiny_model_path: Path) -> Document:
    return text_of(hidden(tiny_model_path, 700, 4))


def files(chat: Conversation) -> list[Path]:
    assert chat._states is not None
    return sorted(chat._states.folder.iterdir())


def test_the_second_start_reads_the_state(
    tiny_model_path: Path, document: Hidden, tmp_path: Path
) -> None:
    question = document.facts[2].question
    answers = []
    for start in range(2):
        states = states_in(tmp_path, tiny_model_path)
        with chatting(tiny_model_path, states) as chat:
            chat.add(text_of(document))
            with counted(chat) as sizes:
                reading = chat.read(no_progress)
                read = sum(sizes)
                answers.append(said(chat, question))
            assert reading.from_disk == (start == 1)
            assert read == reading.n_evaluated == (0 if start == 1 else reading.n_tokens)
            assert all(n < 60 for n in sizes) or start == 0
            assert chat.last is not None
            assert chat.last.dense == {}
    assert answers[0]
    assert answers[0] == answers[1]
    [state] = tmp_path.iterdir()
    assert state.suffix == ".state"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(place: Callable[[int], int]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[place(len(data))] ^= 1
        path.write_bytes(data)

    return damage


DAMAGES = {
    "cut": cut,
    "empty": empty,
    "first byte": flip(lambda n: 0),
    "a cell": flip(lambda n: n // 2),
    "footer": flip(lambda n: n - 1),
    "no state": lambda path: path.write_bytes(b"something else " * 100),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_made_again(chat: Conversation, short: Document, name: str) -> None:
    chat.add(short)
    first = chat.read(no_progress)
    [path] = files(chat)
    whole = path.read_bytes()
    DAMAGES[name](path)
    chat.llm.reset()
    with counted(chat) as sizes:
        again = chat.read(no_progress)
    assert not again.from_disk
    assert again.unsaved is None
    assert sum(sizes) == first.n_tokens
    assert files(chat) == [path]
    assert path.stat().st_size == len(whole)
    chat.llm.reset()
    assert chat.read(no_progress).from_disk


def test_a_state_of_other_tokens_under_this_name(chat: Conversation, short: Document) -> None:
    chat.add(short)
    chat.read(no_progress)
    [path] = files(chat)
    chat.clear()
    chat.pending = [Document("other", "x" + short.text)]
    chat.read(no_progress)
    [other] = set(files(chat)) - {path}
    os.replace(other, path)
    chat.pending = [short]
    chat.llm.reset()
    assert not chat.read(no_progress).from_disk


def test_what_a_key_depends_on(
    chat: Conversation, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(tiny_model_path.read_bytes())
    tokens = [1, 2, 3]
    states = states_in(tmp_path, model)
    keys = [
        states.path(chat.llm, tokens),
        states.path(chat.llm, [1, 2]),
        States(tmp_path, model, "q8_0", "f16", GIB).path(chat.llm, tokens),
        States(tmp_path, model, "f16", "q8_0", GIB).path(chat.llm, tokens),
    ]
    os.utime(model, ns=(0, 0))
    keys.append(states_in(tmp_path, model).path(chat.llm, tokens))
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    keys.append(states.path(chat.llm, tokens))
    assert len(set(keys)) == len(keys)
    monkeypatch.delenv("LLAMA_ATTN_ROT_DISABLE")
    assert states.path(chat.llm, tokens) == keys[0]


def test_the_longest_unused_go_first(
    chat: Conversation, short: Document, tiny_model_path: Path
) -> None:
    assert chat._states is not None
    folder = chat._states.folder
    made = []
    for i, letter in enumerate("abc"):
        chat.pending = [Document(letter, letter + short.text)]
        chat.read(no_progress)
        [new] = set(files(chat)) - set(made)
        os.utime(new, (i + 1, i + 1))
        made.append(new)
    size = made[0].stat().st_size

    chat.pending = [Document("a", "a" + short.text)]
    chat.llm.reset()
    assert chat.read(no_progress).from_disk  # so "b" is unused for longest
    left = folder / ".pyfasa-0.tmp"
    left.write_bytes(b"unfinished")
    os.utime(left, (1, 1))
    running = folder / ".pyfasa-1.tmp"
    running.write_bytes(b"of another process")

    chat._states = states_in(folder, tiny_model_path, int(3.5 * size))
    chat.pending = [Document("d", "d" + short.text)]
    assert chat.read(no_progress).unsaved is None
    kept = set(files(chat))
    assert made[0] in kept
    assert made[1] not in kept
    assert left not in kept
    assert running in kept
    assert made[0].stat().st_mtime == pytest.approx(time.time(), abs=60)


def test_a_state_larger_than_the_bound(
    chat: Conversation, short: Document, tiny_model_path: Path
) -> None:
    assert chat._states is not None
    chat._states = states_in(chat._states.folder, tiny_model_path, 1000)
    chat.add(short)
    reading = chat.read(no_progress)
    assert "--cache-size" in (reading.unsaved or "")
    assert not chat._states.folder.exists()


def test_a_folder_that_cannot_be_written(
    chat: Conversation, short: Document, tiny_model_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    chat._states = states_in(tmp_path / "file" / "states", tiny_model_path)
    chat.add(short)
    assert "--no-cache" in (chat.read(no_progress).unsaved or "")
    assert said(chat, "What is the value of key amber falcon?")


def test_a_write_that_fails_leaves_nothing(
    chat: Conversation, short: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_cpp.llama_state_seq_save_file", lambda *_: 0)
    chat.add(short)
    assert "disk full" in (chat.read(no_progress).unsaved or "")
    assert files(chat) == []
    assert chat._states is not None
    with pytest.raises(WriteError, match="could not be written"):
        chat._states.save(chat.llm, [1])


def test_only_documents_that_open_a_chat_are_kept(chat: Conversation, short: Document) -> None:
    said(chat, "What is the value of key amber falcon?")
    chat.add(short)
    chat.read(no_progress)
    assert chat._states is not None
    assert not chat._states.folder.exists()


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "pyfasa" / "states"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "pyfasa" / "states"
