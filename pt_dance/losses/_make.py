"""Losses by name and options."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from sentence_transformers import SentenceTransformer

from pt_dance.losses.base import RetrievalLoss, WrappedLoss
from pt_dance.losses.combined import SumLoss
from pt_dance.losses.contrastive import ContrastiveLoss
from pt_dance.losses.distill_kl import DistillKLLoss
from pt_dance.losses.dual import DualLoss
from pt_dance.losses.margin_mse import MarginMSELoss
from pt_dance.losses.pairwise import PairwiseLoss
from pt_dance.losses.regularized import RegularizedLoss
from pt_dance.losses.rows import TrainingRows
from pt_dance.losses.samtone import SamToneLoss

NAMES: dict[str, type[RetrievalLoss]] = {
    "contrastive": ContrastiveLoss,
    "pairwise": PairwiseLoss,
    "samtone": SamToneLoss,
    "margin_mse": MarginMSELoss,
    "distill_kl": DistillKLLoss,
}

# What may be put around any loss, with the defaults.
AROUND: dict[str, Any] = {
    "dual": False,
    "dual_weight": 0.1,
    "document_weight": 1.0,
    "alignment": 0.0,
    "uniformity": 0.0,
    "alignment_alpha": 2.0,
    "uniformity_t": 5.0,
    "uniformity_sum": False,
}

# Which of them do nothing without another.
NEEDS = {
    "dual_weight": "dual",
    "document_weight": "dual",
    "alignment_alpha": "alignment",
    "uniformity_t": "uniformity",
    "uniformity_sum": "uniformity",
}

# What is said once for all losses of a sum; a similarity of None leaves each its own.
SHARED = ("similarity", "query_negatives", "mini_batch_size", "gather_across_devices")

LossName = str | type[RetrievalLoss] | Sequence


def options(loss: LossName) -> dict[str, Any]:
    """Return the options that :func:`make` takes for a loss, and their defaults.

    The loss's own come first, then those of the dual direction and of the regularisers. Errors are those of
    :func:`make`.
    """
    if _is_list(loss):
        for name, _, own in _parts(loss):
            _refuse_unknown(own, _own_options(_find(name)), f"loss {_label(name)} in a list")
        defaults = _own_options(RetrievalLoss) | {"similarity": None}
        return {name: defaults[name] for name in SHARED} | AROUND
    return _own_options(_find(loss)) | AROUND


def make(loss: LossName, model: SentenceTransformer, rows: TrainingRows | None = None, **options: Any) -> RetrievalLoss:
    """Build a loss from its name and options.

    Args:
        loss: One of "contrastive", "pairwise", "samtone", "margin_mse", "distill_kl"; a subclass of
            :class:`~pt_dance.losses.RetrievalLoss`; or a list of (loss, weight) or (loss, weight, options), which
            makes their weighted sum.
        model: The SentenceTransformer to train.
        rows: What is known of every training row.
        **options: The loss's own, see :func:`options`, and what may be put around any loss:
            dual (bool): add the dual direction, with dual_weight (.1) and document_weight (1);
            alignment, uniformity (float): add these regularisers, with alignment_alpha (2), uniformity_t (5) and
            uniformity_sum (False).
            For a list: what holds for all of its losses (similarity, where a loss's own options do not say it;
            query_negatives, mini_batch_size, gather_across_devices), and those around the sum.

    Returns:
        The loss, wrapped in :class:`~pt_dance.losses.DualLoss` and :class:`~pt_dance.losses.RegularizedLoss` as asked.

    Raises:
        ValueError: An unknown loss or option, an option out of its range, or one that would do nothing.
        TypeError: Neither a name, a loss class nor a list.

    Example:
        ::

            make("pairwise", model, rows, similarity="cosine", temperature=0.01, dual=True)  # DANCE
            make([("margin_mse", 1.0), ("contrastive", 1.0)], model, rows, dual=True, dual_weight=1.0)
    """
    check(loss, **options)
    own = {name: value for name, value in options.items() if name not in AROUND}
    around = {**AROUND, **options}
    if _is_list(loss):
        parts = _parts(loss)
        if own.get("similarity") is None:
            own.pop("similarity", None)
        built = SumLoss([(_find(part)(model, rows=rows, **{**own, **more}), weight) for part, weight, more in parts])
    else:
        built = _find(loss)(model, rows=rows, **own)
    if around["dual"]:
        built = DualLoss(built, around["dual_weight"], around["document_weight"])
    if around["alignment"] or around["uniformity"]:
        built = RegularizedLoss(
            built, alignment=around["alignment"], uniformity=around["uniformity"], alpha=around["alignment_alpha"],
            t=around["uniformity_t"], uniformity_sum=around["uniformity_sum"],
        )  # fmt: skip
    return built


def check(loss: LossName, **options_given: Any) -> None:
    """Refuse what :func:`make` would refuse about names: an unknown loss or option, or one that would do nothing.

    Arguments and errors are those of :func:`make`.
    """
    valid = options(loss)
    _refuse_unknown(options_given, valid, "a list of losses" if _is_list(loss) else f"loss {_label(loss)}")
    for name, needed in NEEDS.items():
        if name in options_given and not options_given.get(needed):
            raise ValueError(f"the option {name} does nothing without the option {needed}")


def _refuse_unknown(given: dict[str, Any], valid: dict[str, Any], of: str) -> None:
    for name in given:
        if name not in valid:
            raise ValueError(f"unknown option {name!r} of {of}; valid options: {', '.join(valid)}")


def _is_list(loss: LossName) -> bool:
    return isinstance(loss, (list, tuple))


def _parts(losses: Any) -> list[tuple[LossName, float, dict[str, Any]]]:
    parts = []
    for part in losses:
        if not isinstance(part, (list, tuple)) or len(part) not in (2, 3) or _is_list(part[0]):
            raise ValueError(f"a list of losses holds (loss, weight) or (loss, weight, options), not {part!r}")
        parts.append((part[0], part[1], dict(part[2]) if len(part) == 3 else {}))
    return parts


def _find(loss: LossName) -> type[RetrievalLoss]:
    if isinstance(loss, str):
        if loss not in NAMES:
            raise ValueError(f"unknown loss {loss!r}; valid losses: {', '.join(NAMES)}")
        return NAMES[loss]
    if isinstance(loss, type) and issubclass(loss, RetrievalLoss) and not issubclass(loss, WrappedLoss):
        return loss
    raise TypeError(
        f"a loss is one of the names {', '.join(NAMES)}, a subclass of pt_dance.losses.RetrievalLoss that is not put "
        f"around another loss, or a list of them with weights, not {loss!r}"
    )


def _own_options(loss: type[RetrievalLoss]) -> dict[str, Any]:
    """Return the options of a loss and their defaults: its constructor's own, then those it hands on."""
    own: dict[str, Any] = {}
    for cls in loss.__mro__:
        constructor: Any = vars(cls).get("__init__")
        if constructor is None:
            continue
        parameters = inspect.signature(constructor).parameters.values()
        named = (p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        own = {p.name: p.default for p in named if p.name not in ("self", "model", "rows")} | own
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    defaults = {name: getattr(loss, name) for name in ("temperature", "similarity") if name in own}
    return own | defaults


def _label(loss: Any) -> str:
    return repr(loss) if isinstance(loss, str) else loss.__name__
