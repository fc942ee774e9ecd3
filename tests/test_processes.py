"""What shows in a process as a whole: memory over many contexts, fork, the end of the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pyfasa
from caches import TINY, written

KIB = 1024


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("model"), TINY)


def in_a_process(code: str, *arguments: object) -> str:
    """What a script prints; it must end well and say nothing on stderr."""
    folders = [str(Path(pyfasa.__file__).parents[1]), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


CREATE = """
import ctypes, gc, sys
from pathlib import Path
from caches import A, SPARSE
from support import decode, opened, opened_plain, random_profile

path, kind = Path(sys.argv[1]), sys.argv[2]
profile = random_profile(path)
libc = ctypes.CDLL(None)
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


libc.mallinfo2.restype = Info


def once(drop):
    settings = {"n_ctx": 4096, "n_batch": 64, "n_threads": 1}
    if kind == "pyfasa":
        context = opened(path, profile=profile, **settings, **SPARSE)
    else:
        context = opened_plain(path, **settings)
    llm = context.__enter__()
    if kind == "pyfasa":
        llm.fasa.verify = True
    llm.eval(A[:128])
    decode(llm, A[128:130])
    if kind == "pyfasa":
        counters = llm.fasa.counters
        assert (counters.nodes["sparse"], counters.verify_failures) == (2, 0)
        assert counters.index_bytes > 4096 * 4
    if not drop:
        llm.close()


sizes = []
for i in range(200):
    once(drop=i % 2 == 0)
    if i in (49, 199):
        gc.collect()
        info = libc.mallinfo2()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes += [pages * 4096, info.uordblks + info.hblkhd]
print(sizes[2] - sizes[0], sizes[3] - sizes[1])
"""


def test_memory_does_not_grow(tiny: Path) -> None:
    """150 contexts after a warm-up of 50, half of them closed, half of them dropped.

    Resident memory jumps by up to 1.1 MiB, bytes in use by 10 KiB. The smallest thing that can leak is a session of
    some hundred bytes; the K cache of one of these contexts has 256 KiB, its side index more than 16.
    """
    resident, in_use = np.subtract(
        *(
            [int(size) for size in in_a_process(CREATE, tiny, kind).split()]
            for kind in ("pyfasa", "llama_cpp")
        )
    )
    assert resident < 1536 * KIB
    assert in_use < 40 * KIB


FORK = """
import os, signal, sys
from pathlib import Path
import llama_cpp
import numpy as np
from caches import A, after, verified
from support import decode

path, what = Path(sys.argv[1]), sys.argv[2]
wanted = after(path, A[:128], A[128:134], n_ctx=256, n_threads=1)
with verified(path, n_ctx=256, n_threads_batch=2) as llm:
    llm.eval(A[:128])
    first = decode(llm, A[128:130])
    child = os.fork()
    if child == 0:
        signal.alarm(15)
        if what != "exits":
            llama_cpp.llama_set_n_threads(llm._ctx.ctx, 1, 1)
            assert np.allclose(decode(llm, A[130:134]), wanted[2:], atol=1e-4)
            assert llm.fasa.counters.nodes["sparse"] == 6
            assert llm.fasa.counters.verify_failures == 0
        if what == "closes":
            llm.close()
        if what == "makes another":
            found = after(path, A[:128], A[128:134], n_ctx=256, n_threads=1, n_threads_batch=1)
            assert np.array_equal(found, wanted)
        if what == "ends":
            sys.exit(0)
        os._exit(0)
    assert np.allclose(decode(llm, A[130:134]), wanted[2:], atol=1e-4)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"the child ended with {status}"
"""


@pytest.mark.parametrize("child", ["exits", "decodes", "closes", "makes another", "ends"])
def test_fork(child: str, tiny: Path) -> None:
    """A child may do all that a child of llama_cpp may: anything, with one thread.

    With more threads both wait forever: GNU OpenMP's threads exist in the parent only.
    """
    in_a_process(FORK, tiny, child)


LIVE = """
import atexit, sys, threading, time
from pathlib import Path
from caches import A, SPARSE
from pyfasa import Llama
from support import decode, random_profile

path, how = Path(sys.argv[1]), sys.argv[2]
llm = Llama(str(path), profile=random_profile(path), n_ctx=256, n_threads=2, verbose=False, **SPARSE)
llm.fasa.verify = True
llm.eval(A[:64])
decode(llm, A[64:67])


def go_on():
    while True:
        llm.n_tokens = 64
        decode(llm, A[64:67])


if how == "cycle":
    llm.itself = [llm]
elif how == "generate":
    tokens = llm.generate(A[:64], top_k=1)
    next(tokens), next(tokens)
elif how == "stream":
    chunks = llm.create_completion(A[:64], max_tokens=30, stream=True, temperature=0.0)
    next(chunks)
elif how == "atexit":
    atexit.register(decode, llm, A[67:70])
elif how == "thread":
    threading.Thread(target=go_on, daemon=True).start()
    time.sleep(0.3)
assert llm.fasa.counters.nodes["sparse"] >= 3
assert llm.fasa.counters.verify_failures == 0
"""


@pytest.mark.parametrize("how", ["live", "cycle", "generate", "stream", "atexit", "thread"])
def test_the_interpreter_ends_with_a_live_model(how: str, tiny: Path) -> None:
    """A name that nobody deleted, a reference cycle, running generators, a decoding daemon thread."""
    assert in_a_process(LIVE, tiny, how) == ""
