"""Several GPUs: each process encodes and searches on its own. Where there is none, CUDA's answers are pretended."""

from __future__ import annotations

from types import SimpleNamespace

import dill
import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder

from pt_dance import CrossEncoderScorer, DualEncoder
from pt_dance.engines import ranks, sending
from pt_dance.engines.worker import Workplace
from pt_dance.index import parts
from pt_dance.retriever.search import exact
from pt_dance.storage import devices
from pt_dance.training.refresh.beside import _written
from small_models import small_bert

TEXTS = ["a list of numbers", "the length of a text", "open a file"]


@pytest.fixture
def four_gpus(monkeypatch):
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 4, current_device=lambda: 2)
    monkeypatch.setattr(devices, "torch", SimpleNamespace(cuda=cuda))
    return cuda


@pytest.mark.parametrize(
    ("surroundings", "device"),
    [
        ({}, "cuda:2"),
        ({"LOCAL_RANK": "1"}, "cuda:2"),  # of one process alone nothing is dealt out
        ({"WORLD_SIZE": "8", "RANK": "7", "LOCAL_RANK": "3"}, "cuda:3"),
        ({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "5"}, "cuda:1"),
        ({"WORLD_SIZE": "8"}, "cuda:2"),
    ],
)
def test_a_process_has_the_gpu_that_accelerate_gives_it(four_gpus, monkeypatch, surroundings, device):
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    assert devices.own_device() == device
    four_gpus.is_available = lambda: False
    assert devices.own_device() == "cpu"


@pytest.fixture
def models(tmp_path):
    encoder = DualEncoder(small_bert(TEXTS, tmp_path), device="cpu", max_length=32)
    return encoder, CrossEncoderScorer(CrossEncoder(str(tmp_path / "bert"), num_labels=1, device="cpu"))


@pytest.fixture
def arrived(models, monkeypatch):
    """Where the models' weights go when they are sent: those of this process stand for some of a GPU."""
    on_gpu = {t.data_ptr() for m in models for t in (*m.model.parameters(), *m.model.buffers())}
    places = []

    def to(tensor, place):
        places.append(place)
        return tensor

    monkeypatch.setattr(sending, "_is_on_gpu", lambda tensor: tensor.data_ptr() in on_gpu)
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "to", to)
    yield places
    assert len(places) >= len(on_gpu)


def test_models_that_are_sent_go_to_the_gpu_of_the_process_of_the_job_that_gets_them(
    four_gpus, models, arrived, monkeypatch
):
    """Not to that of the process that sent them: a negative source or a teacher that is asked in all of them."""
    told, place = [], Workplace()
    engine = ranks.Ranks(2, None, told.append, lambda: [ranks.serve(place, 1, told[-1])])

    def answer(task):
        return task, [model.fingerprint for model in models]

    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    mine, others = engine.map(lambda: answer, ["mine", "other's"], "the source")
    assert mine == answer("mine") and others == answer("other's")
    assert set(arrived) == {"cuda:1"}


def test_models_of_a_refresher_go_to_its_gpu(four_gpus, models, arrived):
    with _written(models, "round 1") as given:
        got = dill.load(given)
    assert [model.fingerprint for model in got] == [model.fingerprint for model in models]
    assert all(
        a.requires_grad == b.requires_grad
        for a, b in zip(*(m[0].model.parameters() for m in (got, models)), strict=True)
    )
    assert set(arrived) == {"cuda:2"}


def test_what_is_on_no_gpu_stays_on_none(four_gpus, models):
    models[0].model.requires_grad_(False)
    got = dill.loads(sending.dumps(models[0]))
    assert str(got.device) == "cpu" and got.fingerprint == models[0].fingerprint
    assert not any(parameter.requires_grad for parameter in got.model.parameters())


class OnGpu:
    """An encoder that only says where it is."""

    def __init__(self, device):
        self.device, self.went = torch.device(device), []
        self.model = SimpleNamespace(to=self.went.append)

    def copy(self):
        return OnGpu(self.device)


def test_parts_of_an_index_are_encoded_on_the_workers_own_gpu(four_gpus, monkeypatch, tmp_path):
    for asked, there, went in (
        (None, "cpu", ["cuda:2"]), (None, "cuda:0", ["cuda:2"]), (None, "cuda:2", []), ("cpu", "cuda:2", ["cpu"]),
        ("cpu", "cpu", []), ("cuda", "cuda:1", []), ("cuda:0", "cuda:1", ["cuda:0"]), ("cuda", "cpu", ["cuda"]),
    ):  # fmt: skip
        writer = parts.PartWriter(tmp_path, "key", None, OnGpu(there), asked, {})
        writer()
        assert writer.encoder.went == went, (asked, there)


def test_vectors_are_searched_on_the_process_s_own_gpu_unless_the_index_says_where(four_gpus, monkeypatch):
    monkeypatch.setattr(exact, "TensorVectors", lambda docs, device: str(device))
    vectors = np.eye(3, dtype=np.float32)
    assert exact.open_vectors(vectors) == "cuda:2"
    assert exact.open_vectors(vectors, "cuda:3") == "cuda:3"
    assert isinstance(exact.open_vectors(vectors, "cpu"), exact.Vectors)
