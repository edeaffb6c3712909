"""Publish an encoder as a model repository on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyterrier as pt
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError

from pt_dance.encoder.card import artifact_card, model_card
from pt_dance.storage.options import path_of


def push(
    encoder: Any,
    repo: str,
    *,
    data: str | None = None,
    measures: Mapping[str, Mapping[str, float]] | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload an encoder as a sentence-transformers repository, with a model card written from what trained it.

    ``SentenceTransformer(repo)`` and ``DualEncoder(repo)`` open it. The card says base model, data, recipe, measures
    with their splits, the base model's licence and what to cite; the base model's own card is not copied.

    Args:
        encoder: The ``DualEncoder``; ``dance.encoder`` knows of its run.
        repo: ``owner/name``; made if it is not there, else files of the same names are replaced in a new commit.
        data: What it was trained on, for the card, e.g. ``"MedQuAD, train split"``.
        measures: Measures to show beside those of the validation topics, by split: ``{"test": {"nDCG@10": 0.5}}``.
        license: The model's licence; that of the base model when ``None``.
        private: Whether a new repository is private; what the owner's settings say when ``None``.
        token: For the hub; that of ``hf auth login`` or ``HF_TOKEN`` when ``None``.
        endpoint: Address of the hub; ``HF_ENDPOINT`` or huggingface.co when ``None``.

    Returns:
        The repository's address.

    Raises:
        ValueError: If ``repo`` is no name of a repository.
        OSError: If the hub cannot be reached, or refuses.
    """
    api = HfApi(endpoint=endpoint, token=token)
    with _one_line(repo, api.endpoint):
        address = api.create_repo(repo, private=private, exist_ok=True)
    repo = address.repo_id
    with tempfile.TemporaryDirectory() as folder:
        encoder.write(Path(folder))
        card = model_card(encoder, repo, data=data, measures=measures, license=license)
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")
        with _one_line(repo, api.endpoint):
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add a pt_dance encoder")
    return str(address)


def build_package(encoder: Any, package_path: str | None = None, **options: Any) -> str:
    """Package an encoder as it is now, saved or not; see :meth:`pyterrier.Artifact.build_package`."""
    if package_path is None:
        if not isinstance(encoder.path, Path):
            raise ValueError("say where to write the package: this encoder has not been saved to a folder")
        package_path = f"{encoder.path}.tar.lz4"
    with tempfile.TemporaryDirectory() as folder:
        encoder.write(Path(folder))
        return pt.Artifact(folder).build_package(str(path_of(package_path, "package_path")), **options)


def artifact_readme(encoder: Any, *, repo: str, branch: str | None = "main", metadata: Any = None, **_: Any) -> str:
    """Write the card of the artifact that ``encoder.to_hf`` uploads."""
    load = f"encoder = pt.Artifact.from_hf({repo if branch in (None, 'main') else f'{repo}@{branch}'!r})"
    return artifact_card(encoder, repo.rsplit("/", 1)[-1], load, metadata or {})


@contextlib.contextmanager
def _one_line(repo: str, endpoint: str) -> Iterator[None]:
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is no name of a repository, such as 'owner/name': {_first(error)}") from error
    except (HTTPError, OSError, RuntimeError) as error:  # hf_xet, which sends large files, has only built-in errors
        raise OSError(f"{repo!r} could not be published on {endpoint}: {_first(error)}") from error


def _first(error: Exception) -> str:
    said = getattr(error, "server_message", None) or str(error)
    return (said.strip() or type(error).__name__).splitlines()[0].rstrip(".")
