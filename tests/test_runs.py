"""Chapter 7, run folders: damaged and altered files, two processes, kills, full disks.

A file that cannot be used is refused in one line, and nothing is lost.
"""

import contextlib
import io
import json
import os
import resource
import shlex
import shutil
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch
from tools import (
    KILLED,
    ROOT,
    TINY,
    contents,
    main_in,
    metapt_in,
    options,
    outcome,
    refused,
    rewrite,
    spy,
    strict_json,
    summary_of,
    toy_file,
)

import metapt

ROTATION = "digits-rotation"
NOISE = "digits-noise"
STEPS = 16
QUICK = [f"--steps={STEPS}", "--warmup=4", "--compare=0"]
MEASURE = ["--compare=1", "--measure-steps=2", "--sizes=5"]
# In place of a value: the key is removed.
NONE = object()
NAN = float("nan")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A toy domain, a whole run of it, and a run that was stopped half-way; not to be changed."""
    folder = tmp_path_factory.mktemp("home")
    toy_file(folder / "toy.py")

    def stop(run, training):
        save(run, training)
        if training.step == STEPS // 2:
            raise metapt.Failed("half of it will do")

    save = metapt.Run.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metapt, "CHECKPOINT_EVERY", 1)
        for name, code in {"run": 0, "half": 1}.items():
            if name == "half":
                patch.setattr(metapt.Run, "save_checkpoint", stop)
            arguments = ["meta", "toy.py", "--out", name, *QUICK]
            assert main_in(folder, *arguments)[0] == code
    return folder


@pytest.fixture
def run(home, tmp_path):
    """A copy of the whole run, and nothing beside it."""
    return Path(shutil.copytree(home / "run", tmp_path / "run"))


@pytest.fixture
def half(home, tmp_path):
    """A copy of the run that was stopped half-way, and nothing beside it."""
    return Path(shutil.copytree(home / "half", tmp_path / "half"))


@pytest.fixture(autouse=True)
def frequent_checkpoints(monkeypatch):
    monkeypatch.setattr(metapt, "CHECKPOINT_EVERY", 1)


def altered(content, path: str, value) -> None:
    """Sets a value, or what a function makes of it, at a path such as settings/steps."""
    *parents, last = (int(key) if key.isdecimal() else key for key in path.split("/"))
    for key in parents:
        content = content[key]
    if value is NONE:
        del content[last]
    elif callable(value):
        content[last] = value(content[last])
    else:
        content[last] = value


def named(part) -> str:
    return "none" if part is NONE else repr(part)[:20]


def names_in(folder: Path) -> set[str]:
    """What a folder holds, with what begins with a dot, but for the lock."""
    return {path.name for path in folder.iterdir()} - {".lock"}


def readers(home: Path, run: str = "run") -> list[list]:
    """The commands that read a run."""
    return [
        ["meta", f"--resume={run}"],
        ["finetune", run, *MEASURE],
        ["eval", run, *MEASURE],
        ["pretrain", home / "toy.py", f"--phi={run}", "--use=learned", *QUICK[::2]],
    ]


# ------------------------------------------------------------------------------------------------
# Altered files


CONFIG = [
    ("format", "metapt 2"),
    ("format", 3),
    ("format", None),
    ("format", NONE),
    ("command", "finetune"),
    ("command", []),
    ("command", NONE),
    ("domain", 3),
    ("domain", "nothing"),
    ("domain", "a\0b.py"),
    ("domain", "\ud800.py"),
    ("domain", "x" * 5000 + ".py"),
    ("domain", ["toy.py"]),
    ("domain", NONE),
    ("domain_sha256", 3),
    ("domain_sha256", NONE),
    ("phi", 3),
    ("phi", NONE),
    ("device", None),
    ("data", 3),
    ("data", "0" * 64),
    ("settings", []),
    ("settings", NONE),
    ("settings/particles", 3),
    ("settings/colour", 1),
    ("settings/sizes", "30,,60"),
    ("settings/sizes", "9" * 5000),
    ("settings/sizes", 30),
    ("settings/seed", 1.5),
    ("settings/seed", -1),
    ("settings/seed", True),
    ("settings/batch_size", 64.0),
    ("settings/batch_size", 0),
    ("settings/batch_size", "64"),
    ("settings/steps", -7),
    ("settings/steps", None),
    ("settings/warmup", 10**9),
    ("settings/lr", NAN),
    ("settings/lr", float("inf")),
    ("settings/lr", 1e38),
    ("settings/lr", 10**400),
    ("settings/lr", "fast"),
    ("settings/cosine", 1),
    ("settings/meta_lr", 1e38),
    ("settings/solver", "magic"),
    ("settings/solver", 3),
    ("settings/terms", -1),
    ("settings/alpha", "x"),
    ("settings/hvp", None),
    ("settings/hvp_step", -1.0),
    ("settings/average", 1.0),
    ("settings/unroll_scope", "tail"),
    ("settings/jitter", -1.0),
    ("settings/jitter", [0.1]),
]


@pytest.mark.parametrize(("path", "value"), CONFIG, ids=named)
def test_a_config_that_cannot_be_is_refused(path, value, run, tmp_path):
    rewrite(run, lambda config: altered(config, path, value))
    before = contents(run)
    for command in (["meta", "--resume=run"], ["finetune", "run", *MEASURE]):
        message = refused(tmp_path, *command)
        # A domain that does not exist, and other data, are named themselves.
        assert "run/config.json" in message or path in ("domain", "data")
    key = path.rpartition("/")[2]
    if len(str(value)) < 50 and path != "domain":
        says = (key, metapt.flag(key), "Solver.method", "--hvp", f"run of {value!r}", "other data")
        assert any(words in message for words in says)
    assert contents(run) == before
    assert set(os.listdir(tmp_path)) == {"run"}


@pytest.mark.parametrize("value", ["metapt 2", "metapt 4", None])
def test_a_run_of_an_earlier_format_is_one_line(value, run, home, tmp_path):
    rewrite(run, lambda config: altered(config, "format", value))
    for command in readers(home):
        message = refused(tmp_path, *command)
        assert f"its format is {value!r}, this metapt reads {metapt.FORMAT!r}" in message


def test_a_plausible_altered_setting_is_believed(half, tmp_path):
    path = half / "config.json"
    config = json.loads(path.read_text())
    altered(config, "settings/lr", 0.5)
    path.write_text(json.dumps(config, separators=(",", ":")))
    assert summary_of(tmp_path, "meta", "--resume=half")["pt_steps"] == STEPS


JSON = [
    "",
    "{",
    "[]",
    "3",
    "null",
    '"text"',
    "[" * 200_000,
    '{"a":' * 200_000,
    b"\xff\xfe",
    b"\0" * 99,
    "9" * 5000,
]


@pytest.mark.parametrize("content", JSON, ids=lambda content: repr(content)[:12])
def test_a_config_that_is_something_else_is_refused_and_kept(content, run, home, tmp_path):
    if isinstance(content, str):
        content = content.encode()
    (run / "config.json").write_bytes(content)
    before = contents(run)
    for command in readers(home):
        message = refused(tmp_path, *command)
        assert "run/config.json is not what this metapt writes" in message
    assert contents(run) == before
    assert set(os.listdir(tmp_path)) == {"run"}


def test_a_run_without_its_config_is_refused(run, home, tmp_path):
    (run / "config.json").unlink()
    for command in readers(home):
        assert "run is not a run that can be used: it has no config.json" in refused(
            tmp_path, *command
        )


OTHER = torch.zeros(3, 3)
CHECKPOINT = [
    ("format", "metapt 2"),
    ("format", 3),
    ("format", NONE),
    ("step", "5"),
    ("step", None),
    ("step", 5.0),
    ("step", NONE),
    ("training", []),
    ("training", {}),
    ("training", None),
    ("training", NONE),
    ("training/step", "5"),
    ("training/step", 7),
    ("training/step", None),
    ("training/random", OTHER),
    ("training/random", "x"),
    *((f"training/{name}", NONE) for name in ("batches", "random", "losses", "seconds", "step")),
    *((f"training/{name}", NONE) for name in ("psi", "ft_states", "skipped", "meta_steps")),
    ("training/batches", {}),
    ("training/batches", None),
    ("training/batches/meta", (1, 2, 3)),
    ("training/losses", None),
    *((f"training/{name}", {}) for name in ("network", "meta", "optimizer", "meta_optimizer")),
    *((f"training/{name}", NONE) for name in ("network", "meta", "optimizer", "meta_optimizer")),
    ("training/network/head.bias", OTHER),
    ("training/network/head.bias", "x"),
    ("training/network/head.bias", NONE),
    ("training/network/head.bias", lambda bias: bias.to("meta")),
    ("training/network/encoder.1.num_batches_tracked", 3),
    ("training/network/more", OTHER),
    ("training/meta/weight", OTHER),
    ("training/meta/weight", NONE),
    ("training/meta/more", OTHER),
    ("training/optimizer/param_groups", []),
    ("training/optimizer/state", NONE),
]


@pytest.mark.parametrize(("path", "value"), CHECKPOINT, ids=named)
def test_a_checkpoint_that_does_not_fit_is_refused(path, value, half, tmp_path):
    """Its sum is right: what torch and the types of its contents notice."""
    rewrite(half, checkpoint=lambda content: altered(content, path, value))
    before = contents(half)
    message = refused(tmp_path, "meta", "--resume=half")
    assert "half/checkpoint.pt is not what this metapt writes" in message
    if "network" in path or "/" not in path:
        code, _, err = main_in(tmp_path, "finetune", "half", *MEASURE)
        assert code == 2
        assert "half/checkpoint.pt is not what this metapt writes" in err
        assert err.count("\n") == 1
    assert contents(half) == before
    assert set(os.listdir(tmp_path)) == {"half"}


@pytest.mark.parametrize("value", [{}, None, {"weight": OTHER}, {"weight": "x"}, {"a": OTHER}])
def test_a_phi_that_does_not_fit_is_refused(value, home, run, tmp_path):
    rewrite(run, checkpoint=lambda content: content.update(phi=value))
    assert "run: its φ does not fit Toy" in refused(tmp_path, *readers(home)[-1])


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


@pytest.mark.parametrize("kind", ["hostile", "foreign", "a list", "of another domain"])
def test_checkpoints_of_other_things_are_refused_and_kept(kind, home, half, tmp_path):
    if kind == "of another domain":
        training = metapt.Training(
            metapt.DigitsRotation(metapt.DigitsRotation.Settings(), torch.device("cpu"), Path()),
            learn=True,
        )
        metapt.Run(half).save_checkpoint(training)
    else:
        alien = {"hostile": Hostile(), "foreign": {"weight": torch.ones(3)}, "a list": [1]}
        content = metapt.saved_bytes(alien[kind])
        (half / "checkpoint.pt").write_bytes(metapt.with_checksum(content))
    before = contents(half)
    for command in readers(home, "half"):
        code, _, err = main_in(tmp_path, *command)
        assert code == 2
        of_phi = kind == "of another domain" and command[0] == "pretrain"
        says = "half: its φ does not fit Toy"
        if not of_phi:
            says = "half/checkpoint.pt is not what this metapt writes"
        assert says in err
        assert err.count("\n") == 1
    assert contents(half) == before
    assert set(os.listdir(tmp_path)) == {"half"}


ROWS = [
    b"rubbish",
    b"[]",
    b"3",
    b"{}",
    b'{"step": "3"}',
    b'{"step": 3.5}',
    b'{"step": 3, "loss": "x"}',
    b'{"step": 3, "loss": ' + b"9" * 400 + b"}",
    b"\xff",
]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("line", [0, -1])
def test_metrics_of_another_kind_are_refused_and_kept(line, row, half, tmp_path):
    lines = (half / "metrics.jsonl").read_bytes().splitlines()
    lines[line] = row.ljust(len(lines[line]))
    (half / "metrics.jsonl").write_bytes(b"".join(each + b"\n" for each in lines))
    before = contents(half)
    assert "metrics.jsonl is not what" in refused(tmp_path, "meta", "--resume=half")
    assert contents(half) == before


@pytest.mark.parametrize("content", ["{}", "[]", "3", '{"chosen": 3}', "{"])
def test_a_damaged_summary_is_refused_or_without_a_choice(content, home, run, tmp_path):
    (run / "summary.json").write_text(content)
    arguments = ("pretrain", home / "toy.py", "--phi=run", "--compare=0", "--out=afresh")
    if content == "{}":
        # As without a comparison.
        assert main_in(tmp_path, *arguments)[0] == 0
    else:
        assert "summary.json" in refused(tmp_path, *arguments)


# ------------------------------------------------------------------------------------------------
# Damaged files


def flip(content: bytearray, place: int) -> None:
    content[place] ^= 1


def zeros(content: bytearray, place: int) -> None:
    length = len(content[place : place + 512])
    content[place : place + 512] = bytes(length)


def cut(content: bytearray, place: int) -> None:
    del content[place:]


@pytest.mark.parametrize("damage", [flip, zeros, cut])
@pytest.mark.parametrize("share", [0, 0.3, 0.6, 0.9, 1])
def test_a_damaged_checkpoint_is_refused_and_kept(damage, share, home, half, tmp_path):
    content = bytearray((half / "checkpoint.pt").read_bytes())
    damage(content, round(share * (len(content) - 2)))
    (half / "checkpoint.pt").write_bytes(content)
    before = contents(half)
    for command in readers(home, "half"):
        message = refused(tmp_path, *command)
        assert "half/checkpoint.pt is not what this metapt writes" in message
        assert "it is damaged" in message
    assert contents(half) == before


def test_a_finished_run_whose_checkpoint_is_lost_is_not_begun_again(home, run, tmp_path):
    """But one that was killed before its first checkpoint is, though it has metrics."""
    (run / "checkpoint.pt").unlink()
    before = contents(run)
    for command in readers(home):
        assert "it has no checkpoint.pt" in refused(tmp_path, *command)
    assert contents(run) == before
    for name in set(before) - {"config.json", "metrics.jsonl"}:
        (run / name).unlink()
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"torn')
    assert main_in(tmp_path, "meta", "--resume=run")[0] == 0
    assert outcome(run) == outcome(home / "run")


@pytest.mark.parametrize("kept", [100, 0, None])
def test_metrics_longer_or_shorter_than_the_checkpoint_leave_no_rubbish(kept, run, home, tmp_path):
    """What was written after the checkpoint is cut off, and so is a row that is torn."""
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    if kept is None:
        path.write_bytes(whole + b'{"step": 99}\n{"step": 99')
    else:
        path.write_bytes(whole[:kept])
    assert main_in(tmp_path, "meta", "--resume=run")[0] == 0
    expected = whole if kept is None else whole[: whole[:kept].rfind(b"\n") + 1]
    assert path.read_bytes() == expected
    assert outcome(run)[0] == outcome(home / "run")[0]


# ------------------------------------------------------------------------------------------------
# Numbers that cannot be


@pytest.mark.parametrize("given", [["--lr=1e30"], ["--meta-lr=1e30"], ["--unroll-lr=1e30"]])
def test_a_run_that_leaves_all_numbers_ends_in_one_line_or_goes_on(given, home, tmp_path):
    arguments = ["meta", home / "toy.py", "--out=run", "--json", *given, *QUICK]
    code, out, err = main_in(tmp_path, *arguments)
    if code:
        last = err.strip().splitlines()[-1]
        assert code == 1
        assert last.startswith("metapt: ")
        assert "finite" in last or "usable" in last
    else:
        strict_json(out)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
            strict_json(line)


def test_a_phi_that_is_not_finite_leaves_strict_json_and_is_not_used(home, tmp_path, monkeypatch):
    real = metapt.Training.meta_step

    def meta_step(self):
        real(self)
        if self.step == STEPS:
            next(self.meta.parameters()).data.fill_(NAN)

    monkeypatch.setattr(metapt.Training, "meta_step", meta_step)
    code, out, err = main_in(tmp_path, "meta", home / "toy.py", "--out=run", "--json", *QUICK)
    if code == 0:
        strict_json(out)
        strict_json((tmp_path / "run" / "summary.json").read_text())
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
            strict_json(line)
        assert "not finite" in refused(tmp_path, *readers(home)[-1])
        phi = ["pretrain", home / "toy.py", "--phi=run/phi.pt"]
        assert "weight is not finite" in refused(tmp_path, *phi)
    else:
        assert code == 1
        assert "finite" in err.strip().splitlines()[-1]


# ------------------------------------------------------------------------------------------------
# Folders and files of the user's


def test_a_folder_of_the_users_is_not_touched(home, tmp_path):
    (tmp_path / "mine").mkdir()
    files = {".metapt-notes.txt": b"mine", ".checkpoint.pt.new": b"too"}
    for name, content in files.items():
        (tmp_path / "mine" / name).write_bytes(content)
    for command in (["meta", home / "toy.py"], ["finetune", home / "run"]):
        message = refused(tmp_path, *command, "--out=mine")
        assert "mine is not empty: name another --out" in message
    assert {path.name for path in (tmp_path / "mine").iterdir()} == set(files)
    assert {path.read_bytes() for path in (tmp_path / "mine").iterdir()} == set(files.values())


def test_an_out_that_is_not_empty_is_kept(home, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for out in ("full", "file", "file/below"):
        assert out in refused(tmp_path, "meta", home / "toy.py", *QUICK, "--out", out)
    assert (tmp_path / "full" / "mine").read_text() == "precious"
    assert (tmp_path / "file").read_text() == "precious"
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_advice_on_a_folder_that_is_not_empty_can_be_followed(home, run, tmp_path):
    """A run of `finetune` cannot be gone on with, and nobody is told to."""
    assert main_in(tmp_path, "finetune", "run", "--out=f", *MEASURE)[0] == 0
    (tmp_path / "f" / "summary.json").unlink()
    for command in (["finetune", "run", "--out=f"], ["eval", "run", "--out=f"]):
        message = refused(tmp_path, *command, *MEASURE)
        assert "f is not empty: name another --out" in message
        assert "--resume" not in message
    assert "--resume" not in refused(tmp_path, "finetune", "run", "--out=run", *MEASURE)
    message = refused(tmp_path, "meta", home / "toy.py", "--out=f")
    assert "--resume" not in message
    copy = shutil.copytree(run, tmp_path / "a [b]  'c'")
    message = refused(tmp_path, "meta", home / "toy.py", "--out", copy.name)
    words = shlex.split(message.partition("go on with ")[2])
    assert words == ["--resume", copy.name]
    assert main_in(tmp_path, "meta", *words)[0] == 0


def test_an_export_replaces_a_file_only_with_force_and_never_one_of_a_run(run, tmp_path):
    precious = ("mine.pt", "mine.pt.part", ".mine.pt.x")
    for name in precious:
        (tmp_path / name).write_text("precious")
    (tmp_path / "link.pt").symlink_to(run / "checkpoint.pt")
    (tmp_path / "door").symlink_to(run)
    (tmp_path / "folder").mkdir()
    (tmp_path / "new").mkdir()
    before = contents(run)
    cases = [
        ("mine.pt", [], "mine.pt is there already (--force replaces a file)"),
        ("folder", ["--force"], "is there already"),
        ("/dev/null", ["--force"], "is there already"),
        ("nowhere/mine.pt", ["--force"], "nowhere is no folder"),
        ("new/config.json", ["--out=new"], "lies in a run's folder"),
    ]
    inside = ("checkpoint.pt", "config.json", "new.pt")
    for export in (*(f"run/{name}" for name in inside), "link.pt", "door/checkpoint.pt"):
        cases.append((export, [], "lies in a run's folder"))
        cases.append((export, ["--force"], "lies in a run's folder"))
    for export, given, says in cases:
        message = refused(tmp_path, "finetune", "run", f"--export={export}", *given, *MEASURE)
        assert says in message, export
    assert contents(run) == before
    assert not (tmp_path / "runs").exists()
    assert not list((tmp_path / "new").iterdir())
    assert {(tmp_path / name).read_text() for name in precious} == {"precious"}

    summary_of(tmp_path, "finetune", "run", "--export=mine.pt", "--force", *MEASURE)
    network = metapt.Run(run).load_checkpoint()["training"]["network"]
    encoder = [name for name in network if name.startswith("encoder.")]
    exported = torch.load(tmp_path / "mine.pt", weights_only=True)
    assert list(exported) == [name.removeprefix("encoder.") for name in encoder]
    assert {(tmp_path / name).read_text() for name in precious[1:]} == {"precious"}


def test_an_export_never_replaces_a_file_of_any_run(home, run, tmp_path):
    shutil.copytree(home / "run", tmp_path / "other")
    before = contents(run)
    arguments = ["finetune", "other", "--export=run/checkpoint.pt", "--force", *MEASURE]
    assert "a run" in refused(tmp_path, *arguments)
    assert contents(run) == before


def modes(folder: Path) -> dict[str, int]:
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return {path.name: path.stat().st_mode & 0o777 for path in visible}


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_files_have_the_modes_that_are_asked_for(mask, home, tmp_path):
    before = os.umask(mask)
    try:
        assert main_in(tmp_path, "meta", home / "toy.py", "--out=run", *QUICK)[0] == 0
        assert set(modes(tmp_path / "run").values()) == {0o666 & ~mask}
        (tmp_path / "mine.pt").touch()
        (tmp_path / "mine.pt").chmod(0o640)
        arguments = ["finetune", "run", "--export=mine.pt", "--force", "--out=new", *MEASURE]
        assert main_in(tmp_path, *arguments)[0] == 0
        assert modes(tmp_path)["mine.pt"] == 0o640
    finally:
        os.umask(before)


def test_a_folder_that_cannot_be_written_is_one_line(home, half, tmp_path, monkeypatch):
    """A folder that is read-only; root may write there all the same, so `open` stands in for it."""

    def read_only(path, mode="r", *given, **options):
        if "w" in mode or "a" in mode:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, mode, *given, **options)

    real = Path.open
    monkeypatch.setattr(Path, "open", read_only)
    for command in (["meta", "--resume=half"], ["meta", home / "toy.py", "--out=new", *QUICK]):
        code, _, err = main_in(tmp_path, *command, "--json")
        last = err.splitlines()[-1]
        assert code == 2
        assert last.startswith("metapt: [Errno 13] Permission denied: ")
        assert "half/" in last or "new/" in last


# ------------------------------------------------------------------------------------------------
# Two processes


def forked(work) -> tuple[int, str]:
    """What `work` ends with in a child: exit status or −signal, and standard error."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 70
        with contextlib.suppress(BaseException), os.fdopen(writing, "w") as sys.stderr:
            sys.stdout = io.StringIO()
            try:
                work()
                status = 0
            except SystemExit as ended:
                status = ended.code or 0
            except BaseException:  # noqa: BLE001, RUF100 (a traceback is what a test looks for)
                traceback.print_exc()
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as err:
        said = err.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def command(folder: Path, *arguments) -> None:
    os.chdir(folder)
    sys.argv = ["metapt.py", *map(str, arguments)]
    metapt.main()


def test_a_run_is_of_one_process_until_that_ends_or_is_killed(home, run, tmp_path):
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            _held = metapt.Run(run).acquire()
            os.write(go, b"1")
            signal.pause()
        os._exit(1)
    os.read(ready, 1)
    lines = (run / "metrics.jsonl").read_text()
    assert "run is in use by another process" in refused(tmp_path, "meta", "--resume=run")
    # Reading disturbs nobody.
    assert summary_of(tmp_path, "finetune", "run", *MEASURE)["command"] == "finetune"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert main_in(tmp_path, "meta", "--resume=run")[0] == 0
    assert (run / "metrics.jsonl").read_text() == lines
    assert names_in(run) == names_in(home / "run")

    (tmp_path / "new").mkdir()
    held = metapt.Run(tmp_path / "new").acquire()
    start = ["meta", home / "toy.py", "--out=new", *QUICK]
    assert "new is in use by another process" in refused(tmp_path, *start)
    held.release()
    assert main_in(tmp_path, *start)[0] == 0


def test_a_lock_that_is_a_link_writes_nowhere_else(run, tmp_path):
    (run / ".lock").unlink(missing_ok=True)
    (run / ".lock").symlink_to(tmp_path / "elsewhere")
    main_in(tmp_path, "meta", "--resume=run")
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_system_without_locks_runs_on(home, tmp_path, monkeypatch):
    def fail(*_, **options):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(metapt.filelock.FileLock, "acquire", fail)
    assert main_in(tmp_path, "meta", home / "toy.py", "--out=run", *QUICK)[0] == 0
    assert main_in(tmp_path, "meta", "--resume=run")[0] == 0


def test_of_two_starts_at_once_each_has_a_folder_of_its_own(home, tmp_path, monkeypatch):
    made = []

    def mkdir(path, *given, **options):
        if not made and path.parent.name == "runs":
            # The other one was faster.
            made.append(path)
            path.mkdir(parents=True)
            shutil.copy(home / "run" / "config.json", path)
        return real(path, *given, **options)

    real = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert main_in(tmp_path, "meta", home / "toy.py", *QUICK)[0] == 0
    assert sorted(os.listdir(tmp_path / "runs")) == ["meta-toy", "meta-toy-2"]
    assert os.listdir(tmp_path / "runs" / "meta-toy") == ["config.json"]
    (tmp_path / "runs").rename(tmp_path / "other")
    (tmp_path / "runs").symlink_to("nowhere")
    message = refused(tmp_path, "meta", home / "toy.py", *QUICK)
    assert "File exists" in message
    assert "runs" in message


# ------------------------------------------------------------------------------------------------
# Signals, kills and full disks


@pytest.mark.parametrize("name", [ROTATION, NOISE])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(name, number, tmp_path, monkeypatch):
    """At a round between checkpoints. The process goes on, with the handlers that it had."""
    real = metapt.Training.meta_step
    meta_steps = []

    def meta_step(self):
        real(self)
        meta_steps.append(1)
        if len(meta_steps) == 5:
            os.kill(os.getpid(), number)

    start = ["meta", name, *options({**TINY[name], "compare": 0})]
    assert main_in(tmp_path, *start, "--out=whole")[0] == 0
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(each) for each in numbers]
    with monkeypatch.context() as patch:
        patch.setattr(metapt.Training, "meta_step", meta_step)
        patch.setattr(metapt, "CHECKPOINT_EVERY", 1000)
        code, out, err = main_in(tmp_path, *start, "--json", "--out=a run")
    assert (code, out) == (1, "")
    assert handlers == [signal.getsignal(each) for each in numbers]
    message = err.strip().splitlines()[-1]
    saved = metapt.Run(tmp_path / "a run").load_checkpoint()["step"]
    assert message.startswith(f"metapt: stopped at PT step {saved}; go on with: ")
    assert 0 < saved < TINY[name]["steps"]
    assert not (tmp_path / "a run" / "summary.json").exists()
    words = shlex.split(message.partition("python metapt.py ")[2])
    assert words == ["meta", "--resume", "a run"]
    assert main_in(tmp_path, *words)[0] == 0
    assert outcome(tmp_path / "a run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_comparing_says_how_to_go_on(number, home, tmp_path, monkeypatch):
    start = ["meta", home / "toy.py", *QUICK[:2], *MEASURE]
    assert main_in(tmp_path, *start, "--out=whole")[0] == 0
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        spy(patch, metapt, "finetune_schedule", lambda *_: os.kill(os.getpid(), number))
        code, out, err = main_in(tmp_path, *start, "--json", "--out=run")
    assert (code, out) == (1, "")
    message = err.strip().splitlines()[-1]
    assert message == (
        "metapt: stopped while comparing; go on with: python metapt.py meta --resume run"
    )
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert main_in(tmp_path, "meta", "--resume=run")[0] == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("name", ["finetune", "eval"])
def test_a_signal_in_finetune_and_eval_says_what_can_be_done(name, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        spy(patch, metapt, "finetune_schedule", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        code, out, err = main_in(tmp_path, name, "run", "--out=f", "--json", *MEASURE)
    assert (code, out) == (1, "")
    message = err.strip().splitlines()[-1]
    assert "--resume" not in message
    assert f"begin {name} anew with another --out" in message
    assert "name another --out" in refused(tmp_path, name, "run", "--out=f", *MEASURE)
    assert main_in(tmp_path, name, "run", "--out=g", *MEASURE)[0] == 0


def test_a_finished_run_can_be_resumed_and_stays_the_same(run, home, tmp_path):
    # Killed after the last checkpoint.
    (run / "summary.json").unlink()
    summary_of(tmp_path, "meta", home / "toy.py", "--resume=run", "--jitter=0.1")
    assert outcome(run) == outcome(home / "run")


# Stands for save_figure, which takes long: it writes as that does.
PLAIN = {
    "save_figure": lambda run, name, draw: run.write(name, b"drawn"),
}


def dying(at: int) -> list:
    """From now on every write, of which half is done, rename, flush and removal is counted.

    Returns:
        What grows by one a count. At the `at`-th this process is killed.
    """
    calls = []

    def count(half=None):
        calls.append(1)
        if len(calls) == at:
            if half:
                half()
            os.kill(os.getpid(), signal.SIGKILL)

    def before(owner, name):
        real = getattr(owner, name)

        def counted(*given, **options):
            count()
            return real(*given, **options)

        setattr(owner, name, counted)

    def opened(path, *given, **options):
        file = open_path(path, *given, **options)
        if file.writable():
            write = file.write

            def write_half(content):
                write(content[: len(content) // 2])
                file.flush()

            def counted(content):
                count(lambda: write_half(content))
                return write(content)

            file.write = counted
        return file

    for name in ("fsync", "replace", "unlink"):
        before(os, name)
    open_path = Path.open
    Path.open = opened
    return calls


def test_a_kill_at_every_write_rename_and_flush_leads_to_the_same_end(home, tmp_path):
    start = ["meta", home / "toy.py", "--out=run", *QUICK]

    def plain():
        metapt.CHECKPOINT_EVERY = 1
        for name, function in PLAIN.items():
            setattr(metapt.Run, name, function)

    def killed(folder, at, *arguments):
        plain()
        calls = dying(at)
        try:
            command(folder, *arguments)
        finally:
            (folder / "calls").write_text(str(len(calls)))

    def gone_on(folder, *arguments):
        plain()
        command(folder, *arguments)

    def again(folder):
        begun = (folder / "run" / "config.json").exists()
        return ["meta", "--resume=run"] if begun else start

    whole = tmp_path / "whole"
    whole.mkdir()
    assert forked(lambda: killed(whole, 0, *start)) == (0, "")
    expected = outcome(whole / "run")
    moments = int((whole / "calls").read_text())
    assert moments > 25
    for at in range(1, moments + 1):
        folder = tmp_path / str(at)
        folder.mkdir()
        assert forked(lambda: killed(folder, at, *start))[0] == -signal.SIGKILL, at
        if at % 2:
            # And the second time at another place.
            forked(lambda: killed(folder, at % 13 + 1, *again(folder)))
        ended = forked(lambda: gone_on(folder, *again(folder)))
        assert ended == (0, ""), at
        assert outcome(folder / "run") == expected, at
        assert names_in(folder / "run") == names_in(whole / "run"), at


def test_a_process_that_is_killed_goes_on_to_the_same_end(home, tmp_path):
    """SIGKILL around the writing of config.json, of the first checkpoint, and of a later one."""
    start = ["meta", home / "toy.py", "--out=run", *QUICK]
    resume = ["meta", "--resume=run"]
    for when, arguments in [
        ("1 before", start),
        ("2 before", start),
        ("2 after", resume),
        ("3 before", resume),
    ]:
        words = [*when.split(), *arguments]
        done = metapt_in(tmp_path, *words, code=KILLED, PYTHONPATH=str(ROOT))
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "run" / "summary.json").exists()
    assert main_in(tmp_path, *resume)[0] == 0
    assert outcome(tmp_path / "run") == outcome(home / "run")


@pytest.mark.parametrize("limit", [100, 1000, 4000, 20_000])
def test_a_full_disk_is_one_line_and_what_was_saved_goes_on(limit, home, half, tmp_path):
    """RLIMIT_FSIZE stands for the disk: below config.json, metrics, a checkpoint, a figure."""

    def limited(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        command(tmp_path, *arguments)

    start = ["meta", home / "toy.py", "--out=new", "--json", *QUICK]
    status, err = forked(lambda: limited(*start))
    assert status == 1
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("metapt: new/")
    assert "File too large" in last
    assert "metrics.jsonl" in last or "bytes are needed" in last
    assert not [name for name in names_in(tmp_path / "new") if name.startswith(".")]
    if (tmp_path / "new" / "config.json").exists():
        assert main_in(tmp_path, "meta", "--resume=new")[0] == 0
        assert outcome(tmp_path / "new") == outcome(home / "run")

    before = (half / "checkpoint.pt").read_bytes()
    status, err = forked(lambda: limited("meta", "--resume=half", "--json"))
    assert status == 1
    assert "File too large" in err.strip().splitlines()[-1]
    if limit < len(before):
        assert (half / "checkpoint.pt").read_bytes() == before
    assert main_in(tmp_path, "meta", "--resume=half")[0] == 0
    assert outcome(half) == outcome(home / "run")


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_file_is_written_whole_or_not_at_all(name, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(5, "the disk is faulty")

    path = tmp_path / "new"
    metapt.write_whole(path, b"1")
    metapt.write_whole(path, b"2")
    assert contents(tmp_path) == {"new": b"2"}
    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="faulty"):
        metapt.write_whole(path, b"3")
    assert names_in(tmp_path) == {"new"}
    assert path.read_bytes() == b"2"
