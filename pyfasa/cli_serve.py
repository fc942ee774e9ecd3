"""The command serve. pyfasa.cli registers it."""

from __future__ import annotations

import typer


def serve(context: typer.Context) -> None:
    """Serve models over the OpenAI API: chat, completions, embeddings, metrics, and a page to chat."""
    try:
        from pyfasa.server.app import serve as run
    except ImportError as error:
        if error.name is None or error.name.startswith(("pyfasa", "llama_cpp.")):
            raise
        raise RuntimeError(
            f"pyfasa serve needs the package {error.name}; install the extra: pip install 'pyfasa[server]'"
        ) from None
    run(context.args)
