"""What `pyfasa calibrate --dry-run` tells: the work and what it takes, without doing it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from pyfasa import calibration, console, estimate
from pyfasa.calibration_plan import Plan


def outlook(plan: Plan, output: Path) -> dict[str, str]:
    """Names and values. Opens the model to measure how fast it is; raises ProfileError if it cannot be calibrated."""
    model = plan.identity
    trained = f"{plan.n_ctx_train:,}" if plan.n_ctx_train else "an unknown number of"
    n = len(plan.samples)
    documents = f"{n} documents" if n > 1 else "a document"
    f16 = 2 * 2 * model.head_dim
    most = "at most " if plan.method == "allocation" else ""
    found = {
        "model": f"{plan.model_path}: {model.name}, {model.architecture}, {model.n_layer} layers, "
        f"{model.n_head_kv} KV heads of {model.head_dim} dims, trained on contexts of {trained} tokens",
        "text": f"{plan.text}: {documents} of up to {plan.n_ctx:,} tokens, {plan.n_tokens:,} tokens "
        f"in all with questions about them, {plan.n_query:,} queries captured",
        "method": plan.method,
        "side index": f"{most}{plan.index_bytes:.3g} bytes per token and KV head, "
        f"{console.percent(plan.index_bytes / f16)} of K and V in f16",
        "output": str(output),
        "memory": str(estimate.memory(plan)),
    }
    if plan.before:
        found["saved runs added"] = str(len(plan.before))
    return {**found, "time": estimate.duration(rehearse(plan))}


def rehearse(plan: Plan) -> float:
    """Opens the model as calibration does, and returns how many seconds that would take (``estimate.seconds``).

    Raises ProfileError for a model without a layer that can be calibrated.
    """
    with closing(calibration.open_model(plan)) as llm:
        return estimate.seconds(llm, plan)
