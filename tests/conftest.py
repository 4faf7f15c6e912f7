"""Shared by the test files: a small toy world, a tiny model, real samples if present.

Nothing heavy is imported here, so that tests of plain text need no torch.
"""

import ctypes
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st


def has_gpu() -> bool:
    """Asks the CUDA driver itself: importing torch to ask would take seconds."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return driver.cuInit(0) == driver.cuDeviceGetCount(ctypes.byref(count)) == 0 < count.value


# Two test processes share the cores, so each computes in one thread. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

for name, examples in dict(quick=50, full=500).items():
    settings.register_profile(name, max_examples=examples, deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

MISSING_CODECS = [] if importlib.util.find_spec("av") else ["av"]
INTERPRETER_IS_BROKEN = (
    importlib.util.find_spec("triton") is not None
    and version("triton").startswith("3.6.")
    and not version("numpy").startswith(("2.0.", "2.1.", "2.2.", "2.3."))
)
PROJECT = Path(__file__).resolve().parent.parent
SAMPLES = Path(os.environ.get("TWGRPO_SAMPLES", PROJECT.parent / "shared" / "data"))
TOY_FLAGS = (
    "--max_frames 4 --min_pixels 3136 --max_pixels 3136 --max_completion_length 20 "
    "--dataloader_num_workers 0 --gradient_checkpointing false"
).split()


def pytest_xdist_auto_num_workers(config) -> int:
    """Two processes; one for a single file, where starting another costs more than it saves."""
    return 0 if len(config.args) == 1 and ".py" in config.args[0] else 2


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items) -> None:
    """Tests that need the toy world are slow: making it takes ten seconds in each process."""
    for item in items:
        if "world" in item.fixturenames:
            item.add_marker(pytest.mark.slow)


def lacking(error: BaseException | None) -> str | None:
    """What this machine lacks, if that is why a test failed."""
    while error:
        if isinstance(error, ModuleNotFoundError) and error.name in MISSING_CODECS:
            return f"needs a video codec: the package {error.name} is not installed"
        if type(error).__name__ == "InterpreterError" and INTERPRETER_IS_BROKEN:
            return (
                "Triton 3.6's interpreter fails with NumPy 2.4 and later; on a GPU it is not used"
            )
        error = error.__cause__ or error.__context__
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    try:
        return (yield)
    except Exception as error:
        if why := lacking(error):
            pytest.skip(why)
        raise


pytest_runtest_call = pytest_runtest_setup  # in a fixture or in the test itself


@pytest.fixture
def sample():
    """sample("name"): the path of a real file that the project does not ship, or a skip."""

    def find(name: str) -> Path:
        path = SAMPLES / name
        if not path.exists():
            pytest.skip(f"{name} is not at hand (set TWGRPO_SAMPLES to its directory)")
        return path

    return find


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A toy world of 24 + 8 clips, its model warm-started just enough to answer in form."""
    import toy

    root = tmp_path_factory.mktemp("toy") / "world"
    toy.prepare(root, seed=0, train=24, test=8, steps=80)
    return root


@pytest.fixture(scope="session")
def records(world):
    from records import load_records

    return load_records(world / "train.jsonl", world)


@pytest.fixture
def policy(world):
    from model.policy import Policy

    return Policy.load(world / "model")


@pytest.fixture
def prompter(policy):
    import toy
    from data import Prompter
    from video import ClipSettings

    clips = ClipSettings(**toy.CLIP)
    return Prompter(policy.tokenizer, policy.chat_template, policy.geometry, clips=clips)


@pytest.fixture
def questions(prompter, records):
    return questions_of(prompter, records)


def questions_of(prompter, records) -> list:
    """Three questions whose prompts differ in length."""
    extra = ("", " Look twice.", " Look closely, then look again.")
    chosen = zip(records, extra, strict=False)
    return [prompter(dataclasses.replace(r, problem=r.problem + words)) for r, words in chosen]


def twgrpo_command(world: Path, out: Path, *flags: str) -> list[str]:
    """The command of a short run on the toy world's untrained model; later flags win."""
    paths = ["--model_name_or_path", world / "model", "--jsonl_path", world / "train.jsonl"]
    paths += ["--video_root", world, "--output_dir", out]
    short = "--max_steps 2 --per_device_train_batch_size 2 --num_generations 4".split()
    command = [sys.executable, PROJECT / "twgrpo.py", *paths, *TOY_FLAGS, *short, *flags]
    return [str(part) for part in command]


def run_twgrpo(world: Path, out: Path, *flags: str) -> subprocess.CompletedProcess:
    """A short run in a process of its own that ends well."""
    command = twgrpo_command(world, out, *flags)
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def rows_of(path: Path) -> list[dict]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def json_values(names: list[str], texts: list[str]) -> st.SearchStrategy:
    """Any JSON, with keys and some of the strings taken from these."""
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    return st.recursive(
        scalars | st.sampled_from(texts),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(names), inner),
        max_leaves=4,
    )


def random_completions(policy, lengths: list[int], seed: int = 0) -> list:
    """Token ids that may be sampled, of the given lengths."""
    import torch

    allowed = (~policy.banned_V).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    return [allowed[torch.randint(len(allowed), (n,), generator=generator)] for n in lengths]
