"""The command `pyfasa chat`. pyfasa.cli registers it."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from pyfasa import console
from pyfasa.options import (
    Chunks,
    Documents,
    KvType,
    MinCtx,
    Model,
    ProfileFile,
    Seed,
    Temperature,
    Threads,
    TypeK,
    TypeV,
)

ROOM = 8192  # tokens for the turns, beside the documents


def chat(
    model: Model,
    file: Documents = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Attend to everything; /dense changes it.")
    ] = False,
    budget: Annotated[int, typer.Option("--budget", help="Tokens that a head attends to.")] = 1024,
    n_fc: Chunks = None,
    min_ctx: MinCtx = None,
    ctx: Annotated[
        int | None,
        typer.Option(
            "-c", "--ctx", min=1, help="Context size; default: the documents and 8192 tokens."
        ),
    ] = None,
    type_k: TypeK = KvType.f16,
    type_v: TypeV = KvType.f16,
    threads: Threads = None,
    max_tokens: Annotated[
        int, typer.Option("-n", "--max-tokens", min=1, help="Tokens of an answer at most.")
    ] = 1024,
    temp: Temperature = 0.0,
    seed: Seed = 0,
    profile: ProfileFile = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep read documents on disk.")
    ] = True,
    cache_size: Annotated[
        float, typer.Option("--cache-size", metavar="GIB", min=0.0, help="Size of that cache.")
    ] = 10.0,
) -> None:
    """Chat with a model about documents."""
    from pyfasa.chat.conversation import Conversation, read_document
    from pyfasa.chat.session import Session
    from pyfasa.chat.states import States, default_folder
    from pyfasa.chat.terminal import screen

    documents = [read_document(path) for path in file or []]
    text = "\n\n".join(document.text for document in documents)
    tokens, n_ctx_train = console.prompt_tokens(model, text)
    n_ctx = ctx or context_size(len(tokens), max_tokens, n_ctx_train)
    llm = console.open_model(
        model,
        n_ctx,
        n_ctx_train,
        threads,
        type_k=type_k.value,
        type_v=type_v.value,
        seed=seed,
        profile=profile,
        budget=budget,
        n_fc=n_fc,
        min_ctx=min_ctx,
    )
    with closing(llm):
        llm.fasa.enabled = not dense
        states = None
        if cache:
            states = States(
                default_folder(), model, type_k.value, type_v.value, int(cache_size * 2**30)
            )
        conversation = Conversation(llm, max_tokens=max_tokens, temp=temp, states=states)
        typed = screen()
        if typed.interactive:
            console.note(f"{model.name}, a context of {llm.n_ctx():,} tokens; /help shows commands")
        if not dense and llm.fasa.reason is not None:
            console.note(f"dense: {llm.fasa.reason}")
        well = Session(conversation, typed).run(documents)
    raise typer.Exit(0 if well else 1)


def context_size(n_tokens: int, max_tokens: int, n_ctx_train: int) -> int:
    """Room for n_tokens of documents and for turns, within what the model was trained for if possible.

    n_ctx_train: 0 if that is unknown
    """
    wanted = n_tokens + max(ROOM, 2 * max_tokens)
    if n_ctx_train <= 0:
        return wanted
    return min(wanted, max(n_ctx_train, n_tokens + max_tokens + 1))
