"""bench.studies.worth: the rivals that it compares φ with, and its arithmetic."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats

import metapt
from bench.stored import ROOT
from bench.studies import worth

QUICK = ["steps=6", "warmup=2", "meta_every=2", "measure_steps=2"]


def trial(name: str, **given) -> worth.Trial:
    return worth.Trial(worth.EXPERIMENTS[name], 0, given, Path("data"))


def rows_of(scores: dict[str, list[float]], **more) -> list[dict]:
    return [
        {
            "seed": seed,
            "method": method,
            "seconds": 1.0,
            "scope": "head",
            "ft_examples": 30,
            "score": score,
            **more,
        }
        for method, each in scores.items()
        for seed, score in enumerate(each)
    ]


def test_gains_are_paired_by_seed_and_the_share_is_of_sums():
    scores = {"default": [0.5, 0.7, 0.6], "learned": [0.6, 0.7, 0.8], "oracle": [0.7, 0.89, 0.81]}
    lines = {line["method"]: line for line in worth.summary(rows_of(scores))}
    gains = np.array([10.0, 0.0, 20.0])
    low, high = stats.t.interval(0.95, 2, gains.mean(), stats.sem(gains))
    assert lines["learned"]["gain"] == pytest.approx((10, (high - low) / 2))
    assert lines["learned"]["share"] == pytest.approx(30 / 60) and lines["learned"][
        "worst"
    ] == pytest.approx(0)
    assert math.isnan(worth.interval([1.0])[1])
    uncertain = {**scores, "oracle": [0.7, 0.8, 0.9]}  # a gap that may be none has no share
    assert {line["share"] for line in worth.summary(rows_of(uncertain))} == {None}


def test_the_figure_tells_learned_oracle_and_rivals_apart_and_begins_with_real_data():
    assert set(worth.IN_FIGURE) == {"sources", *worth.EXPERIMENTS}
    scores = {"default": [0.5, 0.7], "learned": [0.6, 0.7], "oracle": [0.7, 0.9]}
    noise = worth.summary(rows_of({**scores, "finetune_alone": [0.4, 0.6]}))
    proteins = worth.summary(rows_of({"default": [0.5, 0.7], "online": [0.6, 0.9]}))
    figure = Figure(layout="constrained")
    worth.draw_gains(figure, {"digits-noise": noise, "ppi": proteins})
    figure.canvas.draw()
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == ["ppi, 2 seeds", "digits-noise, 2 seeds"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["learned φ", "oracle φ", "rivals"]
    colours = [[bar.lines[0].get_color() for bar in axis.containers] for axis in figure.axes]
    assert colours == [["C0"], ["C0", "C1", "C2"]]
    for axis in figure.axes:
        low, high = sorted(axis.get_ylim())
        assert low < 0 and high > len(axis.get_yticks()) - 1


def test_what_is_chosen_has_the_highest_held_score_of_the_three():
    rows = rows_of({"default": [0.5, 0.5]}, held=0.6) + rows_of({"learned": [0.7, 0.1]}, held=0.5)
    rows += [row | {"held": 0.7 if row["seed"] else 0.1} for row in rows_of({"online": [0.9, 0.8]})]
    assert worth.by_method(rows)["chosen"] == {0: {("head", 30): 50.0}, 1: {("head", 30): 80.0}}
    of_equal_ones = [row | {"held": 0.5} for row in reversed(rows)]
    assert worth.by_method(of_equal_ones)["chosen"][1] == {("head", 30): 50.0}


@pytest.mark.parametrize(
    ("name", "expected"), [("digits-rotation", 180 / 3**0.5), ("digits-affine", 3**-0.5)]
)
def test_the_rival_without_phi_has_wide_maps_throughout(name, expected, monkeypatch):
    """A uniform distribution from −r to r has the standard deviation r / √3."""
    made, seen = trial(name), []
    monkeypatch.setattr(metapt, "pretrain_afresh", lambda *given: seen.append(given))
    made.wide()
    domain, phi = seen[0][0], seen[0][2]
    meta, index = domain.meta(), torch.arange(4)
    if phi:
        meta.load_state_dict(phi)
    assert not any(p.any() for p in meta.parameters())
    spreads = []
    monkeypatch.setattr(
        type(meta), "forward", lambda self, images, spread: spreads.append(spread) or images
    )
    network = domain.network()
    domain.pretrain_loss(network, meta, index, 1.0, True)(
        dict(network.named_parameters()), metapt.detached(meta)
    )
    wanted = expected * domain.ranges if hasattr(domain, "ranges") else torch.tensor(expected)
    assert torch.as_tensor(spreads[0]).float() == pytest.approx(wanted.float())
    # The trial's own domain is as it was.
    assert made.domain.settings == type(made.domain.settings)()


def test_the_oracle_of_wrong_labels_weighs_right_ones_alone():
    domain = trial("digits-noise").domain
    known, meta = worth.KnownNoise.of(domain), domain.meta()
    index = torch.arange(1000)
    weights = known.weigh(meta, metapt.detached(meta), index, True)
    assert torch.equal(weights.bool(), ~domain.noisy) and set(weights.unique().tolist()) == {
        0.0,
        1.0,
    }


def test_a_search_has_the_time_of_the_meta_run_and_of_pt_with_its_phi(monkeypatch):
    made, clock = trial("digits-rotation"), [0.0]
    made.meta_run = worth.MetaRun(None, None, 10.0)
    monkeypatch.setattr(worth.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(made, "afresh", lambda phi: clock.__setitem__(0, clock[0] + 3) or phi)
    monkeypatch.setattr(
        metapt,
        "finetune",
        lambda domain, phi, *_: metapt.Finetuned({}, abs(phi["rotation_mean_deg"] - 90)),
    )
    few, (draws, best) = made.search(), (made.draws, made.search3()["rotation_mean_deg"])
    assert (draws, made.draws) == (4, 10)
    random = np.random.default_rng(0)
    drawn = [random.uniform(-180, 180) for _ in range(10)]
    assert best == pytest.approx(min(drawn, key=lambda angle: abs(angle - 90)))
    assert few["rotation_mean_deg"] == pytest.approx(
        min(drawn[:4], key=lambda angle: abs(angle - 90))
    )


def test_what_is_stored_is_not_made_again_nor_mixed_with_other_settings(tmp_path, capsys):
    def run(*more, **options):
        worth.run(
            "digits-rotation",
            seeds="0",
            methods="default,learned",
            variant="quick",
            set_=[*QUICK, *more],
            data=ROOT / "data",
            out=tmp_path,
            **({"again": False} | options),
        )
        return json.loads((tmp_path / "digits-rotation-quick.json").read_text())

    first = run()
    assert {row["method"] for row in first["rows"]} == {"default", "learned"} and first["settings"][
        "steps"
    ] == 6
    assert run() == first
    with pytest.raises(SystemExit, match="another meta_lr, steps"):
        run("meta_lr=1.0", "steps=8", again=True)
    same = ("seed", "method", "scope", "ft_examples", "score", "phi", "held")
    assert [[row.get(name) for name in same] for row in run(again=True)["rows"]] == [
        [row.get(name) for name in same] for row in first["rows"]
    ]


def test_the_cells_of_languages_are_an_experiment_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(worth.languages, "RESULTS", tmp_path)
    scores = {"even": [0.5, 0.6, 0.7], "learned": [0.6, 0.7, 0.8], "online": [0.6, 0.6, 0.9]}
    cells = {"A 20": scores, "B 21": scores, "A 0": {"even": [0.0, 0.0, 0.0]}}
    held = {"A 20": {"even": 0.4, "learned": 0.5, "online": 0.3}, "B 21": {"even": 0.5}}
    (tmp_path / "default.json").write_text(json.dumps(cells))
    (tmp_path / "default-held.json").write_text(json.dumps(held))
    lines = {line["method"]: line for line in worth.summary(worth.rows_of_sources())}
    assert list(lines) == ["default", "learned", "online", "chosen"]
    assert lines["default"]["seeds"] == 2
    assert lines["default"]["cells"] == pytest.approx(
        {("head", 10): 50, ("head", 100): 60, ("all", 100): 70}
    )
    assert lines["learned"]["gain"][0] == pytest.approx(10)
    assert lines["chosen"]["seeds"] == 1
    assert lines["chosen"]["gain"][0] == pytest.approx(10)


def test_a_table_has_means_or_gains_and_no_gain_of_the_default():
    scores = {"default": [0.5, 0.7], "learned": [0.6, 0.9], "oracle": [0.8, 0.99]}
    rows = rows_of(scores) + [row | {"ft_examples": 100} for row in rows_of(scores)]
    for row in rows:
        if row["ft_examples"] == 100 and row["method"] == "learned":
            row["score"] -= 0.1
    lines = worth.summary(rows)
    columns, *means = worth.table_of(lines, with_gains=False)
    assert columns[:4] == ["", "head, 30", "head, 100", "mean"]
    assert means[0] == ["default φ", "60.0", "60.0", "60.0", "", "", "", "1", "2"]
    share = f"{100 * 0.2 / 0.59:.0f} %"
    gain = worth.gain(worth.interval([5, 15]))
    assert means[1][1:] == ["75.0", "65.0", "70.0", gain, "+5.0", share, "1", "2"]
    _, *gains = worth.table_of(lines, with_gains=True)
    assert gains[0] == means[0]
    in_cells = [worth.gain(worth.interval(points)) for points in ([10, 20], [0, 10])]
    assert gains[1][1:3] == in_cells


def test_a_report_is_of_the_seeds_that_are_reported(tmp_path, capsys):
    rows = rows_of({"default": [0.5, 0.7], "learned": [0.6, 0.9]})
    fresh = [row | {"seed": row["seed"] + 40, "score": 0.5} for row in rows]
    content = {"settings": {}, "rows": rows + fresh}
    (tmp_path / "digits-rotation.json").write_text(json.dumps(content))
    worth.report(tmp_path, variants=False, cells=False, markdown=True)
    learned = capsys.readouterr().out.splitlines()[-1]
    assert learned.split(" | ")[1:3] == ["50.0", "50.0"]


def test_one_seed_has_no_share_of_the_gap():
    assert worth.share_of_gap([1.0], [2.0]) is None
    assert worth.share_of_gap([1.0, 1.0], [2.0, 2.1]) == pytest.approx(2 / 4.1)


def test_longer_is_twice_as_long_and_with_the_default_phi(monkeypatch):
    made = trial("digits-rotation", steps=7, warmup=2)
    seen = []
    monkeypatch.setattr(metapt, "pretrain_afresh", lambda *given: seen.append(given))
    made.longer()
    [(domain, seed, phi)] = seen
    assert (domain.settings.steps, seed, phi) == (14, 0, None)
    assert made.domain.settings.steps == 7


def test_the_oracle_of_permuted_tasks_leaves_them_alone(monkeypatch):
    made = trial("digits-rotation")
    made.domain.permuted = np.array([True, False, True])
    seen = []
    monkeypatch.setattr(metapt, "pretrain_afresh", lambda *given: seen.append(given[2]))
    made.oracle()
    weights = seen[0]["task_logits"].softmax(0)
    assert weights.tolist() == pytest.approx([0, 1, 0], abs=1e-6)


def test_seeds_are_kept_in_one_file(tmp_path, capsys):
    for seeds in ("0", "1"):
        worth.run(
            "digits-rotation",
            seeds=seeds,
            methods="default",
            variant="quick",
            set_=QUICK,
            again=False,
            data=ROOT / "data",
            out=tmp_path,
        )
    stored = json.loads((tmp_path / "digits-rotation-quick.json").read_text())
    assert {row["seed"] for row in stored["rows"]} == {0, 1}
    assert stored["settings"]["seed"] is None
    assert stored["settings"]["warmup"] == 2
