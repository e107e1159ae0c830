"""Chapter 9: commands, what they print and leave, their help, a domain of one's own, downloads."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from tools import (
    ROOT,
    TINY,
    Toy,
    contents,
    domain_of,
    find_domain,
    main_in,
    metapt_in,
    options,
    outcome,
    refused,
    rewrite,
    strict_json,
    summary_of,
    toy_file,
)

import metapt

ROTATION = "digits-rotation"
NOISE = "digits-noise"
QUICK = ["--steps=8", "--warmup=4", "--meta-every=2", "--compare=0"]
MEASURE = ["--compare=1", "--measure-steps=2", "--sizes=5"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A small meta run of each of three domains, and a baseline; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    commands = {name: ["meta", name, *options(given)] for name, given in TINY.items()}
    commands["toy"] = ["meta", toy_file(folder / "toy.py")]
    given = {name: TINY[NOISE][name] for name in ("steps", "compare", "measure_steps", "sizes")}
    commands["baseline"] = ["pretrain", NOISE, *options(given)]
    for name, command in commands.items():
        code, out, err = main_in(folder, *command, "--json", "--out", name)
        assert code == 0, err
        (folder / f"{name}.out").write_text(out)
        (folder / f"{name}.err").write_text(err)
    return folder


@pytest.fixture
def copied(runs, tmp_path):
    """Copies a run of `runs` to the folder `run` of the test's own."""
    return lambda name, to="run": Path(shutil.copytree(runs / name, tmp_path / to))


@pytest.fixture(autouse=True)
def frequent_checkpoints(monkeypatch):
    monkeypatch.setattr(metapt, "CHECKPOINT_EVERY", 2)


# ------------------------------------------------------------------------------------------------
# What the commands print and leave

EVERYWHERE = {"command", "domain", "seed", "device", "seconds", "comparison"}
TRAINING = {"pt_steps", "meta_steps", "skipped_meta_steps", "validation_loss", "phi"}
ROW = {"method", "ft_examples", "metric", "mean", "stderr", "seeds"}
FILES = {"config.json", "metrics.jsonl", "checkpoint.pt", "summary.json"}
FIGURES = {"losses.png", "comparison.png"}


@pytest.mark.parametrize("name", [ROTATION, NOISE, "toy", "baseline"])
def test_a_run_prints_and_leaves_what_the_design_lists(name, runs):
    # One JSON object and nothing else.
    summary = strict_json((runs / f"{name}.out").read_text())
    folder = runs / name
    learned = name != "baseline"
    assert summary == json.loads((folder / "summary.json").read_text())
    assert set(summary) >= EVERYWHERE | TRAINING
    methods = ["no_pretraining", "default_phi"]
    if learned:
        methods += ["learned_phi", "online"]
        assert summary["chosen"] in methods[1:]
        assert summary["validation_loss"] > 0
    else:
        assert summary["validation_loss"] is None
    assert list(dict.fromkeys(row["method"] for row in summary["comparison"])) == methods
    for row in summary["comparison"]:
        assert set(row) == ROW
        assert 0 <= row["mean"] <= 1
        assert row["seeds"] == 1
    assert len(summary["comparison"]) == 2 * len(methods)
    steps = {ROTATION: 60, "toy": 24}.get(name, 41)
    assert (summary["pt_steps"], summary["device"], summary["seed"]) == (steps, "cpu", 0)
    rows = [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == steps

    files = FILES | FIGURES
    if learned:
        files |= {"phi.pt", "phi.png"}
    if name == ROTATION:
        assert summary["meta_steps"] == 12
        assert -180 <= summary["phi"]["rotation_mean_deg"] < 180
        assert rows[-1]["rotation_mean_deg"] != rows[0]["rotation_mean_deg"]
    if name in (NOISE, "baseline"):
        files |= {"weights.png", "phi.csv"}
        assert summary["clean_to_noisy_weight_ratio"] > 0
        assert set(summary["phi"]["scores.1.weight"]) == {"shape", "mean", "min", "max"}
        assert summary["phi"]["scores.1.weight"]["shape"] == [10, 64]
        assert summary["phi_table"] == "phi.csv"
        lines = (folder / "phi.csv").read_text().splitlines()
        assert (lines[0], len(lines)) == ("example,label,weight", 1001)
    assert set(contents(folder)) == files
    for file, data in contents(folder).items():
        assert not file.endswith(".png") or data[:4] == b"\x89PNG"
    err = (runs / f"{name}.err").read_text()
    assert "Test accuracy after fine-tuning" in err
    assert f"{name}: " in err


def test_the_validation_loss_is_that_of_the_last_theta_and_psi(runs):
    summary = json.loads((runs / "toy" / "summary.json").read_text())
    state = metapt.Run(runs / "toy").load_checkpoint()["training"]
    domain = domain_of(Toy)
    network = domain.network()
    network.load_state_dict(state["network"])
    loss = domain.finetune_loss(network, domain.head(), "validation", torch.arange(16))
    value = loss(metapt.detached(network), state["psi"])
    assert summary["validation_loss"] == pytest.approx(value.item())


def test_what_was_learned_is_also_a_state_dict(runs):
    for name in (ROTATION, NOISE, "toy"):
        learned = torch.load(runs / name / "phi.pt", weights_only=True)
        kept = metapt.Run(runs / name).load_checkpoint()["phi"]
        assert learned.keys() == kept.keys()
        assert all(torch.equal(learned[key], kept[key]) for key in learned)


def test_a_run_without_json_prints_the_same_tables_on_standard_output(tmp_path):
    code, out, err = main_in(tmp_path, "meta", toy_file(tmp_path / "toy.py"), "--compare=2")
    assert (code, err) == (0, "")
    assert "Test accuracy after fine-tuning" in out
    assert "runs/meta-toy" in out
    summary = json.loads((tmp_path / "runs" / "meta-toy" / "summary.json").read_text())
    for row in summary["comparison"]:
        name = metapt.METHODS[row["method"]]
        numbers = rf"\b{100 * row['mean']:.1f} +± +{100 * row['stderr']:.1f}"
        assert re.search(rf"{name} .*{numbers}", out)
    main_in(tmp_path, "pretrain", "toy.py", "--compare=0")
    main_in(tmp_path, "pretrain", "toy.py", "--compare=0")
    folders = {path.name for path in (tmp_path / "runs").iterdir()}
    assert folders == {"meta-toy", "pretrain-toy", "pretrain-toy-2"}
    summary = json.loads((tmp_path / "runs" / "pretrain-toy" / "summary.json").read_text())
    assert "comparison" not in summary


def test_the_same_command_gives_the_same_numbers(runs, tmp_path):
    assert main_in(tmp_path, "meta", NOISE, "--out=again", *options(TINY[NOISE]))[0] == 0
    assert outcome(tmp_path / "again") == outcome(runs / NOISE)


def test_finetune_exports_an_encoder(runs, tmp_path):
    common = ["--compare=2", "--measure-steps=8", "--sizes=30,60"]
    run = runs / NOISE
    summary = summary_of(tmp_path, "finetune", run, "--export=encoder.pt", "--out=one", *common)
    assert set(summary) >= EVERYWHERE
    assert summary["command"] == "finetune"
    rows = summary["comparison"]
    assert [(row["method"], row["ft_examples"], row["seeds"]) for row in rows] == [
        (str(run), 30, 2),
        (str(run), 60, 2),
        ("no_pretraining", 30, 2),
        ("no_pretraining", 60, 2),
    ]
    assert set(contents(tmp_path / "one")) == {"config.json", "summary.json", "comparison.png"}
    whole = summary_of(tmp_path, "finetune", run, "--measure-scope=all", *common)
    assert [row["mean"] for row in whole["comparison"]] != [row["mean"] for row in rows]
    assert whole["scope"] == "all"
    domain = domain_of(NOISE)
    network = domain.network()
    network.encoder.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))
    scores = [metapt.finetune(domain, network, 60, seed).scores["test"] for seed in range(2)]
    assert rows[1]["mean"] == pytest.approx(np.mean(scores))


def test_eval_pairs_runs_by_seed(runs):
    common = ["--compare=4", "--measure-steps=8", "--sizes=60"]
    summary = summary_of(runs, "eval", "baseline", NOISE, *common)
    methods = ["baseline", NOISE, "no_pretraining"]
    assert [row["method"] for row in summary["comparison"]] == methods
    versus = [(row["method"], row["versus"]) for row in summary["differences"]]
    assert versus == [(method, "baseline") for method in methods[1:]]
    domain = domain_of(NOISE)
    scores = {}
    for name in ("baseline", NOISE):
        network = metapt.Run(runs / name).load_encoder(domain)
        outcomes = [metapt.finetune(domain, network, 60, seed).scores["test"] for seed in range(4)]
        scores[name] = np.array(outcomes)
    d = scores[NOISE] - scores["baseline"]
    # Student's t, 0.975, 3 degrees of freedom; √4.
    half = 3.182446305284263 * d.std(ddof=1) / 2
    row = summary["differences"][0]
    assert (row["ft_examples"], row["metric"]) == (60, "accuracy")
    expected = [d.mean(), d.mean() - half, d.mean() + half]
    assert [row["mean"], row["low"], row["high"]] == pytest.approx(expected)


def test_every_row_names_its_run(copied, tmp_path):
    """Also runs of one method, of one name in two folders, and with names that say little."""
    names = ["one/run", "other/run", "e[lr=0.1]", "e[lr=0.2]", "a  b", "_a", "c$x$_{"]
    for name in names:
        copied("toy", name)
    code, out, err = main_in(tmp_path, "eval", *names, *MEASURE, "--out=x[/y]")
    assert code == 0, err
    summary = strict_json((tmp_path / "x[" / "y]" / "summary.json").read_text())
    assert [row["method"] for row in summary["comparison"]] == [*names, "no_pretraining"]
    assert {row["mean"] for row in summary["differences"][: len(names) - 1]} == {0}
    assert all(name in out for name in names)
    assert "x[/y]: comparison.png" in out
    assert "a run is named twice" in refused(tmp_path, "eval", "one/run", "one/../one/run")


@pytest.mark.parametrize("name", ["no_pretraining", "default_phi", "learned_phi", "online"])
def test_a_run_whose_folder_has_the_name_of_a_method_is_a_run(name, copied, runs, tmp_path):
    copied("toy", name)
    expected = summary_of(runs, "eval", "toy", *MEASURE, "--out", tmp_path / "expected")
    code, out, err = main_in(tmp_path, "eval", name, *MEASURE, "--out=e")
    assert code == 0, err
    rows = strict_json((tmp_path / "e" / "summary.json").read_text())["comparison"]
    assert [row["method"] for row in rows] == [f"./{name}", "no_pretraining"]
    assert [row["mean"] for row in rows] == [row["mean"] for row in expected["comparison"]]
    assert f"./{name}" in out
    words = metapt.METHODS[name]
    assert (words in out) == (name == "no_pretraining")


def test_solves_without_use_are_counted_and_said_to_have_moved_phi(copied, tmp_path):
    """Such steps are not skipped: the report says how many there were of all, and what may help."""
    folder = copied("toy")
    rows = [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    solved = [row for row in rows if row.get("residual") is not None]
    for row, residual in zip(solved, (1.0, 2.5), strict=False):
        row["residual"] = residual
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = main_in(tmp_path, "meta", "--resume", folder)
    assert (code, err) == (0, "")
    expected = f"in 2 of {len(solved)} meta steps the solve came to nothing better than q = 0"
    assert expected in " ".join(out.split())


@pytest.mark.parametrize("command", ["finetune", "eval"])
def test_seeds_are_as_many_as_asked(command, runs, tmp_path):
    for given, seeds in ([], 5), (["--compare=2"], 2), (["--compare", "1"], 1):
        arguments = [command, runs / "toy", "--measure-steps=2", "--sizes=5", *given]
        rows = summary_of(tmp_path, *arguments)["comparison"]
        assert {row["seeds"] for row in rows} == {seeds}
    assert "--compare is 0, expected 1 or more" in refused(
        tmp_path, command, runs / "toy", "--compare=0"
    )


@pytest.mark.parametrize("command", ["finetune", "eval"])
def test_an_unfinished_run_is_said_to_be_unfinished(command, copied, tmp_path):
    def unfinished(content):
        content["step"] = content["training"]["step"] = 16

    rewrite(copied("toy"), checkpoint=unfinished)
    code, out, err = main_in(tmp_path, command, "run", *MEASURE)
    assert code == 0, err
    assert "run is unfinished: its encoder is that of PT step 16" in " ".join(out.split())


@pytest.mark.parametrize(
    ("given", "steps", "warmup"),
    [
        (["--steps=100"], 100, 8),
        (["--steps=3900"], 3900, 300),
        (["--steps=100", "--warmup=50"], 100, 50),
        ([], 2600, 200),
    ],
)
def test_the_warm_up_is_a_share_of_the_steps(given, steps, warmup, tmp_path, monkeypatch):
    trained = []

    def stop(self, *_):
        trained.append(self.settings)
        raise metapt.Failed("far enough")

    monkeypatch.setattr(metapt.Training, "run", stop)
    assert main_in(tmp_path, "meta", NOISE, "--out=run", *given)[0] == 1
    assert (trained[0].steps, trained[0].warmup_steps) == (steps, warmup)


def test_a_preset_is_where_settings_begin(tmp_path):
    path = toy_file(tmp_path / "toy.py")
    cases = [([], 0.1), (["--preset=calm"], 0.0), (["--preset=calm", "--jitter=0.5"], 0.5)]
    for given, jitter in cases:
        out = f"run-{jitter}"
        summary_of(tmp_path, "meta", path, "--out", out, *given, *QUICK)
        settings = json.loads((tmp_path / out / "config.json").read_text())["settings"]
        assert (settings["jitter"], settings["steps"]) == (jitter, 8)


@pytest.mark.cuda
def test_a_short_meta_run_on_cuda(tmp_path):
    given = options(TINY[ROTATION])
    assert summary_of(tmp_path, "meta", "--device=cuda", *given)["device"] == "cuda"


# ------------------------------------------------------------------------------------------------
# How settings are written


def test_settings_are_written_in_any_of_the_usual_ways(tmp_path):
    words = [
        *("--steps", "9"),
        "--lr=0.25",
        *("--warmup", "3"),
        *("--cosine", "--sizes", "2,3"),
        *("--jitter", "0"),
    ]
    given = metapt.parse_settings(Toy.Settings, "meta", words)
    assert given == {
        "steps": 9,
        "lr": 0.25,
        "warmup": 3,
        "cosine": True,
        "sizes": "2,3",
        "jitter": 0.0,
    }
    assert metapt.parse_settings(Toy.Settings, "meta", ["--no-cosine"]) == {"cosine": False}
    # The last one counts, as in other programs.
    assert metapt.parse_settings(Toy.Settings, "meta", ["--steps=1", "--steps=2"]) == {"steps": 2}
    rotation = metapt.DigitsRotation.Settings
    for words in (["--init-deg=-30"], ["--init-deg", "-30"], ["--init-deg", "-3e1"]):
        assert metapt.parse_settings(rotation, "meta", words) == {"init_deg": -30.0}
    assert metapt.parse_settings(rotation, "meta", ["--sizes=a=b"]) == {"sizes": "a=b"}
    assert metapt.parse_settings(rotation, "meta", ["--sizes", "--x"]) == {"sizes": "--x"}


def test_options_stand_before_and_after_settings(tmp_path):
    toy_file(tmp_path / "toy.py")
    words = ["--steps", "8", "--out", "run", "--jitter", "0.5", "--json", "--warmup=2"]
    code, out, err = main_in(tmp_path, "meta", "toy.py", *words, "--compare", "0", "--no-cosine")
    assert code == 0, err
    assert strict_json(out)["pt_steps"] == 8
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (settings["jitter"], settings["warmup"], settings["cosine"]) == (0.5, 2, False)


@pytest.mark.parametrize("words", [[], [""], ["--"]])
def test_without_a_domain_there_is_the_first(words, tmp_path, monkeypatch):
    began = []

    def begin(request, console):
        began.append(request.kind())
        raise metapt.Failed("far enough")

    monkeypatch.setattr(metapt, "begin_run", begin)
    assert main_in(tmp_path, "meta", *words, "--steps=8")[0] in (1, 2)
    assert words == ["--"] or began == [metapt.DigitsRotation]


# ------------------------------------------------------------------------------------------------
# What cannot be used is refused in one line

# Arguments: what the line must say.
BAD_OPTIONS = {
    "meta digits-colour": "'digits-colour' is no domain; ",
    "meta digits-rotaton": "did you mean digits-rotation?",
    "meta --colour=1": "no such option: --colour",
    "meta --setps=3": "no such option: --setps; did you mean --steps?",
    "meta --no-steps": "no such option: --no-steps",
    "meta --no-json": "no such option: --no-json",
    "meta --cosine=true": "--cosine takes no value: it is --cosine or --no-cosine",
    "meta --no-cosine=1": "--no-cosine takes no value",
    "meta --steps=8 digits-noise": "'digits-noise' is no option; a domain stands first",
    "meta --steps 8 digits-noise": "'digits-noise' is no option; a domain stands first",
    "meta digits-noise digits-rotation": "'digits-rotation' is no option; a domain stands first",
    "meta -x": "no such option: -x",
    "train": "No such command 'train'",
    "met": "Did you mean 'meta'?",
    "--nothing": "--nothing",
    "eval": "runs",
    "finetune": "run",
    "finetune a b": "unexpected extra argument",
    "download": "data_set",
    "download imagenet": "'imagenet' cannot be downloaded; there are mnist, ecg, ppi",
    "meta --steps=0": "--steps is 0, expected 1 or more",
    "meta --steps=many": "--steps is 'many', expected int",
    "meta --steps=1.5": "--steps is '1.5', expected int",
    "meta --steps=": "--steps is '', expected int",
    "meta --steps": "--steps needs a value",
    "meta --steps=10 --warmup=20": "--warmup is 20, expected at most the 10 steps",
    "meta --warmup-share=1": "--warmup-share is 1.0, expected at least 0 and less than 1",
    "meta --seed=-1": "--seed is -1",
    "meta --seed -1": "--seed is -1",
    "meta --lr=nan": "--lr is nan, expected a finite number",
    "meta --lr -1e-3": "--lr is -0.001, expected positive",
    "meta --init-deg=inf": "--init-deg is inf, expected a finite number",
    "meta digits-noise --noise=1": "--noise is 1.0, expected at least 0 and less than 1",
    "meta --spread-deg=0": "--spread-deg is 0.0, expected 1 or more",
    "meta --solver=magic": "--solver is 'magic', expected one of identity, neumann, cg, nystrom",
    "meta --solver=nystrom --terms=2 --damping=0": "--damping is 0.0, expected positive",
    "meta --solver=neumann --preconditioner=adam": "--preconditioner is 'adam', expected nothing",
    "meta --preset=magic": "--preset is 'magic'; DigitsRotation has default, paper",
    "meta --sizes=301": "--sizes is '301', expected between 1 and the 300 FT examples there are",
    "meta --device=abacus": "--device is 'abacus', expected auto, cpu, cuda or cuda:N",
    "meta --device=meta": "--device is 'meta'",
    "meta --device=cuda:99": "--device cuda:99: there is no such GPU here",
    "meta mnist-rotation": "about.json is missing: 'python metapt.py download mnist'",
    "meta --resume=nowhere": "nowhere is no folder of a run",
    "pretrain --use=learned": "--use says which φ of --phi",
    "pretrain --use=best": "--use is 'best', expected chosen or learned",
    "pretrain --phi=nowhere": "nowhere is no folder of a run",
    "pretrain --phi=nowhere.pt": "nowhere.pt holds no φ of DigitsRotation: it is missing",
    "finetune nowhere": "nowhere is no folder of a run",
    # Options that belong to another command.
    "pretrain --solver=cg": "--solver belongs to meta, not to pretrain",
    "meta --phi=x": "no such option: --phi",
    "meta --export=x": "no such option: --export",
    "finetune x --steps=3": "No such option: --steps",
    "eval x --export=y": "No such option: --export",
    # What this program no longer has.
    "meta --particles=3:0.5": "no such option: --particles",
    "meta --compile": "no such option: --compile",
    # Options without effect.
    "meta --solver=identity --terms=3": "--terms has no effect with --solver identity",
    "meta --alpha=0.1": "--alpha has no effect with --solver cg",
    "meta --hvp-step=0.1": "--hvp-step has no effect with --hvp exact",
    "meta --measure-steps=10 --measure-epochs=2": "--measure-steps has no effect with",
}


@pytest.mark.parametrize("line", BAD_OPTIONS)
def test_what_cannot_be_done_is_refused_in_one_line(line, tmp_path):
    assert BAD_OPTIONS[line] in refused(tmp_path, *line.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 5000 + ".py", "a\nb.py", "[/x].py", "ö\udcff"])
def test_odd_names_of_domains_are_refused_in_one_line(name, tmp_path):
    assert refused(tmp_path, "meta", name).isprintable() or "\udcff" in name
    assert list(tmp_path.iterdir()) == []


RUNS_THAT_DO_NOT_FIT = {
    "meta --resume=digits-noise --lr=0.5": "digits-noise began with --lr 0.001, not 0.5",
    "meta --resume=digits-noise --out=x": "--resume",
    "meta --resume=digits-noise --preset=paper": "--resume",
    "pretrain --resume=baseline --phi=digits-noise": "--resume",
    "pretrain --resume=digits-noise": "digits-noise is a run of meta: resume it with meta",
    "meta mnist-noise --resume=digits-noise": "is of digits-noise, not of mnist-noise",
    "meta --resume=digits-noise mnist-noise": "a domain stands first",
    "meta --resume=digits-noise --noise": "--noise needs a value",
    "meta --out=digits-noise --steps=5": "digits-noise is not empty",
    "pretrain digits-rotation --phi=digits-noise": "is of digits-noise, not of digits-rotation",
    "pretrain digits-noise --phi=digits-noise --steps=2 --seed=1": "learned its φ on other data",
    "pretrain digits-noise --phi=digits-noise --steps=2 --noise=0.25": "φ on other data",
    "pretrain digits-rotation --phi=digits-noise/phi.pt": "phi.pt holds no φ",
    "pretrain digits-rotation --phi=digits-noise/config.json": "is no folder of a run",
    "pretrain toy.py --phi=digits-noise/phi.csv": "the φ of Toy cannot be made from a table",
    "eval digits-noise digits-rotation": "digits-rotation is of digits-rotation",
    "finetune digits-noise --sizes=301": "--sizes",
    "finetune digits-noise --measure-scope=tail": "--measure-scope",
    "finetune digits-noise --measure-lr=inf": "--measure-lr",
    "finetune digits-noise --measure-lr -3": "--measure-lr is -3.0",
    "finetune digits-noise --compare=0": "--compare is 0",
    "finetune digits-noise --compare=-2": "--compare is -2",
    "finetune digits-noise --measure-steps=3 --measure-epochs=2": "has no effect with",
    "finetune digits-noise --export=nowhere/encoder.pt": "nowhere is no folder",
    "finetune digits-noise --export=toy.py": "is there already",
    "finetune digits-noise --out=toy --export=new.pt": "toy is not empty",
    "finetune toy.py": "toy.py is no folder of a run",
}


@pytest.mark.parametrize("line", RUNS_THAT_DO_NOT_FIT)
def test_runs_that_do_not_fit_what_is_asked_are_refused(runs, line):
    def there():
        return sorted(path for path in runs.rglob("*") if path.name != ".lock")

    before = there()
    assert RUNS_THAT_DO_NOT_FIT[line] in refused(runs, *line.split())
    assert there() == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--seed=1"], "--seed"),
        (["--noise=0.25"], "--noise"),
        (["--measure-steps=9"], "--measure-steps"),
        (["--measure-scope=all"], "name it, so that all have the same FT"),
        (["--sizes=30"], "--sizes"),
    ],
)
def test_runs_that_are_compared_must_agree_on_their_data_and_their_ft(
    runs, tmp_path, given, message
):
    settings = {name: TINY[NOISE][name] for name in ("steps", "measure_steps", "sizes")}
    settings["compare"] = 0
    summary_of(tmp_path, "pretrain", NOISE, "--out=other", *options(settings), *given)
    common = ["eval", runs / NOISE, "other", "--compare=1"]
    assert message in refused(tmp_path, *common)
    if given[0].startswith("--measure-steps"):
        summary_of(tmp_path, *common, "--measure-steps=2", "--sizes=30")


def test_an_error_of_the_programs_own_is_no_bad_input(tmp_path, monkeypatch):
    monkeypatch.setattr(metapt.Training, "pretrain_step", lambda self: 1 / 0)
    monkeypatch.setattr("sys.argv", ["metapt.py", "meta", "--out", str(tmp_path / "run"), *QUICK])
    with pytest.raises(ZeroDivisionError):
        metapt.main()
    errors = [metapt.Failed("it is over"), OSError(28, "No space left"), KeyboardInterrupt()]
    for error in errors:
        monkeypatch.setattr(metapt.Training, "pretrain_step", mock.Mock(side_effect=error))
        code, out, err = main_in(tmp_path, "meta", *QUICK, "--json")
        assert (code, out) == (1, "")
        assert err.strip().splitlines()[-1].startswith("metapt: ")


@pytest.mark.parametrize("where", ["meta", "network", "head", "inputs"])
def test_an_error_while_a_training_is_made_is_not_said_to_be_of_the_input(
    where, copied, runs, tmp_path, monkeypatch
):
    copied("toy")
    kind = metapt.find_domain(str(runs / "toy.py"))
    commands = (
        ["meta", runs / "toy.py", *QUICK],
        ["pretrain", runs / "toy.py", "--phi=run", "--use=learned"],
        ["meta", "--resume=run"],
    )
    if where == "head":
        # Pre-training alone has none.
        commands = (commands[0], commands[2])

    def illegal(*_):
        raise RuntimeError("an illegal memory access was encountered")

    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(kind, where, illegal)
        for command in commands:
            with pytest.raises(RuntimeError, match="illegal"):
                main_in(tmp_path, *command)
    exhausting = {
        "CUDA out of memory": exhausted,
        "you tried to allocate": lambda *_: torch.empty(10**15),
        "Unable to allocate": lambda *_: np.empty(10**15),
        "out of memory": lambda *_: bytearray(10**17),
    }
    for says, exhaust in exhausting.items():
        monkeypatch.setattr(kind, where, exhaust)
        for command in commands:
            code, _, err = main_in(tmp_path, *command)
            assert (code, err.count("\n")) == (1, 1)
            assert err.startswith("metapt: ")
            assert says in err


# ------------------------------------------------------------------------------------------------
# φ of a run, or from a file


def test_phi_that_was_learned_can_be_frozen(runs, tmp_path):
    names = ("steps", "compare", "measure_steps", "sizes")
    given = options({name: TINY[ROTATION][name] for name in names})
    learned = json.loads((runs / ROTATION / "summary.json").read_text())["phi"]
    frozen = ("pretrain", "--phi", runs / ROTATION, "--use=learned", "--out=frozen")
    summary = summary_of(tmp_path, *frozen, *given)
    assert summary["phi"] == learned
    assert summary["meta_steps"] == 0
    methods = [row["method"] for row in summary["comparison"][::2]]
    assert methods == ["no_pretraining", "learned_phi"]
    (tmp_path / "frozen" / "summary.json").unlink()
    assert summary_of(tmp_path, "pretrain", "--resume=frozen")["phi"] == summary["phi"]
    file = runs / ROTATION / "phi.pt"
    again = summary_of(tmp_path, "pretrain", "--phi", file, "--out=from-file", *given)
    assert again["phi"] == learned
    assert again["comparison"] == summary["comparison"]


@pytest.mark.parametrize(
    ("chosen", "use", "method"),
    [
        ("default_phi", "chosen", "default_phi"),
        ("default_phi", "learned", "learned_phi"),
        ("online", "chosen", "learned_phi"),
        ("learned_phi", "chosen", "learned_phi"),
        (None, "chosen", "learned_phi"),
    ],
)
def test_pretraining_uses_what_the_run_chose_unless_told_otherwise(
    copied, runs, tmp_path, chosen, use, method
):
    path = copied("toy") / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chosen": chosen}))
    arguments = ["pretrain", runs / "toy.py", "--phi=run", "--use", use, "--out=afresh"]
    code, out, err = main_in(tmp_path, *arguments)
    assert code == 0, err
    assert ("not worth it" in out) == (method == "default_phi")
    comparison = json.loads((tmp_path / "afresh" / "summary.json").read_text())["comparison"]
    assert comparison[-1]["method"] == method
    # The run goes on also where what it took φ from is there no longer.
    shutil.rmtree(tmp_path / "run")
    again = summary_of(tmp_path, "pretrain", "--resume=afresh")
    assert again["comparison"] == comparison


def test_phi_of_an_unfinished_run_is_used_and_said_to_be(copied, runs, tmp_path):
    rewrite(copied("toy"), checkpoint=lambda content: content.update(step=16))
    arguments = ["pretrain", runs / "toy.py", "--phi=run", "--use=learned", "--compare=0"]
    code, out, _ = main_in(tmp_path, *arguments)
    assert code == 0
    assert "run is unfinished: its φ is that of PT step 16" in " ".join(out.split())
    config = json.loads((tmp_path / "runs" / "pretrain-toy" / "config.json").read_text())
    # So that it is found from any folder.
    assert config["phi"] == str(tmp_path / "run")


def test_a_phi_by_hand_can_be_tried(runs, tmp_path):
    by_hand = {"weight": torch.tensor([[3.0], [-1.0]])}
    torch.save(by_hand, tmp_path / "mine.pt")
    arguments = ["pretrain", runs / "toy.py", *QUICK[:1], "--compare=0"]
    summary = summary_of(tmp_path, *arguments, "--phi=mine.pt", "--out=run")
    assert summary["phi"]["weight"] == {"shape": [2, 1], "mean": 1.0, "min": -1.0, "max": 3.0}


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


BAD_PHI = {
    "hostile": Hostile(),
    "list": [1],
    "none": None,
    "other names": {"weights": torch.ones(2, 1)},
    "no names": {},
    "other shape": {"weight": torch.ones(3)},
    "text": {"weight": "x"},
    "not finite": {"weight": torch.tensor([[1.0], [float("nan")]])},
    "more": {"weight": torch.ones(2, 1), "bias": torch.ones(1)},
}


@pytest.mark.parametrize("name", BAD_PHI)
def test_files_that_hold_no_phi_are_refused(name, runs, tmp_path):
    torch.save(BAD_PHI[name], tmp_path / "phi.pt")
    message = refused(tmp_path, "pretrain", runs / "toy.py", "--phi=phi.pt", *QUICK[:1])
    assert "phi.pt holds no φ of Toy: " in message
    assert {path.name for path in tmp_path.iterdir()} == {"phi.pt"}


def test_a_run_may_be_called_like_a_file_of_phi(copied, runs, tmp_path):
    for name in ("run.pt", "run.csv"):
        copied("toy", name)
        arguments = ["pretrain", runs / "toy.py", "--use=learned", "--compare=0"]
        assert summary_of(tmp_path, *arguments, f"--phi={name}")["pt_steps"] == 24


TABLED = """

class Tabled(Toy):
    def table(self, meta):
        return ["class", "weight"], list(zip(["left", "right"], meta.weight[:, 0].tolist()))

    def phi_from_table(self, values):
        return {"weight": torch.tensor(values)[:, None]}
"""


def test_phi_may_come_from_a_table_by_name(tmp_path):
    toy_file(tmp_path / "toy.py", TABLED)
    quick = ["--steps=8", "--compare=0"]
    summary = summary_of(tmp_path, "meta", "toy.py:Tabled", "--out=run", *quick)
    frozen = ["pretrain", "toy.py:Tabled", *quick]
    again = summary_of(tmp_path, *frozen, "--phi=run/phi.csv")
    for name in ("mean", "min", "max"):
        expected = summary["phi"]["weight"][name]
        assert again["phi"]["weight"][name] == pytest.approx(expected)
    (tmp_path / "hand.csv").write_text("class,weight\nright,2\nleft,-1\n")
    assert summary_of(tmp_path, *frozen, "--phi=hand.csv", "--out=hand")["pt_steps"] == 8
    phi = metapt.Run(tmp_path / "hand").load_checkpoint()["phi"]
    assert phi["weight"].flatten().tolist() == [-1, 2]
    bad = {
        "class,weight\nleft,2\n": "its names are not those of Tabled: right",
        "class,weight\nleft,2\nright,3\nmiddle,4\n": "middle",
        "class,weight\nleft,2\nright,3\nleft,4\n": "a name stands there twice",
        "class,weight\nleft,2\nright,many\n": "many",
        "class,weight\nleft,2\nright,nan\n": "not finite",
        "": "hand.csv is no table of φ",
        "\n\n\n": "hand.csv is no table of φ",
    }
    for text, says in bad.items():
        (tmp_path / "hand.csv").write_text(text)
        assert says in refused(tmp_path, *frozen, "--phi=hand.csv")


# ------------------------------------------------------------------------------------------------
# Help, and what terminals can say


def help_of(folder: Path, *arguments) -> tuple[str, dict[str, str]]:
    """What --help prints at 100 columns, and the lines of its options by name."""
    with mock.patch.dict(os.environ, {"COLUMNS": "100", "TERMINAL_WIDTH": "100"}):
        code, out, err = main_in(folder, *arguments, "--help")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    found = {}
    for line in lines:
        match = re.match(r"  (?:-h, )?--([a-z-]+)", line)
        if match:
            found[match[1]] = line
    return out, found


@pytest.mark.parametrize("name", metapt.DOMAINS)
@pytest.mark.parametrize("command", ["meta", "pretrain"])
def test_help_shows_the_options_of_the_command_and_the_domain_with_their_defaults(
    command, name, tmp_path
):
    kind = find_domain(name)
    out, shown = help_of(tmp_path, command, name)
    fields = metapt.dataclasses.fields(kind.Settings)
    knobs = metapt.knobs_of(kind.Settings)
    wanted = [field for field in fields if command == "meta" or not knobs[field.name].learning]
    general = {"preset", "resume", "device", "data", "jobs", "out", "json", "help"}
    if command == "pretrain":
        general |= {"phi", "use"}
    assert set(shown) == {field.name.replace("_", "-") for field in wanted} | general
    assert ("meta-lr" in shown) == (command == "meta")
    assert ("solver" in shown) == (command == "meta")
    for field in wanted:
        default = "none" if field.default in (None, "") else str(field.default)
        if isinstance(field.default, float):
            default = f"{field.default:.4g}"
        line = shown[field.name.replace("_", "-")]
        assert re.search(rf"\s{re.escape(default)}\s", line), field.name
    for preset in kind.presets:
        assert preset in out
    assert name in out
    assert len(out.splitlines()) <= 120


def test_help_without_a_domain_of_a_resumed_run_and_of_a_file(runs, tmp_path):
    shown = help_of(tmp_path, "meta")[1]
    assert set(shown) == set(help_of(tmp_path, "meta", ROTATION)[1])
    assert set(shown) == set(help_of(tmp_path, "meta", "--steps=3", "--json")[1])
    assert "noise" in help_of(tmp_path, "meta", "--resume", runs / NOISE)[1]
    assert "noise" in help_of(tmp_path, "meta", "--json", f"--resume={runs / NOISE}")[1]
    out, shown = help_of(tmp_path, "meta", runs / "toy.py")
    assert re.search(r"\s0\.1\s", shown["jitter"])
    assert "init-deg" not in shown
    assert "calm" in out
    for command in ("meta", "pretrain", "finetune", "eval", "download"):
        assert main_in(tmp_path, command, "-h") == main_in(tmp_path, command, "--help")
    assert "'nosuch' is no domain" in refused(tmp_path, "meta", "nosuch", "-h")


@pytest.mark.parametrize("command", ["finetune", "eval", "download"])
def test_help_of_the_other_commands(command, tmp_path):
    out, shown = help_of(tmp_path, command)
    assert len(out.splitlines()) <= 45
    if command == "download":
        assert all(data in out for data in metapt.SCRIPTS)
        return
    measuring = {"scope", "lr", "steps", "epochs", "batch-size"}
    wanted = {f"measure-{name}" for name in measuring} | {"compare", "sizes"}
    if command == "finetune":
        wanted |= {"export", "force"}
    assert set(shown) == wanted | {"device", "data", "jobs", "out", "json", "help"}


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_no_command_shows_them_all(words, tmp_path):
    code, out, err = main_in(tmp_path, *words)
    assert (code, err) == (0, "")
    for command in ("Usage", "download", "pretrain", "meta", "finetune", "eval", "--version"):
        assert command in out
    assert len(out.splitlines()) > 10


def test_the_version_is_told(tmp_path):
    code, out, err = main_in(tmp_path, "--version")
    assert (code, err) == (0, "")
    assert metapt.FORMAT in out
    assert torch.__version__ in out


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_stream_that_cannot_say_every_character_says_the_rest(encoding, runs, tmp_path):
    """φ, ± and ö in help, in a run's bar and tables, and in an error."""
    toy_file(tmp_path / "töy.py")
    said = {}
    for words in (
        ["meta", "--help"],
        ["meta", "töy.py", "--steps=8", "--compare=1", "--out=rün"],
        ["meta", "dömain"],
    ):
        done = subprocess.run(
            [sys.executable, metapt.__file__, *words],
            check=False,
            cwd=tmp_path,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding},
            timeout=300,
        )
        said[words[1]] = done
        assert b"Traceback" not in done.stderr
        assert done.returncode == (2 if words[1] == "dömain" else 0), done.stderr
    assert "Pre-train" in said["--help"].stdout.decode(encoding)
    learned = "φ" if encoding == "utf-8" else "?"
    assert f"the learned {learned} " in said["töy.py"].stdout.decode(encoding)
    assert (tmp_path / "rün" / "summary.json").exists()
    assert said["dömain"].stderr.decode(encoding).count("\n") == 1


@pytest.mark.parametrize("columns", ["0", "40", "-1", "many"])
def test_any_number_of_columns_prints_something(columns, tmp_path):
    with mock.patch.dict(os.environ, {"COLUMNS": columns}):
        code, out, err = main_in(tmp_path, "meta", "--help")
        assert (code, err) == (0, "")
        assert "--steps" in out.replace("\n", "")
        code, out, err = main_in(tmp_path, "meta", toy_file(tmp_path / "toy.py"))
        assert code == 0, err
        assert len(out.split()) > 20


def test_advice_and_messages_keep_the_spaces_of_a_name(copied, tmp_path):
    copied("toy", "a  b")
    (tmp_path / "a  b" / "config.json").write_text("{")
    assert "a  b/config.json is not what" in refused(tmp_path, "meta", "--resume=a  b")


def test_names_are_text_also_where_they_look_like_markup(runs, tmp_path):
    out = "a:fire:b [red]x[/red]"
    code, said, err = main_in(tmp_path, "meta", runs / "toy.py", "--out", out, *QUICK)
    assert code == 0, err
    assert f"{out}: checkpoint.pt" in " ".join(said.split())


# ------------------------------------------------------------------------------------------------
# A domain of one's own


def test_a_domain_of_a_file_is_found_by_all_commands(tmp_path):
    path = toy_file(tmp_path / "mine.py")
    summary = summary_of(tmp_path, "meta", "mine.py", "--jitter=0.25", "--out=run", *QUICK)
    assert summary["domain"] == f"{path}:Toy"
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["settings"]["jitter"], len(config["domain_sha256"])) == (0.25, 64)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "summary.json").unlink()
    # The path in config.json is absolute.
    again = summary_of(tmp_path / "elsewhere", "meta", "--resume=../run")
    assert again["validation_loss"] == summary["validation_loss"]
    for words in (["mine.py"], ["mine.py:Toy"], [str(path)]):
        summary_of(tmp_path, "meta", *words, "--resume", "run")
    arguments = ["--phi=run", "--jitter=0.25", "--out=frozen", "--compare=0"]
    frozen = summary_of(tmp_path, "pretrain", "mine.py:Toy", *arguments)
    assert frozen["phi"] == summary["phi"]
    exported = summary_of(tmp_path, "finetune", "run", "--export=e.pt", *MEASURE)
    assert exported["domain"] == summary["domain"]
    rows = summary_of(tmp_path, "eval", "run", "frozen", *MEASURE)["differences"]
    assert [row["method"] for row in rows] == ["frozen", "no_pretraining"]
    assert "--jitter is -1.0, expected 0 or more" in refused(
        tmp_path, "meta", "mine.py", "--jitter=-1"
    )


WITH_TWO = "\n\nclass Other(Toy):\n    pass\n"
LACKING = "\n\nclass Lack(Toy):\n    targets = metapt.Domain.targets\n\n\ndel Toy\n"
ALONE = """

def pretrain_loss(self, network, meta, index, progress, live):
    return lambda theta, phi: theta["head.bias"].sum()


Toy.pretrain_loss = pretrain_loss
"""
SETTINGS = """

@dataclass(frozen=True)
class Bad(metapt.Settings):
    steps: int = 0


Toy.Settings = Bad
"""
# What a file has besides `Toy` (None: there is no file), and what the line must say.
BROKEN_FILES = {
    "two.py": (WITH_TWO, "defines Toy, Other: name one, as two.py:Toy"),
    "two.py:Third": (WITH_TWO, "has no domain Third"),
    "none.py": ("\n\ndel Toy\n", "defines no domain"),
    "syntax.py": ("\n\ndef f(:\n", "syntax.py, line {end}: SyntaxError"),
    "import.py": (
        "\n\nimport nothing_of_that_name\n",
        "import.py, line {end}: ModuleNotFoundError",
    ),
    "lacking.py": (LACKING, "Lack lacks targets, which a domain needs"),
    "loss.py": (ALONE, "Toy.pretrain_loss does not depend on φ"),
    "settings.py": (SETTINGS, "--steps is 0"),
    "plain.py": (SETTINGS.replace("@dataclass(frozen=True)\n", ""), "needs @dataclass"),
    "missing.py": (None, "missing.py, which defines the domain missing.py, is missing"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_file_that_defines_no_usable_domain_is_refused(name, tmp_path):
    more, message = BROKEN_FILES[name]
    path = tmp_path / name.partition(":")[0]
    if more is not None:
        end = len(toy_file(path, more).read_text().splitlines())
        message = message.format(end=end)
    assert message in refused(tmp_path, "meta", name, *QUICK[2:])
    assert not (tmp_path / "runs").exists()


def test_files_of_one_content_in_two_folders_are_two_domains(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        path = toy_file(tmp_path / name / "toy.py")
        path.write_text(path.read_text().replace(str(path), ""))
        summary = summary_of(tmp_path, "meta", path, "--out", f"{name}/run", *QUICK)
        assert summary["domain"] == f"{path}:Toy"
    summary = summary_of(tmp_path, "finetune", "one/run", *MEASURE)
    assert summary["domain"] == f"{tmp_path / 'one' / 'toy.py'}:Toy"


def test_one_of_several_domains_of_a_file_can_be_named(tmp_path):
    toy_file(tmp_path / "two.py", WITH_TWO)
    summary = summary_of(tmp_path, "meta", "two.py:Other", *QUICK)
    assert summary["domain"].endswith("two.py:Other")
    assert (tmp_path / "runs" / "meta-two").is_dir()


def test_a_file_may_have_its_annotations_as_text(tmp_path):
    path = toy_file(tmp_path / "late.py")
    path.write_text("from __future__ import annotations\n\n" + path.read_text())
    assert summary_of(tmp_path, "meta", "late.py", "--jitter=0.5", *QUICK)["pt_steps"] == 8


@pytest.mark.parametrize("name", ["toy.py:Toy", "toy.py", "sub/../toy.py:Toy", "link.py"])
def test_a_run_never_supplies_code(name, copied, runs, tmp_path):
    """A domain file that config.json names and that lies in the run's folder, also by a link."""
    run = copied("toy")
    (run / "sub").mkdir()
    toy_file(run / "toy.py", "\n\nraise SystemExit('code of a run was executed')\n")
    (tmp_path / "link.py").symlink_to(run / "toy.py")
    (tmp_path / "door").symlink_to(run)
    where = tmp_path if name == "link.py" else run
    for path in (where / name, tmp_path / "door" / name):
        if name == "link.py" and path.parent.name == "door":
            continue
        rewrite(run, lambda config: config.update(domain=str(path)))
        commands = [["finetune", "run"], ["eval", "run"], ["meta", "--resume=run"]]
        for command in (*commands, ["finetune", "door"], ["meta", "--resume=run", "--help"]):
            assert "a run never supplies code" in refused(tmp_path, *command)
    # Relative to where one stands, too.
    rewrite(run, lambda config: config.update(domain="toy.py"))
    assert "a run never supplies code" in refused(run, "finetune", ".")


def test_a_file_that_has_changed_is_used_and_said_to_be(tmp_path):
    path = toy_file(tmp_path / "toy.py")
    summary_of(tmp_path, "meta", "toy.py", "--out=run", *QUICK)
    path.write_text(path.read_text() + "\n# changed\n")
    for command in (
        ["meta", "--resume=run"],
        ["finetune", "run", *MEASURE],
        ["eval", "run", *MEASURE],
    ):
        code, out, err = main_in(tmp_path, *command)
        assert code == 0, err
        assert "toy.py:Toy has changed since run was made" in " ".join(out.split())
    path.unlink()
    assert "toy.py" in refused(tmp_path, "finetune", "run")


ONE_MODULE = "\n\nimport sys\nassert metapt is sys.modules['__main__'] is sys.modules['metapt']\n"


def test_metapt_is_one_module_as_a_script_and_imported(tmp_path):
    toy_file(tmp_path / "toy.py", ONE_MODULE)
    done = metapt_in(tmp_path, "meta", "toy.py", "--json", *QUICK)
    assert done.returncode == 0, done.stderr
    assert strict_json(done.stdout)["pt_steps"] == 8


def test_what_a_domain_may_measure_and_keep_is_no_fault(tmp_path):
    """A number that comes later and is a bool, and a buffer that is not finite."""
    more = """

class Masked(Toy):
    def network(self):
        network = super().network()
        network.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        return network

    def measure(self, meta):
        self.calls = getattr(self, "calls", 0) + 1
        return {"weight": 1.0} | ({"converged": False} if self.calls > 2 else {"lost": None})
"""
    toy_file(tmp_path / "toy.py", more)
    code, _, err = main_in(tmp_path, "meta", "toy.py:Masked", "--out=run", *QUICK)
    assert code == 0, err
    assert main_in(tmp_path, "meta", "--resume=run")[0] == 0


# ------------------------------------------------------------------------------------------------
# Alone, and downloads


def test_the_file_alone_runs_every_command(tmp_path):
    """A copy in an empty folder: on its own domain and on a file beside it."""
    copy = shutil.copy(ROOT / "metapt.py", tmp_path)
    toy_file(tmp_path / "toy.py")
    for name, domain in (("own", []), ("file", ["toy.py"])):
        sizes = ["--sizes=30"] if name == "own" else ["--sizes=5"]
        quick = ["--steps=8", "--compare=1", "--measure-steps=2", *sizes]
        meta = f"{name}-meta"
        frozen = f"{name}-pretrain"
        commands = [
            ["meta", *domain, "--warmup=4", "--meta-every=2", "--out", meta, *quick],
            ["pretrain", *domain, "--phi", meta, "--use=learned", "--out", frozen, *quick],
            ["meta", "--resume", meta],
            ["finetune", meta, "--compare=1"],
            ["eval", meta, frozen, "--compare=1"],
        ]
        lines = "\n".join(f"metapt_main({command!r})" for command in commands)
        code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import metapt
assert metapt.__file__ == {copy!r}

def metapt_main(words):
    try:
        metapt.main(words + ["--json"])
    except SystemExit as ended:
        assert ended.code == 0, words

{lines}
"""
        done = metapt_in(tmp_path, code=code, PYTHONPATH="")
        assert done.returncode == 0, done.stderr
        summaries = [strict_json(line) for line in done.stdout.splitlines()]
        names = ["meta", "pretrain", "meta", "finetune", "eval"]
        assert [summary["command"] for summary in summaries] == names
        assert summaries[0]["meta_steps"] == 2


def test_the_file_alone_says_where_the_rest_is(tmp_path, monkeypatch):
    monkeypatch.setattr(metapt, "HERE", tmp_path)
    for name, where in metapt.DOMAINS.items():
        if name != ROTATION:
            file = where.partition(":")[0]
            assert f"copy bench/domains/{file} of metapt's" in refused(tmp_path, "meta", name)
    for name in metapt.SCRIPTS:
        message = refused(tmp_path, "download", *name.split())
        assert "copy data_scripts of metapt's repository there" in message


@pytest.mark.parametrize("data", list(metapt.SCRIPTS))
def test_download_passes_words_and_exit_status_on(data, tmp_path, monkeypatch):
    scripts = tmp_path / "data_scripts"
    scripts.mkdir()
    (scripts / "__init__.py").touch()
    stub = "import json, sys\njson.dump(sys.argv, open('called.json', 'w'))\n"
    stub += "sys.exit(int(sys.argv[-1]))\n"
    module = metapt.SCRIPTS[data]
    (scripts / f"{module}.py").write_text(stub)
    monkeypatch.setattr(metapt, "HERE", tmp_path)
    # From any folder.
    (tmp_path / "elsewhere").mkdir()
    words = ["download", *data.split(), "--from", "a b", "--check", "--n=-1"]
    for status in (0, 2, 1):
        code, out, err = main_in(tmp_path / "elsewhere", *words, status)
        assert (code, out, err) == (status, "", "")
    called = json.loads((tmp_path / "elsewhere" / "called.json").read_text())
    assert Path(called[0]) == scripts / f"{module}.py"
    assert called[1:] == ["--from", "a b", "--check", "--n=-1", "1"]


def test_download_prepares_from_any_folder(tmp_path):
    """The scripts are a package: they find what they share."""
    for data in ("mnist", "ppi", "ppi string-yeast"):
        code = main_in(tmp_path, "download", *data.split(), "--from", "nowhere")[0]
        assert code == 2
    assert main_in(tmp_path, "download", "ecg", "--", "--help")[0] == 0


def test_ctrl_c_while_a_script_is_imported_is_one_line(tmp_path):
    """A module that the script imports waits in the import until Ctrl-C was pressed."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "requests.py").write_text(f"""
import pathlib, sys, time
folder = pathlib.Path({str(tmp_path)!r})
(folder / "importing").touch()
while not (folder / "pressed").exists():
    time.sleep(0.01)
sys.path.remove(str(folder / "modules"))
del sys.modules["requests"]
import requests
""")
    command = [sys.executable, metapt.__file__, "download", "mnist", "--from", tmp_path]
    running = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(modules), "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    )
    while not (tmp_path / "importing").exists():
        assert running.poll() is None
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)
    (tmp_path / "pressed").touch()
    _, err = running.communicate()
    assert running.returncode == 1
    assert err == "mnist: stopped: the same command again goes on where it stopped\n"
    assert not (tmp_path / "data").exists()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


# ------------------------------------------------------------------------------------------------
# The project


def test_under_torchrun_one_line_names_the_program_for_several_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refused(tmp_path, "meta", *QUICK)
    assert "torchrun --nproc-per-node N -m bench.ranks COMMAND" in message


def test_the_scripts_own_requirements_are_those_of_the_project():
    text = (ROOT / "metapt.py").read_text()
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", text, re.MULTILINE)[1]
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    requirements = (ROOT / "requirements.txt").read_text().split()
    # The same ranges.
    assert set(metadata["dependencies"]) < set(requirements)
    assert "torch==2.13.0" in requirements
    assert all(re.search("[<=]", line) for line in requirements)
    names = {re.split("[<>=]", line)[0] for line in metadata["dependencies"]}
    names = {name.replace("scikit-learn", "sklearn") for name in names}
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.MULTILINE))
    imported -= set(sys.stdlib_module_names)
    # scipy and joblib come with scikit-learn, filelock with torch.
    assert imported - {"scipy", "joblib", "filelock"} == names


def test_the_summary_is_one_line_on_a_stream_of_any_encoding(runs):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream.write((runs / "toy.out").read_text())
    assert (runs / "toy.out").read_text().count("\n") == 1
