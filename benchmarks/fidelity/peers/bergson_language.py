"""bergson's pipelines on a language model, by its command, in an environment of their own.

The package needs newer versions of others than the benchmarks do. Its command gets a saved model, tokens and
a file of settings, and leaves scores in a folder.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from turnover import InputError

from .. import language
from ..language_methods import Attribution, Floats

_CONJUGATE_GRADIENTS = {"num_steps": 10, "solver": "cg", "batch_size": 400, "micro_batch_size": 50}


def command() -> Path:
    """bergson's command: ``TURNOVER_BERGSON``, or the one ``make`` sets up."""
    return Path(os.environ.get("TURNOVER_BERGSON", ".bench-bergson/bin/bergson"))


def ekfac(given: Attribution, *, conjugate_gradients: bool = False) -> Floats:
    """EK-FAC on the blocks' linear layers; or its start of ten steps of conjugate gradients."""
    settings: dict[str, Any] = {
        "hessian_cfg": {"method": "kfac", "ev_correction": True},
        "score_cfg": {},
        "preprocess_cfg": {},
        "hessian_pipeline_cfg": {"query": _query(given)},
    }
    if conjugate_gradients:
        settings["hessian_pipeline_cfg"]["astra"] = _CONJUGATE_GRADIENTS
    return _run(given, "ekfac", {}, settings)


def trackstar(given: Attribution) -> Floats:
    """TrackStar (Chang et al. 2024), gradients divided by the roots of AdamW's second moments."""
    state = _folder(given) / "optimizer.pt"
    torch.save(given.trained.optimizer.state_dict(), state)
    index = {"projection_dim": 16, "optimizer_state": str(state)}
    settings = {
        "trackstar_cfg": {"query": _query(given), "preprocess_cfg": {"unit_normalize": True}}
    }
    return _run(given, "trackstar", index, settings)


def _folder(given: Attribution) -> Path:
    folder = given.folder.resolve() / "bergson"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _query(given: Attribution) -> dict[str, str]:
    return {"dataset": str(_folder(given) / "test.jsonl"), "aggregation": "none"}


def _run(given: Attribution, name: str, index: dict[str, Any], settings: dict[str, Any]) -> Floats:
    if not command().exists():
        raise InputError(f"no {command()}: make .bench-bergson/.done sets it up")
    folder = _folder(given)
    model, run = folder / "model", folder / name
    _save(given.trained.model, model)
    PreTrainedTokenizerFast(
        tokenizer_object=given.problem.tokenizer,
        eos_token=language.END,
        model_max_length=language.TOKENS,
    ).save_pretrained(model)
    for file, tokens in (("train", given.problem.train), ("test", given.problem.test)):
        rows = [json.dumps({"input_ids": row}) for row in tokens.tolist()]
        (folder / f"{file}.jsonl").write_text("\n".join(rows) + "\n")
    shutil.rmtree(run, ignore_errors=True)
    settings["index_cfg"] = {
        "run_path": str(run),
        "model": str(model),
        "data": {"dataset": str(folder / "train.jsonl")},
        "token_batch_size": language.TOKENS,
        "include_bias": True,
        **index,
    }
    steps = folder / f"{name}.yaml"
    steps.write_text(json.dumps({"steps": [{name: settings}]}))  # which is YAML, too
    others = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(command()), str(steps)], capture_output=True, text=True, check=False, env=others
    )
    if done.returncode < 0:
        raise RuntimeError(f"ended by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["nothing was said"])[-1])
    info = json.loads((run / "scores" / "info.json").read_text())
    stored = np.fromfile(run / "scores" / "scores.bin", dtype=np.dtype(info["dtype"]))
    return np.stack([stored[f"score_{target}"] for target in range(info["num_scores"])])


def _save(model: Any, folder: Path) -> None:
    """Save a model, or an adapter and beside it its base."""
    if hasattr(model, "peft_config"):
        base = folder.with_name("base")
        copy.deepcopy(model).unload().save_pretrained(base)
        model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
