"""The transformer behind ``pt.text.get_text(corpus)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pt_dance.storage.attributes import Fixed

if TYPE_CHECKING:
    from pt_dance.corpus.corpus import Corpus


class CorpusTextLoader(pt.Transformer):
    """Add the documents' texts to a frame with docnos; made by :meth:`pt_dance.Corpus.text_loader`.

    Args:
        corpus: Where the texts are.
        fields: ``text``, a field of the corpus, a list of them, or ``*`` for all.
        columns: Which column of the corpus each field is; None for those of the corpus under their own names.
        verbose: Whether to show a progress bar.

    Raises:
        ValueError: If the corpus has no such field.
    """

    schematic = {"label": "Corpus texts", "help_url": None}
    corpus, fields, columns = (Fixed() for _ in range(3))

    def __init__(
        self,
        corpus: Corpus,
        fields: str | Sequence[str] = "*",
        *,
        columns: Mapping[str, str] | None = None,
        verbose: bool = False,
    ) -> None:
        if columns is None:
            columns = {name: name for name in corpus.dataset.column_names if name != "docno"}
        names = list(columns) if fields == "*" else [fields] if isinstance(fields, str) else list(fields)
        unknown = [name for name in names if name not in columns]
        if unknown or not names:
            raise ValueError(
                f"fields={fields!r} must name fields of the documents: they have {', '.join(map(repr, columns))}"
            )
        self.corpus, self.fields, self.columns, self.verbose = corpus, fields, columns, verbose
        self._names = names

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Add the text columns.

        Args:
            inp: Any frame with a ``docno`` column.

        Returns:
            The same rows and columns, and a column of strings for each field (replaced where it exists).

        Raises:
            KeyError: Naming a docno that is not in the corpus.
        """
        pt.validate.columns(inp, includes=["docno"], context=self)
        rows = self.corpus.known_rows(inp["docno"].tolist())
        distinct, inverse = np.unique(rows, return_inverse=True)
        columns = {}
        for name in pt.tqdm(self._names, desc=f"{self.corpus.path.name} texts", disable=not self.verbose, delay=1):
            values = np.empty(len(distinct), dtype=object)
            values[:] = self.corpus.field_at(self.columns[name], distinct)
            columns[name] = pd.Series(values[inverse], index=inp.index, dtype="str" if not len(inp) else None)
        return inp.assign(**columns)

    def fuse_rank_cutoff(self, k: int) -> pt.Transformer:
        """Let a rank cut-off move to the left: rows map one to one, so texts are loaded only for what remains."""
        return pt.RankCutoff(k) >> self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CorpusTextLoader):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash((CorpusTextLoader, self._key()))

    def _key(self) -> tuple[Any, ...]:
        return self.corpus, tuple((name, self.columns[name]) for name in self._names)

    def __repr__(self) -> str:
        return f"{self.corpus!r}.text_loader({self.fields!r})"
