"""Negative sources: a pipeline, a function from the current dense retriever to one, or a weighted list of these."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any, TypeGuard

import pandas as pd
import pyterrier as pt

from pt_dance.storage import options
from pt_dance.storage.digests import text_id

FIRST_STAGE = "first_stage"


def _pairs(source: object) -> list[tuple[object, float]]:
    if isinstance(source, (list, tuple)) and not (len(source) == 2 and options.is_number(source[1])):
        if not source:
            raise ValueError("a list of negative sources must hold at least one source")
        return [pair for entry in source for pair in _pairs(entry)]
    if isinstance(source, tuple):
        if source[1] <= 0:
            raise ValueError(f"the weight {source[1]!r} of a negative source must be above 0")
        return [(source[0], float(source[1]))]
    return [(source, 1.0)]


def check_source(source: object, option: str) -> None:
    """Raise a plain TypeError where ``source`` is nothing that negatives can come from."""
    if source is None:
        return
    for entry, _ in _pairs(source):
        if (
            entry == FIRST_STAGE
            if isinstance(entry, str)
            else isinstance(entry, (pt.Transformer, pd.DataFrame)) or callable(entry)
        ):
            continue
        raise TypeError(
            f"{option}={entry!r} is no negative source; give a pipeline, a function from the dense retriever to a "
            f"pipeline, {FIRST_STAGE!r}, or a list of these"
        )


def needs_dense(source: object) -> bool:
    """Return whether the source is, or contains, a function of the current dense retriever."""
    return source is not None and any(_is_function(entry) for entry, _ in _pairs(source))


def _is_function(entry: object) -> TypeGuard[Callable[..., Any]]:
    return callable(entry) and not isinstance(entry, (pt.Transformer, pd.DataFrame))


def resolve_source(
    source: object, *, dense: pt.Transformer | None = None, first_stage: pd.DataFrame | None = None
) -> list[tuple[pt.Transformer | pd.DataFrame, float]]:
    """Turn a negative source into pipelines (or result frames) with their weights.

    Args:
        source: A pipeline, a function ``dense -> pipeline``, ``"first_stage"``, a result frame, or a list of these,
            each perhaps in a pair ``(source, weight)``.
        dense: What functions are called with: the dense retriever of the current weights.
        first_stage: The result frame that ``"first_stage"`` stands for; left out where it is None.

    Returns:
        (pipeline or result frame, weight) pairs; empty where only a missing first stage was asked for.

    Raises:
        TypeError: If a function gives back something that is no PyTerrier pipeline.
    """
    check_source(source, "source")
    resolved: list[tuple[pt.Transformer | pd.DataFrame, float]] = []
    for entry, weight in _pairs(source):
        if isinstance(entry, str):
            if first_stage is not None:
                resolved.append((first_stage, weight))
            continue
        if _is_function(entry):
            made = entry(dense)
            if not isinstance(made, pt.Transformer):
                raise TypeError(
                    f"the negative source {describe_source(entry)} gave back a {type(made).__name__}; "
                    "it must give a PyTerrier pipeline"
                )
            entry = made
        resolved.append((entry, weight))
    return resolved


def describe_source(source: object) -> str:
    """Return a short text: the same in every run for the same source, another one when a function's code changes."""
    if source is None:
        return "none"
    if isinstance(source, (list, tuple)):
        pairs: Sequence[tuple[object, float]] = _pairs(source)
        return " + ".join(f"{weight:g} * {describe_source(entry)}" for entry, weight in pairs)
    if isinstance(source, str):
        return source
    if isinstance(source, pd.DataFrame):
        return f"results of {source['qid'].nunique()} queries"
    if _is_function(source):
        return _describe_function(source)
    return without_addresses(repr(source)) + "".join(_functions_of(source))


def _functions_of(stage: object) -> Iterator[str]:
    """Yield the functions that a pipeline's stages hold, such as those of ``pt.apply``, which a repr does not show."""
    for name, value in sorted(getattr(stage, "__dict__", {}).items()):
        if isinstance(value, (FunctionType, MethodType, partial)):
            yield f" {name}={_describe_function(value)}"
    for inner in getattr(stage, "_transformers", ()):
        yield from _functions_of(inner)


def _describe_function(function: Any) -> str:
    code = getattr(function, "__code__", None)
    if code is None:
        return without_addresses(repr(function))
    parts = [*_code(code), repr(function.__defaults__)]
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        value = cell.cell_contents
        if isinstance(value, (set, frozenset)):  # whose order differs in every process
            value = sorted(map(repr, value))
        parts.append(f"{name}={_describe_function(value) if _is_function(value) else repr(value)}")
    digest = text_id(without_addresses("\n".join(parts)), 8)
    return f"{function.__name__}#{digest}"


def _code(code: CodeType) -> Iterator[str]:
    """Yield what a function does, its inner functions among it."""
    yield code.co_code.hex()
    yield repr(code.co_names)
    yield repr([c for c in code.co_consts if isinstance(c, (str, bytes, int, float, tuple, type(None)))])
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)


def without_addresses(text: str) -> str:
    """Return the text without the addresses of objects, which say nothing about them and differ in every process."""
    return re.sub(r"(?: at )?\b0x[0-9a-fA-F]+", "", text)
