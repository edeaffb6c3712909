"""What there is to say of an encoder: model cards, written from what trained it, and a few facts for notebooks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from pt_dance.encoder.origin import of_weights

_TAGS = ["pt_dance", "pyterrier", "dense-retrieval"]


def about(encoder: Any) -> dict[str, Any]:
    """Return what a notebook shows of a ``DualEncoder``."""
    kind, longest = "static" if encoder.is_static else "transformer", encoder.model.max_seq_length or math.inf
    return {
        "towers": f"two ({kind})" if encoder.has_two_towers else f"one ({kind})",
        "dimensions": encoder.dim,
        "similarity": encoder.similarity,
        "parameters": sum(parameter.numel() for parameter in encoder.model.parameters()),
        "tokens of a text": "all" if math.isinf(longest) else int(longest),
        "device": str(encoder.device),
        "encodes in": encoder.dtype,
        "fingerprint": encoder.fingerprint,
    }


def model_card(
    encoder: Any,
    repo: str,
    *,
    data: str | None = None,
    measures: Mapping[str, Mapping[str, float]] | None = None,
    license: str | None = None,
) -> str:
    """Write the card of an encoder's sentence-transformers repository, as Markdown with metadata for the hub.

    Args:
        encoder: The ``DualEncoder``. Of the trainings in its ``origin`` the card gives ``base``, ``rounds`` (a text a
            round), ``data`` (by name), ``measures`` (by split), ``versions`` and ``citations``.
        repo: Name of the repository.
        data: What it was trained on, in the user's words.
        measures: Values of measures by the split they were measured on, beside those that the run has.
        license: The model's licence; that of the base model when ``None``.
    """
    origin = of_weights(encoder.origin, encoder.fingerprint)
    bases = origin["bases"]
    licences = sorted({base["license"] for base in bases if base.get("license")})
    alone = licences[0] if len(licences) == 1 and all(base.get("license") for base in bases) else None
    head = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", *_TAGS],
        base_model=[base["model"] for base in bases if base.get("model")] or None,
        license=license or alone,
    )
    use = f"""from pt_dance import DualEncoder

encoder = DualEncoder({repo!r})  # in PyTerrier: a transformer, and what pt_dance.DenseIndex takes
```

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({repo!r})
scores = model.encode_query(["a query"]) @ model.encode_document(["a document"]).T"""
    told = sections(encoder, data=data, measures=measures)
    return _card(head.to_yaml(), repo.rsplit("/", 1)[-1], _kind(encoder), use, told, origin, license)


def artifact_card(encoder: Any, title: str, load: str, metadata: Mapping[str, Any], *, extra: str = "") -> str:
    """Write the card of a PyTerrier artifact that holds an encoder, as Markdown with metadata for the hub.

    Args:
        encoder: The ``DualEncoder``.
        title: Its heading.
        load: The line of Python that opens the artifact.
        metadata: The artifact's ``type`` and ``format``.
        extra: What else there is to say of the artifact.
    """
    origin = of_weights(encoder.origin, encoder.fingerprint)
    kind, shape = metadata.get("type", ""), metadata.get("format", "")
    tags = ["pyterrier", "pyterrier-artifact", f"pyterrier-artifact.{kind}", f"pyterrier-artifact.{kind}.{shape}"]
    listed = "".join(f"\n- {tag}" for tag in tags)
    head = f"tags:{listed}\ntask_categories:\n- text-retrieval\nviewer: false"
    kind = f"{_kind(encoder)} {extra}".strip()
    return _card(head, title, kind, f"import pyterrier as pt\n\n{load}", sections(encoder), origin, None)


def _card(
    head: str, title: str, kind: str, use: str, told: list[str], origin: Mapping[str, list], license: str | None
) -> str:
    parts = [
        f"---\n{head}\n---\n\n# {title}",
        kind,
        f"## Use\n\n```python\n{use}\n```",
        *told,
        f"## Licence\n\n{_licence_in_words(origin['bases'], license)}",
    ]
    entries = [entry.strip() for training in origin["trainings"] for entry in training.get("citations", [])]
    if entries:
        parts.append("## Citation\n\n```bibtex\n" + "\n\n".join(dict.fromkeys(entries)) + "\n```")
    return "\n\n".join(parts) + "\n"


def sections(
    encoder: Any, *, data: str | None = None, measures: Mapping[str, Mapping[str, float]] | None = None
) -> list[str]:
    """Return what the card says of training and results, as Markdown."""
    origin = of_weights(encoder.origin, encoder.fingerprint)
    trainings = origin["trainings"]
    facts = [("Base model", ", ".join(base.get("model") or base["name"] for base in origin["bases"]) or "none")]
    if data is not None:
        facts.append(("Data", data))
    for training in trainings:
        facts += [(str(name), str(value)) for name, value in training.get("data", {}).items()]
    if trainings:
        versions = trainings[-1].get("versions", {})
        facts.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    facts.append(("Fingerprint", encoder.fingerprint))
    told = ["## Training", _table(["", ""], facts)]
    if not trainings:
        told.append("No run of pt_dance that gave these weights is known.")
    told += ["\n".join(f"- {_line(text)}" for text in training.get("rounds", [])) for training in trainings]
    rows = {
        split: values for training in trainings[-1:] for split, values in training.get("measures", {}).items() if values
    }
    rows |= {split: dict(values) for split, values in (measures or {}).items()}
    if rows:
        names = list(dict.fromkeys(name for values in rows.values() for name in values))
        table = [(split, *(_value(values.get(name)) for name in names)) for split, values in rows.items()]
        told += ["## Results", _table(["split", *names], table)]
        if any("validation" in training.get("measures", {}) for training in trainings[-1:]):
            told.append("The validation topics chose the round, so their values are a little optimistic.")
    return [text for text in told if text]


def _kind(encoder: Any) -> str:
    towers = "two towers" if encoder.has_two_towers else "one tower"
    made = "static token embeddings" if encoder.is_static else "a transformer"
    return (
        f"A dense retriever's encoder: {towers}, {made}, vectors of {encoder.dim} numbers, compared by "
        f"{'cosine' if encoder.similarity == 'cosine' else 'dot product'}."
    )


def _licence_in_words(bases: list[dict], given: str | None) -> str:
    told = [f"`{given}`."] if given else []
    for base in bases:
        name = base.get("model") or base["name"]
        told.append(
            f"The base model {name} is " + (f"`{known}`." if (known := base.get("license")) else "of unknown licence.")
        )
    return " ".join(told) or "None was given."


def _value(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"


def _line(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _table(head: list[str], rows: list[tuple]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_line(cell) for cell in line) + " |" for line in lines)
