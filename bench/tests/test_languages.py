"""bench.studies.languages: the rivals of learned shares, what is chosen, and what is stored."""

import numpy as np
import pytest
import torch
from datasets import write_treebanks
from tools import flat

import metapt
from bench.stored import load_json
from bench.studies import languages
from data_scripts import ud

TARGET = "Alpha-One"
SMALL = {
    "target_sentences": 20,
    "validation_sentences": 10,
    "per_source": 30,
    "buckets": 64,
    "embedding": 4,
    "width": 6,
    "steps": 12,
    "warmup": 4,
    "meta_every": 4,
    "batch_size": 8,
    "meta_batch_size": 12,
    "measure_steps": 8,
}
# Twelve sentences are too few for CG at the preset's damping.
LEARNING = {"solver": "identity", "damping": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prepared treebanks of four made-up languages."""
    folder = tmp_path_factory.mktemp("languages")
    write_treebanks(folder / "treebanks")
    (folder / "ud").mkdir()
    ud.prepare(folder / "treebanks", folder / "ud" / "prepared")
    return folder


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The study in small, with results in a folder of their own."""
    make = languages.make_domain

    def make_small(data, target, seed, **given):
        return make(data, target, seed, **{**SMALL, **given})

    monkeypatch.setattr(languages, "make_domain", make_small)
    monkeypatch.setattr(languages, "RESULTS", tmp_path)
    monkeypatch.setitem(languages.SETTINGS, "default", LEARNING)
    monkeypatch.setitem(languages.RELATED, "Alpha", "Gamma")
    monkeypatch.setattr(languages, "FEW", 2)
    monkeypatch.setattr(languages, "SEARCHED", 3)
    return tmp_path


def shares_of(cell, phi) -> dict[str, float]:
    meta = cell.domain.meta()
    meta.load_state_dict(phi)
    return cell.domain.measure(meta)


def test_the_choice_by_hand_is_of_the_related_languages(small, data):
    cell = languages.Cell(data, TARGET, 0)
    shares = shares_of(cell, cell.phi("hand", "default", 0.0))
    assert shares == pytest.approx({"Beta-One": 0, "Gamma-One": 1, "Omega-One": 0}, abs=1e-6)


@pytest.mark.parametrize("method", ["overlap", "tagger"])
def test_rules_give_the_best_sources_equal_shares(small, data, method):
    cell = languages.Cell(data, TARGET, 0)
    shares = shares_of(cell, cell.phi(method, "default", 0.0))
    assert sorted(shares.values()) == pytest.approx([0, 0.5, 0.5], abs=1e-6)


def test_the_overlap_is_in_groups_of_three_letters(small, data):
    cell = languages.Cell(data, TARGET, 0)
    domain = cell.domain
    wanted = languages.trigrams(domain, domain.rows["finetune"])
    common = {}
    for source, name in enumerate(domain.sources):
        rows = languages.rows_of_source(domain, source)
        assert len(rows) == domain.count[source]
        common[name] = len(wanted & languages.trigrams(domain, rows))
    shares = shares_of(cell, cell.phi("overlap", "default", 0.0))
    least = min(common, key=common.get)
    assert shares[least] == pytest.approx(0, abs=1e-6)
    assert all(len(group) == 3 for group in wanted)


def test_search_keeps_the_draw_whose_validation_loss_is_lowest(small, data, monkeypatch):
    cell = languages.Cell(data, TARGET, 0)
    losses = []
    networks = []

    def finetune(domain, network, examples, seed):
        networks.append(flat(network))
        losses.append([0.3, 0.1, 0.2][len(losses)])
        return metapt.Finetuned({"test": 0.0}, losses[-1])

    monkeypatch.setattr(metapt, "finetune", finetune)
    found = flat(cell.network("search", "default"))
    assert len(losses) == 3
    assert torch.equal(found, networks[1])
    assert not torch.equal(networks[0], networks[1])


@pytest.mark.parametrize(
    ("held", "chosen"),
    [
        ({"even": 0.5, "learned": 0.6, "online": 0.55}, 2.0),
        ({"even": 0.5, "learned": 0.4, "online": 0.55}, 3.0),
        ({"even": 0.5, "learned": 0.5, "online": 0.5}, 1.0),
    ],
)
def test_chosen_is_what_has_the_best_held_out_score_and_even_shares_else(held, chosen):
    scores = {"even": [1.0], "learned": [2.0], "online": [3.0], "hand": [9.0]}
    assert languages.choice(scores, held) == {"chosen": [chosen]}
    del held["online"]
    assert languages.choice(scores, held) == {}


def test_what_is_stored_is_not_made_again_unless_that_is_asked_for(small, data, capsys):
    given = {"targets": TARGET, "setting": "default", "data": data}
    methods = "even learned online search cotrain-learned"
    languages.run("5", methods=methods, again=False, **given)
    assert len(capsys.readouterr().out.splitlines()) == 5
    first = (small / "default.json").read_bytes()
    held = load_json(small / "default-held.json")
    assert set(held[f"{TARGET} 5"]) == {"even", "learned", "online"}

    languages.run("5", methods=methods, again=False, **given)
    assert capsys.readouterr().out == ""
    languages.run("5", methods="even learned", again=True, **given)
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert (small / "default.json").read_bytes() == first
    assert load_json(small / "default-held.json") == held

    results = languages.stored_of("default", "5")
    best = max(("even", "learned", "online"), key=held[f"{TARGET} 5"].get)
    assert results[f"{TARGET} 5"]["chosen"] == results[f"{TARGET} 5"][best]
    assert languages.stored_of("default", "6") == {}


def test_gains_are_paired_by_cell():
    results = {
        "A 1": {"even": [0.1, 0.2, 0.3], "learned": [0.2, 0.4, 0.6]},
        "B 1": {"even": [0.5, 0.5, 0.5], "learned": [0.5, 0.5, 0.8]},
        "C 1": {"even": [0.5, 0.5, 0.5]},
    }
    np.testing.assert_allclose(languages.gains_of(results, "learned", "even", 0), [0.1, 0.0])
    by_mean = languages.gains_of(results, "learned", "even", slice(None))
    np.testing.assert_allclose(by_mean, [0.2, 0.1])


def test_the_mean_of_targets_gives_each_target_the_same_weight():
    results = {
        "A 1": {"even": [0.1, 0.2, 0.3], "learned": [0.2, 0.3, 0.4]},
        "A 2": {"even": [0.1, 0.2, 0.3], "learned": [0.4, 0.5, 0.6]},
        "B 1": {"even": [0.5, 0.5, 0.5], "learned": [0.5, 0.5, 0.5], "hand": [0.4, 0.4, 0.4]},
    }
    rows = languages.table_by_target(results, ["learned", "hand"], "even")
    assert rows == [
        ["target", "cells", "even", "learned", "hand"],
        ["A", "2", "20.0", "+20.0", "–"],
        ["B", "1", "50.0", "+0.0", "-10.0"],
        ["mean of targets", "3", "", "+10.0 ± 127.1", "-10.0 ± –"],
    ]
