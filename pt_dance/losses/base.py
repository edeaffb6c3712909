"""What every loss here shares: from the trainer's columns to a batch, in any of the ways a batch can be embedded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.base.losses.merged_forward import embed_columns, merge_feature_batches
from sentence_transformers.sentence_transformer.modules import Router, StaticEmbedding
from sentence_transformers.util import all_gather, all_gather_with_grad, get_rank
from torch import Tensor, nn

from pt_dance.encoder.batches import groups_of_like_length
from pt_dance.losses._batch import Batch, BatchRows
from pt_dance.losses.rows import TrainingRows
from pt_dance.storage.options import choice, number, whole

SIMILARITIES = ("cosine", "dot")
#: Tokens of one forward pass on a CPU. Fixed, not measured: other groups would draw other dropout, and a fit must
#: repeat to the bit.
TOKENS_AT_ONCE = 2048
#: What a tokeniser gives a number of for each token of a padded text.
_PADDED = {"input_ids", "attention_mask", "token_type_ids"}


class RetrievalLoss(CachedLossMixin, nn.Module):
    """The base of the losses: columns of texts in, one number out.

    A training row has the columns query, positive, negative_1 … negative_n (mined documents), negative_query_1 …
    negative_query_m (mined queries), in this order, and a label. With ``rows`` the label is the row's number in the
    training set, and pairs that are known to be relevant are never used as negatives. A row of number -1 only fills the
    batch up, so that it can be dealt out to processes: it is nobody's negative and counts in no mean. Without ``rows``
    the loss works on any data set of sentence-transformers' layout and knows no more than the columns say.

    Where ``rows`` say how many passages documents have, each document takes as many columns, one after the other, as
    the longest has passages, and every score of a document is that of its best passage (MaxP).

    A subclass implements :meth:`loss_of`, from a :class:`~pt_dance.losses.Batch` to a scalar. Since a batch can be
    mirrored, every loss has its dual form through :class:`~pt_dance.losses.DualLoss`.

    Attributes:
        needs_negatives: Whether the loss has nothing to learn from without mined texts.
        needs_teacher: Whether it also needs a teacher's score of each of them and of the positives.
        two_sided: Whether it has both directions in itself, so that DualLoss would count them twice.
        shown: Names of the options that model cards give.

    Args:
        model: The SentenceTransformer to train.
        temperature: Similarities are divided by it; None takes the loss's own default, a class attribute.
        similarity: "cosine" or "dot"; with "cosine" embeddings are divided by their L2 norm here, whether or not the
            model ends with a Normalize module. None takes the loss's own default, a class attribute.
        rows: What is known of every training row, see :class:`~pt_dance.losses.TrainingRows`.
        query_negatives: How many of the last columns are mined queries; only without ``rows``, which say it.
        mini_batch_size: With a number, gradient caching: only so many texts have their activations in memory at a
            time, and the gradients are those of the whole batch (Gao et al. 2021, arXiv 2101.06983). Each text is
            embedded twice. Static towers, whose activations take little memory, ignore it.
        gather_across_devices: Use the embeddings of all processes, so that in-batch negatives come from all of them.
            Every process must have the same number of rows.

    Raises:
        TypeError: ``model`` is no SentenceTransformer.
        ValueError: An option out of its range.
    """

    temperature: float = 1.0
    similarity: str = "cosine"
    needs_negatives = False
    needs_teacher = False
    two_sided = False
    shown: tuple[str, ...] = ("similarity", "temperature", "mini_batch_size", "gather_across_devices")

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float | None = None,
        similarity: str | None = None,
        *,
        rows: TrainingRows | None = None,
        query_negatives: int | None = None,
        mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a SentenceTransformer, not {type(model).__name__}")
        if rows is not None and not isinstance(rows, TrainingRows):
            raise TypeError(f"rows must be a TrainingRows, not {type(rows).__name__}")
        if rows is not None and query_negatives is not None:
            raise ValueError("query_negatives is known from rows: give one of them, not both")
        self.model = model
        self.rows = rows
        self.query_negatives = whole("query_negatives", query_negatives, 0, or_none=True)
        self.similarity = choice("similarity", self.similarity if similarity is None else similarity, SIMILARITIES)
        self.temperature = number("temperature", self.temperature if temperature is None else temperature, above=0)
        self.mini_batch_size = whole("mini_batch_size", mini_batch_size, or_none=True)
        self.gather_across_devices = bool(gather_across_devices)
        self.uses_gradient_cache = mini_batch_size is not None and not _is_static(model)
        if rows is not None:
            self.check_rows(rows)

    def loss_of(self, batch: Batch) -> Tensor:
        """Return the loss of a batch, a scalar that is differentiable by the embeddings.

        These are float32 or float64, of L2 norm 1 where ``similarity`` is "cosine". (Not named ``loss``: by that
        attribute sentence-transformers' model cards look for losses inside losses.)
        """
        raise NotImplementedError(f"{type(self).__name__} must implement loss_of(batch)")

    def check_rows(self, rows: TrainingRows, mined: str = "negatives") -> None:
        """Refuse training rows this loss cannot be computed of.

        Args:
            rows: The training rows, mirrored for the dual direction.
            mined: How messages call the mined texts of this direction.

        Raises:
            ValueError: Something is missing from the rows.
        """
        name = type(self).__name__
        if (self.needs_negatives or self.needs_teacher) and rows.negatives.shape[1] == 0:
            raise ValueError(
                f"{name} has nothing to learn from: it has no in-batch negatives and the training rows have no {mined}"
            )
        if self.needs_teacher:
            needed = f"{name} needs the teacher's scores of the positives and of the {mined}"
            if rows.teacher_positive is None or rows.teacher_negatives is None:
                raise ValueError(f"{needed}: the training rows have none")
            missing = ~np.isfinite(rows.teacher_negatives) & (rows.negatives >= 0)
            unscored = ~np.isfinite(rows.teacher_positive) | missing.any(axis=1)
            if unscored.any():
                first = int(unscored.argmax())
                raise ValueError(f"{needed}: {int(unscored.sum())} rows lack some, the first of them row {first}")

    def evaluate(self, batch: Batch) -> Tensor:
        """Return the loss of a batch of embeddings as the model gives them; shape ()."""
        return self.loss_of(batch.unit() if self.similarity == "cosine" else batch)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Return the loss of the trainer's columns, a scalar.

        Args:
            sentence_features: The tokenised columns, in the order of the class description.
            labels: (B,) row numbers with ``rows``; without them whatever the loss itself says, or None.
        """
        sentence_features = list(sentence_features)
        if self.rows is not None:
            # Before the model runs: on a GPU this waits for the step before, not for the forward pass, during which
            # the CPU can then look up the masks.
            labels = torch.from_numpy(self._row_numbers(labels))
        self._split(sentence_features)
        if self.uses_gradient_cache:
            return self.forward_cached(sentence_features, labels)  # type: ignore[operator]
        return self.compute_loss_from_embeddings(self._embed(sentence_features), labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """Return the loss of columns that are embedded already, a scalar.

        Similarities are computed in float32 (float64 for float64 embeddings), also under autocast.

        Args:
            embeddings: One (B, d) tensor a column, in the order of the class description.
            labels: As :meth:`forward` takes them.

        Raises:
            ValueError: Too few columns, columns that ``rows`` do not know, or labels that are no row numbers.
        """
        with torch.autocast(embeddings[0].device.type, enabled=False):
            return self.evaluate(self._batch([_full_precision(column) for column in embeddings], labels))

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Return the loss of the whole batch, and compute its gradients: step two of gradient caching."""
        loss = self.compute_loss_from_embeddings([torch.cat(column) for column in reps], labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
            for embeddings in (chunk for column in reps for chunk in column):
                if embeddings.grad is None:  # a column this loss has no use for, such as those of a dual of weight 0
                    embeddings.grad = torch.zeros_like(embeddings)
        return loss

    def embed_minibatch(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Embed a mini-batch; in full precision, so that the cached gradients are too and do not underflow."""
        embeddings, random_state = super().embed_minibatch(*args, **kwargs)
        return _full_precision(embeddings), random_state

    def get_config_dict(self) -> dict[str, Any]:
        """Return the options, as sentence-transformers writes them on model cards."""
        return {name: getattr(self, name) for name in self.shown} | {"known_positives_masked": self.rows is not None}

    def _split(self, columns: list) -> tuple[list, list]:
        """Return columns of documents, but for the first one, and of mined queries."""
        mined = len(columns) - 2
        if mined < 0:
            raise ValueError(f"the columns query and positive are needed, but there are {len(columns)} columns")
        queries = self.query_negatives or 0
        if self.rows is not None:
            documents, queries = self.rows.negatives.shape[1], self.rows.query_negatives.shape[1]
            passages = self.rows.passages_per_document
            if mined + 1 != passages * (1 + documents) + queries:
                raise ValueError(
                    f"there are {mined} columns after query and positive, but the training rows have {documents} "
                    f"negatives and {queries} query negatives"
                    + (f", and {passages} passages of each document" if passages > 1 else "")
                )
        elif queries > mined:
            raise ValueError(
                f"query_negatives is {queries}, but only {mined} columns follow the columns query and positive"
            )
        return columns[2 : len(columns) - queries], columns[len(columns) - queries :]

    def _embed(self, features: list[dict[str, Tensor]]) -> list[Tensor]:
        # Texts of one kind share forward passes: they have about the same length and, of two towers, the same one.
        negatives, query_negatives = self._split(features)
        queries, documents = [features[0], *query_negatives], [features[1], *negatives]
        if all("offsets" in column for column in features):
            # A static tower's whole table is the gradient of each forward pass, so one pass for all columns it reads
            # is worth more than anything else.
            if len({column.get("task") for column in features}) == 1:
                embedded = _embed_bags(self.model, queries + documents)
            else:
                embedded = _embed_bags(self.model, queries) + _embed_bags(self.model, documents)
            queries, documents = embedded[: len(queries)], embedded[len(queries) :]
        else:
            queries, documents = _embed_texts(self.model, queries), _embed_texts(self.model, documents)
        return [queries[0], *documents, *queries[1:]]

    def _row_numbers(self, labels: Tensor | None) -> np.ndarray:
        if labels is None:
            raise ValueError("the data set needs a column label with each row's number in the training rows")
        numbers = labels.detach().cpu().numpy()
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            raise ValueError(
                "the column label must hold each row's number in the training rows, one whole number a row; "
                f"it holds {numbers.dtype} of shape {numbers.shape}"
            )
        rows: Any = self.rows  # labels are only looked at where there are rows
        # where negatives are refreshed, a label also says which of their versions the row has
        is_beyond = numbers.size and rows.later is None and numbers.max() >= len(rows)
        if is_beyond or (numbers.size and numbers.min() < -1):
            raise ValueError(
                f"the column label holds row numbers from {numbers.min()} to {numbers.max()}, but there are "
                f"{len(rows)} training rows, numbered from 0; only -1 is allowed besides, for a row that fills "
                "the batch up"
            )
        return numbers

    def _batch(self, columns: list[Tensor], labels: Tensor | None) -> Batch:
        self._split(columns)
        size, device = len(columns[0]), columns[0].device
        numbers: Any = None
        if self.rows is not None:
            numbers = self._row_numbers(labels)
            if len(numbers) != size:
                raise ValueError(f"there are {len(numbers)} labels for {size} rows")
            labels = None
        first = 0
        if self.gather_across_devices:
            columns = [all_gather_with_grad(column) for column in columns]
            first = get_rank() * size
            if numbers is not None:
                numbers = all_gather(torch.from_numpy(numbers).to(device)).cpu().numpy()
        negatives, mined = self._split(columns)
        documents = torch.stack([columns[1], *negatives], dim=1)
        query_negatives = torch.stack(mined, dim=1) if mined else columns[0][:, None][:, :0]
        rows, numbers = (None, None) if self.rows is None else self.rows.of(numbers)
        known = BatchRows(rows, numbers, len(columns[0]), slice(first, first + size), device)
        if rows is not None and rows.passages_per_document > 1:
            documents = known.passages_filled(documents)
        return Batch(columns[0], documents[:, 0], documents[:, 1:], query_negatives, known, labels)


class WrappedLoss(RetrievalLoss):
    """The base of losses made of other losses: they embed the columns once and share the batch.

    Args:
        losses: The losses inside; they must be of one model and agree in ``rows``, ``query_negatives``,
            ``mini_batch_size`` and ``gather_across_devices``, which the whole takes from them.

    Raises:
        TypeError: Something else than a RetrievalLoss.
        ValueError: Losses that do not agree.
    """

    shown: tuple[str, ...] = ("mini_batch_size", "gather_across_devices")

    def __init__(self, *losses: RetrievalLoss) -> None:
        for loss in losses:
            if not isinstance(loss, RetrievalLoss):
                raise TypeError(
                    f"{type(self).__name__} works on the losses of pt_dance.losses, not on {type(loss).__name__}"
                )
        nn.Module.__init__(self)
        first = losses[0]
        for name in ("model", "rows", "query_negatives", "mini_batch_size", "gather_across_devices"):
            if any(getattr(loss, name) != getattr(first, name) for loss in losses[1:]):
                raise ValueError(f"the losses in a {type(self).__name__} must have the same {name}")
            setattr(self, name, getattr(first, name))
        self.uses_gradient_cache = first.uses_gradient_cache

    def evaluate(self, batch: Batch) -> Tensor:
        """Return the loss of a batch; each loss inside applies its own similarity and temperature."""
        return self.loss_of(batch)


def _embed_bags(model: nn.Module, columns: list[dict[str, Any]]) -> list[Tensor]:
    """Embed columns of token bags (``input_ids`` of all texts in a row, ``offsets`` of each) in one forward pass."""
    starts = np.cumsum([0] + [len(column["input_ids"]) for column in columns])
    merged = {
        **columns[0],
        "input_ids": torch.cat([column["input_ids"] for column in columns]),
        "offsets": torch.cat([column["offsets"] + int(start) for column, start in zip(columns, starts, strict=False)]),
    }
    return list(model(merged)["sentence_embedding"].split([len(column["offsets"]) for column in columns]))


def _embed_texts(model: nn.Module, columns: list[dict[str, Any]]) -> list[Tensor]:
    """Embed columns of padded texts: in one forward pass, or on a CPU in one for each group of texts of like length.

    A CPU computes what is padding like everything else; a GPU would rather have one large pass than several small ones.
    Only padding on the right can be left out, since what is on the left moves positions.
    """
    merged = merge_feature_batches(columns) if _are_texts_on_a_cpu(columns) else None
    if merged is None:
        return embed_columns(model, columns, separate_first=False)
    mask = merged["attention_mask"]
    widths = mask.shape[1] - mask.flip(1).int().argmax(1)  # of a text with its last token
    # of one length, or padded on the left: there is nothing to leave out
    budget = mask.numel() if int(widths.min()) == mask.shape[1] else TOKENS_AT_ONCE
    groups = [torch.from_numpy(rows) for rows in groups_of_like_length(widths.numpy(), budget, len(widths))]
    parts = []
    for rows in groups:
        width = int(widths[rows[0]])
        parts.append(model({key: value[rows, :width] if key in _PADDED else value for key, value in merged.items()}))
    embeddings = torch.cat([part["sentence_embedding"] for part in parts])[torch.cat(groups).argsort()]
    return list(embeddings.split([len(column["attention_mask"]) for column in columns]))


def _are_texts_on_a_cpu(columns: list[dict[str, Any]]) -> bool:
    """Return whether columns hold padded texts and what is the same for all of them, and nothing else."""
    for column in columns:
        mask = column.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.device.type != "cpu":
            return False
        for name, value in column.items():
            of_all = name == "prompt_length" or value is None or isinstance(value, (str, int, float))
            is_padded = name in _PADDED and isinstance(value, Tensor) and value.shape == mask.shape
            if not (of_all or is_padded):
                return False
    return True


def _full_precision(embeddings: Tensor) -> Tensor:
    return embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings


def _is_static(model: nn.Module) -> bool:
    """Return whether the towers are static embeddings, whose inputs cannot be cut into mini-batches and need not be."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, SentenceTransformer):
        return False
    routed = isinstance(model[0], Router)
    inputs = [route[0] for route in model[0].sub_modules.values()] if routed else [model[0]]
    static = [isinstance(module, StaticEmbedding) for module in inputs]
    if any(static) and not all(static):
        raise ValueError(
            "gradient caching does not work with one static tower and one that is not: leave mini_batch_size out"
        )
    return all(static)
