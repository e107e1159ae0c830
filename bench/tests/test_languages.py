"""bench.studies.languages: the rivals of learned shares, what is chosen, and what is stored."""

import json

import numpy as np
import pytest
import torch
from datasets import prepare_treebanks
from tools import flat, spy

import metapt
from bench.stored import load_json
from bench.studies import languages, worth

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
    return prepare_treebanks(tmp_path_factory.mktemp("languages"))


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


def test_the_taggers_choice_leaves_out_the_source_that_it_tags_worst(small, data):
    cell = languages.Cell(data, TARGET, 0)
    domain = cell.domain
    network, head = languages.tagger_of_finetuning(domain)
    accuracy = {}
    for source, name in enumerate(domain.sources):
        grams, tags = domain.sentences(languages.rows_of_source(domain, source))
        with torch.no_grad():
            accuracy[name] = domain.score(head(network(grams, features=True)), tags)
    shares = shares_of(cell, cell.phi("tagger", "default", 0.0))
    worst = min(accuracy, key=accuracy.get)
    expected = {name: 0.5 * (name != worst) for name in domain.sources}
    assert shares == pytest.approx(expected, abs=1e-6)
    assert len(set(accuracy.values())) == 3
    assert torch.equal(flat(cell.network("alone", "default")), flat(network))


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
    losses = iter([0.3, 0.1, 0.2])
    networks = []
    shares = []

    def finetune(domain, network, examples, seed):
        assert (examples, seed) == (20, 0)
        networks.append(flat(network))
        return metapt.Finetuned({"test": 0.0}, next(losses))

    monkeypatch.setattr(metapt, "finetune", finetune)
    spy(monkeypatch, metapt, "pretrain_afresh", lambda *given: shares.append(given[2]))
    found = flat(cell.network("search", "default"))
    assert len(networks) == 3
    assert torch.equal(found, networks[1])
    assert not torch.equal(networks[0], networks[1])
    for phi in shares:
        drawn = sorted(shares_of(cell, phi).values())
        assert drawn == pytest.approx([0, 0.5, 0.5], abs=1e-6)


@pytest.mark.parametrize(
    ("method", "steps", "cotrain", "shares"),
    [
        ("even", 12, 0.0, None),
        ("long", 48, 0.0, None),
        ("hand", 12, 0.0, "hand"),
        ("learned", 12, 0.0, "learned"),
        ("cotrain", 12, 0.2, None),
        ("cotrain-hand", 12, 0.2, "hand"),
        ("cotrain-learned", 12, 0.2, "learned"),
    ],
)
def test_a_method_pretrains_with_its_shares(
    small, data, monkeypatch, method, steps, cotrain, shares
):
    cell = languages.Cell(data, TARGET, 3)
    asked = []
    spy(monkeypatch, metapt, "pretrain_afresh", lambda *given: asked.append(given))
    cell.network(method, "default")
    [(domain, seed, phi)] = asked
    assert (domain.settings.steps, domain.settings.cotrain, seed) == (steps, cotrain, 3)
    if shares is None:
        assert phi is None
    else:
        assert torch.equal(phi["logits"], cell.phi(shares, "default", cotrain)["logits"])


def test_one_run_serves_learned_and_online_and_has_the_settings_by_name(small, data, monkeypatch):
    cell = languages.Cell(data, TARGET, 0)
    asked = []
    spy(monkeypatch, metapt.Training, "__init__", lambda *given, **_: asked.append(given[1]))
    online = cell.network("online", "default")
    cell.phi("learned", "default", 0.0)
    [domain] = asked
    assert domain.settings.solver == LEARNING["solver"]
    assert online is cell.learned("default", 0.0).network
    assert cell.learned("default", 0.2).domain.settings.cotrain == 0.2


def test_scores_are_after_ft_of_a_head_on_few_and_on_all_and_of_everything(
    small, data, monkeypatch
):
    cell = languages.Cell(data, TARGET, 4)
    asked = []

    def finetune(domain, network, examples, seed):
        asked.append((domain.settings.measure_scope, examples, seed))
        return metapt.Finetuned({"test": float(len(asked))}, 0.0)

    monkeypatch.setattr(metapt, "finetune", finetune)
    assert languages.scores_of(cell.domain, cell.domain.network()) == [1, 2, 3]
    assert asked == [("head", 10, 4), ("head", 20, 4), ("all", 20, 4)]


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
    cell = languages.Cell(data, TARGET, 5)
    network = cell.network("online", "default")
    of_cell = load_json(small / "default.json")[f"{TARGET} 5"]
    assert of_cell["online"] == languages.scores_of(cell.domain, network)
    expected = metapt.held_score(cell.domain, network, 20, 5)
    assert held[f"{TARGET} 5"]["online"] == expected

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
        "A 1": {"hand": [0.1, 0.2, 0.3], "learned": [0.2, 0.3, 0.4], "even": [0.0, 0.0, 0.0]},
        "A 2": {"hand": [0.1, 0.2, 0.3], "learned": [0.4, 0.5, 0.6], "even": [0.0, 0.0, 0.0]},
        "A 3": {"hand": [0.1, 0.2, 0.3], "learned": [0.3, 0.4, 0.5], "even": [0.0, 0.0, 0.0]},
        "B 1": {"hand": [0.5, 0.5, 0.5], "learned": [0.5, 0.5, 0.5]},
    }
    rows = languages.table_by_target(results, ["learned", "even"], "hand")
    assert rows == [
        ["target", "cells", "hand", "learned", "even"],
        ["A", "3", "20.0", "+20.0", "-20.0"],
        ["B", "1", "50.0", "+0.0", "–"],
        ["mean of targets", "", "", "+10.0 ± 127.1", "-20.0"],
    ]


def test_a_report_is_of_the_cells_that_have_what_gains_are_measured_on(small, capsys):
    cells = {
        "A 1": {"even": [0.1] * 3, "learned": [0.2] * 3, "online": [0.4] * 3},
        "B 1": {"even": [0.5] * 3, "learned": [0.5] * 3},
    }
    (small / "default.json").write_text(json.dumps(cells))
    for by_target in (False, True):
        languages.report("default", "online", "", "", by_target=by_target, markdown=True)
        _, _, *rows = capsys.readouterr().out.splitlines()
        assert len(rows) == 2
        assert "B" not in [row.split()[1] for row in rows]
        assert "-20.0" in rows[-1]
    with pytest.raises(SystemExit, match="no such cell of default has onlin$"):
        languages.report("default", "onlin", "", "", by_target=False, markdown=True)


def test_figures_are_drawn_of_methods_that_one_cell_has(small, monkeypatch):
    rivals = {"tagger": [0.1] * 3, "overlap": [0.1] * 3, "hand": [0.1] * 3}
    cells = {"A 0": {"even": [0.1] * 3, "learned": [0.2] * 3, **rivals}}
    for setting in languages.BY_PRODUCTS:
        (small / f"{setting}.json").write_text(json.dumps(cells))
    languages.figure("default", "")
    languages.products("0")
    assert {path.name for path in small.glob("*.png")} == {"gains.png", "products.png"}


def test_every_method_is_in_the_figures_and_has_a_name():
    methods = set(languages.METHODS.split())
    assert set(languages.IN_FIGURE) == methods - {"none", "even"} | {"chosen"}
    assert {worth.OF_SOURCES.get(name, name) for name in methods} <= set(worth.NAMES)
