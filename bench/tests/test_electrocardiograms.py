"""The statistics of the ECG study, on predictions whose scores are known; the published layers
equal the domain's.
"""

import json
import shutil

import numpy as np
import pytest
import torch

from bench.costs import counting
from bench.costs.plain_resnet import PlainResNet18, PlainWarp
from bench.domains.ecg import ResNet18, WarpAugmentation, mean_auroc
from bench.studies import electrocardiograms


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Three groups of made-up predictions: "learned" ranks perfectly, "initial" and "half" alike,
    "none" by chance.
    """
    monkeypatch.setattr(electrocardiograms, "STORED", tmp_path)
    monkeypatch.setattr(electrocardiograms, "DRAWS", 50)
    random = np.random.default_rng(0)
    for group in range(3):
        labels = (random.random((40, 5)) < 0.4).astype(np.float32)
        some = (labels + random.normal(size=(electrocardiograms.FT_SEEDS, 40, 5))).astype(
            np.float32
        )
        of = {
            "learned": np.stack([labels] * electrocardiograms.FT_SEEDS),
            "initial": some,
            "half": some,
            "simclr": -some,
            "none": random.normal(size=some.shape).astype(np.float32),
        }
        found = {
            f"{name} {n} {scope}": of[name]
            for name in of
            for n in electrocardiograms.SETS
            for scope in electrocardiograms.SCOPES
        }
        for seed in (0, 1):
            path = tmp_path / f"group{group}-seed{seed}"
            np.savez(
                path.with_suffix(".npz"),
                labels=labels,
                patients=np.arange(40) // 2 + 100 * group,
                **found,
            )
            path.with_suffix(".json").write_text(
                json.dumps({"settings": {"seed": seed, "steps": 150}})
            )
    return tmp_path


def reported(study):
    electrocardiograms.report()
    rows = json.loads((study / "ecg-study.json").read_text())["rows"]
    return {(row["method"], row["scope"], row["n"]): row for row in rows}


def test_report_pools_groups_and_pairs_methods(study):
    rows = reported(study)
    assert len(rows) == 5 * 4 * 2
    learned, half, initial, none, simclr = (
        rows[name, "all", 50] for name in ("learned", "half", "initial", "none", "simclr")
    )
    assert learned["mean"] == 1
    assert learned["interval"] == [1, 1]
    assert learned["to_initial"] == pytest.approx(1 - initial["mean"])
    assert learned["to_initial_interval"][0] > 0  # at every draw of patients
    # paired: the same predictions
    assert (half["to_initial"], half["to_initial_interval"]) == (
        0,
        [0, 0],
    )
    assert simclr["mean"] == pytest.approx(1 - initial["mean"])
    assert none["interval"][0] < 0.5 < none["interval"][1]
    assert initial["interval"][0] < initial["mean"] < initial["interval"][1]
    assert len(initial["by_seed"]) == 2
    other = study / "group1-seed1.json"
    other.write_text(json.dumps({"settings": {"seed": 1, "steps": 50}}))
    with pytest.raises(SystemExit, match="different settings"):
        electrocardiograms.report()
    (study / "group2-seed1.npz").unlink()  # a seed that is not complete is left out
    assert len(reported(study)["none", "all", 50]["by_seed"]) == 1


def test_a_warp_of_fixed_strength_is_a_method_more_where_all_have_it(study):
    paths = [study / f"group{group}-seed{seed}" for group in range(3) for seed in (0, 1)]
    for path in paths:
        if path == paths[-1]:
            assert len(reported(study)) == 5 * 4 * 2
        of = {
            key.replace("initial", "s = 1.5"): x
            for key, x in np.load(f"{path}.npz").items()
            if "initial" in key
        }
        np.savez(f"{path}-s1.5.npz", **of)
        shutil.copy(f"{path}.json", f"{path}-s1.5.json")
    rows = reported(study)
    assert len(rows) == 6 * 4 * 2
    assert rows["s = 1.5", "head", 0]["mean"] == rows["initial", "head", 0]["mean"]


def test_the_score_by_ranks_is_the_domains():
    torch.manual_seed(0)
    scores, labels = torch.randint(0, 9, (40, 5)).float(), (torch.rand(40, 5) < 0.4).float()
    labels[:, 2] = 1  # a class that all have
    assert electrocardiograms.by_ranks(scores.numpy(), labels.numpy()) == pytest.approx(
        mean_auroc(scores, labels), rel=1e-12
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_published_encoder_is_the_same_function(training):
    torch.manual_seed(0)
    ours, x = ResNet18(12, 2).double(), torch.randn(3, 12, 1000, dtype=torch.float64)
    ours.train()(2 * x)  # statistics that are not those of the start
    plain = PlainResNet18(ours).train(training)
    weights = torch.randn(3, 16, dtype=torch.float64)
    found, expected = ours.train(training)(x), plain(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for out in (found, expected):
        (out * weights).sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad.reshape(b.shape), b.grad, msg=name)


def test_the_published_warp_is_the_same_function():
    torch.manual_seed(0)
    ours, x = WarpAugmentation(12, 0.7).double(), torch.randn(3, 12, 1000, dtype=torch.float64)
    plain = PlainWarp(ours)
    torch.testing.assert_close(ours.magnitudes(x), plain.magnitudes(x))
    views = []
    for warp in (ours, plain):
        torch.manual_seed(1)
        views.append(warp(x, warp.magnitudes(x)))
    torch.testing.assert_close(*views)


def test_inputs_count_as_saved_where_that_is_asked_for():
    layer, x = torch.nn.Linear(10, 3), torch.randn(100, 10)
    assert counting.peak(lambda: layer(x).sum().backward()) == 0
    assert counting.peak(lambda: layer(x).sum().backward(), data=True) == x.numel() * 4
