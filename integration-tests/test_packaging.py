"""Each distribution, from its built wheel, alone in an environment of its own.

The third-party versions are those of uv.lock, so that a run can be repeated. What a pack does
there is in `jobs/<import name>_job.py`; a pack without a job is only imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
JOBS = Path(__file__).resolve().parent / "jobs"
PACKS = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
WITHOUT_TORCH = ["ft-core", "ft-openai-distill", "ft-judge", "ft-cohere-rerank", "ft-text2sql"]
TORCH = {"torch", "transformers", "sentence-transformers", "accelerate", "peft", "trl"}
LOADED_WHERE_USED = {
    "cohere",
    "datasets",
    "llama_index.embeddings",
    "llama_index.llms",
    "matplotlib",
    "openai",
    "peft",
    "sentence_transformers",
    "sqlglot",
    "torch",
    "transformers",
    "trl",
}


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Return the standard output of a command; a failing one fails the test with all it wrote."""
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True
    )
    if result.returncode:
        print(result.stdout, result.stderr)  # pytest shows it, and keeps its summary short
        pytest.fail(f"exit code {result.returncode}: {shlex.join(map(str, command))}")
    return result.stdout


def import_name(pack: str) -> str:
    return pack.replace("-", "_")


def sources(pack: str) -> set[str]:
    """Return the files that the wheel must hold, as paths from the import name on."""
    src = ROOT / "packages" / pack / "src"
    files = (path for path in src.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(src).as_posix() for path in files}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Distribution name to its wheel, built now."""
    folder = tmp_path_factory.mktemp("wheels")
    run("uv", "build", "--wheel", "--all-packages", "--out-dir", folder, cwd=ROOT)
    built = {path.name.split("-")[0].replace("_", "-"): path for path in folder.glob("*.whl")}
    assert sorted(built) == PACKS
    return built


@pytest.fixture(scope="module")
def constraints(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that holds every package to the lock's version, and ours to the wheels."""
    locked = run(
        *("uv", "export", "--frozen", "--no-dev", "--no-emit-workspace", "--no-hashes"),
        cwd=ROOT,
    )
    ours = [f"{name} @ {wheel.as_uri()}" for name, wheel in wheels.items()]
    path = tmp_path_factory.mktemp("constraints") / "constraints.txt"
    path.write_text("\n".join([locked, *ours, ""]))
    return path


class Environment:
    """A virtual environment with one distribution and what that declares."""

    def __init__(self, folder: Path, pack: str, constraints: Path, python: str) -> None:
        self.folder = folder
        self.python = folder / "venv/bin/python"
        run("uv", "venv", "--no-project", "--python", python, folder / "venv", cwd=folder)
        run(
            *("uv", "pip", "install", "--python", self.python),
            *("--constraint", constraints, pack),
            cwd=folder,
        )

    def run(self, *arguments: str | Path) -> str:
        """Run Python away from the repository, with nothing of this process's environment."""
        clean = {"PATH": os.defpath, "HOME": str(self.folder), "HF_HUB_OFFLINE": "1"}
        return run(self.python, "-I", *arguments, cwd=self.folder, env=clean)

    def distributions(self) -> set[str]:
        listed = run(
            *("uv", "pip", "list", "--format", "json", "--python", self.python), cwd=self.folder
        )
        return {entry["name"] for entry in json.loads(listed)}

    def do_job(self, pack: str) -> None:
        self.run(JOBS / f"{import_name(pack)}_job.py", ROOT / "tools")


@pytest.fixture
def environment(constraints: Path, tmp_path: Path) -> Iterator[Callable[..., Environment]]:
    """Make an `Environment` for a pack, and remove it after the test: pytest would keep it."""
    yield lambda pack, python=sys.executable: Environment(tmp_path, pack, constraints, python)
    shutil.rmtree(tmp_path / "venv", ignore_errors=True)


def heavy(modules: list[str]) -> list[str]:
    return sorted(
        name
        for name in modules
        # A namespace itself holds nothing: LlamaIndex's core looks into `llama_index.llms`.
        if any(
            name.startswith(f"{other}.") or (name == other and "." not in other)
            for other in LOADED_WHERE_USED
        )
    )


@pytest.mark.parametrize("pack", PACKS)
def test_a_wheel_holds_the_sources_and_nothing_else(pack: str, wheels: dict[str, Path]) -> None:
    with zipfile.ZipFile(wheels[pack]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}

    assert names == sources(pack)
    assert f"{import_name(pack)}/py.typed" in names
    assert {name.split("/")[0] for name in names} == {import_name(pack)}


def test_the_wheels_hold_the_data_files(wheels: dict[str, Path]) -> None:
    """Named here, so that a file that is missing from the sources too is missed."""
    with zipfile.ZipFile(wheels["ft-core"]) as wheel:
        assert wheel.read("ft_core/report/page.html.j2")
    with zipfile.ZipFile(wheels["ft-embeddings"]) as wheel:
        for name in ("passages", "training_questions", "heldout_questions"):
            assert wheel.read(f"ft_embeddings/demo/{name}.jsonl")


@pytest.mark.parametrize("pack", PACKS)
def test_a_pack_works_alone(pack: str, environment: Callable[..., Environment]) -> None:
    alone = environment(pack)

    installed = alone.distributions()
    assert installed & set(PACKS) == {"ft-core", pack}
    if pack in WITHOUT_TORCH:
        assert not installed & TORCH

    script = (
        "import importlib.metadata, json, pathlib, sys, {name} as pack\n"
        "folder = pathlib.Path(pack.__file__).parent\n"
        "assert pack.__version__ == importlib.metadata.version('{pack}')\n"
        "assert (folder / 'py.typed').exists()\n"
        "assert folder.is_relative_to(sys.prefix), folder\n"
        "print(json.dumps(list(sys.modules)))\n"
    )
    loaded = alone.run("-c", script.format(name=import_name(pack), pack=pack))
    assert heavy(json.loads(loaded)) == []

    if (JOBS / f"{import_name(pack)}_job.py").exists():
        alone.do_job(pack)


def test_a_student_is_trained_with_the_extra_for_it(
    environment: Callable[..., Environment],
) -> None:
    alone = environment("ft-openai-distill[local]")
    assert {"torch", "trl", "peft"} <= alone.distributions()
    alone.run(JOBS / "ft_openai_distill_local_job.py", ROOT / "tools")


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize(
    "pack", ["ft-core", "ft-embeddings", "ft-openai-distill", "ft-judge", "ft-text2sql"]
)
def test_a_pack_works_on_every_supported_python(
    pack: str, version: str, environment: Callable[..., Environment], tmp_path: Path
) -> None:
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        pytest.skip("is the running one, see test_a_pack_works_alone")
    if pack == "ft-embeddings" and not os.environ.get("CI"):
        pytest.skip("downloads gigabytes of torch for each Python; set CI=true to run it")
    find = ["uv", "python", "find", "--no-project", "--no-python-downloads", version]
    found = subprocess.run(find, cwd=tmp_path, capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"there is no Python {version} here")

    environment(pack, found.stdout.strip()).do_job(pack)


@pytest.mark.parametrize("pack", PACKS)
def test_importing_a_pack_loads_nothing_heavy(pack: str, tmp_path: Path) -> None:
    """In the development environment, where all of it is there to be loaded."""
    assert importlib.util.find_spec("torch")
    script = f"import json, sys, {import_name(pack)}; print(json.dumps(list(sys.modules)))"

    loaded = json.loads(run(sys.executable, "-c", script, cwd=tmp_path))

    assert heavy(loaded) == []


def test_importing_any_module_of_ft_core_loads_nothing_heavy(tmp_path: Path) -> None:
    """But for those where models are trained, which the others import when they train."""
    script = (
        "import importlib, json, pkgutil, sys, ft_core\n"
        "for module in pkgutil.walk_packages(ft_core.__path__, 'ft_core.'):\n"
        "    if module.name not in ('ft_core.sft.trainer', 'ft_core.sft.training'):\n"
        "        importlib.import_module(module.name)\n"
        "print(json.dumps(list(sys.modules)))\n"
    )

    loaded = json.loads(run(sys.executable, "-c", script, cwd=tmp_path))

    assert "ft_core.cli" in loaded
    assert heavy(loaded) == []
