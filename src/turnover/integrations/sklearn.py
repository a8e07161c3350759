"""scikit-learn: a classifier of tables that knows which of its training rows are behind a prediction.

A wide masked head on standardised columns; text and categories are one-hot. For anything deeper,
:func:`turnover.attach` to a model of your own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turnover.batches import Batch
from turnover.errors import InputError, needing
from turnover.heads import WideHead
from turnover.influence import Influence
from turnover.masks import MaskSpec, check_training_ids, string_ids
from turnover.network import attach

if TYPE_CHECKING:
    import pandas

    from turnover.influence.result import Result

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
"""Of the optimiser, however few the rows."""


class TurnoverClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A neural network of one wide hidden layer, trained with turn-over dropout.

    ``X`` is a numeric array, or a data frame of numbers, booleans, strings and categories.

    Args:
        units: width of the hidden layer, which are the mask units: signal to noise of a score grows like
            their square root over that of the training rows.
        epochs: passes over the training rows; a small set is passed over more often, for 300 steps.
        batch_size: rows in a step.
        learning_rate: of Adam, decaying linearly to 0.
        random_state: of weights, order and masks: an int, a ``RandomState``, or ``None``.

    Attributes:
        classes_: labels, sorted.
        n_features_in_: columns of ``X``.
        feature_names_in_: their names, where ``X`` was a data frame.
        encoder_: the fitted transformer of ``X`` to the network's input.
        network_: :class:`turnover.Network`, trained under ``ids_``.
        ids_: int64 (rows,), the ids of the training rows.
        train_batch_: the training rows as the network takes them, with labels and ids, for what has no method
            here: ``turnover.hidden_predictions(model.network_, [model.train_batch_])``.
        train_index_: (rows,), what the training rows are called in data frames: the index of ``X``, or
            ``ids`` where they were given, or row numbers.
    """

    def __init__(
        self,
        units: int = 4096,
        *,
        epochs: int = 10,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        random_state: Any = None,
    ) -> None:
        self.units = units
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: Any, y: Any, ids: Any = None) -> TurnoverClassifier:
        """Train.

        Args:
            X: (rows, columns).
            y: (rows,), labels.
            ids: (rows,), integers >= 0 or strings. Rows of one id are a group (a source, an annotator),
                whose influence is then scored as one. ``None``: every row for itself.

        Raises:
            InputError: a parameter out of its range, columns of dates or other objects, ids that do not
                fit, one class alone, or a training that diverges.
            ValueError: what scikit-learn refuses: missing values, other shapes.
        """
        self._check_parameters()
        inputs, y = self._encode(X, fit=True), column_or_1d(y, warn=True)
        check_consistent_length(X, y, ids)
        check_classification_targets(y)
        assert_all_finite(y, input_name="y")
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"one class alone, {self.classes_.tolist()}: give rows of two or more")
        self.ids_, self.train_index_ = _identified(X, ids, len(y))
        seed = int(check_random_state(self.random_state).randint(2**31))
        # Made on no device and drawn here, so that torch's own generator stays as it is.
        generator = torch.Generator().manual_seed(seed)
        with torch.device("meta"):
            head = WideHead(inputs.shape[1], self.units, len(self.classes_))
        head.to_empty(device="cpu").reset_parameters(generator)
        self.network_ = attach(head, "activation", MaskSpec(seed=seed))
        self.train_batch_ = Batch(inputs, torch.from_numpy(labels), torch.from_numpy(self.ids_))
        self._optimise(generator)
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Probabilities of the classes by the whole network: float64 (rows, classes)."""
        check_is_fitted(self)
        inputs = self._encode(X)
        # In float64, so that a row's probabilities do not depend on the rows beside it.
        state = {name: value.double() for name, value in self.network_.model.state_dict().items()}
        with torch.no_grad():
            found = [
                torch.func.functional_call(self.network_.model, state, (part.double(),)).softmax(1)
                for part in torch.split(inputs, _ROWS)
            ]
        return torch.cat(found).numpy()

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable class of each row: (rows,)."""
        best = self.predict_proba(X).argmax(axis=1)
        found: NDArray[Any] = self.classes_[best]
        return found

    @property
    def influence_(self) -> Influence:
        """:class:`turnover.Influence` of the network, linear and of the margin."""
        check_is_fitted(self)
        return Influence(self.network_)

    def influence_on(self, X: Any, y: Any) -> pandas.DataFrame:
        """Influence of every training row, or group, on every given row.

        Args:
            X: (rows, columns).
            y: (rows,), the label whose log-odds are looked at: the true one to ask who helped and who
                harmed, or the predicted one to ask who is behind the prediction.

        Returns:
            A data frame indexed by (given row, training row): ``score`` (nats of log-odds; positive
            is helpful), ``z`` and ``q`` (:class:`turnover.Result`). ``frame.loc[row]`` is of one row.

        Raises:
            InputError: a label that was not trained on.
        """
        import pandas

        check_is_fitted(self)
        batch = Batch(self._encode(X), self._labels(y))
        check_consistent_length(batch.inputs, batch.labels)
        ids, first = np.unique(self.ids_, return_index=True)
        first.sort()
        ids = self.ids_[first]
        parts = [batch.rows(at, at + _ROWS) for at in range(0, len(batch), _ROWS)]
        result = self.influence_.estimate(parts, torch.from_numpy(ids))
        rows = _index_of(X, len(batch))
        index = pandas.MultiIndex.from_product(
            [rows, self.train_index_[first]], names=["row", "train"]
        )
        return _frame(result, index)

    def self_influence(self) -> pandas.DataFrame:
        """Influence of every training row on itself: what was learned by heart, wrong labels among it.

        Returns:
            A data frame indexed by training row: ``score``, ``z`` and ``q``, as in
            :meth:`influence_on`.

        Raises:
            InputError: rows share ids (groups).
        """
        import pandas

        check_is_fitted(self)
        batch = self.train_batch_
        parts = [batch.rows(at, at + _ROWS) for at in range(0, len(batch), _ROWS)]
        index = pandas.Index(self.train_index_, name="train")
        return _frame(self.influence_.self_influence(parts), index)

    def _check_parameters(self) -> None:
        for name in ("units", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < np.inf:
            raise InputError(f"learning_rate must be > 0 and finite, got {self.learning_rate}")

    def _encode(self, X: Any, *, fit: bool = False) -> Tensor:
        """The network's input: float32 (rows, features)."""
        names = _categories(X)
        if names or (not fit and hasattr(self.encoder_, "transformers_")):
            validate_data(self, X, reset=fit, skip_check_array=True)
        else:
            X = validate_data(self, X, reset=fit, dtype=np.float64, ensure_min_samples=1 + fit)
        if fit:
            self.encoder_: Any = StandardScaler()
            if names:
                one_hot = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
                self.encoder_ = make_column_transformer((one_hot, names), remainder=self.encoder_)
            self.encoder_.fit(X)
        encoded = np.asarray(self.encoder_.transform(X), dtype=np.float32)
        assert_all_finite(encoded, input_name="X")
        return torch.from_numpy(encoded)

    def _labels(self, y: Any) -> Tensor:
        y = column_or_1d(y)
        unknown = sorted(set(y.tolist()) - set(self.classes_.tolist()))
        if unknown:
            raise InputError(f"y has labels that were not trained on: {unknown[:5]}")
        return torch.from_numpy(np.searchsorted(self.classes_, y))

    def _optimise(self, generator: torch.Generator) -> None:
        batch, model = self.train_batch_, self.network_.model
        assert batch.labels is not None and batch.ids is not None
        optimizer = torch.optim.Adam(model.parameters(), lr=self.learning_rate, fused=True)
        steps = -(-len(batch) // self.batch_size)
        epochs = max(self.epochs, -(-_LEAST_STEPS // steps))
        rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * steps)
        for _ in range(epochs):
            order = torch.randperm(len(batch), generator=generator)
            for rows in torch.split(order, self.batch_size):
                with self.network_.exposed(batch.ids[rows]):
                    logits = model(batch.inputs[rows])
                loss = torch.nn.functional.cross_entropy(logits, batch.labels[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                rates.step()
            if not bool(torch.isfinite(loss)):
                raise InputError(
                    f"the training loss became {loss.item()}: lower learning_rate, now "
                    f"{self.learning_rate:g}"
                )
        model.eval()


def _categories(X: Any) -> list[Any]:
    """Columns of a data frame that are one-hot encoded."""
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


def _identified(X: Any, ids: Any, rows: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Ids of the training rows, and what they are called."""
    if ids is None:
        return np.arange(rows), _index_of(X, rows)
    given = column_or_1d(ids)
    if given.dtype.kind in "OU":
        return string_ids(given.tolist()).numpy(), given
    return check_training_ids(torch.as_tensor(given)).numpy(), given


def _index_of(X: Any, rows: int) -> NDArray[Any]:
    return np.asarray(X.index) if hasattr(X, "iloc") else np.arange(rows)


def _frame(result: Result, index: pandas.Index) -> pandas.DataFrame:
    import pandas

    columns = {"score": result.scores.ravel(), "z": result.z.ravel(), "q": result.q.ravel()}
    return pandas.DataFrame(columns, index=index)
