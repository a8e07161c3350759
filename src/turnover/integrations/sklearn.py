"""scikit-learn: a classifier of tables that names the training rows behind a prediction.

A wide masked hidden layer on standardized columns, with texts and categories one-hot. For deeper networks
use :func:`turnover.attach`.
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR

from turnover.batches import Batch
from turnover.dropout.head import WideHead
from turnover.dropout.masks import MaskSpec
from turnover.dropout.network import attach
from turnover.errors import InputError, needing
from turnover.influence.estimator import Influence
from turnover.integrations.table_rows import (
    check_aligned,
    identified,
    index_of,
    weights_of_rows,
)
from turnover.labels import label_errors
from turnover.training import mean_cross_entropy, shuffled, train

if TYPE_CHECKING:
    import pandas

    from turnover.results.result import Result

with needing("the classifier", "turnover[sklearn]"):
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.compose import make_column_transformer
    from sklearn.preprocessing import OneHotEncoder, StandardScaler
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import (
        assert_all_finite,
        check_consistent_length,
        check_is_fitted,
        column_or_1d,
        validate_data,
    )

_ROWS = 1024
"""Rows that are predicted or scored at once."""
_LEAST_STEPS = 300
"""Optimizer steps of a training, however few the rows."""
_GAIN = 0.7
"""Spread of the units' inputs at the start: units that start at zero stay near it, where they are linear."""
_OUTPUT_RATE = 0.01
"""Learning rate of the output layer as a share of the hidden layer's: what rows have in common is then
learned as features, where masks of all of them cover it, and less is memorized row by row."""


class TurnoverClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A neural network of one wide hidden layer, trained with turn-over dropout.

    ``X`` is a numeric array, or a data frame of numbers, booleans, strings and categories.

    Weights (``class_weight``, ``sample_weight``) multiply training losses alone: influence is on the
    unweighted log-odds of a label. A row of weight 0 is not learned; it keeps its place in ``ids_``, and
    data frames of influence leave it out.

    Args:
        units: width of the hidden layer, and number of mask units: signal to noise of a score grows like
            sqrt(units / training rows), time like units.
        epochs: passes over the training rows; more on small sets, for at least 300 steps.
        batch_size: rows in a step.
        learning_rate: learning rate of Adam, with a linear decay to 0; the output layer learns at a
            hundredth of it. ``None``: 0.63 / sqrt(units), which changes predictions as fast at any width.
        class_weight: factors of the losses by class, as in scikit-learn: a dictionary from labels,
            ``"balanced"``, or ``None``.
        random_state: seed of weights, order and masks: an int, a ``RandomState``, or ``None``.

    Attributes:
        classes_: labels, sorted.
        n_features_in_: columns of ``X``.
        feature_names_in_: their names, if ``X`` was a data frame.
        encoder_: the fitted transformer of ``X`` to the network's input.
        network_: :class:`turnover.Network`, trained under ``ids_``.
        ids_: int64 (rows,), the ids of the training rows.
        train_batch_: the training rows as the network takes them, with labels and ids, for functions of
            turnover: ``turnover.hidden_predictions(model.network_, [model.train_batch_])``.
        weights_: float64 (rows,), factors of the training losses: 1 on average over the learned rows, and
            0 for the others.
        train_index_: (rows,), names of the training rows in data frames: ``ids`` if given, else the index
            of ``X``, else row numbers.
    """

    def __init__(
        self,
        units: int = 8192,
        *,
        epochs: int = 10,
        batch_size: int = 32,
        learning_rate: float | None = None,
        class_weight: Any = None,
        random_state: Any = None,
    ) -> None:
        self.units = units
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.class_weight = class_weight
        self.random_state = random_state

    def fit(self, X: Any, y: Any, ids: Any = None, sample_weight: Any = None) -> TurnoverClassifier:
        """Train on rows of ``X``, ``y``, ``ids`` and ``sample_weight``, paired by place.

        Args:
            X: (rows, columns).
            y: (rows,), labels.
            ids: (rows,), integers >= 0 or strings. Rows of one id are a group (a source, an annotator)
                and get one score. ``None``: an id for every row.
            sample_weight: (rows,), >= 0, factors of the rows' losses. Their scale does not matter.

        Warns:
            UserWarning: labels of a data frame's index that repeat, or that suggest another pairing.

        Raises:
            InputError: a parameter out of its range, columns of dates or other objects, ids or weights
                that do not fit, a single class, labels of the index in another order, or a training that
                diverges.
            ValueError: an error of scikit-learn: missing values, other shapes.
        """
        self._check_parameters()
        check_aligned(X, y=y, ids=ids, sample_weight=sample_weight)
        y, X_checked = column_or_1d(y, warn=True), self._checked(X, fit=True)
        check_consistent_length(X, y, ids)
        check_classification_targets(y)
        assert_all_finite(y, input_name="y")
        self.classes_, labels = np.unique(y, return_inverse=True)
        weights = weights_of_rows(X, labels, self.classes_, sample_weight, self.class_weight)
        learned = np.ones(len(y), dtype=bool) if weights is None else weights > 0
        if len(np.unique(labels[learned])) < 2:
            alone = self.classes_[np.unique(labels[learned])].tolist()
            raise InputError(f"one class alone, {alone}: give rows of two or more, of weights > 0")
        self.weights_ = np.ones(len(y)) if weights is None else weights
        self.ids_, self.train_index_ = identified(X, ids, len(y))
        categories = _categories(X_checked)
        self.encoder_: Any = StandardScaler()
        if categories:
            one_hot = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
            self.encoder_ = make_column_transformer((one_hot, categories), remainder=self.encoder_)
        self.encoder_.fit(X_checked if learned.all() else X_checked[learned])
        inputs = self._encoded(X_checked)
        seed = int(check_random_state(self.random_state).randint(2**31))
        # The meta device leaves torch's own generator alone.
        generator = torch.Generator().manual_seed(seed)
        with torch.device("meta"):
            head = WideHead(inputs.shape[1], self.units, len(self.classes_), gain=_GAIN)
        head.to_empty(device="cpu").reset_parameters(generator)
        _pair(head)
        self.network_ = attach(head, "activation", MaskSpec(seed=seed))
        self.train_batch_ = Batch(inputs, torch.from_numpy(labels), torch.from_numpy(self.ids_))
        self._train(generator, None if weights is None else torch.from_numpy(weights).float())
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Return probabilities of the classes by the whole network: float64 (rows, classes)."""
        check_is_fitted(self)
        inputs = self._encode(X)
        # In float64 the probabilities of a row do not depend on the rows beside it.
        state = {name: value.double() for name, value in self.network_.model.state_dict().items()}
        with torch.no_grad():
            found = [
                torch.func.functional_call(self.network_.model, state, (part.double(),)).softmax(1)
                for part in torch.split(inputs, _ROWS)
            ]
        return torch.cat(found).numpy()

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the most probable class of each row: (rows,)."""
        best = self.predict_proba(X).argmax(axis=1)
        found: NDArray[Any] = self.classes_[best]
        return found

    @property
    def influence_(self) -> Influence:
        """:class:`turnover.Influence` of the network, linear and of the margin."""
        check_is_fitted(self)
        return Influence(self.network_)

    def influence_on(self, X: Any, y: Any) -> pandas.DataFrame:
        """Score the influence of every training row, or group, on every given row.

        Args:
            X: (rows, columns).
            y: (rows,), labels whose log-odds are influenced: the true ones to see which training rows
                helped and harmed, or the predicted ones to see which explain the prediction.

        Returns:
            A data frame indexed by (given row, training row): ``score`` (nats of log-odds; positive
            is helpful), ``z`` and ``q`` (:class:`turnover.Result`). ``frame.loc[row]`` selects a row.

        Raises:
            InputError: a label that was not trained on.
        """
        import pandas

        check_is_fitted(self)
        check_aligned(X, y=y)
        batch = Batch(self._encode(X), self._labels(y))
        check_consistent_length(batch.inputs, batch.labels)
        learned = np.flatnonzero(self.weights_)
        first = learned[np.sort(np.unique(self.ids_[learned], return_index=True)[1])]
        ids = self.ids_[first]
        result = self.influence_.estimate(_parts(batch), torch.from_numpy(ids))
        rows = index_of(X, len(batch))
        index = pandas.MultiIndex.from_product(
            [rows, self.train_index_[first]], names=["row", "train"]
        )
        return _frame(result, index)

    def self_influence(self) -> pandas.DataFrame:
        """Score the influence of every training row on itself: memorized rows, such as wrong labels.

        Returns:
            A data frame indexed by training row: ``score``, ``z`` and ``q``, as in
            :meth:`influence_on`.

        Raises:
            InputError: rows share ids (groups).
        """
        import pandas

        check_is_fitted(self)
        batch, learned = self.train_batch_, np.flatnonzero(self.weights_)
        assert batch.labels is not None and batch.ids is not None
        kept = Batch(batch.inputs[learned], batch.labels[learned], batch.ids[learned])
        index = pandas.Index(self.train_index_[learned], name="train")
        return _frame(self.influence_.self_influence(_parts(kept)), index)

    def label_errors(self) -> pandas.DataFrame:
        """Estimate which labels are wrong, from the encoded columns alone (:func:`turnover.label_errors`).

        Returns:
            A data frame indexed by training row, in its order: ``label``, ``suggested`` (the most probable
            other class), ``probability`` (that the label is wrong) and ``suspicion`` (its log-odds).
            The sum of the probabilities is the expected number of wrong labels.
        """
        import pandas

        check_is_fitted(self)
        batch, learned = self.train_batch_, np.flatnonzero(self.weights_)
        assert batch.labels is not None
        labels = batch.labels[learned]
        found = label_errors(batch.inputs[learned], labels, classes=len(self.classes_))
        columns = {
            "label": self.classes_[labels.numpy()],
            "suggested": self.classes_[found.suggested],
            "probability": found.probability,
            "suspicion": found.suspicion,
        }
        index = pandas.Index(self.train_index_[learned], name="train")
        return pandas.DataFrame(columns, index=index)

    def _check_parameters(self) -> None:
        for name in ("units", "epochs", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or value < 1:
                raise InputError(f"{name} must be an integer >= 1, got {value!r}")
        if self.learning_rate is not None and not 0 < self.learning_rate < np.inf:
            raise InputError(f"learning_rate must be > 0 and finite, got {self.learning_rate}")

    def _checked(self, X: Any, *, fit: bool = False) -> Any:
        names = _categories(X)
        if names or (not fit and hasattr(self.encoder_, "transformers_")):
            validate_data(self, X, reset=fit, skip_check_array=True)
            return X
        return validate_data(self, X, reset=fit, dtype=np.float64, ensure_min_samples=1 + fit)

    def _encode(self, X: Any) -> Tensor:
        """Return the network's input: float32 (rows, features)."""
        return self._encoded(self._checked(X))

    def _encoded(self, X: Any) -> Tensor:
        encoded = np.asarray(self.encoder_.transform(X), dtype=np.float32)
        assert_all_finite(encoded, input_name="X")
        return torch.from_numpy(encoded)

    def _labels(self, y: Any) -> Tensor:
        y = column_or_1d(y)
        unknown = sorted(set(y.tolist()) - set(self.classes_.tolist()))
        if unknown:
            raise InputError(f"y has labels that were not trained on: {unknown[:5]}")
        return torch.from_numpy(np.searchsorted(self.classes_, y))

    def _train(self, generator: torch.Generator, weights: Tensor | None) -> None:
        batch, model = self.train_batch_, cast("WideHead", self.network_.model)
        inputs, labels, ids = batch.inputs, batch.labels, batch.ids
        assert labels is not None and ids is not None
        rows = torch.from_numpy(np.flatnonzero(self.weights_))
        spread, output = model.spread.parameters(), model.classify.parameters()
        rate = 0.63 / self.units**0.5 if self.learning_rate is None else self.learning_rate
        groups: list[dict[str, Any]] = [
            {"params": spread},
            {"params": output, "lr": _OUTPUT_RATE * rate},
        ]
        optimizer = torch.optim.Adam(groups, lr=rate, fused=True)
        steps = -(-len(rows) // self.batch_size)
        epochs = max(self.epochs, -(-_LEAST_STEPS // steps))
        rates = LinearLR(optimizer, 1.0, 0.0, epochs * steps)

        def check(loss: Tensor) -> None:
            if not bool(loss.isfinite()):
                raise InputError(
                    f"the training loss became {loss.item()}: lower learning_rate, now {rate:g}"
                )

        def loss_of(batch: Tensor) -> Tensor:
            with self.network_.exposed(ids[batch]):
                logits = model(inputs[batch])
            return mean_cross_entropy(
                logits, labels[batch], None if weights is None else weights[batch]
            )

        def batches(_: int) -> tuple[Tensor, ...]:
            return shuffled(rows, self.batch_size, generator)

        train(optimizer, range(epochs), batches, loss_of, rates=rates, after_step=check)
        model.eval()


def _pair(head: WideHead) -> None:
    """Start both units of each pair, of which a mask keeps one, with the same weights.

    Whatever they compute at the start is then equal under any two masks, and no noise in a score.
    """
    pairs = 2 * (head.spread.out_features // 2)
    with torch.no_grad():
        for weight in (head.spread.weight, head.classify.weight.T):
            weight[1:pairs:2] = weight[:pairs:2].clone()


def _parts(batch: Batch) -> list[Batch]:
    return [batch.rows(at, at + _ROWS) for at in range(0, len(batch), _ROWS)]


def _categories(X: Any) -> list[Any]:
    """Return the columns of a data frame that are one-hot encoded."""
    if not hasattr(X, "iloc"):
        return []
    others = X.select_dtypes(exclude=["number", "bool"])
    names = list(others.select_dtypes(include=["object", "string", "category"]))
    for name in others:
        if name not in names:
            raise InputError(
                f"column {name!r} is of type {others[name].dtype}: columns must be numbers, booleans, "
                f"strings or categories"
            )
    return names


def _frame(result: Result, index: pandas.Index) -> pandas.DataFrame:
    import pandas

    columns = {"score": result.scores.ravel(), "z": result.z.ravel(), "q": result.q.ravel()}
    return pandas.DataFrame(columns, index=index)
