"""Chapter 6 of metapt.py: fine-tuning that measures, comparisons, which φ to keep."""

import contextlib
import math
import re

import numpy as np
import pytest
import scipy.stats
import torch
from tools import Toy, domain_of, flat, spy, training

import metapt

# ------------------------------------------------------------------------------------------------
# Which examples FT gets


@pytest.fixture
def asked(monkeypatch):
    """The examples that fine-tuning asks of a domain: (part, numbers) each."""
    calls = []
    spy(monkeypatch, Toy, "inputs", lambda self, part, rows: calls.append((part, rows.tolist())))
    return calls


def examples(asked, part: str) -> set[int]:
    return {row for of_part, rows in asked if of_part == part for row in rows}


@pytest.mark.parametrize("scope", ["head", "all"])
def test_sets_are_nested_and_the_same_for_all_methods(asked, scope):
    domain = domain_of(Toy, measure_scope=scope, measure_steps=20)
    sets = {}
    for method in range(2):
        for size in (3, 8, 20):
            for seed in (0, 1):
                asked.clear()
                metapt.finetune(domain, domain.network(), size, seed)
                got = examples(asked, "finetune")
                assert len(got) == size
                assert examples(asked, "validation") == set(range(16))
                assert examples(asked, "test") == set(range(30))
                sets[method, size, seed] = got
    for seed in (0, 1):
        assert sets[0, 3, seed] < sets[0, 8, seed] < sets[0, 20, seed]
        for size in (3, 8, 20):
            assert sets[0, size, seed] == sets[1, size, seed]
    assert sets[0, 3, 0] != sets[0, 3, 1]


def test_a_domain_says_how_many_examples_an_ft_set_has_for_training_and_validation(
    asked, monkeypatch
):
    monkeypatch.setattr(Toy, "finetune_split", lambda self, size: (size - 3, 3))
    domain = domain_of(Toy)
    metapt.finetune(domain, domain.network(), 10, 0)
    assert [len(examples(asked, part)) for part in ("finetune", "validation")] == [7, 3]


def trained_on(domain, judges) -> set[int]:
    """The FT examples that FT learns from: it asks for their targets with gradients on."""
    seen = set()
    real = domain.targets

    def targets(part, rows):
        if part == "finetune" and torch.is_grad_enabled():
            seen.update(rows.tolist())
        return real(part, rows)

    domain.targets = targets
    metapt.finetune(domain, domain.network(), 20, 0, judges)
    del domain.targets
    return seen


@pytest.mark.parametrize("scope", ["head", "all"])
def test_examples_that_judge_are_scored_and_nothing_else_and_ft_does_not_get_them(asked, scope):
    domain = domain_of(Toy, measure_scope=scope)
    everything = trained_on(domain, None)
    asked.clear()
    judges = torch.tensor([3, 7, 8])
    assert trained_on(domain, judges) == everything - {3, 7, 8}
    assert examples(asked, "test") == set()
    found = metapt.finetune(domain, domain.network(), 20, 0, judges)
    assert set(found.scores) == {"held"}
    assert 0 <= found.scores["held"] <= 1


# ------------------------------------------------------------------------------------------------
# How FT goes


@pytest.mark.parametrize(
    ("scope", "given", "rate"), [("head", None, 1e-2), ("all", None, 1e-3), ("all", 0.5, 0.5)]
)
def test_the_encoder_that_is_given_is_not_changed_and_a_copy_moves_in_scope_all(
    asked, monkeypatch, scope, given, rate
):
    domain = domain_of(Toy, measure_scope=scope, measure_lr=given)
    network = domain.network()
    before = flat(network.state_dict())
    optimizers = []
    modes = []
    real = metapt.adam

    def adam(*args):
        optimizers.append(real(*args))
        return optimizers[-1]

    monkeypatch.setattr(metapt, "adam", adam)
    spy(monkeypatch, Toy, "finetune_mode", lambda self, network: modes.append(network.training))
    metapt.finetune(domain, network, 10, 0)

    assert torch.equal(flat(network.state_dict()), before)
    ((group,),) = [optimizer.param_groups for optimizer in optimizers]
    assert (len(group["params"]), group["lr"]) == (2 if scope == "head" else 8, rate)
    assert not {id(p) for p in group["params"]} & {id(p) for p in network.parameters()}
    if scope == "head":
        # Each example passes the encoder once.
        assert sorted(part for part, _ in asked) == ["finetune", "test", "validation"]
        assert modes == []
    else:
        assert len(modes) == 10
        first_weight = group["params"][2].detach().reshape(-1)
        assert (first_weight - before[: 4 * 6]).abs().min() > 0


def test_layers_that_are_frozen_stay_in_ft_of_everything(monkeypatch):
    domain = domain_of(Toy, measure_scope="all", measure_lr=0.5)
    network = domain.network()
    network.encoder[0].requires_grad_(False)
    seen = []
    real = domain.score

    def score(outputs, targets):
        seen.append(outputs)
        return real(outputs, targets)

    def first_layer(module, *_):
        weights.append(module.weight.detach().clone())

    weights = []
    network.encoder[0].register_forward_hook(first_layer)
    monkeypatch.setattr(domain, "score", score)
    metapt.finetune(domain, network, 20, 0)
    assert len(weights) > 10
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    assert len(seen) > 1
    assert not torch.equal(seen[0], seen[-1])


@pytest.mark.parametrize(
    ("given", "steps", "looks"),
    [
        ({"measure_steps": 50}, 50, 25),
        ({"measure_steps": 7}, 7, 7),
        ({"measure_epochs": 3, "measure_batch_size": 8}, 9, 3),
        ({"measure_epochs": 2, "measure_batch_size": 64}, 2, 2),
    ],
)
def test_steps_epochs_and_looks_are_as_many_as_asked(monkeypatch, given, steps, looks):
    domain = domain_of(Toy, **given)
    calls = []
    spy(
        monkeypatch,
        Toy,
        "loss",
        lambda self, outputs, targets: calls.append((outputs.requires_grad, len(outputs))),
    )
    metapt.finetune(domain, domain.network(), 20, 0)
    evaluated = [count for with_gradient, count in calls if not with_gradient]
    assert len(calls) - len(evaluated) == steps
    assert evaluated == [16] * looks


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"measure_steps": 50}, (50, {*range(2, 51, 2)})),
        ({"measure_epochs": 3, "measure_batch_size": 8}, (9, {3, 6, 9})),
    ],
)
def test_looks_are_spread_evenly_and_the_last_is_at_the_end(given, expected):
    assert metapt.finetune_schedule(metapt.Settings(**given), 20) == expected


def test_the_best_look_counts(monkeypatch):
    """At a rate that ruins the head the score is that of the lowest validation loss."""
    torch.manual_seed(0)
    domain = domain_of(Toy, measure_lr=10.0, measure_steps=50)
    losses = []
    real = domain.loss

    def loss(outputs, targets):
        value = real(outputs, targets)
        if not outputs.requires_grad:
            losses.append(value.item())
        return value

    monkeypatch.setattr(domain, "loss", loss)
    monkeypatch.setattr(domain, "score", lambda outputs, targets: float(len(losses)))
    found = metapt.finetune(domain, domain.network(), 20, 0)
    assert len(losses) == 25
    assert found.lowest_loss == min(losses) < losses[-1]
    assert found.scores == {"test": losses.index(min(losses)) + 1}


def test_networks_are_measured_in_evaluation_mode(monkeypatch):
    """Where FT trains BatchNorm, scores still come of its statistics, not of a batch's."""
    domain = domain_of(Toy, measure_scope="all")
    network = domain.network()
    modes = set()

    def note(module, *_):
        modes.add((module.training, torch.is_grad_enabled()))

    network.encoder.register_forward_hook(note)
    monkeypatch.setattr(Toy, "finetune_mode", lambda self, network: network.train())
    metapt.finetune(domain, network, 10, 0)
    assert modes == {(True, True), (False, False)}


def test_fine_tuning_learns_what_there_is_and_a_failed_one_has_no_score():
    domain = domain_of(Toy, measure_steps=300)
    assert metapt.finetune(domain, domain.network(), 20, 0).scores["test"] > 0.75
    domain.points["validation"].fill_(math.nan)
    failed = metapt.finetune(domain, domain.network(), 20, 0)
    assert failed.lowest_loss == math.inf
    assert math.isnan(failed.scores["test"])


def test_fine_tuning_depends_on_the_seed_alone():
    domain = domain_of(Toy)
    network = domain.network()
    first = metapt.finetune(domain, network, 20, 0)
    torch.rand(7)
    assert metapt.finetune(domain, network, 20, 0) == first
    assert metapt.finetune(domain, network, 20, 1) != first


# ------------------------------------------------------------------------------------------------
# Comparisons


def test_a_comparison_has_each_method_with_each_seed_and_size(monkeypatch):
    asked = []

    def make_network(domain, method, seed):
        asked.append((method.way, seed))
        return f"{method.way} {seed}"

    def finetune(domain, network, size, seed):
        return network, size, seed

    monkeypatch.setattr(metapt, "make_network", make_network)
    monkeypatch.setattr(metapt, "finetune", finetune)
    domain = domain_of(Toy)
    ways = ("untrained", "pretrained")
    methods = {f"by {way}": metapt.Method(way) for way in ways}
    cells = metapt.cells_of(methods, [5, 9], 2, with_held=False)
    advanced = []
    measured = metapt.measure_cells(domain, cells, 1, lambda: advanced.append(1))
    comparison = metapt.collect(cells, measured)
    assert comparison.finetuned == {
        (f"by {way}", size): [(f"{way} {seed}", size, seed) for seed in (0, 1)]
        for way in ways
        for size in (5, 9)
    }
    # A network is made once for all sizes.
    assert asked == [(way, seed) for seed in (0, 1) for way in ways]
    assert len(advanced) == 4


def test_an_untrained_network_is_drawn_by_the_seed():
    domain = domain_of(Toy)
    for seed in (0, 1):
        torch.rand(5)
        found = metapt.make_network(domain, metapt.Method("untrained"), seed)
        torch.manual_seed(seed)
        assert torch.equal(flat(found), flat(domain.network()))


def test_a_network_that_is_given_is_the_same_for_all_seeds_with_its_buffers():
    domain = domain_of(Toy)
    network = metapt.Training(domain, learn=False).run().network
    method = metapt.given_network(domain, network)
    for seed in (0, 1):
        found = metapt.make_network(domain, method, seed).state_dict()
        assert found.keys() == network.state_dict().keys()
        for name, values in network.state_dict().items():
            assert torch.equal(found[name], values)


@pytest.mark.parametrize("phi", [None, {"weight": torch.tensor([[2.0], [-2.0]])}])
def test_pretraining_is_afresh_by_the_seed_and_with_the_phi_of_the_method(phi):
    domain = domain_of(Toy)
    for seed in (0, 1):
        found = metapt.make_network(domain, metapt.Method("pretrained", phi=phi), seed)
        expected = metapt.pretrain_afresh(domain, seed, phi)
        assert torch.equal(flat(found), flat(expected))
    default = metapt.pretrain_afresh(domain, 1, None)
    assert torch.equal(flat(found), flat(default)) == (phi is None)


@pytest.mark.parametrize(
    ("text", "sizes"), [("", [2, 20]), ("7", [7]), ("9,3,9,20", [3, 9, 20]), ("0", 0), ("5,21", 0)]
)
def test_sizes_are_the_ones_given_or_the_domains(text, sizes):
    refusal = pytest.raises(metapt.BadInput, match="--sizes.* between 1 and the 20 FT examples")
    with contextlib.nullcontext() if sizes else refusal:
        assert metapt.compared_sizes(domain_of(Toy, sizes=text)) == sizes


def test_sizes_that_a_domain_names_come_before_the_default(monkeypatch):
    monkeypatch.setattr(Toy, "finetune_sizes", (4, 12))
    assert metapt.compared_sizes(domain_of(Toy)) == [4, 12]
    assert metapt.compared_sizes(domain_of(Toy, sizes="5")) == [5]


SCORES = {"a": [0.5, 0.7, 0.9, 0.4], "b": [0.6, 0.9, 0.9, 0.7]}


def finetuned(scores) -> list:
    return [metapt.Finetuned({"test": x, "hard": x / 2}, 0.0) for x in scores]


def test_comparisons_are_means_and_standard_errors_over_seeds():
    domain = domain_of(Toy)
    domain.tests = {"test": "accuracy", "hard": "hard accuracy"}
    results = {(name, 5): finetuned(scores) for name, scores in SCORES.items()}
    rows = metapt.comparison_rows(domain, results)
    assert [(row["method"], row["metric"]) for row in rows] == [
        ("a", "accuracy"),
        ("b", "accuracy"),
        ("a", "hard accuracy"),
        ("b", "hard accuracy"),
    ]
    for row in rows:
        scores = np.array(SCORES[row["method"]])
        if row["metric"] == "hard accuracy":
            scores = scores / 2
        found = [row["mean"], row["stderr"]]
        assert found == pytest.approx([scores.mean(), scipy.stats.sem(scores)])
        assert (row["ft_examples"], row["seeds"]) == (5, 4)


@pytest.mark.parametrize(
    ("scores", "expected"), [([0.5], (0.5, None, 1)), ([0.5, math.nan], (None, None, 2))]
)
def test_a_mean_or_an_error_that_there_is_not_is_none(scores, expected):
    (row,) = metapt.comparison_rows(domain_of(Toy), {("a", 5): finetuned(scores)})
    assert (row["mean"], row["stderr"], row["seeds"]) == expected


def test_differences_are_paired_by_seed_with_students_interval():
    def difference(first, second):
        results = {("a", 5): finetuned(first), ("b", 5): finetuned(second)}
        (row,) = metapt.difference_rows(domain_of(Toy), results, ["a", "b"], [5])
        assert (row["method"], row["versus"]) == ("b", "a")
        assert (row["ft_examples"], row["metric"]) == (5, "accuracy")
        return [row["mean"], row["low"], row["high"]]

    interval = scipy.stats.ttest_rel(SCORES["b"], SCORES["a"]).confidence_interval(0.95)
    found = difference(SCORES["a"], SCORES["b"])
    assert found == pytest.approx([0.15, interval.low, interval.high])
    assert difference([0.5], [0.75]) == [0.25, None, None]
    assert difference([0.5, math.nan], [0.5, 0.7]) == [None, None, None]


# ------------------------------------------------------------------------------------------------
# Which φ to keep


@pytest.mark.parametrize("enough", [True, False])
def test_what_judges_is_kept_from_learning_phi_where_there_is_enough(monkeypatch, enough):
    """It is the last fifth of the FT examples; otherwise each fifth in turn judges."""
    monkeypatch.setattr(metapt, "ENOUGH_TO_HOLD_OUT", 20 if enough else 21)
    run = training(unroll_batch_size=4)
    batches = run.batches["finetune"]
    seen = set(torch.cat([batches.next() for _ in range(50)]).tolist())
    assert seen == set(range(16 if enough else 20))

    calls = []

    def finetune(domain, network, size, seed, judges):
        calls.append((size, seed, judges.tolist()))
        return metapt.Finetuned({"held": len(calls) / 10}, 0.0)

    monkeypatch.setattr(metapt, "finetune", finetune)
    score = metapt.held_score(run.domain, run.network, 20, 5)
    assert score == pytest.approx(0.1 if enough else 0.3)
    folds = [judges for _, _, judges in calls]
    last = [[16, 17, 18, 19]]
    each = [list(range(first, first + 4)) for first in range(0, 20, 4)]
    assert folds == (last if enough else each)
    assert {(size, seed) for size, seed, _ in calls} == {(20, 5)}


# Held-out scores that no method has much reason to beat.
EVEN = {"no_pretraining": [0.5] * 3, "default_phi": [0.7] * 3}


def chosen_from(**scores) -> metapt.Choice:
    """The choice from each method's held-out scores, a list over seeds."""
    choice = metapt.choose(domain_of(Toy), scores)
    assert set(choice.held_scores) == set(scores)
    for method, values in scores.items():
        assert choice.held_scores[method] == metapt.mean_and_error(values)
    return choice


def interval_of(gains) -> str:
    """Student's interval as scipy computes it, in words."""
    low, high = scipy.stats.t.interval(0.95, len(gains) - 1, np.mean(gains), scipy.stats.sem(gains))
    return f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}"


@pytest.mark.parametrize(
    ("best", "words"), [("learned_phi", "the learned φ"), ("online", "the θ of this run")]
)
def test_a_gain_above_its_standard_error_is_kept(best, words):
    gains = [0.04, 0.05, 0.06]
    scores = {"learned_phi": [0.71] * 3, "online": [0.71] * 3}
    scores[best] = [0.7 + gain for gain in gains]
    choice = chosen_from(**EVEN, **scores)
    assert choice.chosen == best
    labels = "on FT labels that FT had not, though φ had"
    expected = f"{words} is worth +5.0 points ({interval_of(gains)}) {labels}: keep it"
    assert choice.sentence == expected
    assert "includes 0" not in choice.sentence


def test_a_gain_above_its_standard_error_whose_interval_includes_0_is_kept_with_a_word():
    gains = [0.0, 0.01, 0.02]
    assert np.mean(gains) > scipy.stats.sem(gains)
    learned = [0.7 + gain for gain in gains]
    choice = chosen_from(**EVEN, learned_phi=learned, online=[0.6] * 3)
    assert choice.chosen == "learned_phi"
    worth = f"+1.0 points ({interval_of(gains)}, which includes 0)"
    assert f"the learned φ is worth {worth} on FT labels" in choice.sentence
    assert choice.sentence.endswith(": keep it")


@pytest.mark.parametrize(
    ("gains", "worth"),
    [
        ([-0.02, 0.01, 0.03], "+0.7 points"),
        ([-0.01, 0.0, 0.0], "-0.3 points"),
        ([-0.05, -0.05, -0.05], "-5.0 points"),
        ([0.0, 0.0, 0.0], "+0.0 points"),
    ],
)
def test_the_default_phi_stays_unless_the_gain_exceeds_its_standard_error(gains, worth):
    assert np.mean(gains) <= scipy.stats.sem(gains)
    learned = [0.7 + gain for gain in gains]
    choice = chosen_from(**EVEN, learned_phi=learned, online=[0.5] * 3)
    assert choice.chosen == "default_phi"
    assert choice.sentence.startswith(f"the learned φ is worth {worth} (")
    assert choice.sentence.endswith(": not worth it here: keep the default φ")
    includes_zero = max(gains) >= 0
    assert ("which includes 0" in choice.sentence) == includes_zero


@pytest.mark.parametrize(("learned", "chosen"), [(0.75, "learned_phi"), (0.7, "default_phi")])
def test_one_seed_has_no_interval(learned, chosen):
    choice = chosen_from(
        no_pretraining=[0.5],
        default_phi=[0.7],
        learned_phi=[learned],
        online=[0.6],
    )
    assert choice.chosen == chosen
    assert "points (one seed: no interval) on FT labels" in choice.sentence


@pytest.mark.parametrize(
    ("learned", "chosen", "points"), [(0.75, "learned_phi", 5.0), (0.65, "default_phi", 10.0)]
)
def test_it_is_said_where_no_pretraining_does_better_than_what_is_kept(learned, chosen, points):
    choice = chosen_from(
        no_pretraining=[0.8] * 3,
        default_phi=[0.7] * 3,
        learned_phi=[learned] * 3,
        online=[0.6] * 3,
    )
    assert choice.chosen == chosen
    word = f"; but no pre-training at all does better still, by {points:.1f} points"
    assert choice.sentence.endswith(word)


@pytest.mark.parametrize(("no_pretraining", "learned"), [(0.5, 0.65), (0.8, 0.85), (0.7, 0.65)])
def test_nothing_is_said_of_no_pretraining_where_what_is_kept_is_as_good(no_pretraining, learned):
    choice = chosen_from(
        no_pretraining=[no_pretraining] * 3,
        default_phi=[0.7] * 3,
        learned_phi=[learned] * 3,
        online=[0.6] * 3,
    )
    assert "no pre-training" not in choice.sentence


def test_what_is_no_number_is_not_chosen():
    nan = [math.nan] * 3
    choice = chosen_from(**EVEN, learned_phi=nan, online=[0.75] * 3)
    assert choice.chosen == "online"
    nowhere = {"no_pretraining": nan, "default_phi": nan}
    choice = chosen_from(**nowhere, learned_phi=nan, online=nan)
    assert choice.chosen == "default_phi"
    assert re.search("unknown number of points .*keep the default", choice.sentence)


def test_the_sentence_says_whether_learning_phi_had_the_labels(monkeypatch):
    scores = {**EVEN, "learned_phi": [0.75] * 3, "online": [0.6] * 3}
    monkeypatch.setattr(metapt, "ENOUGH_TO_HOLD_OUT", 20)
    choice = chosen_from(**scores)
    assert "on FT labels that neither φ nor FT had: keep it" in choice.sentence
