"""How objects look in a notebook: what a reader needs, and every text as text."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pyterrier as pt
import pytest

from pt_dance import Corpus, DanceRetriever, DualEncoder, Round, mining, recipes
from pt_dance.analysis.words import recipe_in_words
from pt_dance.training.round_table import recipe_table, round_settings
from small_collection import standard_library


def cells(html: str) -> list[str]:
    return [re.sub("<[^>]+>", "", cell) for cell in re.findall("<t[hd][^>]*>(.*?)</t[hd]>", html, flags=re.S)]


@pytest.fixture(scope="module")
def encoder():
    return DualEncoder.static(list(standard_library().documents["text"]), dim=8, vocab_size=300)


def test_encoder(encoder):
    shown = cells(encoder._repr_html_())
    told = dict(zip(shown[::2], shown[1::2], strict=True))
    assert told["towers"] == "one (static)" and told["dimensions"] == "8" and told["similarity"] == encoder.similarity
    assert told["parameters"] == f"{sum(p.numel() for p in encoder.model.parameters()):,}"
    assert told["fingerprint"] == encoder.fingerprint


def test_corpus_shows_its_first_documents_as_text(tmp_path):
    documents = [{"docno": f"<b>{i}", "text": "<script>alert(1)</script>" + "x" * 1_000_000} for i in range(9)]
    corpus = Corpus.build(documents, tmp_path / "corpus", fields=["text"], verbose=False)
    shown = corpus._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;" in shown and len(shown) < 5000
    assert "9" in cells(shown) and "&lt;b&gt;2" in cells(shown) and "&lt;b&gt;3" not in cells(shown)


def test_round_reads_like_the_settings_of_a_paper():
    dual = recipes.dance(learning_rate=5e-6)[-1]
    told = round_settings(dual)
    assert told["loss"].startswith("contrastive (dual True") and told["starts from"] == "the best round so far"
    assert told["negatives"] == "current model" and told["query negatives"] == "dense"
    assert told["drawn from"] == "uniformly from the top 200"
    assert told["learning rate"] == "5e-06" and told["batch size"] == str(dual.batch_size)
    assert cells(dual._repr_html_())[:4] == ["starts from", told["starts from"], "loss", told["loss"]]
    changed = replace(dual, steps=7, rank_range=(10, 50), filters=[mining.RankRange(1, 9)], share_of_queries=0.2)
    told = round_settings(changed)
    assert "starts from" not in round_settings(Round())
    assert told["length"] == "7 steps" and told["drawn from"].endswith("ranks 10 to 49")
    assert told["filters"] == "RankRange(first=1, last=9)" and told["queries"] == "20% in turn"
    alone = round_settings(Round(negatives=None))
    assert alone["negatives"] == "the batch's only" and "drawn from" not in alone and "query negatives" not in alone


def test_every_option_of_a_round_is_in_the_table():
    """An option that is added to Round is added to the table."""
    shown = {
        "loss", "loss_options", "negatives", "query_negatives", "depth", "rank_range", "sampling",
        "negatives_per_query", "negatives_per_row", "query_negatives_per_row", "filters", "share_of_queries", "teacher",
        "start", "epochs", "steps", "carry_optimizer", "refresh_every", "max_staleness",
        "batch_size", "learning_rate", "warmup", "scheduler", "similarity",
        "training_arguments", "name",
    }  # fmt: skip
    left_out = {"checkpoint_steps"}  # changes nothing in what is trained
    assert set(Round.__dataclass_fields__) == shown | left_out


def test_recipe_is_a_table_with_a_column_a_round():
    recipe = recipes.dance()
    shown = recipe_table(recipe)
    rows = re.findall("<tr>(.*?)</tr>", shown)
    assert [len(cells(row)) for row in rows] == [len(recipe) + 1] * len(rows)
    assert cells(rows[0])[1] == f"round 1: {recipe[0].name}"
    by_name = {cells(row)[0]: cells(row)[1:] for row in rows[1:]}
    assert by_name["query negatives"][0] == "–" and by_name["query negatives"][-1] == "dense"


def test_retriever_before_and_after_fit(encoder, tmp_path):
    collection = standard_library()
    recipe = recipes.mnrl(1, batch_size=32, name="<u>warm</u>")
    dance = DanceRetriever(encoder, collection, tmp_path / "run", recipe=recipe, verbose=False)
    before = dance._repr_html_()
    assert "not trained yet" in before and "round 1: &lt;u&gt;warm&lt;/u&gt;" in before and "<u>" not in before
    assert "DanceRetriever" in before and "repr_html" in before  # the schematic
    assert not (tmp_path / "run" / "rounds").exists()  # looking at it makes no index
    dance.fit(collection.topics, collection.qrels, collection.topics.head(20), collection.qrels)
    after = dance._repr_html_()
    assert "not trained yet" not in after
    assert f"{dance.history['nDCG@10'].iloc[-1]:.4g}" in after


def test_what_a_round_chose_is_among_its_settings(encoder, tmp_path):
    """What a round left open is in the history, the folder's settings, their words, and the notebook's table."""
    collection = standard_library()
    teacher = pt.apply.doc_score(lambda row: 50.0 * len(set(row["query"].split()) & set(row["text"].split())))
    recipe = [*recipes.mnrl(batch_size=32), *recipes.distill_kl(teacher, learning_rate=0.001, batch_size=32)]
    dance = DanceRetriever(encoder.with_similarity("dot"), collection, tmp_path / "run", recipe=recipe, verbose=False)
    first_stage = (DanceRetriever(encoder, collection, tmp_path / "first", verbose=False) % 20)(collection.topics)
    dance.fit(first_stage, collection.qrels)
    rows = dance.history.iloc[1:]
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    words = recipe_in_words(settings)
    by_name = {cells(row)[0]: cells(row)[1:] for row in re.findall("<tr>(.*?)</tr>", dance._repr_html_())}
    for place, (text, (number, row)) in enumerate(zip(words, rows.iterrows(), strict=True)):
        chosen = {name: row[name] for name in ("learning_rate", "similarity", "temperature")}
        assert row["similarity"] == "dot" and 0 < row["temperature"] != recipe[place].loss_options.get("temperature")
        if place:
            chosen["teacher_scale"] = row["teacher_scale"]
            assert row["teacher_scale"] > 50 and f"teacher scale {row['teacher_scale']:.4g}" in text
            assert by_name["teacher scale"] == ["–", f"{row['teacher_scale']:.4g}"]
        assert settings[f"round {number} chosen"] == chosen
        assert f"learning rate {row['learning_rate']:g}" in text and f"temperature {row['temperature']:.4g}" in text
        assert by_name["temperature"][place] == f"{row['temperature']:.4g}"
    assert by_name["learning rate"] == [f"{rows['learning_rate'].iloc[0]:g}, as suits the encoder", "0.001"]
    again = DanceRetriever(encoder.with_similarity("dot"), collection, tmp_path / "run", recipe=recipe, verbose=False)
    again.fit(first_stage, collection.qrels)  # what was chosen is no other setting
    assert again.history.equals(dance.history)
