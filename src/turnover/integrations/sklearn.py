"""scikit-learn: a classifier of tables that knows which of its training rows are behind a prediction.

A wide masked head on standardised columns; text and categories are one-hot. For anything deeper,
:func:`turnover.attach` to a model of your own.
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

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
"""Of the optimiser, however few the rows."""


class TurnoverClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A neural network of one wide hidden layer, trained with turn-over dropout.

    ``X`` is a numeric array, or a data frame of numbers, booleans, strings and categories.

    Weights (``class_weight``, ``sample_weight``) multiply the losses that are trained on, and nothing else:
    influence is on the unweighted log-odds of a label. A row of weight 0 is not learned. It keeps its
    place in ``ids_`` and its id, but is not listed where influence is.

    Args:
        units: width of the hidden layer, which are the mask units: signal to noise of a score grows like
            their square root over that of the training rows.
        epochs: passes over the training rows; a small set is passed over more often, for 300 steps.
        batch_size: rows in a step.
        learning_rate: of Adam, decaying linearly to 0.
        class_weight: factors of the losses by class, as scikit-learn has them: a dictionary from labels,
            ``"balanced"``, or ``None``.
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
        weights_: float64 (rows,), what the losses were multiplied by: 1 on average over the rows that were
            learned, and 0 for the others.
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
        """Train.

        Rows of ``X``, ``y``, ``ids`` and ``sample_weight`` are paired by place.

        Args:
            X: (rows, columns).
            y: (rows,), labels.
            ids: (rows,), integers >= 0 or strings. Rows of one id are a group (a source, an annotator),
                whose influence is then scored as one. ``None``: every row for itself.
            sample_weight: (rows,), >= 0, factors of the rows' losses. Their scale does not matter.

        Warns:
            UserWarning: rows whose labels in a data frame's index do not tell them apart, or may be meant
                to be paired otherwise.

        Raises:
            InputError: a parameter out of its range, columns of dates or other objects, ids or weights
                that do not fit, one class alone, labels of the index in another order, or a training that
                diverges.
            ValueError: what scikit-learn refuses: missing values, other shapes.
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
        self._fit_encoder(X_checked, learned)
        inputs = self._encoded(X_checked)
        seed = int(check_random_state(self.random_state).randint(2**31))
        # Made on no device and drawn here, so that torch's own generator stays as it is.
        generator = torch.Generator().manual_seed(seed)
        with torch.device("meta"):
            head = WideHead(inputs.shape[1], self.units, len(self.classes_))
        head.to_empty(device="cpu").reset_parameters(generator)
        self.network_ = attach(head, "activation", MaskSpec(seed=seed))
        self.train_batch_ = Batch(inputs, torch.from_numpy(labels), torch.from_numpy(self.ids_))
        self._train(generator, None if weights is None else torch.from_numpy(weights).float())
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
        check_aligned(X, y=y)
        batch = Batch(self._encode(X), self._labels(y))
        check_consistent_length(batch.inputs, batch.labels)
        learned = np.flatnonzero(self.weights_)
        first = learned[np.sort(np.unique(self.ids_[learned], return_index=True)[1])]
        ids = self.ids_[first]
        parts = [batch.rows(at, at + _ROWS) for at in range(0, len(batch), _ROWS)]
        result = self.influence_.estimate(parts, torch.from_numpy(ids))
        rows = index_of(X, len(batch))
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
        batch, learned = self._learned()
        parts = [batch.rows(at, at + _ROWS) for at in range(0, len(batch), _ROWS)]
        index = pandas.Index(self.train_index_[learned], name="train")
        return _frame(self.influence_.self_influence(parts), index)

    def _check_parameters(self) -> None:
        for name in ("units", "epochs", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral):
                raise InputError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise InputError(f"{name} must be >= 1, got {value}")
        if not 0 < self.learning_rate < np.inf:
            raise InputError(f"learning_rate must be > 0 and finite, got {self.learning_rate}")

    def _learned(self) -> tuple[Batch, NDArray[np.int64]]:
        """The training rows of weight above 0, and their places."""
        batch, rows = self.train_batch_, np.flatnonzero(self.weights_)
        assert batch.labels is not None and batch.ids is not None
        at = torch.from_numpy(rows)
        return Batch(batch.inputs[at], batch.labels[at], batch.ids[at]), rows

    def _checked(self, X: Any, *, fit: bool = False) -> Any:
        """What scikit-learn makes of ``X``."""
        names = _categories(X)
        if names or (not fit and hasattr(self.encoder_, "transformers_")):
            validate_data(self, X, reset=fit, skip_check_array=True)
            return X
        return validate_data(self, X, reset=fit, dtype=np.float64, ensure_min_samples=1 + fit)

    def _fit_encoder(self, X: Any, learned: NDArray[np.bool_]) -> None:
        names = _categories(X)
        self.encoder_: Any = StandardScaler()
        if names:
            one_hot = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
            self.encoder_ = make_column_transformer((one_hot, names), remainder=self.encoder_)
        self.encoder_.fit(X if learned.all() else X[learned])

    def _encode(self, X: Any) -> Tensor:
        """The network's input: float32 (rows, features)."""
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
        (batch, learned), model = self._learned(), self.network_.model
        of_rows = None if weights is None else weights[torch.from_numpy(learned)]
        labels, ids = batch.labels, batch.ids
        assert labels is not None and ids is not None
        optimizer = torch.optim.Adam(model.parameters(), lr=self.learning_rate, fused=True)
        steps = -(-len(batch) // self.batch_size)
        epochs = max(self.epochs, -(-_LEAST_STEPS // steps))
        every_row = torch.arange(len(batch))

        def loss_of(rows: Tensor) -> Tensor:
            with self.network_.exposed(ids[rows]):
                logits = model(batch.inputs[rows])
            return mean_cross_entropy(
                logits, labels[rows], None if of_rows is None else of_rows[rows]
            )

        def check(loss: Tensor) -> None:
            if not bool(loss.isfinite()):
                raise InputError(
                    f"the training loss became {loss.item()}: lower learning_rate, now "
                    f"{self.learning_rate:g}"
                )

        train(
            optimizer,
            range(epochs),
            lambda _: shuffled(every_row, self.batch_size, generator),
            loss_of,
            rates=LinearLR(optimizer, 1.0, 0.0, epochs * steps),
            after_step=check,
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


def _frame(result: Result, index: pandas.Index) -> pandas.DataFrame:
    import pandas

    columns = {"score": result.scores.ravel(), "z": result.z.ravel(), "q": result.q.ravel()}
    return pandas.DataFrame(columns, index=index)
