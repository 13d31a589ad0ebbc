"""A real TensorBoard server shows what was written: asked over HTTP, as its pages ask it."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from PIL import Image

import gatedadapters as ga
from gatedadapters.inspection import TensorBoardWriter
from gatedadapters.testing.backbones import tiny

R = np.array([[0.9, np.nan], [0.7, 0.8]])


class Server:
    """TensorBoard in a process of its own."""

    def __init__(self, logs: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--host", "127.0.0.1"]
        more = ["--port", str(port), "--load_fast", "false", "--reload_multifile", "true"]
        self.process = subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def get(self, route: str, data: Any = None, **query: str) -> bytes:
        """The body of an answer; `data` is posted."""
        address = f"{self.address}/data/{route}" + (f"?{urlencode(query)}" if query else "")
        body = None if data is None else json.dumps(data).encode()
        with urlopen(Request(address, body, {"Content-Type": "application/json"}), timeout=30) as answer:
            found: bytes = answer.read()
        return found

    def json(self, route: str, data: Any = None, **query: str) -> Any:
        """The same, parsed."""
        return json.loads(self.get(route, data, **query))

    def wait_for(self, runs: set[str]) -> None:
        """Until it has read these runs."""
        for _ in range(240):
            try:
                if runs <= set(self.json("runs")):
                    return
            except (URLError, ConnectionError):
                assert self.process.poll() is None, "tensorboard did not start"
            time.sleep(0.25)
        raise AssertionError(f"tensorboard has not read {runs} in a minute")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, ga.Adapters]]:
    """Two runs: gates over two steps with everything there is to show, and one that only has other parameters."""
    logs = tmp_path_factory.mktemp("logs")
    torch.manual_seed(0)
    adapters = ga.attach(tiny("bert")[0], "encoder-mixed", tasks=("mood", "topic"))
    adapters.set_penalty(ga.Budget(fraction=0.2), total_steps=10)
    assert adapters.bank is not None
    config = {"rate": 0.1, "penalty": ga.Budget(fraction=0.2), "noise": None}
    with TensorBoardWriter(logs / "first") as writer:
        writer.hparams(config, {"score": 0.8})
        writer.gates(adapters, 0)
        before = adapters.discretize(ga.Budget(fraction=0.5))
        writer.structure(before, 0)
        with torch.no_grad():
            adapters.bank.log_alpha.normal_(0, 2)
        writer.gates(adapters, 1)
        writer.structure(adapters.discretize(ga.Budget(fraction=0.2)), 1, before=before)
        writer.matrix(["mood", "topic"], R, 1)
    with TensorBoardWriter(logs / "second") as writer:
        writer.hparams({**config, "noise": 0.2}, {"score": 0.6})
    server = Server(logs)
    try:
        server.wait_for({"first", "second"})
        yield server, adapters
    finally:
        server.process.terminate()
        server.process.wait(timeout=30)


def test_scalars_have_the_values_of_the_gates(written: tuple[Server, ga.Adapters]) -> None:
    server, adapters = written
    bank = adapters.bank
    assert bank is not None
    tags = server.json("plugin/scalars/tags")["first"]
    assert {"gates/expected_cost", "gates/real_cost", "gates/target", "gates/closed_paths", "penalty/budget"} <= set(
        tags
    )
    found = server.json("plugin/scalars/scalars", run="first", tag="gates/expected_cost")
    assert [step for _, step, _ in found] == [0, 1]
    assert found[-1][2] == pytest.approx(float(bank.expected_cost().detach()), rel=1e-5)
    real = server.json("plugin/scalars/scalars", run="first", tag="gates/real_cost")[-1][2]
    assert real == pytest.approx(float((bank.deterministic() > 0).any(0).double() @ bank.cost("params")))
    any_task = 1 - (1 - bank.open_probability()).prod(0)
    where = bank.slices["encoder/layer/1/attention/self/query:lora"]
    place = server.json("plugin/scalars/scalars", run="first", tag="open block 1/attn.q lora")[-1][2]
    assert place == pytest.approx(float(any_task[where].detach().mean()), abs=1e-6)


def test_images_show_open_probabilities_by_place_and_task(written: tuple[Server, ga.Adapters]) -> None:
    server, _ = written
    tags = server.json("plugin/images/tags")["first"]
    assert set(tags) == {
        *("open/mood", "open/topic", "path mix/by block", "structure/kept", "structure/changed", "R"),
        *("structure/kept by mood", "structure/kept by topic"),
    }
    first, second = (picture(server, "open/topic", sample) for sample in (0, 1))
    assert first.shape == second.shape
    assert min(first.shape[:2]) > 150
    dark, mixed = (len(np.unique(image.reshape(-1, 3), axis=0)) for image in (first, second))
    assert mixed > dark + 20  # all open looks the same everywhere; what random gates do does not


def picture(server: Server, tag: str, sample: int) -> np.ndarray[Any, Any]:
    entry = server.json("plugin/images/images", run="first", tag=tag, sample="0")[sample]
    body = server.get(f"plugin/images/individualImage?{entry['query']}")
    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))


def test_histograms_count_every_log_alpha(written: tuple[Server, ga.Adapters]) -> None:
    server, adapters = written
    assert adapters.bank is not None
    tags = server.json("plugin/histograms/tags")["first"]
    assert set(tags) == {
        f"log alpha/{task} {level}" for task in adapters.tasks for level in adapters.bank.config.levels
    }
    counted = 0.0
    for level in adapters.bank.config.levels:
        _, step, buckets = server.json("plugin/histograms/histograms", run="first", tag=f"log alpha/mood {level}")[-1]
        assert step == 1
        counted += sum(count for *_, count in buckets)
    assert counted == adapters.bank.n_gates


def test_hparams_are_complete_in_the_first_run_and_nested_ones_have_dots(written: tuple[Server, ga.Adapters]) -> None:
    server, _ = written
    experiment = server.json("plugin/hparams/experiment", {"experimentName": ""})
    names = {info["name"] for info in experiment["hparamInfos"]}
    assert {"rate", "noise", "penalty.fraction", "penalty.per_task"} <= names
    request = {"experimentName": "", "startIndex": 0, "sliceSize": 10, "allowedStatuses": ["STATUS_SUCCESS"]}
    groups = server.json("plugin/hparams/session_groups", request)["sessionGroups"]
    found = {group["hparams"]["noise"]: group["metricValues"][0]["value"] for group in groups}
    assert found == {"none": pytest.approx(0.8), 0.2: pytest.approx(0.6)}


def test_the_diff_is_a_text_with_one_line_a_path(written: tuple[Server, ga.Adapters]) -> None:
    server, _ = written
    (entry,) = server.json("plugin/text/text", run="first", tag="structure/diff/text_summary")
    assert entry["text"].count("encoder/layer/") > 5
    assert "<code>" in entry["text"]
