"""The commands of a chat, as a table: what begins with a slash is looked up here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from pyfasa import console
from pyfasa.chat.conversation import Conversation, read_document

if TYPE_CHECKING:
    from pyfasa.chat.session import Session


class Leave(Exception):  # noqa: N818 - no error
    """The user wants to leave the chat."""


@dataclass(frozen=True)
class Command:
    """argument: its name, for the help; empty: the command takes none."""

    name: str
    argument: str
    help: str
    function: Callable[[Session, str], None]


def run(session: Session, line: str) -> None:
    """Does what a line like `/budget 512` says. ValueError for what is no command."""
    name, _, argument = line.strip().partition(" ")
    command = COMMANDS.get(name)
    argument = argument.strip()
    if command is None:
        raise ValueError(f"{name} is no command; there are {', '.join(COMMANDS)}.")
    if command.argument and not argument:
        raise ValueError(f"{name} needs {command.argument}: {command.help}")
    if argument and not command.argument:
        raise ValueError(f"{name} takes nothing behind it, but {argument!r} was given.")
    command.function(session, argument)


def _file(session: Session, argument: str) -> None:
    session.conversation.add(read_document(Path(argument).expanduser()))
    session.read()


def _dense(session: Session, _: str) -> None:
    fasa = session.conversation.llm.fasa
    fasa.enabled = not fasa.enabled
    if not fasa.enabled:
        session.screen.note("dense, until /dense is given again")
    elif fasa.reason is not None:
        session.screen.note(f"dense: {fasa.reason}")
    else:
        session.screen.note(f"sparse, {fasa.budget:,} tokens per head")


def _budget(session: Session, argument: str) -> None:
    fasa = session.conversation.llm.fasa
    # what is no number goes on as it is: the library says what it needs
    number = argument.replace(",", "")
    fasa.budget = int(number) if number.lstrip("+-").isdecimal() else argument  # type: ignore[assignment]
    session.screen.note(
        f"budget {fasa.budget:,} tokens per head; contexts below {fasa.min_ctx:,} tokens stay dense"
    )


def _save(session: Session, argument: str) -> None:
    from pyfasa.profile import replacing

    path = Path(argument).expanduser()
    if path.exists():
        raise ValueError(f"{path} exists; choose another name.")
    with replacing(path, force=False) as file:
        file.write(markdown(session.conversation).encode())
    session.screen.note(f"wrote {path}")


def _clear(session: Session, _: str) -> None:
    session.conversation.clear()
    n = len(session.conversation.documents)
    session.screen.note(f"forgot the turns; {n} document{'' if n == 1 else 's'} kept")


def _stats(session: Session, _: str) -> None:
    session.screen.show(stats(session.conversation))


def _help(session: Session, _: str) -> None:
    table = Table(show_header=False, box=None)
    for command in COMMANDS.values():
        table.add_row(escape(f"{command.name} {command.argument}".strip()), escape(command.help))
    session.screen.show(table)


def _quit(session: Session, _: str) -> None:
    raise Leave


COMMANDS = {
    command.name: command
    for command in (
        Command("/file", "PATH", "Put a document before the next question.", _file),
        Command("/dense", "", "Attend to everything, or to the budget again.", _dense),
        Command("/budget", "N", "Tokens that a head attends to.", _budget),
        Command("/stats", "", "Counters and timings of the last answer.", _stats),
        Command("/save", "PATH", "Write the chat as Markdown.", _save),
        Command("/clear", "", "Forget the turns, keep the documents.", _clear),
        Command("/help", "", "Show these commands.", _help),
        Command("/quit", "", "Leave; Ctrl-D does too.", _quit),
    )
}


def markdown(conversation: Conversation) -> str:
    """The chat as a Markdown text; documents by name."""
    parts = [f"# Chat with {conversation.model_name}"]
    for turn in conversation.turns:
        parts.append("## Question")
        parts += [f"*Document: {document.name}*" for document in turn.documents]
        parts += [turn.question, "## Answer", turn.answer]
        if turn.stopped:
            parts.append("*(stopped)*")
    if conversation.pending:
        parts.append("## Not asked about yet")
        parts += [f"*Document: {document.name}*" for document in conversation.pending]
    return "\n\n".join(parts) + "\n"


def stats(conversation: Conversation) -> Table:
    """Context and settings, then counters and timings of the last answer."""
    llm, answer = conversation.llm, conversation.last
    values: dict[str, object] = {
        "model": conversation.model_name,
        "depth": f"{llm.n_tokens:,} of {llm.n_ctx():,} tokens",
        "documents": len(conversation.documents),
        "turns": len(conversation.turns),
        "budget": f"{llm.fasa.budget:,} tokens per head",
        "dense below": f"{llm.fasa.min_ctx:,} tokens",
    }
    if not llm.fasa.enabled:
        values["dense"] = "by /dense or --dense"
    elif llm.fasa.reason is not None:
        values["dense"] = llm.fasa.reason
    if answer is not None:
        values["decoded"] = f"{answer.n_steps:,} tokens, {answer.speed:,.1f} tokens/s"
        values["cache read"] = console.percent(answer.cells_read)
    values |= _counted(conversation)
    return console.pairs("of the last answer" if answer else "no answer yet", values)


def _counted(conversation: Conversation) -> dict[str, object]:
    """What the core counted; nothing where it is not attached."""
    try:
        counters = conversation.llm.fasa.counters
        timings = conversation.llm.fasa.timings
    except RuntimeError:
        return {}
    nodes = ", ".join(f"{name} {n:,}" for name, n in counters.nodes.items() if n)
    spent = (f"{name} {ns / 1e6:,.1f}" for name, ns in vars(timings).items() if ns)
    return {
        "attention nodes": nodes or "none",
        "side index": console.human_bytes(counters.index_bytes),
        "K/V cache": console.human_bytes(counters.kv_bytes),
        "milliseconds": ", ".join(spent) or "none",
    }
