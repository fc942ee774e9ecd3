"""A process that decodes with llama_cpp alone, and loads the plugin as llama.cpp's tools do: test_plugin.py runs it.

    plugin_host.py MODEL [+pyfasa] [+signal] [+copy]

Prints the last logits after a prompt and some decoded tokens, as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import llama_cpp
import numpy as np

if "+pyfasa" in sys.argv:
    import pyfasa.native  # noqa: F401

N_PROMPT = 600
N_DECODED = 6


def main() -> None:
    # libllama needs it by this name; another file would be another ggml, as in a tool that is linked statically
    library = Path(llama_cpp.__file__).parent / "lib" / "libggml.so.0"
    if "+copy" in sys.argv:
        library = Path(shutil.copy(library, tempfile.mkdtemp()))
    for _ in range(2):  # as tools do
        ctypes.CDLL(str(library)).ggml_backend_load_all()
    llm = llama_cpp.Llama(
        sys.argv[1],
        n_ctx=1024,
        n_batch=256,
        n_threads=1,
        n_threads_batch=1,
        flash_attn=True,
        verbose=False,
    )
    rng = np.random.default_rng(0)
    tokens = [int(t) for t in rng.integers(3, 259, N_PROMPT)]
    llm.eval(tokens)
    for token in rng.integers(3, 259, N_DECODED):
        llm.eval([int(token)])
    pointer = llama_cpp.llama_get_logits_ith(llm._ctx.ctx, -1)
    logits = np.ctypeslib.as_array(pointer, (llm.n_vocab(),)).tolist()
    if "+signal" in sys.argv:
        os.kill(os.getpid(), signal.SIGUSR1)
        path = Path(os.environ["PYFASA_STATS"])
        while not path.exists():
            time.sleep(0.01)
        path.rename(path.with_suffix(".signal"))
    llm.close()
    print(json.dumps(logits))


if __name__ == "__main__":
    main()
