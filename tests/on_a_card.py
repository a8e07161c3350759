"""Run commands on the CPU and on the simulated card: ``python on_a_card.py FOLDER``, with data there."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

import encoders
import simulated
from test_cli import turnover
from turnover.dropout import modules
from turnover.results.reader import open_result


def on(device: str, out: Path, where: Path) -> None:
    shown = turnover(
        *("fit", where / "train.csv", "--test", where / "test.csv", "--model", where / "encoder"),
        *(
            "--out",
            out,
            "--head-units",
            64,
            "--lora-rank",
            4,
            "--batch-size",
            8,
            "--device",
            device,
        ),
        *("--head-learning-rate", 0.003, "--epochs", 2, "--memorization", "--json"),
    )
    assert json.loads(shown.stdout)["metrics"]["device"] == device
    assert (f"device: {device}" in shown.stderr) == (device != "cpu")
    commands = (
        ("influence", out, "--method", "rerank", "--ghosts", 50),
        ("explain", out, "--text", "good film", "--no-gram"),
        ("predict", out, "--hidden"),
    )
    for command in commands:
        turnover(*command, "--device", device)


def main(where: Path) -> None:
    torch.set_num_threads(1)
    mode = simulated.simulate()  # before torch's first backward, which counts the devices
    # The CPU trains in bfloat16 where it can; here both train in float32.
    torch.cpu._is_avx512_bf16_supported = lambda: False
    encoders.folder(transformers.BertConfig(**encoders.SHAPE), where / "encoder")
    on("cpu", where / "cpu", where)
    known = modules.choose_device
    card = torch.device("card:0")
    for module in list(sys.modules.values()):
        if getattr(module, "choose_device", None) is known:
            module.choose_device = lambda name: card if str(name) == "card:0" else known(name)
    with mode:
        on("card:0", where / "card", where)
    for name in ("errors", "gram", "aggregate", "self"):
        one, other = (
            open_result(where / run / "results" / f"{name}.zarr") for run in ("cpu", "card")
        )
        largest = np.abs(one.load().scores).max()
        np.testing.assert_allclose(other.load().scores, one.load().scores, atol=1e-4 * largest)
    assert "card" not in (where / "card" / "fit.toml").read_text().split("[made]")[0].replace(
        str(where), ""
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
