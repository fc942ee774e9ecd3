"""Stock llama-perplexity as the judge of the plugin: KL divergence of sparse decoding from dense.

python docs/bench/plugin_kld.py TOOLS MODEL > docs/bench/plugin-kld.csv

llama-perplexity reads its text in batches of -b tokens. In batches of 8 each token is decoded as in a server with eight
slots: every one of the text, its prompt included, has attended sparsely, so errors add up through the whole context.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from pyfasa import Llama
from pyfasa.documents import make_document
from pyfasa.machine import cpu
from pyfasa.plugin import library_path

N_CTX, N_CHUNKS, ROWS = 8192, 3, 8
BUDGETS = (None, 256, 1024, 2048)  # None: dense in batches of 8, the noise of other batches
COLUMNS = {
    "mean_kld": r"Mean\s+KLD:\s+(\S+)",
    "median_kld": r"Median\s+KLD:\s+(\S+)",
    "p99_kld": r"99\.0%\s+KLD:\s+(\S+)",
    "same_top": r"Same top p:\s+(\S+)",
    "ppl_ratio": r"Mean PPL\(Q\)/PPL\(base\)\s*:\s+(\S+)",
}


def main() -> None:
    tools, model = sys.argv[1:]
    llm = Llama(model, n_ctx=512, verbose=False)
    text = make_document(
        lambda t: llm.tokenize(t.encode(), add_bos=False), N_CTX * N_CHUNKS + 64, 100, seed=99
    ).text
    llm.close()
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["budget", *COLUMNS, "n_ctx", "n_chunks", "rows"])
    with tempfile.TemporaryDirectory() as folder:
        file, base = Path(folder) / "text.txt", Path(folder) / "base.bin"
        file.write_text(text)
        line = [f"{tools}/llama-perplexity", "-m", model, "-f", file, "-c", N_CTX, "-fa", "on"]
        line += ["--chunks", N_CHUNKS, "-t", cpu().cores, "--kl-divergence-base", base]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYFASA_", "GGML_"))}
        subprocess.run([*map(str, line)], env=clean, check=True, capture_output=True)
        for budget in BUDGETS:
            env = clean | {"GGML_BACKEND_PATH": str(library_path())}
            if budget is not None:
                env |= {"PYFASA_PROFILE": model, "PYFASA_BUDGET": str(budget)}
            judged = [*line, "--kl-divergence", "-b", ROWS, "-ub", ROWS]
            done = subprocess.run(
                [*map(str, judged)], env=env, check=True, capture_output=True, text=True
            )
            said = done.stdout + done.stderr
            found = [
                match[1] if (match := re.search(pattern, said)) else ""
                for pattern in COLUMNS.values()
            ]
            out.writerow([budget or "", *found, N_CTX, N_CHUNKS, ROWS])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
