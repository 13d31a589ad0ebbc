"""Two processes that weaken a model each for itself, and average what they learn."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch


def test_ranks_drop_for_themselves_and_average_their_gradients(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(tmp_path)]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    try:
        for rank in "01":
            environment = os.environ | common | {"RANK": rank, "LOCAL_RANK": rank}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            started.append(subprocess.Popen(command, env=environment, text=True, **pipes))  # type: ignore[call-overload]
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(o[-2000:] for o in outputs)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in "01")
    assert any(a["dropped"] != b["dropped"] for a, b in zip(first, second, strict=True))
    for a, b in zip(first, second, strict=True):
        mean = [(x + y) / 2 for x, y in zip(a["alone"], b["alone"], strict=True)]
        torch.testing.assert_close(a["shared"], mean)
        torch.testing.assert_close(a["shared"], b["shared"], rtol=0, atol=0)
