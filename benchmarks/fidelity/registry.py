"""The rows of the board, in its order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from . import ours, peers, trivial
from .methods import Attribution, Scored
from .problems import Problem

EVERY = ("standard", "wide", "turnover")
_OURS = (*EVERY, "head")
_MASKED = ("turnover", "head")
_LARGE = 1000


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        name: of the row.
        kind: ``"ours"``, ``"peer"``, ``"trivial"`` or ``"mislabel"`` (no pairs).
        run: finds the scores.
        networks: those that it is run on.
        package: whose work it is, where it is a peer's.
        texts: whether it needs sentences.
        large: those of large problems, where it takes minutes for each; ``None``: the same.
    """

    name: str
    kind: str
    run: Callable[[Attribution], Scored]
    networks: tuple[str, ...] = EVERY
    package: str | None = None
    texts: bool = False
    large: tuple[str, ...] | None = None

    def runs_on(self, problem: Problem, network: str) -> bool:
        """Whether the row exists there."""
        networks = self.networks
        if self.large is not None and len(problem.train) > _LARGE:
            networks = self.large
        return network in networks and (not self.texts or problem.train.texts is not None)

    def described(self) -> dict[str, Any]:
        """Kind and package, with its version."""
        if self.package is None:
            return {"kind": self.kind}
        try:
            return {"kind": self.kind, "package": f"{self.package} {version(self.package)}"}
        except PackageNotFoundError:
            return {"kind": self.kind, "package": self.package}


_ONCE = ("standard",)  # what looks at no network
METHODS = (
    Method("gram", "ours", ours.gram(1), _OURS),
    Method("gram, 5 networks", "ours", ours.gram(5)),
    Method("gram, mask features", "ours", ours.gram(1, "masks"), ("turnover",)),
    Method("turn-over", "ours", ours.turn_over(1), _MASKED),
    Method("turn-over, exact", "ours", ours.turn_over(1, "exact"), ("turnover",)),
    Method("turn-over, 5 networks", "ours", ours.turn_over(5), ("turnover",)),
    Method("turn-over, 20 networks", "ours", ours.turn_over(20), ("turnover",)),
    Method("EK-FAC (kronfluence)", "peer", peers.ekfac, package="kronfluence"),
    Method("TRAK-10 (dattri)", "peer", peers.trak(10), package="dattri", large=_ONCE),
    Method("TRAK-1 (dattri)", "peer", peers.trak(1), package="dattri"),
    Method(
        "IF-CG (dattri)",
        "peer",
        peers.conjugate_gradients,
        package="dattri",
        large=("standard", "turnover"),
    ),
    Method("TracInCP (captum)", "peer", peers.tracin, package="captum"),
    Method("Nystroem (pyDVL)", "peer", peers.pydvl("nystroem"), package="pydvl"),
    Method("EK-FAC (pyDVL)", "peer", peers.pydvl("ekfac"), package="pydvl"),
    Method("bergson", "peer", peers.bergson, _ONCE, package="bergson"),
    Method("gradient product", "trivial", trivial.gradient_product),
    Method(
        "representation similarity", "trivial", trivial.timed(trivial.representation_similarity)
    ),
    Method("input similarity", "trivial", trivial.timed(trivial.input_similarity), _ONCE),
    Method("same class", "trivial", trivial.timed(trivial.same_class), _ONCE),
    Method("random", "trivial", trivial.timed(trivial.anything), _ONCE),
    Method("BM25", "trivial", trivial.timed(trivial.bm25(signed=False)), _ONCE, texts=True),
    Method("BM25, signed", "trivial", trivial.timed(trivial.bm25(signed=True)), _ONCE, texts=True),
    Method(
        "sentence similarity",
        "trivial",
        trivial.timed(trivial.sentence_similarity(signed=False)),
        _ONCE,
        texts=True,
    ),
    Method(
        "sentence similarity, signed",
        "trivial",
        trivial.timed(trivial.sentence_similarity(signed=True)),
        _ONCE,
        texts=True,
    ),
    Method("loss", "mislabel", trivial.loss(-1)),
    Method("early loss", "mislabel", trivial.loss(0)),
    Method("5-fold (cleanlab)", "mislabel", peers.cleanlab, _ONCE, package="cleanlab"),
)
