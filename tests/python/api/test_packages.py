"""What others install: the wheel in a fresh environment, the C++ library in a fresh project."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BIN = Path(sys.executable).parent

CONSUMER = """
cmake_minimum_required(VERSION 3.22)
project(consumer CXX)
set(CMAKE_CXX_STANDARD 20)
find_package(lowbit 0.1 REQUIRED)
add_executable(app main.cpp)
target_link_libraries(app PRIVATE lowbit::lowbit)
"""


def run(*command, **options):
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **options,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}"
    return done.stdout


def test_find_package_without_torch(tmp_path):
    """The README's C++ example, built in a project of its own against the installed library."""
    if not (ROOT / "build/CMakeCache.txt").is_file():
        pytest.skip("no build/ folder here: run `make build`")
    path = f"{BIN}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path}
    prefix = tmp_path / "prefix"
    run("cmake", "--install", ROOT / "build", "--prefix", prefix, "--component", "dev", env=env)
    installed = [file.name for file in prefix.rglob("*") if file.is_file()]
    assert "lowbitConfig.cmake" in installed
    assert not any("torch" in name for name in installed)

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```cpp\n(.*?)```", readme, re.DOTALL)
    project = tmp_path / "project"
    project.mkdir()
    (project / "main.cpp").write_text(example)
    (project / "CMakeLists.txt").write_text(CONSUMER)
    run(
        "cmake",
        "-S",
        project,
        "-B",
        project / "build",
        "-G",
        "Ninja",
        f"-DCMAKE_PREFIX_PATH={prefix}",
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        env=env,
    )
    run("cmake", "--build", project / "build", env=env)
    app = project / "build/app"
    assert run(app) == "50\n"
    # Nothing of torch: neither linked, nor its headers on the command line.
    assert "torch" not in run("ldd", app)
    assert "torch" not in (project / "build/compile_commands.json").read_text()


SCRIPT = """
import shutil, sys
assert not any(shutil.which(tool) for tool in ("cc", "gcc", "g++", "clang", "cmake", "nvcc"))
import ipex_llm, torch
from pathlib import Path
assert Path(ipex_llm.__file__).is_relative_to(sys.prefix), ipex_llm.__file__
assert "transformers" not in sys.modules

model = torch.nn.Sequential(torch.nn.Linear(100, 48), torch.nn.ReLU(), torch.nn.Linear(48, 10))
x = torch.randn(3, 100)
before = model(x)
model = ipex_llm.optimize_model(model, low_bit="sym_int8")
after = model(x)
assert torch.allclose(before, after, atol=0.05), (before - after).abs().max()
model.save_low_bit("saved")
fresh = torch.nn.Sequential(torch.nn.Linear(100, 48), torch.nn.ReLU(), torch.nn.Linear(48, 10))
fresh = ipex_llm.optimize.load_low_bit(fresh, "saved")
assert torch.equal(fresh(x), after)
import importlib.metadata
print(importlib.metadata.version("ipex-llm-lowbit"), ipex_llm.__version__)
"""


@pytest.mark.slow
def test_wheel_runs_where_there_is_no_compiler(tmp_path):
    environment = {
        key: value
        for key, value in os.environ.items()
        if key.startswith("PIP_") or key in ("HOME", "LANG", "CCACHE_DIR")
    }
    # Objects that `make build` compiled are found by ccache: paths relative to the sources.
    launcher = ["--config-settings", "cmake.define.CMAKE_CXX_COMPILER_LAUNCHER=ccache"] * bool(
        shutil.which("ccache")
    )
    env = {
        **environment,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "CCACHE_BASEDIR": str(tmp_path / "source"),
        "CCACHE_NOHASHDIR": "1",
    }
    # A copy of the sources as a clone would have them: no library built in the tree can slip in.
    source = tmp_path / "source"
    files = run("git", "ls-files", "-z", "--cached", cwd=ROOT).split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    run(
        *(sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation"),
        *("-w", tmp_path, "--config-settings", f"cmake.define.Python_EXECUTABLE={sys.executable}"),
        *("--config-settings", f"build-dir={source / 'build'}", *launcher),
        env=env,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"ipex_llm_lowbit-0\.1\.0-py3-none-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "ipex_llm/lib/liblowbit_ops.so" in names
    assert "ipex_llm/__init__.py" in names
    top = {name.split("/")[0] for name in names}
    assert top == {"ipex_llm", "ipex_llm_lowbit-0.1.0.dist-info"}
    assert any(name.endswith("LICENSE") for name in names)

    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", venv)
    python = venv / "bin/python"
    run(
        *(python, "-m", "pip", "install", "-c", ROOT / "constraints.txt", "torch==2.13.0", wheel),
        env=env,
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    printed = run(python, "-c", SCRIPT, cwd=bare, env={"PATH": str(bare), "HOME": str(bare)})
    assert printed.split()[-2:] == ["0.1.0", "0.1.0"]
