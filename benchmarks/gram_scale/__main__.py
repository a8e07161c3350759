"""Gram by landmarks, measured: writes ``benchmarks/results/gram_scale.json`` and tables of docs/scale.md.

``kept``: what is kept of exact gram's scores. ``retrained``: agreement with retraining. ``sizes``: a
million instances of made features. ``rate``: sentences through a BERT. The method was chosen on problems
A, B and D of the board.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.fidelity import problems
from benchmarks.fidelity.board import machine

from . import RESULTS, Json, kept, rate, retrained, sizes, table
from .networks import Network

PARTS = ("kept", "retrained", "sizes", "rate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--problems", nargs="*", default=list("ABCDE"))
    parser.add_argument("--rows", type=int, help="measure one size, in this process")
    parser.add_argument("--sentences", type=int, help="measure one rate, in this process")
    parser.add_argument("--data", type=Path, help="cifar10_10k_2k.npz, or its folder, for E")
    parser.add_argument(
        "--truth", type=Path, default=Path("runs/fidelity"), help="keeps what the board retrained"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/gram_scale"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.rows is not None:
        print(json.dumps(sizes.measured(options.rows)))
        return
    if options.sentences is not None:
        print(json.dumps(rate.measured(options.folder, options.sentences)))
        return
    known: Json = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def keep(part: str, found: Json) -> None:
        known[part] = found
        known.setdefault("machines", {})[part] = machine()
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")

    for name in options.problems:
        if not {"kept", "retrained"} & set(options.parts):
            break
        network = Network(problems.load(name, options.data, options.truth), options.folder / name)
        if "kept" in options.parts:
            found = kept.agreement(network)
            for row, values in found["rows"].items():
                shown = ", ".join(f"{key} {value:.3f}" for key, value in values.items())
                print(f"{name} {row}: {shown}", flush=True)
            keep("kept", known.get("kept", {}) | {name: found})
        if "retrained" in options.parts:
            found = retrained.judged(network, options.truth)
            retrained.show(name, found)
            keep("retrained", known.get("retrained", {}) | {name: found})
    if "sizes" in options.parts:
        keep("million", sizes.sizes())
    if "rate" in options.parts:
        keep("rate", rate.rates(options.folder))
    table.write(known)


if __name__ == "__main__":
    main()
