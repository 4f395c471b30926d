"""Saves that are damaged, foreign, hostile, or that could not be finished.

Whatever is refused leaves the model, or the directory, as it was. The rules and their C++ tests:
docs/security.md.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ipex_llm import optimize_model
from ipex_llm.optimize import load_low_bit
from saved_models import ids, mixed, same, snapshot, weight_files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    optimize_model(mixed()).save_low_bit(directory, max_shard_size="20KB")
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(saved, directory)
    return directory


def refused(directory, *errors, match=None, **kwargs):
    """Loading raises one of `errors`, names load_low_bit, and leaves the model untouched."""
    model = mixed(1)
    before = snapshot(model)
    with pytest.raises(errors or ValueError, match=match) as error:
        load_low_bit(model, directory, **kwargs)
    assert str(error.value).startswith("load_low_bit: ")
    assert same(before, snapshot(model))
    return str(error.value)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_flipped_bit_is_found(saved, data):
    name = data.draw(st.sampled_from(sorted(os.listdir(saved))))
    good = (saved / name).read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[place] ^= 1 << data.draw(st.integers(0, 7))
    with tempfile.TemporaryDirectory() as other:
        for entry in os.listdir(saved):
            os.link(saved / entry, os.path.join(other, entry))
        os.remove(os.path.join(other, name))
        Path(other, name).write_bytes(bad)
        refused(other, ValueError, FileNotFoundError, mmap=data.draw(st.booleans()))


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 4096, 0.5, -1])
def test_truncated_and_empty_files(copy, keep, mmap):
    for name in sorted(os.listdir(copy)):
        good = (copy / name).read_bytes()
        size = int(len(good) * keep) if isinstance(keep, float) else keep
        (copy / name).write_bytes(good[:size])
        if len(good[:size]) != len(good):
            text = refused(copy, mmap=mmap, verify=False)
            assert name in text
        (copy / name).write_bytes(good)


def test_an_empty_directory_and_a_foreign_one(tmp_path):
    assert "ipex_llm.json" in refused(tmp_path, FileNotFoundError)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert "optimize_model" in refused(tmp_path, FileNotFoundError)
    (tmp_path / "bigdl_config.json").write_text("{}")
    assert "archived ipex-llm" in refused(tmp_path, FileNotFoundError)
    for text in ("", "{}", "[]", "null", '{"format": "pt"}', "not json", "\x00" * 100):
        (tmp_path / "ipex_llm.json").write_text(text)
        refused(tmp_path)
    (tmp_path / "ipex_llm.json").unlink()
    (tmp_path / "ipex_llm.json").mkdir()
    refused(tmp_path, OSError)


def test_a_save_of_a_newer_version(copy):
    (copy / "ipex_llm.json").write_text(
        json.dumps({"format": "ipex-llm low-bit", "format_version": 2, "anything": "else"})
    )
    assert "format version 2" in refused(copy)


def test_a_missing_shard(copy):
    victim = weight_files(copy)[1]
    (copy / victim).unlink()
    assert victim in refused(copy, FileNotFoundError)


def test_shards_of_another_save(copy, tmp_path):
    other = tmp_path / "other"
    optimize_model(mixed(9)).save_low_bit(other, max_shard_size="20KB")
    by_number = [sorted(weight_files(d), key=lambda name: name[-26:]) for d in (copy, other)]
    for mine, theirs in zip(*by_number, strict=True):
        shutil.copy(other / theirs, copy / mine)
    refused(copy, match="digest")


def test_a_save_of_another_model(tmp_path):
    optimize_model(nn.Sequential(nn.Linear(32, 16))).save_low_bit(tmp_path)
    assert "another model" in refused(tmp_path)


def test_what_is_not_a_regular_file(copy, tmp_path):
    victim = weight_files(copy)[0]
    (copy / victim).unlink()
    os.mkfifo(copy / victim)
    refused(copy, OSError, match="regular file")
    (copy / victim).unlink()
    (copy / victim).symlink_to("/dev/zero")
    refused(copy, OSError, match="regular file")


def test_links_of_the_user_are_followed(copy, tmp_path):
    """Hub caches are directories of links."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in os.listdir(copy):
        (linked / name).symlink_to(copy / name)
    expected = load_low_bit(mixed(1), copy)(ids())
    assert torch.equal(load_low_bit(mixed(1), linked)(ids()), expected)
    # Saving over it replaces links, not what they point to.
    before = {name: (copy / name).read_bytes() for name in os.listdir(copy)}
    optimize_model(mixed(4)).save_low_bit(linked)
    assert {name: (copy / name).read_bytes() for name in os.listdir(copy)} == before


def test_a_pickle_is_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save(Bomb(), tmp_path / "pytorch_model.bin")
    refused(tmp_path, FileNotFoundError)
    shutil.copy(tmp_path / "pytorch_model.bin", tmp_path / "ipex_llm.json")
    refused(tmp_path)
    assert not (tmp_path / "exploded").exists()


# ---- saves that cannot be finished ---------------------------------------------------------------


def run_saver(body: str, *arguments, **kwargs) -> subprocess.CompletedProcess:
    """A process of its own with an optimized model `model` and `directory` = the first argument."""
    program = (
        "import os, sys, torch\n"
        "from ipex_llm import optimize_model\n"
        "from saved_models import mixed\n"
        "model = optimize_model(mixed(int(sys.argv[2])))\n"
        "directory = sys.argv[1]\n" + body
    )
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        **kwargs,
    )


# The limit stands in for a disk that fills up: the kernel refuses the write that passes it.
LIMITED = """
import resource
from pathlib import Path
def files(): return {path.name: path.read_bytes() for path in Path(directory).iterdir()}
if sys.argv[3] == "over":
    optimize_model(mixed(1)).save_low_bit(directory)
    before = files()
for limit in (0, 1000, 5000, 30_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        model.save_low_bit(directory)
        print("it was saved")
    except OSError as error:
        assert str(error).startswith("save_low_bit: "), error
        assert "free some space" in str(error), error
    if sys.argv[3] == "over":
        assert files() == before, limit
    else:
        assert not os.path.exists(directory), limit
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
model.save_low_bit(directory)
print("passed")
"""


@pytest.mark.parametrize("where", ["over", "new"])
def test_a_full_disk(tmp_path, where):
    done = run_saver(LIMITED, tmp_path / "save", 2, where)
    assert done.stdout == "passed\n", (done.stdout, done.stderr)


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a tmpfs needs root"
)
def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk]).returncode:
        pytest.skip("this container may not mount")
    try:
        model = optimize_model(mixed())
        with pytest.raises(OSError, match="No space left on device"):
            model.save_low_bit(disk / "save")
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_directory_without_write_permission(tmp_path):
    directory = tmp_path / "save"
    optimize_model(mixed()).save_low_bit(directory)
    before = {name: (directory / name).read_bytes() for name in os.listdir(directory)}
    model = optimize_model(mixed(2))
    if os.geteuid() == 0:
        # Root may write anywhere, so a child gives its rights up once everything is imported.
        child = os.fork()
        if child == 0:
            code = 3
            try:
                os.chmod(tmp_path, 0o755)
                os.chmod(directory, 0o555)
                os.setuid(65534)
                for target in (directory, directory / "below"):
                    try:
                        model.save_low_bit(target)
                    except OSError as error:
                        code = 0 if "ermission" in str(error) else 4
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    else:
        directory.chmod(0o555)
        for target in (directory, directory / "below"):
            with pytest.raises(OSError, match="ermission"):
                model.save_low_bit(target)
    directory.chmod(0o755)
    assert {name: (directory / name).read_bytes() for name in os.listdir(directory)} == before


def test_two_processes_that_save_at_the_same_time(tmp_path):
    body = "for i in range(15): model.save_low_bit(directory, max_shard_size='20KB')\n"
    program = (
        "import sys\nfrom ipex_llm import optimize_model\nfrom saved_models import mixed\n"
        "model = optimize_model(mixed(int(sys.argv[2])))\ndirectory = sys.argv[1]\n" + body
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    optimize_model(mixed(1)).save_low_bit(tmp_path)
    savers = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path, str(seed)], env=environment)
        for seed in (1, 2)
    ]
    outcomes = {seed: optimize_model(mixed(seed))(ids()) for seed in (1, 2)}
    loads = 0
    while any(saver.poll() is None for saver in savers):
        result = load_low_bit(mixed(5), tmp_path)(ids())
        assert any(torch.equal(result, expected) for expected in outcomes.values())
        loads += 1
    assert [saver.returncode for saver in savers] == [0, 0] and loads > 0
    result = load_low_bit(mixed(5), tmp_path)(ids())
    assert any(torch.equal(result, expected) for expected in outcomes.values())
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_a_killed_saver_leaves_a_save_that_loads(tmp_path):
    body = (
        "print('ready', flush=True)\n"
        "for i in range(10000): model.save_low_bit(directory, max_shard_size='20KB'); "
        "model.norm.weight.data.add_(1)\n"
    )
    program = (
        "import sys\nfrom ipex_llm import optimize_model\nfrom saved_models import mixed\n"
        "model = optimize_model(mixed(2))\ndirectory = sys.argv[1]\n" + body
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    optimize_model(mixed(1)).save_low_bit(tmp_path)
    for delay in (0.01, 0.033, 0.05):
        saver = subprocess.Popen(
            [sys.executable, "-c", program, tmp_path], env=environment, stdout=subprocess.PIPE
        )
        saver.stdout.readline()
        time.sleep(delay)
        saver.send_signal(signal.SIGKILL)
        saver.wait()
        saver.stdout.close()
        load_low_bit(mixed(5), tmp_path)
    optimize_model(mixed(1)).save_low_bit(tmp_path)  # takes the dead saver's files away
    assert len(os.listdir(tmp_path)) == 1 + len(weight_files(tmp_path))
    assert len(weight_files(tmp_path)) == 1


def test_interrupting_a_save_leaves_nothing(tmp_path, monkeypatch):
    from ipex_llm import save

    chunks = save._chunks
    calls = []

    def interrupted(tensor):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return chunks(tensor)

    monkeypatch.setattr(save, "_chunks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimize_model(mixed()).save_low_bit(tmp_path / "save")
    assert not (tmp_path / "save").exists()


@pytest.mark.parametrize("function", ["file_save_handle", "file_save_begin", "file_save_commit"])
def test_ctrl_c_inside_an_operator_leaves_no_temporary_file(function, tmp_path, monkeypatch):
    """Python raises it when the operator has returned, and what that returned is lost."""
    model = optimize_model(nn.Sequential(nn.Linear(64, 64)))
    model.save_low_bit(tmp_path)
    before = sorted(os.listdir(tmp_path))
    operator = getattr(torch.ops.lowbit, function)

    def interrupted(*args):
        operator(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.ops.lowbit, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save_low_bit(tmp_path)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == before
    load_low_bit(nn.Sequential(nn.Linear(64, 64)), tmp_path)
