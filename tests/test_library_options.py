"""What sentence-transformers and transformers offer stays reachable from a recipe: LoRA, frozen layers, bf16, gradient
accumulation, schedulers, weight decay, loggers, prompts."""

from __future__ import annotations

import csv
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers.trainer
from sentence_transformers import SentenceTransformer
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from pt_dance import Corpus, DanceRetriever, DualEncoder, Round, losses, recipes
from pt_dance.recipes import current_model
from pt_dance.training.history import training_row
from pt_dance.training.reporting import Reports
from pt_dance.training.run_folder import RunFolder
from small_collection import standard_library
from small_models import small_bert

TOPICS = 64
BATCH = 16


class Small:
    """Docstrings as documents, some of their queries, and a small BERT on disk."""

    def __init__(self, folder):
        collection = standard_library()
        # queries with one relevant document each, so that there are as many pairs as queries
        single = collection.qrels.drop_duplicates("qid", keep=False)
        self.topics = collection.topics[collection.topics["qid"].isin(single["qid"])]
        self.topics = self.topics.drop_duplicates("query").head(TOPICS)
        self.topics = self.topics.sort_values("qid").reset_index(drop=True)
        self.queries = self.topics["query"].to_numpy()  # in the order in which training rows number them
        self.qrels = single[single["qid"].isin(self.topics["qid"])].reset_index(drop=True)
        assert len(self.topics) == len(self.qrels) == TOPICS
        documents = collection.documents.assign(text=collection.documents["text"].str.slice(0, 200))
        self.texts = documents["text"].tolist()
        self.corpus = Corpus.build(documents, folder / "corpus", verbose=False)
        self.bert = small_bert([*self.texts, *self.topics["query"]], folder)

    def fit(self, path, encoder, recipe):
        dance = DanceRetriever(encoder, self.corpus, path, recipe=recipe, verbose=False)
        return dance.fit(self.topics, self.qrels)

    def mnrl(self, rounds=1, **options):
        options = {"negatives": None, "batch_size": BATCH, "learning_rate": 1e-3, **options}
        return recipes.mnrl(**options) * rounds


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Small(tmp_path_factory.mktemp("small"))


def weights(encoder):
    return {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}


def changed(before, after):
    """Names of the weights that are not the same bits any more."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- adapters and frozen layers --------------------------------------------------------------------------------------


def with_adapter(path):
    peft = pytest.importorskip("peft", reason="LoRA needs peft (pip install 'pt_dance[lora]')")
    model = SentenceTransformer(path, device="cpu")
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=16, target_modules=["query", "value"], lora_dropout=0.1))
    return DualEncoder(model)


def test_lora_trains_the_adapter_alone(small, tmp_path):
    encoder = with_adapter(small.bert)
    start = weights(encoder)
    adapter = {name for name in start if "lora_" in name}
    assert len(adapter) == 8  # A and B, of query and value, in two layers
    dance = small.fit(tmp_path / "run", encoder, small.mnrl())
    assert changed(start, weights(encoder)) == set(), "the encoder that was given must stay as it is"
    assert changed(start, weights(dance.encoder)) == adapter
    assert not np.allclose(dance.encoder.encode_docs(small.texts[:4]), encoder.encode_docs(small.texts[:4]), atol=1e-3)


def test_a_saved_encoder_with_an_adapter_loads_to_the_same_vectors(small, tmp_path):
    encoder = with_adapter(small.bert)
    with torch.no_grad():
        for name, parameter in encoder.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    vectors = encoder.encode_docs(small.texts)
    encoder.save(tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("*.bin"))
    loaded = DualEncoder.load(tmp_path / "saved")
    np.testing.assert_array_equal(loaded.encode_docs(small.texts), vectors)
    assert loaded.fingerprint == encoder.fingerprint
    assert np.abs(vectors - DualEncoder(small.bert).encode_docs(small.texts)).max() > 0.01


def test_a_round_with_an_adapter_loads_to_the_vectors_of_its_index(small, tmp_path):
    dance = small.fit(tmp_path / "run", with_adapter(small.bert), small.mnrl())
    folder = RunFolder(dance.path).round(1) / "encoder"
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    rows = np.arange(len(small.corpus))
    indexed = dance.index.np_vecs()[dance.index.known_rows(small.corpus.docno(rows).tolist())]
    found = DualEncoder.load(folder).encode_docs(small.corpus.texts_at(rows))
    np.testing.assert_allclose(found, indexed, rtol=0, atol=1e-6)
    loaded = DanceRetriever.load(dance.path)
    assert loaded(small.topics)["docno"].tolist() == dance(small.topics)["docno"].tolist()


def test_every_round_trains_the_adapter_and_nothing_else(small, tmp_path):
    encoder = with_adapter(small.bert)
    dance = small.fit(tmp_path / "run", encoder, small.mnrl(rounds=2))
    rounds = [weights(dance.retriever(round=number).index.encoder) for number in (0, 1, 2)]
    adapter = {name for name in rounds[0] if "lora_" in name}
    assert changed(rounds[0], rounds[1]) == adapter
    assert changed(rounds[1], rounds[2]) == adapter


def test_layers_that_are_frozen_stay_so_in_every_round(small, tmp_path):
    encoder = DualEncoder(small.bert, device="cpu")
    frozen = {name for name, _ in encoder.model.named_parameters() if ".embeddings." in name}
    assert frozen
    for name, parameter in encoder.model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    dance = small.fit(tmp_path / "run", encoder, small.mnrl(rounds=2))
    rounds = [weights(dance.retriever(round=number).index.encoder) for number in (0, 1, 2)]
    for before, after in itertools.pairwise(rounds):
        found = changed(before, after)
        assert found and not found & frozen


# --- the trainer's arguments -----------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """What the trainer does, as its own callbacks are told."""

    def __init__(self):
        self.rates, self.micro_steps = [], 0

    def on_train_begin(self, args, state, control, optimizer=None, **_):
        self.arguments = args
        self.groups = [
            (group["weight_decay"], {parameter.ndim for parameter in group["params"]})
            for group in optimizer.param_groups
        ]

    def on_substep_end(self, *_, **__):
        self.micro_steps += 1

    def on_step_end(self, args, state, control, lr_scheduler=None, **_):
        self.micro_steps += 1
        self.rates.append(lr_scheduler.get_last_lr()[0])


@pytest.fixture
def watch(monkeypatch):
    watch = Watch()
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, watch])
    return watch


def test_accumulation_decay_and_scheduler_reach_the_trainer(small, tmp_path, watch):
    options = dict(warmup=0.25, scheduler="cosine", epochs=4)
    arguments = {"gradient_accumulation_steps": 2, "weight_decay": 0.03}
    dance = small.fit(tmp_path / "run", DualEncoder(small.bert), small.mnrl(training_arguments=arguments, **options))
    micro_steps = 4 * TOPICS // BATCH
    assert watch.micro_steps == micro_steps
    steps = micro_steps // 2
    assert len(watch.rates) == steps == dance.history["steps"].iloc[1]
    warm = steps // 4
    expected = [
        step / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
        for step in range(1, steps + 1)
    ]
    assert watch.rates == pytest.approx([1e-3 * share for share in expected], abs=1e-9)
    # biases and the gains of layer norms, which are vectors, are not decayed
    assert sorted(watch.groups) == [(0.0, {1}), (0.03, {2})]


def test_accumulated_gradients_are_those_of_both_batches(small, tmp_path, watch):
    """One step of plain gradient descent over all batches gives the mean of their gradients, applied once."""
    encoder = DualEncoder(small.bert, device="cpu")
    without_dropout(encoder.model)
    rate, seen = 0.5, []
    arguments = {"gradient_accumulation_steps": 4, "optim": "sgd", "max_grad_norm": 0.0}
    recipe = small.mnrl(
        training_arguments=arguments, learning_rate=rate, warmup=0.0, scheduler="constant", temperature=0.1
    )
    with pytest.MonkeyPatch.context() as patch:
        original = losses.ContrastiveLoss.loss_of
        patch.setattr(
            losses.ContrastiveLoss, "loss_of", lambda loss, batch: seen.append(batch) or original(loss, batch)
        )
        dance = small.fit(tmp_path / "run", encoder, recipe)
    seen = seen[1:]  # before training the loss is asked once whether there is anything to learn from
    assert dance.history["steps"].iloc[1] == 1 and len(seen) == 4
    model = encoder.copy().model.train()
    for batch in seen:
        rows = batch.rows.rows
        numbers = batch.rows.numbers
        queries = small.queries[rows.query[numbers]].tolist()
        texts = small.corpus.texts_at(rows.positive[numbers])
        loss = losses.ContrastiveLoss(model, temperature=0.1, rows=rows)
        (loss([model.preprocess(queries), model.preprocess(texts)], torch.from_numpy(numbers)) / 4).backward()
    trained = dict(dance.encoder.model.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(trained[name], parameter - rate * parameter.grad, rtol=1e-4, atol=1e-6)


def test_bfloat16_trains_under_autocast(small, tmp_path, monkeypatch):
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2))
    except RuntimeError as error:
        pytest.skip(f"this CPU cannot compute in bfloat16: {error}")
    seen = set()
    original = losses.ContrastiveLoss.forward

    def forward(loss, features, labels=None):
        linear = next(module for module in loss.model.modules() if isinstance(module, torch.nn.Linear))
        hook = linear.register_forward_hook(lambda module, _, output: seen.add((module.weight.dtype, output.dtype)))
        try:
            return original(loss, features, labels)
        finally:
            hook.remove()

    monkeypatch.setattr(losses.ContrastiveLoss, "forward", forward)
    encoder = DualEncoder(small.bert)
    dance = small.fit(tmp_path / "bf16", encoder, small.mnrl(training_arguments={"bf16": True}))
    assert seen == {(torch.float32, torch.bfloat16)}
    assert {tensor.dtype for tensor in weights(dance.encoder).values() if tensor.is_floating_point()} == {torch.float32}
    assert dance.history["training_loss"].iloc[1] > 0 and changed(weights(encoder), weights(dance.encoder))
    seen.clear()
    small.fit(tmp_path / "fp32", encoder, small.mnrl())
    assert seen == {(torch.float32, torch.float32)}


# --- loggers ---------------------------------------------------------------------------------------------------------


def test_a_logger_of_ones_own_is_reached_by_its_name(small, tmp_path, monkeypatch):
    file = tmp_path / "log.csv"

    class CsvLogger(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs:
                with file.open("a", newline="") as out:
                    csv.writer(out).writerow([state.global_step, logs["loss"], logs["learning_rate"]])

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "csv", CsvLogger)
    arguments = {"report_to": "csv", "logging_steps": 1}
    dance = small.fit(tmp_path / "run", DualEncoder(small.bert), small.mnrl(training_arguments=arguments))
    rows = [tuple(map(float, row)) for row in csv.reader(file.open(newline=""))]
    assert [step for step, _, _ in rows] == [1, 2, 3, 4]
    assert np.mean([loss for _, loss, _ in rows]) == pytest.approx(dance.history["training_loss"].iloc[1], rel=1e-3)
    file.unlink()
    small.fit(tmp_path / "silent", DualEncoder(small.bert), small.mnrl())
    assert not file.exists()


def test_a_logger_hears_of_what_a_refresher_measured_at_its_steps(tmp_path, monkeypatch):
    heard = []

    class Listener(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            heard.append((state.global_step, logs))

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "listener", Listener)
    round_ = Round(training_arguments={"report_to": "listener"})
    reports = Reports(tmp_path, [round_], ["RR"])
    reports.of_round(round_, 0)[0].on_train_begin(SimpleNamespace(), TrainerState(), TrainerControl())
    measured = [{"step": 6, "RR": 0.25}, {"step": 12, "RR": 0.5}]
    settled = {"learning_rate": 0.01, "similarity": "cosine", "temperature of contrastive": 0.05, "teacher_scale": 2.0}
    trained = {"loss": 1.0, "steps": 20, "settled": settled, "refreshed": {"staleness": 7, "measured_beside": measured}}
    row = training_row(2, round_, trained, {"per_source": 3.0}, {}, {"train": 4.0}) | {"RR": 0.75}
    row["recipe_round"] = 1
    reports.add_round(row, 50)
    of_round = {"round": 2, "staleness": 7, "train_seconds": 4.0, "eval_RR": 0.75, "mining/negatives_per_query": 3.0}
    of_round |= {"mining/queries_short_of_negatives": 0, "mining/query_negatives_per_document": 0.0}
    assert heard == [(36, {"eval_RR": 0.25}), (42, {"eval_RR": 0.5}), (50, of_round)]


def events(folder):
    """The scalars of a run by their tags: (step, value) in the order in which they were written."""
    found = {}
    files = sorted(folder.rglob("events.out.tfevents.*"))
    for file in files:
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.HasField("tensor") and value.tensor.float_val:
                    found.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return files, found


@pytest.mark.parametrize("carry", [True, False])
def test_tensorboard_gets_one_run_with_steps_that_go_on_over_rounds(small, tmp_path, monkeypatch, carry):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    arguments = {"report_to": ["tensorboard"], "logging_steps": 1}
    round_ = Round(
        negatives=current_model, depth=20, negatives_per_query=5, carry_optimizer=carry, batch_size=BATCH,
        learning_rate=1e-3, training_arguments=arguments,
    )  # fmt: skip
    encoder = DualEncoder.static(small.texts, dim=16, vocab_size=500)
    dance = DanceRetriever(encoder, small.corpus, tmp_path / "run", recipe=[round_] * 3, verbose=False)
    dance.fit(small.topics, small.qrels, small.topics.head(20), small.qrels)
    files, found = events(tmp_path / "run" / "logs")
    assert len(files) == 1 and not list((tmp_path / "run" / "rounds").rglob("events.*"))
    history, each = dance.history, TOPICS // BATCH
    assert [step for step, _ in found["train/loss"]] == list(range(1, 3 * each + 1))
    for number in (1, 2, 3):
        losses_of_round = [value for step, value in found["train/loss"] if (number - 1) * each < step <= number * each]
        assert np.mean(losses_of_round) == pytest.approx(history["training_loss"][number], rel=1e-3)
    steps = [0, each, 2 * each, 3 * each]
    for tag, column in (("eval/nDCG@10", "nDCG@10"), ("train/mining/negatives_per_query", "negatives_per_query")):
        values = history[column] if column == "nDCG@10" else history[column][1:]
        assert [step for step, _ in found[tag]] == steps[4 - len(values) :], found.keys()
        assert [value for _, value in found[tag]] == pytest.approx(values.tolist())
    assert [value for _, value in found["train/mining/new_negatives"]] == pytest.approx(history["new_negatives"][2:])
    rates = [value for _, value in found["train/learning_rate"]]
    assert rates.count(0.0) == (1 if carry else 3), "a schedule of a round's own begins anew, a shared one goes on"


def test_a_fit_that_goes_on_writes_on_into_the_same_folder(small, tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    recipe = small.mnrl(rounds=2, training_arguments={"report_to": "tensorboard", "logging_steps": 1})
    encoder = DualEncoder.static(small.texts, dim=16, vocab_size=500)

    finish = RunFolder.finish

    def killed(run, number, row):
        if number == 2:
            raise KeyboardInterrupt
        finish(run, number, row)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "finish", killed)
        small.fit(tmp_path / "run", encoder, recipe)
    small.fit(tmp_path / "run", encoder, recipe)
    _, found = events(tmp_path / "run" / "logs")
    each = TOPICS // BATCH
    assert [step for step, _ in found["train/loss"]] == list(range(1, 2 * each + 1))


def test_an_unknown_logger_gives_one_plain_error(small, tmp_path):
    with pytest.raises(ValueError, match="surely_not") as error:
        small.fit(tmp_path / "run", DualEncoder(small.bert), small.mnrl(training_arguments={"report_to": "surely_not"}))
    assert "\n" not in str(error.value)


def test_a_logger_that_is_not_installed_gives_one_plain_error_before_any_work(small, tmp_path, monkeypatch):
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    with pytest.raises(ValueError, match=r"report_to: TensorBoardCallback cannot be used.*install") as error:
        small.fit(
            tmp_path / "run", DualEncoder(small.bert), small.mnrl(training_arguments={"report_to": "tensorboard"})
        )
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


# --- prompts ---------------------------------------------------------------------------------------------------------

PROMPTS = {"query": "find this: ", "document": "a text: "}


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def encoder_with_prompts(kind, small):
    if kind == "transformer":
        encoder = DualEncoder(SentenceTransformer(small.bert, prompts=PROMPTS, device="cpu"))
        without_dropout(encoder.model)
        return encoder
    towers = [DualEncoder.static(small.texts, dim=16, vocab_size=400, seed=seed) for seed in (1, 2)]
    encoder = towers[0] if kind == "static" else DualEncoder.two_towers(*towers)
    encoder.model.prompts.update(PROMPTS)
    return encoder


@pytest.mark.parametrize("kind", ["transformer", "static", "two static towers"])
def test_training_reads_texts_with_the_prompts_of_encoding(small, tmp_path, monkeypatch, kind):
    encoder = encoder_with_prompts(kind, small)
    columns, batches = [], []
    embed, loss_of = losses.RetrievalLoss._embed, losses.ContrastiveLoss.loss_of
    monkeypatch.setattr(
        losses.RetrievalLoss, "_embed", lambda loss, features: columns.append(features) or embed(loss, features)
    )
    # before training the loss is asked, with other vectors, whether there is anything to learn from
    monkeypatch.setattr(
        losses.ContrastiveLoss,
        "loss_of",
        lambda loss, batch: (batches.append(batch) if columns else None) or loss_of(loss, batch),
    )
    round_ = Round(
        loss_options={"dual": True, "dual_weight": 1.0}, negatives=current_model, query_negatives="dense",
        negatives_per_query=4, depth=10, negatives_per_row=2, batch_size=BATCH,
    )  # fmt: skip
    small.fit(tmp_path / "run", encoder, round_)

    # the token ids of the first batch, column by column
    for number, features in enumerate(columns[0]):
        task = "query" if number in (0, 4) else "document"
        tower = encoder.model[0]
        tower = tower.sub_modules[task][0] if kind.startswith("two") else tower
        if kind == "transformer":
            prompt = tower.tokenizer(PROMPTS[task].strip())["input_ids"][:-1]  # [CLS] and the prompt's own
            found = [row[: len(prompt)] for row in features["input_ids"].tolist()]
        else:
            prompt = tower.tokenizer.encode(PROMPTS[task].strip(), add_special_tokens=False).ids
            ids, starts = features["input_ids"].tolist(), features["offsets"].tolist()
            found = [ids[start : start + len(prompt)] for start in starts]
        assert len(prompt) > 2 and len(found) == BATCH
        assert all(start == prompt for start in found)
    assert len(columns[0]) == 5  # query, positive, two mined documents, one mined query

    # and the vectors, which are those the encoder would give before the first step
    batch = batches[0]
    rows, numbers = batch.rows.rows, batch.rows.numbers
    found_of = {
        "query": [
            (batch.queries, rows.query[numbers]),
            (batch.query_negatives[:, 0], rows.query_negatives[numbers, 0]),
        ],
        "document": [
            (batch.positives, rows.positive[numbers]),
            *((batch.negatives[:, i], rows.negatives[numbers, i]) for i in range(2)),
        ],
    }
    for task, parts in found_of.items():
        for vectors, texts in parts:
            real = texts >= 0
            assert real.sum() > BATCH // 2
            if task == "query":
                expected = encoder.encode_queries(small.queries[texts[real]].tolist())
            else:
                expected = encoder.encode_docs(small.corpus.texts_at(texts[real]))
            np.testing.assert_allclose(vectors.detach().numpy()[real], expected, rtol=0, atol=1e-5)
    bare, queries = encoder.copy(), small.queries.tolist()
    bare.model.prompts = {}
    assert np.abs(bare.encode_queries(queries) - encoder.encode_queries(queries)).max() > 1e-2
