"""Where each round lies in its training: rounds that carry the optimiser share one schedule of steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Span:
    """The part of a schedule that one round trains.

    A schedule is a sequence of optimiser steps with one optimiser and one course of learning rates: that of one round,
    or of several where later ones carry the optimiser. Its batches come from a stream of shuffled passes over the
    pairs, which goes on from round to round as long as they train on the same pairs with the same batch size.

    Attributes:
        schedule_seed: Fixes dropout and what else is random in the schedule.
        first_step: Steps of the schedule before this round.
        steps: Steps of this round.
        total_steps: Steps of the whole schedule.
        first_batch: Batches of the schedule before this round.
        batches: Batches of this round.
        total_batches: Batches of the whole schedule.
        per_pass: Batches of one pass over the pairs.
        stream_seed: Fixes the order of the pairs and the draw of their negatives.
        stream_batch: Batches of the stream before this round.
        carried_on: Whether another round goes on with the optimiser.
        refines: Whether the schedule begins with the best round's encoder.
    """

    schedule_seed: int
    first_step: int
    steps: int
    total_steps: int
    first_batch: int
    batches: int
    total_batches: int
    per_pass: int
    stream_seed: int
    stream_batch: int
    carried_on: bool
    refines: bool = False

    @property
    def last_step(self) -> int:
        """Steps of the schedule when this round ends."""
        return self.first_step + self.steps

    @property
    def first_pass(self) -> int:
        """The pass of the stream in which this round begins, from 0."""
        return self.stream_batch // self.per_pass

    @property
    def passes(self) -> int:
        """How many passes of the stream this round sees a part of."""
        return -(-(self.stream_batch + self.batches) // self.per_pass) - self.first_pass


def plan(rounds: Sequence, pairs: Sequence[int], seeds: Sequence[int]) -> list[Span]:
    """Lay out the steps of a recipe.

    Args:
        rounds: Its ``Round``s.
        pairs: How many (query, positive) pairs each round trains on.
        seeds: The seed of each round.

    Returns:
        A span for each round.

    Raises:
        ValueError: If a round has no whole batch, and the others are dropped.
    """
    spans: list[Span] = []
    first = 0
    while first < len(rounds):
        last = first + 1
        while last < len(rounds) and rounds[last].carry_optimizer:
            last += 1
        spans += _schedule(rounds[first:last], pairs[first:last], seeds[first:last], first + 1)
        first = last
    return spans


def in_turn(rounds: Sequence, pairs: Sequence[int]) -> tuple[list, list[int]]:
    """Return the recipe in which every refresh of negatives while a round is trained begins a round of its own.

    With it comes the number of the round that each is a part of.

    Args:
        rounds: Its ``Round``s.
        pairs: How many (query, positive) pairs each round trains on.
    """
    parts, part_of = [], list[int]()
    for number, (round_, count) in enumerate(zip(rounds, pairs, strict=True), start=1):
        if not round_.is_refreshed:
            parts.append(round_)
            part_of.append(number)
            continue
        whole = without_refreshes(round_)
        steps, every = _length(round_, count, number)[0], round_.refresh_every
        for begun in range(0, steps, every):
            part = replace(whole, steps=min(every, steps - begun))
            parts.append(replace(part, carry_optimizer=True, start="last") if begun else part)
            part_of.append(number)
    return parts, part_of


def without_refreshes(round_):
    """Return a ``Round`` whose negatives are mined when it begins, and stay."""
    return replace(round_, refresh_every=None, max_staleness=None)


def _length(round_, count: int, number: int) -> tuple[int, int, int]:
    """Return the steps of a round, its batches, and the batches of one pass."""
    arguments = round_.training_arguments
    accumulation = int(arguments.get("gradient_accumulation_steps", 1))
    drops = bool(arguments.get("dataloader_drop_last"))
    per_pass = count // round_.batch_size if drops else -(-count // round_.batch_size)
    if per_pass == 0:
        raise ValueError(
            f"round {number} has {count} (query, positive) pairs, fewer than batch_size={round_.batch_size}, and "
            "dataloader_drop_last drops them: take a smaller batch_size, or leave dataloader_drop_last out"
        )
    batches = round_.epochs * per_pass
    steps = round_.steps or -(-batches // accumulation)
    return steps, steps * accumulation if round_.steps else batches, per_pass


def _schedule(rounds: Sequence, pairs: Sequence[int], seeds: Sequence[int], number: int) -> list[Span]:
    lengths = []
    for place, (round_, count) in enumerate(zip(rounds, pairs, strict=True)):
        steps, batches, per_pass = _length(round_, count, number + place)
        if place + 1 < len(rounds):
            # a step is not divided between rounds
            batches = steps * int(round_.training_arguments.get("gradient_accumulation_steps", 1))
        lengths.append((steps, batches, per_pass))
    total_steps, total_batches = (sum(length[i] for length in lengths) for i in (0, 1))
    spans: list[Span] = []
    step = batch = 0
    for place, (steps, batches, per_pass) in enumerate(lengths):
        stream_seed, stream_batch = seeds[place], 0
        if place and _same_stream(rounds[place - 1], rounds[place]) and lengths[place - 1][2] == per_pass:
            before = spans[-1]
            stream_seed, stream_batch = before.stream_seed, before.stream_batch + before.batches
        spans.append(
            Span(
                schedule_seed=seeds[0], first_step=step, steps=steps, total_steps=total_steps, first_batch=batch,
                batches=batches, total_batches=total_batches, per_pass=per_pass, stream_seed=stream_seed,
                stream_batch=stream_batch, carried_on=place + 1 < len(rounds), refines=rounds[0].start == "best",
            )
        )  # fmt: skip
        step, batch = step + steps, batch + batches
    return spans


def _same_stream(before, round_) -> bool:
    return before.batch_size == round_.batch_size and before.share_of_queries == round_.share_of_queries == 1


def check_carried(rounds: Sequence) -> None:
    """Refuse rounds that carry the optimiser but ask for another course of learning rates.

    Args:
        rounds: A recipe's ``Round``s.

    Raises:
        ValueError: Naming the round and the option.
    """
    for place, (before, entry) in enumerate(itertools.pairwise(rounds), start=2):
        for option in ("learning_rate", "warmup", "scheduler", "training_arguments"):
            one, other = getattr(before, option), getattr(entry, option)
            if entry.carry_optimizer and one != other:
                raise ValueError(
                    f"round {place} of the recipe goes on with the optimiser of the round before (carry_optimizer), "
                    f"but has another {option}: {other!r} instead of {one!r}"
                )
