"""Which rows make a batch, and in which order batches come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
from sentence_transformers.base.sampler import DefaultBatchSampler

from pt_dance.training.examples import Examples
from pt_dance.training.schedule import Span


class RoundBatches(DefaultBatchSampler):
    """The batches of a whole schedule as one sequence, of which a round reads its own part.

    The place of a batch in the sequence says everything about it, so training goes on after an interruption, or from
    the round before, by leaving out as many batches as were trained; there is no epoch to be set. Batches of other
    rounds are placeholders: those before are left out unread, and of those after at most one is read ahead.

    Several processes divide each batch between them: the sequence then holds the part of the first process, that of the
    second and so on, then those of the next batch, and accelerate gives each process its own. The parts of a batch are
    of one size; the row -1 fills up what is missing, see :class:`~pt_dance.losses.RetrievalLoss`.

    Args:
        examples: The rows of the round, for the passes of its span.
        span: The part of the schedule that the round trains.
        batch_size: Rows of a batch, over all processes.
        drop_last: Whether a pass leaves out what makes no whole batch.
        processes: How many processes divide a batch.
        version: Says which version of the negatives a batch of the round has, by its number from 0; all have the first
            where None.
    """

    def __init__(
        self, examples: Examples, span: Span, batch_size: int, drop_last: bool, processes: int = 1,
        version: Callable[[int], int] | None = None,
    ):  # fmt: skip
        super().__init__(range(examples.pairs), batch_size=batch_size, drop_last=drop_last, seed=span.stream_seed)
        self.examples = examples
        self.span = span
        self.rows_of_batch = batch_size
        self.processes = processes
        self.version = version
        if processes > 1:
            self.batch_size = None  # or accelerate would take a part that is smaller than others for the last one

    def __len__(self) -> int:
        return self.span.total_batches * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        """Yield lists of labels."""
        for batch in self._whole():
            yield from parts_of(batch, self.processes)

    def _whole(self) -> Iterator[list[int]]:
        span = self.span
        placeholder = list(range(min(self.rows_of_batch, self.examples.pairs)))
        for _ in range(span.first_batch):
            yield placeholder
        for number, batch in enumerate(islice(self._stream(), span.batches)):
            first = 0 if self.version is None else self.version(number) * len(self.examples.rows)
            yield [first + row for row in batch]
        for _ in range(span.total_batches - span.first_batch - span.batches):
            yield placeholder

    def _stream(self) -> Iterator[list[int]]:
        begun = self.span.stream_batch % self.span.per_pass
        for number in range(self.span.passes):
            batches = batches_of_pass(
                self.examples, number, self.rows_of_batch, drop_last=self.drop_last,
                seed=[self.span.stream_seed, self.span.first_pass + number],
            )  # fmt: skip
            yield from islice(batches, begun if number == 0 else 0, None)


def parts_of(batch: list[int], processes: int) -> list[list[int]]:
    """Divide a batch into parts of one size, one a process, in order; -1 fills up what is missing at the end."""
    size = -(-len(batch) // processes)
    filled = batch + [-1] * (size * processes - len(batch))
    return [filled[start : start + size] for start in range(0, len(filled), size)]


def batches_of_pass(
    examples: Examples, number: int, batch_size: int, *, drop_last: bool = False, seed: int | list[int]
) -> Iterator[list[int]]:
    """Shuffle one pass over the pairs into batches, with no query or positive twice in one as long as that is possible.

    A second row of a query, or of a document, adds no negative to its batch (it is masked), so it waits for a later
    batch. Every row of the pass (its ``number`` counts from 0) comes exactly once, unless ``drop_last`` leaves out what
    makes no whole batch.

    Yields:
        Lists of row numbers.
    """
    pairs, offset = examples.pairs, number * examples.pairs
    query, positive = examples.rows.query[:pairs].tolist(), examples.rows.positive[:pairs].tolist()
    waiting = deque(np.random.default_rng(seed).permutation(pairs).tolist())
    for _ in range(pairs // batch_size if drop_last else -(-pairs // batch_size)):
        batch, later = [], []
        queries, positives = set(), set()
        # looking a few batches ahead is enough, and keeps a collection of few documents from costing rows²
        for _ in range(min(len(waiting), 8 * batch_size)):
            pair = waiting.popleft()
            if query[pair] in queries or positive[pair] in positives:
                later.append(pair)
                continue
            queries.add(query[pair])
            positives.add(positive[pair])
            batch.append(pair)
            if len(batch) == batch_size:
                break
        missing = batch_size - len(batch)
        batch += later[:missing]
        waiting.extendleft(reversed(later[missing:]))
        yield [offset + pair for pair in batch]
