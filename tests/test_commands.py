"""Chapters 7 to 9 of metapt.py: run folders, reports, commands, a domain of one's own; and the project around the file."""

import io
import json
import os
import re
import shutil
import signal
import tomllib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import rich.console
import rich.progress
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

ROTATION, NOISE = "digits-rotation", "digits-noise"
QUICK = ["--steps=8", "--warmup=4", "--meta-every=2", "--compare=0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a small meta run of each digits domain and of a domain of one's own, and a baseline; not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    commands = {name: ["meta", name, *options(given)] for name, given in TINY.items()}
    commands["toy"] = ["meta", toy_file(folder / "toy.py")]
    commands["baseline"] = ["pretrain", NOISE, "--steps=41", "--compare=1", "--measure-steps=8", "--sizes=30,60"]
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


# What the commands print and leave

EVERYWHERE = {"command", "domain", "seed", "device", "seconds", "comparison"}
TRAINING = {"pt_steps", "meta_steps", "skipped_meta_steps", "validation_loss", "phi"}
ROW = {"method", "ft_examples", "metric", "mean", "stderr", "seeds"}
FILES = {"config.json", "metrics.jsonl", "checkpoint.pt", "summary.json", "losses.png", "comparison.png"}


@pytest.mark.parametrize("name", [ROTATION, NOISE, "toy", "baseline"])
def test_a_run_prints_and_leaves_what_the_design_lists(name, runs):
    summary, folder = strict_json((runs / f"{name}.out").read_text()), runs / name  # one JSON object and nothing else
    assert summary == json.loads((folder / "summary.json").read_text())
    assert set(summary) >= EVERYWHERE | TRAINING
    methods = ["no_pretraining", "default_phi"] + ["learned_phi", "online"] * (name != "baseline")
    assert list(dict.fromkeys(row["method"] for row in summary["comparison"])) == methods
    assert all(set(row) == ROW and 0 <= row["mean"] <= 1 and row["seeds"] == 1 for row in summary["comparison"])
    assert len(summary["comparison"]) == 2 * len(methods)
    assert name == "baseline" or summary["chosen"] in methods[1:]
    steps = TINY.get(name, {}).get("steps", 24 if name == "toy" else 41)
    assert (summary["pt_steps"], summary["device"], summary["seed"]) == (steps, "cpu", 0)
    rows = [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == steps
    extra = set() if name == "baseline" else {"phi.png"}
    if name == ROTATION:
        assert summary["meta_steps"] == 12
        assert -180 <= summary["phi"]["rotation_mean_deg"] < 180
        assert {row["particle"] for row in rows} == {0, 1, 2}
        assert rows[-1]["rotation_mean_deg"] != rows[0]["rotation_mean_deg"]
    if name == "toy":
        domain, state = domain_of(Toy), torch.load(folder / "checkpoint.pt", weights_only=True)["learners"][0]
        network, head, every = domain.network(), domain.head(), torch.arange(16)
        network.load_state_dict(state["network"])
        loss = domain.finetune_loss(network, head, "validation", every)(metapt.detached(network), state["psi"])
        assert summary["validation_loss"] == pytest.approx(loss.item())
    if name in (NOISE, "baseline"):
        extra |= {"weights.png", "phi.csv"}
        assert summary["clean_to_noisy_weight_ratio"] > 0
        assert set(summary["phi"]["scores.1.weight"]) == {"shape", "mean", "min", "max"}
        assert summary["phi"]["scores.1.weight"]["shape"] == [10, 64]
        assert summary["phi_table"] == "phi.csv"
        lines = (folder / "phi.csv").read_text().splitlines()
        assert (lines[0], len(lines)) == ("example,label,weight", 1001)
    assert set(contents(folder)) == FILES | extra
    assert all(data[:4] == b"\x89PNG" for file, data in contents(folder).items() if file.endswith(".png"))
    err = (runs / f"{name}.err").read_text()
    assert "Test accuracy after fine-tuning" in err and f"{name}: " in err


def test_a_run_without_json_prints_the_same_tables_on_standard_output(tmp_path):
    code, out, err = main_in(tmp_path, "meta", toy_file(tmp_path / "toy.py"), "--compare=2")
    assert (code, err) == (0, "")
    assert "Test accuracy after fine-tuning" in out and "runs/meta-toy-Toy" in out
    for row in json.loads((tmp_path / "runs" / "meta-toy-Toy" / "summary.json").read_text())["comparison"]:
        assert re.search(
            rf"{metapt.METHODS[row['method']]} .*\b{100 * row['mean']:.1f} +± +{100 * row['stderr']:.1f}", out
        )
    main_in(tmp_path, "pretrain", "toy.py", "--compare=0")
    main_in(tmp_path, "pretrain", "toy.py", "--compare=0")
    folders = {path.name for path in (tmp_path / "runs").iterdir()}
    assert folders == {"meta-toy-Toy", "pretrain-toy-Toy", "pretrain-toy-Toy-2"}
    assert "comparison" not in json.loads((tmp_path / "runs" / "pretrain-toy-Toy" / "summary.json").read_text())


def test_the_same_command_gives_the_same_numbers(runs, tmp_path):
    assert main_in(tmp_path, "meta", NOISE, "--out=again", *options(TINY[NOISE]))[0] == 0
    assert outcome(tmp_path / "again") == outcome(runs / NOISE)


def test_phi_that_was_learned_can_be_frozen(runs, tmp_path):
    given = {name: TINY[ROTATION][name] for name in ("steps", "compare", "measure_steps", "sizes")}
    frozen = ("pretrain", "--phi", runs / ROTATION, "--use=learned", "--out=frozen")
    summary = summary_of(tmp_path, *frozen, *options(given))
    assert summary["phi"] == json.loads((runs / ROTATION / "summary.json").read_text())["phi"]
    assert summary["meta_steps"] == 0
    assert [row["method"] for row in summary["comparison"][::2]] == ["no_pretraining", "learned_phi"]
    rows = summary_of(tmp_path, "finetune", "frozen", "--compare=1", "--measure-steps=2")["comparison"]
    assert rows[0]["method"] == "learned_phi"
    (tmp_path / "frozen" / "summary.json").unlink()
    assert summary_of(tmp_path, "pretrain", "--resume=frozen")["phi"] == summary["phi"]


@pytest.mark.parametrize(("chosen", "use", "method"), [
    ("default_phi", "chosen", "default_phi"), ("default_phi", "learned", "learned_phi"), ("online", "chosen", "learned_phi"),
    ("learned_phi", "chosen", "learned_phi"), (None, "chosen", "learned_phi"),
])  # fmt: skip
def test_pretraining_uses_what_the_run_chose_unless_told_otherwise(copied, tmp_path, chosen, use, method):
    path = copied("toy") / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chosen": chosen}))
    toy_file(tmp_path / "toy.py")
    rewrite(tmp_path / "run", lambda config: config.update(domain=f"{tmp_path / 'toy.py'}:Toy"))
    code, out, err = main_in(tmp_path, "pretrain", "toy.py", "--phi=run", "--use", use, "--out=afresh")
    assert code == 0, err
    assert ("not worth it" in out) == (method == "default_phi")
    summary = json.loads((tmp_path / "afresh" / "summary.json").read_text())
    assert summary["comparison"][-1]["method"] == method
    code, out, err = main_in(tmp_path, "pretrain", "--resume=afresh")
    assert (
        code == 0
        and json.loads((tmp_path / "afresh" / "summary.json").read_text())["comparison"] == summary["comparison"]
    )


def test_phi_of_an_unfinished_run_is_used_and_said_to_be(copied, tmp_path):
    toy_file(tmp_path / "toy.py")
    rewrite(copied("toy"), lambda config: config.update(domain=f"{tmp_path / 'toy.py'}:Toy"),
            lambda content: content.update(step=16))  # fmt: skip
    code, out, _ = main_in(tmp_path, "pretrain", "toy.py", "--phi=run", "--use=learned", "--compare=0")
    assert code == 0
    assert "run is unfinished: its φ is that of PT step 16" in " ".join(out.split())
    config = json.loads((tmp_path / "runs" / "pretrain-toy-Toy" / "config.json").read_text())
    assert config["phi"] == str(tmp_path / "run")  # so that it is found from any folder


def test_finetune_exports_an_encoder(runs, tmp_path):
    common = ["--compare=2", "--measure-steps=8", "--sizes=30,60"]
    summary = summary_of(tmp_path, "finetune", runs / NOISE, "--export=encoder.pt", "--out=one", *common)
    assert set(summary) >= EVERYWHERE and summary["command"] == "finetune"
    rows = summary["comparison"]
    assert [(row["method"], row["ft_examples"], row["seeds"]) for row in rows] == [
        ("online", 30, 2), ("online", 60, 2), ("no_pretraining", 30, 2), ("no_pretraining", 60, 2)]  # fmt: skip
    assert set(contents(tmp_path / "one")) == {"config.json", "summary.json", "comparison.png"}
    whole = summary_of(tmp_path, "finetune", runs / NOISE, "--measure-scope=all", *common)
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
    methods = ["default_phi", "online", "no_pretraining"]
    assert [row["method"] for row in summary["comparison"]] == methods
    assert [(row["method"], row["versus"]) for row in summary["differences"]] == [(m, methods[0]) for m in methods[1:]]
    domain, scores = domain_of(NOISE), {}
    for name in ("baseline", NOISE):
        network = domain.network()
        network.load_state_dict(torch.load(runs / name / "checkpoint.pt", weights_only=True)["learners"][0]["network"])
        scores[name] = np.array([metapt.finetune(domain, network, 60, seed).scores["test"] for seed in range(4)])
    d = scores[NOISE] - scores["baseline"]
    half = 3.182446305284263 * d.std(ddof=1) / 2  # Student's t, 0.975, 3 degrees of freedom; √4
    row = summary["differences"][0]
    assert (row["ft_examples"], row["metric"]) == (60, "accuracy")
    assert [row["mean"], row["low"], row["high"]] == pytest.approx([d.mean(), d.mean() - half, d.mean() + half])


def test_runs_of_one_name_are_told_apart(copied, tmp_path):
    for name in ("one", "other"):
        copied("toy", f"{name}/run")
    summary = summary_of(tmp_path, "eval", "one/run", "other/run", "--compare=2", "--measure-steps=2")
    assert len({row["method"] for row in summary["comparison"]}) == 3
    assert summary["differences"][0]["mean"] == 0


@pytest.mark.parametrize(("given", "steps", "warmup"), [
    (["--steps=100"], 100, 7), (["--steps=4000"], 4000, 200), (["--steps=100", "--warmup=50"], 100, 50), ([], 2600, 200),
])  # fmt: skip
def test_fewer_steps_alone_shrink_the_warm_up(given, steps, warmup, tmp_path, monkeypatch):
    def stop(self, *_):
        raise metapt.Failed("far enough")

    monkeypatch.setattr(metapt.Training, "run", stop)
    assert main_in(tmp_path, "meta", NOISE, "--out=run", *given)[0] == 1
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (settings["steps"], settings["warmup"]) == (steps, warmup)


def test_a_preset_is_where_settings_begin(tmp_path):
    path = toy_file(tmp_path / "toy.py")
    for given, jitter in ([], 0.1), (["--preset=calm"], 0.0), (["--preset=calm", "--jitter=0.5"], 0.5):
        out = f"run-{jitter}"
        summary_of(tmp_path, "meta", path, "--out", out, *given, *QUICK)
        settings = json.loads((tmp_path / out / "config.json").read_text())["settings"]
        assert (settings["jitter"], settings["steps"]) == (jitter, 8)


@pytest.mark.cuda
def test_a_short_meta_run_on_cuda(tmp_path):
    assert summary_of(tmp_path, "meta", "--device=cuda", *options(TINY[ROTATION]))["device"] == "cuda"


@pytest.mark.parametrize("width", [80, 60])
def test_the_progress_bar_says_it_all_in_80_columns(width, monkeypatch):
    """Step, of how many, rate, time left and φ, rendered at a fixed width."""
    out = io.StringIO()
    console = rich.console.Console(file=out, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    clock = iter(range(0, 1_000_000, 2))
    monkeypatch.setattr(rich.progress, "monotonic", lambda: float(next(clock)), raising=False)
    with metapt.progress_bar(console, "learning φ", 2600) as bar:
        for step in (500, 1000, 1500):
            bar(step, "φ -179.9")
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").strip().splitlines()[-1].rstrip()
    assert len(last) <= width
    assert "learning φ" in last and "1500/2600" in last and last.endswith("φ -179.9")
    if width == 80:
        assert re.search(r"[\d.]+/s", last) and re.search(r"\d+:\d\d:\d\d", last)


# Killed and gone on with

KILLED = """
import os, signal, sys
import metapt

metapt.CHECKPOINT_EVERY = 2
real, count, last, after = os.replace, 0, int(sys.argv.pop(1)), sys.argv.pop(1) == "after"

def replace(*names):
    global count
    count += 1
    if count == last and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*names)
    if count == last and after:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace
metapt.main()
"""


def test_a_run_that_is_killed_goes_on_to_the_same_end(runs, tmp_path):
    """SIGKILL around the writing of config.json, of the first checkpoint, and of a later one."""
    start = ["meta", NOISE, "--out=run", *options(TINY[NOISE])]
    resume = ["meta", "--resume=run"]
    for when, arguments in [("1 before", start), ("2 before", start), ("2 after", resume), ("1 before", resume)]:
        done = metapt_in(tmp_path, *when.split(), *arguments, code=KILLED, PYTHONPATH=str(ROOT))
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "run" / "summary.json").exists()
    assert main_in(tmp_path, *resume)[0] == 0
    assert outcome(tmp_path / "run") == outcome(runs / NOISE)


@pytest.mark.parametrize("name", [ROTATION, NOISE])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(name, number, runs, tmp_path, monkeypatch):
    """At a round in between checkpoints; then the process goes on, to the same end, with the handlers that it had."""
    real, meta_steps = metapt.Learner.meta_step, []

    def meta_step(self, progress):
        real(self, progress)
        meta_steps.append(1)
        if len(meta_steps) == 5:
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(metapt.Learner, "meta_step", meta_step)
        patch.setattr(metapt, "CHECKPOINT_EVERY", 1000)
        code, out, err = main_in(tmp_path, "meta", name, "--json", "--out=run", *options(TINY[name]))
    assert (code, out) == (1, "")
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    message = err.strip().splitlines()[-1]
    assert message.startswith("metapt: stopped at PT step") and message.endswith("python metapt.py meta --resume run")
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert f"stopped at PT step {saved};" in message and 0 < saved < TINY[name]["steps"]
    assert not (tmp_path / "run" / "summary.json").exists()
    assert main_in(tmp_path, "meta", "--resume", "run")[0] == 0
    assert outcome(tmp_path / "run") == outcome(runs / name)


def test_a_finished_run_can_be_resumed_and_stays_the_same(copied, runs, tmp_path):
    (copied(ROTATION) / "summary.json").unlink()  # killed after the last checkpoint
    summary_of(tmp_path, "meta", ROTATION, "--resume=run", "--kick-deg=20")
    assert outcome(tmp_path / "run") == outcome(runs / ROTATION)


@pytest.mark.parametrize("kept", [100, 0, None])
def test_metrics_of_another_length_than_the_checkpoint_says_leave_no_rubbish(kept, copied, runs, tmp_path):
    """What was written after the checkpoint is cut off; what was lost before it is said."""
    path = copied(NOISE) / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 99' if kept is None else whole[:kept])
    code, out, _ = main_in(tmp_path, "meta", "--resume=run")
    assert code == 0 and ("metrics.jsonl lacks rows that it had" in out) == (kept is not None)
    lines = whole[:kept].rpartition(b"\n")
    assert path.read_bytes() == lines[0] + lines[1]
    assert outcome(tmp_path / "run")[0] == outcome(runs / NOISE)[0]


# What cannot be used is refused in one line, and nothing is lost

BAD_OPTIONS = {  # arguments: what the line must say
    "meta digits-colour": "'digits-colour' is no domain; there are digits-rotation,",
    "meta --colour=1": "--colour",
    "train": "train",
    "eval": "runs",
    "finetune": "run",
    "download imagenet": "imagenet",
    "meta --steps=0": "--steps is 0, expected 1 or more",
    "meta --steps=many": "--steps",
    "meta --steps": "--steps",
    "meta --steps=10 --warmup=20": "--warmup is 20, expected at most the 10 steps",
    "meta --seed=-1": "--seed",
    "meta --lr=nan": "--lr is nan, expected a finite number",
    "meta --init-deg=inf": "--init-deg is inf, expected a finite number",
    "meta digits-noise --noise=1": "--noise is 1.0, expected at least 0 and less than 1",
    "meta --spread-deg=0": "--spread-deg is 0.0, expected 1 or more",
    "meta --solver=magic": "Solver.method is 'magic', expected one of identity",
    "meta --solver=nystrom --terms=2 --damping=0": "--damping is 0.0, expected positive with --solver nystrom",
    "meta --solver=neumann --preconditioner=adam": "--preconditioner is 'adam', expected nothing with --solver neumann",
    "meta --particles=x": "--particles is 'x', expected",
    "meta --preset=magic": "--preset is 'magic'; DigitsRotation has default, anywhere, paper",
    "meta --sizes=301": "--sizes is '301', expected between 1 and the 300 FT examples there are",
    "meta --device=abacus": "--device is 'abacus', expected auto, cpu, cuda or cuda:N",
    "meta --device=meta": "--device",
    "meta --device=cuda:99": "--device cuda:99: there is no such GPU here",
    "meta mnist-rotation": "about.json is missing: 'python metapt.py download mnist' prepares the data",
    "meta --resume=nowhere": "nowhere is no folder of a run",
    "pretrain --use=learned": "--use says which φ of --phi",
    "pretrain --use=best": "expected chosen or learned",
    "pretrain --phi=nowhere": "nowhere is no folder of a run",
    "finetune nowhere": "nowhere is no folder of a run",
    # options that belong elsewhere: the line says where
    "pretrain --solver=cg": "--solver belongs to meta, not to pretrain",
    "pretrain --kick-deg=1": "--kick-deg belongs to digits-rotation",
    "meta digits-rotation --noise=0.1": "--noise belongs to digits-noise, mnist-noise, not to meta digits-rotation",
    "meta --noise=0.1": "--noise belongs to digits-noise, mnist-noise, not to meta digits-rotation",
    "meta digits-noise --init-deg=3": "--init-deg belongs to digits-rotation, mnist-rotation, not to meta digits-noise",
    "meta --phi=x": "--phi belongs to pretrain, not to meta",
    "meta --export=x": "--export belongs to finetune, not to meta",
    "finetune x --steps=3": "--steps belongs to meta and pretrain, not to finetune",
    "finetune x --noise=0.1": "--noise belongs to digits-noise, mnist-noise, not to finetune",
    "eval x --export=y": "--export belongs to finetune, not to eval",
    # options without effect
    "meta --solver=identity --terms=3": "--terms has no effect with --solver identity",
    "meta --alpha=0.1": "--alpha has no effect with --solver cg",
    "meta --hvp-step=0.1": "--hvp-step has no effect with --hvp exact",
    "meta --measure-steps=10 --measure-epochs=2": "--measure-steps has no effect with --measure-epochs",
}


@pytest.mark.parametrize("line", BAD_OPTIONS)
def test_what_cannot_be_done_is_refused_in_one_line(line, tmp_path):
    message = refused(tmp_path, *line.split())
    assert BAD_OPTIONS[line] in message
    assert "--" not in message.partition(", not to ")[2]  # where it does not belong is a command
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("line", "message"), [
    ("meta --resume=digits-noise --lr=0.5", "--lr 0.5 is not what digits-noise was started with: 0.001"),
    ("meta --resume=digits-noise --out=x", "--resume"),
    ("meta --resume=digits-noise --preset=paper", "--resume"),
    ("pretrain --resume=digits-noise", "digits-noise is a run of meta"),
    ("meta mnist-noise --resume=digits-noise", "digits-noise is of the domain digits-noise, not mnist-noise"),
    ("meta --out=digits-noise --steps=5", "digits-noise is not empty"),
    ("pretrain digits-rotation --phi=digits-noise", "digits-noise is of the domain digits-noise, not digits-rotation"),
    ("pretrain digits-noise --phi=digits-noise --steps=2 --compare=0 --seed=1", "its φ was learned on other data"),
    ("pretrain digits-noise --phi=digits-noise --steps=2 --compare=0 --noise=0.25", "its φ was learned on other data"),
    ("eval digits-noise digits-rotation", "of the domain digits-rotation"),
    ("finetune digits-noise --sizes=301", "--sizes"), ("finetune digits-noise --measure-scope=tail", "--measure-scope"),
    ("finetune digits-noise --measure-lr=inf", "--measure-lr"), ("finetune digits-noise --compare=0", "--compare is 0"),
    ("finetune digits-noise --export=nowhere/encoder.pt", "nowhere is no folder"),
    ("finetune digits-noise --export=toy.py", "it is there already"),
    ("finetune digits-noise --domain=digits-rotation", "digits-noise is of the domain digits-noise, not digits-rotation"),
    ("finetune digits-noise --out=toy --export=new.pt", "toy is not empty"),
    ("finetune toy.py", "toy.py is no folder of a run"),
])  # fmt: skip
def test_runs_that_do_not_fit_what_is_asked_are_refused(runs, line, message):
    before = sorted(runs.rglob("*"))
    assert message in refused(runs, *line.split())
    assert sorted(runs.rglob("*")) == before


@pytest.mark.parametrize(("given", "message"), [
    (["--seed=1"], "--seed"), (["--noise=0.25"], "--noise"), (["--measure-steps=9"], "--measure-steps"),
    (["--measure-scope=all"], "name it, so that all have the same FT"), (["--sizes=30"], "--sizes"),
])  # fmt: skip
def test_runs_that_are_compared_must_agree_on_their_data_and_their_ft(runs, tmp_path, given, message):
    settings = {name: TINY[NOISE][name] for name in ("steps", "measure_steps", "sizes")} | {"compare": 0}
    summary_of(tmp_path, "pretrain", NOISE, "--out=other", *options(settings), *given)
    assert message in refused(tmp_path, "eval", runs / NOISE, "other", "--compare=1")
    if given[0].startswith("--measure-steps"):
        summary_of(tmp_path, "eval", runs / NOISE, "other", "--compare=1", "--measure-steps=2", "--sizes=30")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


def spoil(path: Path, kind: str, runs: Path) -> None:
    whole = path.read_bytes()
    if kind in ("torn", "nearly whole", "empty"):
        return path.write_bytes(whole[: {"torn": len(whole) // 2, "nearly whole": len(whole) - 50, "empty": 0}[kind]])
    if kind == "of another domain":
        return path.write_bytes((runs / ROTATION / "checkpoint.pt").read_bytes())
    content = torch.load(path, weights_only=True)
    if kind == "of other networks":
        content["learners"][0]["network"]["encoder.classifier.weight"] = torch.zeros(3, 3)
    elif kind.startswith("without "):
        name = kind.removeprefix("without ")
        content = content | {"learners": []} if name == "a learner" else {k: v for k, v in content.items() if k != name}
    alien = {"hostile": Hostile(), "foreign": {"weight": torch.ones(3)}, "a list": [1]}
    return torch.save(alien.get(kind, content), path)


@pytest.mark.parametrize("kind", ["torn", "nearly whole", "empty", "hostile", "foreign", "a list", "of another domain",
                                  "of other networks", "without a learner", "without learners", "without random",
                                  "without step", "without metrics_bytes", "without phi"])  # fmt: skip
def test_bad_checkpoints_are_refused_and_kept(kind, copied, runs, tmp_path):
    folder = copied(NOISE)
    spoil(folder / "checkpoint.pt", kind, runs)
    before = contents(folder)
    commands = [["meta", "--resume=run"], ["finetune", "run"], ["eval", "run"], ["pretrain", NOISE, "--phi=run"]]
    whole = {"of other networks": 3, "without random": 1, "without a learner": 3}  # φ is whole, or an encoder is
    for arguments in commands[: whole.get(kind, 4)]:
        assert "run" in refused(tmp_path, *arguments)
    assert contents(folder) == before
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("change", [None, "{", "[]", "{}", "[" * 100_000, {"format": "metapt 0"}, {"command": "finetune"},
                                    {"domain": 3}, {"domain": "nothing"}, {"device": None}, {"settings": []}, {"phi": 3},
                                    "without settings", "without a setting", "with a setting", "with a bad setting"],
                         ids=lambda change: str(change)[:20])  # fmt: skip
def test_bad_configs_are_refused_and_kept(change, copied, tmp_path):
    folder = copied(NOISE)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if change is None:
        path.unlink()
    elif isinstance(change, dict):
        path.write_text(json.dumps(config | change))
    elif change.startswith("with"):
        del config["settings" if change == "without settings" else "torch"]
        if change == "without a setting":
            del config["settings"]["noise"]
        elif change != "without settings":
            config["settings"] |= {"colour": 1} if change == "with a setting" else {"noise": 2.0}
        path.write_text(json.dumps(config))
    else:
        path.write_text(change)
    before = contents(folder)
    for arguments in (["meta", "--resume=run"], ["finetune", "run"], ["pretrain", NOISE, "--phi=run"]):
        phi_alone = arguments[0] == "pretrain" and isinstance(change, str) and change.startswith("with ")
        if not phi_alone and change != "without a setting":
            message = refused(tmp_path, *arguments)
            assert "config.json" in message or change == {"domain": "nothing"} and "nothing" in message
    assert contents(folder) == before
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("line", ["rubbish", "[]", "3", "{}", '{"step": 3}'])
def test_alien_metrics_are_refused_and_kept(line, copied, tmp_path):
    folder = copied(NOISE)
    first, *others = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([line.ljust(len(first) - 1) + "\n", *others]))
    before = contents(folder)
    assert "metrics.jsonl: line 1" in refused(tmp_path, "meta", "--resume=run")
    assert contents(folder) == before


@pytest.mark.parametrize("content", [Hostile(), [1], None, {1: 2}, {"layers.1.weight": "text"}, {"weight": torch.ones(3)}],
                         ids=lambda content: type(content).__name__)  # fmt: skip
def test_bad_encoder_files_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "encoder.pt")
    assert "encoder.pt" in refused(tmp_path, "finetune", "encoder.pt", f"--domain={NOISE}")
    assert not (tmp_path / "hostile-was-here").exists()


def test_an_out_that_is_not_empty_is_kept(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for out in ("full", "file", "file/below"):
        assert out in refused(tmp_path, "meta", "--steps=5", "--out", out)
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "precious"
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]


def test_an_error_of_the_programs_own_is_no_bad_input(tmp_path, monkeypatch):
    monkeypatch.setattr(metapt.Learner, "pretrain_step", lambda self, progress: 1 / 0)
    monkeypatch.setattr("sys.argv", ["metapt.py", "meta", "--out", str(tmp_path / "run"), *QUICK])
    with pytest.raises(ZeroDivisionError):
        metapt.main()
    for error in (metapt.Failed("it is over"), OSError(28, "No space left"), KeyboardInterrupt()):
        monkeypatch.setattr(metapt.Learner, "pretrain_step", mock.Mock(side_effect=error))
        code, out, err = main_in(tmp_path, "meta", *QUICK, "--json")
        assert (code, out) == (1, "")
        assert err.strip().splitlines()[-1].startswith("metapt: ")


# Help


def help_of(folder: Path, *arguments) -> tuple[str, dict[str, str]]:
    """What --help prints at 100 columns, and the lines of its options by name."""
    with mock.patch.dict(os.environ, {"COLUMNS": "100", "TERMINAL_WIDTH": "100"}):
        code, out, err = main_in(folder, *arguments, "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    return out, {name: line for line in out.splitlines() for name in re.findall(r"^│ \*? *--([a-z-]+)", line)}


@pytest.mark.parametrize("name", metapt.DOMAINS)
@pytest.mark.parametrize("command", ["meta", "pretrain"])
def test_help_shows_the_options_of_the_command_and_the_domain_with_their_defaults(command, name, tmp_path):
    kind = find_domain(name)
    out, shown = help_of(tmp_path, command, name)
    fields = metapt.dataclasses.fields(kind.Settings)
    wanted = [f for f in fields if command == "meta" or not f.metadata["learning"]]
    general = {"preset", "resume", "device", "data", "out", "json", "help"} | {"pretrain": {"phi", "use"}}.get(
        command, set()
    )
    assert set(shown) == {f.name.replace("_", "-") for f in wanted} | general
    assert ("meta-lr" in shown) == ("solver" in shown) == (command == "meta")
    for f in wanted:
        default = "none" if f.default in (None, "") else str(f.default)
        assert f"[{default}]" in out, f.name
    for preset in kind.presets:
        assert preset in out
    assert name in out
    assert len(out.splitlines()) <= 100


def test_help_without_a_domain_of_a_resumed_run_and_of_a_file(runs, tmp_path):
    assert set(help_of(tmp_path, "meta")[1]) == set(help_of(tmp_path, "meta", ROTATION)[1])
    assert "noise" in help_of(tmp_path, "meta", "--resume", runs / NOISE)[1]
    assert "noise" in help_of(tmp_path, "meta", "--json", f"--resume={runs / NOISE}")[1]
    out, shown = help_of(tmp_path, "meta", runs / "toy.py")
    assert "[0.1]" in shown["jitter"] and "init-deg" not in shown
    assert "calm" in out


@pytest.mark.parametrize("command", ["finetune", "eval", "download"])
def test_help_of_the_other_commands(command, tmp_path):
    out, shown = help_of(tmp_path, command)
    assert len(out.splitlines()) <= 45
    if command == "download":
        return
    measuring = {f"measure-{name}" for name in ("scope", "lr", "steps", "epochs", "batch-size")} | {"compare", "sizes"}
    own = {"export", "force"} if command == "finetune" else set()
    assert set(shown) == measuring | own | {"domain", "device", "data", "out", "json", "help"}


def test_no_command_shows_them_all(tmp_path):
    code, out, err = main_in(tmp_path)
    assert code in (0, 2)
    assert all(command in out + err for command in ("Usage", "download", "pretrain", "meta", "finetune", "eval"))
    assert err.strip() != "metapt:"


# A domain of one's own


def test_a_domain_of_a_file_is_found_by_all_commands(copied, tmp_path):
    path = toy_file(tmp_path / "mine.py")
    summary = summary_of(tmp_path, "meta", "mine.py", "--jitter=0.25", "--out=run", *QUICK)
    assert summary["domain"] == f"{path}:Toy"
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["settings"]["jitter"], len(config["domain_sha256"])) == (0.25, 64)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "summary.json").unlink()
    again = summary_of(tmp_path / "elsewhere", "meta", "--resume=../run")  # the path in config.json is absolute
    assert again["validation_loss"] == summary["validation_loss"]
    frozen = summary_of(
        tmp_path, "pretrain", "mine.py:Toy", "--phi=run", "--jitter=0.25", "--out=frozen", "--compare=0"
    )
    assert frozen["phi"] == summary["phi"]
    common = ["--compare=1", "--measure-steps=2", "--sizes=5"]
    assert summary_of(tmp_path, "finetune", "run", "--export=e.pt", *common)["domain"] == summary["domain"]
    rows = summary_of(tmp_path, "eval", "run", "frozen", *common)["differences"]
    assert [row["method"] for row in rows] == ["learned_phi", "no_pretraining"]
    assert "--jitter is -1.0, expected 0 or more" in refused(tmp_path, "meta", "mine.py", "--jitter=-1")


WITH_TWO = "\n\nclass Other(Toy):\n    pass\n"
BROKEN_FILES = {
    "two.py": (WITH_TWO, "it defines Toy, Other: name one, as two.py:Toy"),
    "two.py:Third": (WITH_TWO, "has no domain Third"),
    "none.py": ("\n\ndel Toy\n", "it defines none"),
    "syntax.py": ("\n\ndef f(:\n", "syntax.py, line {end}: SyntaxError"),
    "import.py": ("\n\nimport nothing_of_that_name\n", "import.py, line {end}: ModuleNotFoundError"),
    "lacking.py": ("\n\nclass Lack(Toy):\n    targets = metapt.Domain.targets\n\n\ndel Toy\n", "Lack lacks targets, which every domain needs"),
    "loss.py": ("\n\nToy.pretrain_loss = lambda self, network, *_, live: lambda theta, phi: theta['head.bias'].sum()\n",
                "Toy.pretrain_loss does not depend on φ"),
    "settings.py": ("\n\nclass Bad(metapt.Settings, steps=0):\n    pass\n\n\nToy.Settings = Bad\n", "--steps is 0"),
    "missing.py": (None, "missing.py, which defines the domain missing.py, is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_file_that_defines_no_usable_domain_is_refused(name, tmp_path):
    more, message = BROKEN_FILES[name]
    path = tmp_path / name.partition(":")[0]
    if more is not None:
        end = len(toy_file(path, more).read_text().splitlines())
        message = message.format(end=end)
    assert message in refused(tmp_path, "meta", name, *QUICK)
    assert not (tmp_path / "runs").exists()


def test_files_of_one_content_in_two_folders_are_two_domains(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        path = toy_file(tmp_path / name / "toy.py")
        path.write_text(path.read_text().replace(str(path), ""))
        assert summary_of(tmp_path, "meta", path, "--out", f"{name}/run", *QUICK)["domain"] == f"{path}:Toy"
    summary = summary_of(tmp_path, "finetune", "one/run", "--compare=1", "--measure-steps=2")
    assert summary["domain"] == f"{tmp_path / 'one' / 'toy.py'}:Toy"


def test_one_of_several_domains_of_a_file_can_be_named(tmp_path):
    toy_file(tmp_path / "two.py", WITH_TWO)
    assert summary_of(tmp_path, "meta", "two.py:Other", *QUICK)["domain"].endswith("two.py:Other")
    assert (tmp_path / "runs" / "meta-two-Other").is_dir()


def test_a_file_may_have_its_annotations_as_text(tmp_path):
    path = toy_file(tmp_path / "late.py")
    path.write_text("from __future__ import annotations\n\n" + path.read_text())
    assert summary_of(tmp_path, "meta", "late.py", "--jitter=0.5", *QUICK)["pt_steps"] == 8


def test_a_run_never_supplies_code(copied, tmp_path):
    toy_file(copied("toy") / "toy.py", "\n\nraise SystemExit('code of a run was executed')\n")
    assert "lies in the run" in refused(tmp_path, "meta", "run/toy.py", *QUICK)


def test_a_file_that_has_changed_is_used_only_where_it_is_named_again(tmp_path):
    path = toy_file(tmp_path / "toy.py")
    summary_of(tmp_path, "meta", "toy.py", "--out=run", *QUICK)
    path.write_text(path.read_text() + "\n# changed\n")
    common = ["--compare=1", "--measure-steps=2", "--sizes=5"]
    for command in (["meta", "--resume=run"], ["finetune", "run", *common], ["eval", "run", *common]):
        assert "toy.py has changed since" in refused(tmp_path, *command)
    for command in (["meta", "toy.py", "--resume=run"], ["finetune", "run", "--domain=toy.py", *common]):
        code, out, err = main_in(tmp_path, *command)
        assert code == 0, err
        assert "has changed since" in " ".join(out.split())
    path.unlink()
    assert "toy.py" in refused(tmp_path, "finetune", "run")


ONE_MODULE = "\n\nimport sys\nassert metapt is sys.modules['__main__'] is sys.modules['metapt']\n"


def test_metapt_is_one_module_as_a_script_and_imported(tmp_path):
    toy_file(tmp_path / "toy.py", ONE_MODULE)
    done = metapt_in(tmp_path, "meta", "toy.py", "--json", *QUICK)
    assert done.returncode == 0, done.stderr
    assert strict_json(done.stdout)["pt_steps"] == 8


# Alone, and downloads


def test_the_file_alone_works_and_says_where_the_rest_is(tmp_path, monkeypatch):
    """Copied away with nothing beside it: in a process of its own for the digits, else as if it lay there."""
    (tmp_path / "alone").mkdir()
    copy = shutil.copy(ROOT / "metapt.py", tmp_path / "alone")
    start = f"import runpy, sys\nsys.argv[0] = {copy!r}\nrunpy.run_path({copy!r}, run_name='__main__')"
    done = metapt_in(tmp_path, "meta", NOISE, "--json", *QUICK, code=start, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert strict_json(done.stdout)["meta_steps"] == 2
    monkeypatch.setattr(metapt, "HERE", tmp_path / "alone")
    for name in ("ppi", "ecg"):
        message = refused(tmp_path, "meta", name)
        assert f"bench/domains/{name}.py of metapt's repository" in message
    for name in ("mnist", "ecg", "ppi"):
        assert "copy the folder data_scripts of metapt's repository there" in refused(tmp_path, "download", name)


@pytest.mark.parametrize(("data", "script"), [
    (["mnist"], "mnist.py"), (["ecg"], "ptbxl.py"), (["ppi"], "hu_graphs.py"),
    (["ppi", "--source", "published"], "hu_graphs.py"), (["ppi", "--source", "string-yeast"], "string_graphs.py"),
], ids=" ".join)  # fmt: skip
def test_download_passes_options_and_exit_status_on(data, script, tmp_path, monkeypatch):
    (tmp_path / "data_scripts").mkdir()
    stub = "import json, sys\nopen('called.json', 'w').write(json.dumps(sys.argv))\nsys.exit(int(sys.argv[-1]))\n"
    (tmp_path / "data_scripts" / script).write_text(stub)
    monkeypatch.setattr(metapt, "HERE", tmp_path)
    for status in (0, 2, 1):
        code, out, err = main_in(tmp_path, "download", *data, "--from", "a b", "--check", status)
        assert (code, out, err) == (status, "", "")
    called = json.loads((tmp_path / "called.json").read_text())
    assert Path(called[0]).name == script
    assert called[1:] == ["--from", "a b", "--check", "1"]
    if data == ["ppi"]:
        assert "--source" in refused(tmp_path, "download", "ppi", "--source", "nowhere")


# The project


def test_the_project_is_laid_out_as_the_design_says():
    for name in ("README.md", "LICENSE", "metapt.py", "requirements.txt", "bench/domains/ppi.py", "bench/domains/ecg.py",
                 *(f"data_scripts/{name}.py" for name in ("mnist", "ptbxl", "hu_graphs", "string_graphs", "files", "graphs"))):  # fmt: skip
        assert (ROOT / name).is_file(), name
    tests = {f"test_{name}.py" for name in (
        "hypergradient", "loop", "images", "commands", "structure", "readme", "ppi", "ecg", "affine", "horizon", "worth", "ranks", "precision", "data_scripts",
        "faults")}  # fmt: skip
    assert {path.name for path in (ROOT / "tests").glob("test_*.py")} == tests


def test_the_scripts_own_requirements_are_those_of_the_project():
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", (ROOT / "metapt.py").read_text(), re.MULTILINE)[1]
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    requirements = (ROOT / "requirements.txt").read_text().split()
    assert set(metadata["dependencies"]) < set(requirements)  # the same ranges
    assert "torch==2.13.0" in requirements
    assert all(re.search("[<=]", line) for line in requirements)
    names = {re.split("[<>=]", line)[0].replace("scikit-learn", "sklearn") for line in metadata["dependencies"]}
    text = (ROOT / "metapt.py").read_text()
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.MULTILINE)) - set(metapt.sys.stdlib_module_names)
    assert imported - {"scipy"} == names  # scipy comes with scikit-learn


def test_a_setting_that_is_on_is_turned_off_by_an_option_with_hyphens():
    (option,) = (p for p in metapt.command_line(["meta", "ppi"]).commands["meta"].params if p.name == "base_rates")
    assert (option.opts, option.secondary_opts) == (["--base-rates"], ["--no-base-rates"])
