"""Write the AdapterHub folders of tests/artifacts/adapterhub, and what the adapters library computes with them.

Run in an environment of its own, because adapters 1.3 needs transformers 4.57:

    python -m venv adapterhub && adapterhub/bin/pip install adapters==1.3.0 torch
    adapterhub/bin/python scripts/make-adapterhub-fixtures.py [FOLDER]

Each case is a folder as `save_adapter(..., use_safetensors=True)` writes it, in half precision to keep it small, and a
file `expected.safetensors`: the token ids, the logits or the last hidden state, and a seed. Weights of the models are
not stored: both sides fill every parameter by its name (`fill`), so that the models are the same in every release.
"""

from __future__ import annotations

import copy
import shutil
import sys
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parents[1] / "tests" / "artifacts" / "adapterhub"
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}
IDS = [[5, 17, 23, 9, 31, 3], [7, 7, 12, 30, 2, 3]]


def fill(model: torch.nn.Module, prefix: str = "") -> None:
    """Values that follow from names and shapes alone: the same in every release of torch and transformers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            count = parameter.numel()
            start = zlib.crc32((prefix + name).encode()) % 10_007
            values = torch.sin(torch.arange(count, dtype=torch.float64) * 12.9898 + start) * 0.35
            around = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_((values + around).view(parameter.shape))


def main(out: Path) -> None:
    """Write every case into a folder."""
    import adapters
    from adapters import (
        BertAdapterModel,
        DistilBertAdapterModel,
        DoubleSeqBnConfig,
        GPT2AdapterModel,
        IA3Config,
        LlamaAdapterModel,
        LoRAConfig,
        ParBnConfig,
        RobertaAdapterModel,
        SeqBnConfig,
    )
    from transformers import BertConfig, DistilBertConfig, GPT2Config, LlamaConfig, RobertaConfig

    bert = (BertAdapterModel, BertConfig(**SIZES, type_vocab_size=2))
    roberta = (RobertaAdapterModel, RobertaConfig(**SIZES, type_vocab_size=1, pad_token_id=1))
    llama = (LlamaAdapterModel, LlamaConfig(**SIZES, num_key_value_heads=1))
    gpt2 = (GPT2AdapterModel, GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=24, n_inner=24))
    distilbert = (
        DistilBertAdapterModel,
        DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=24),
    )
    lora = LoRAConfig(r=2, alpha=6, intermediate_lora=True, output_lora=True, attn_matrices=["q", "k", "v"])
    cases = {
        "bert-houlsby": (bert, DoubleSeqBnConfig(reduction_factor=4), 3, 2),
        "bert-pfeiffer": (bert, SeqBnConfig(reduction_factor=4), 2, 2),
        "bert-both-after-norms": (bert, SeqBnConfig(reduction_factor=8, mh_adapter=True, non_linearity="gelu"), 0, 0),
        "bert-parallel": (bert, ParBnConfig(reduction_factor=8, leave_out=[0]), 2, 1),
        "bert-lora": (bert, lora, 2, 2),
        "bert-ia3": (bert, IA3Config(), 0, 0),
        "roberta-pfeiffer": (roberta, SeqBnConfig(reduction_factor=8), 3, 2),
        "llama-houlsby": (llama, DoubleSeqBnConfig(reduction_factor=4), 0, 0),
        "llama-pfeiffer": (llama, SeqBnConfig(reduction_factor=4), 0, 0),
        "llama-parallel": (llama, ParBnConfig(reduction_factor=8, mh_adapter=True), 0, 0),
        "llama-lora": (llama, lora, 0, 0),
        "llama-ia3": (llama, IA3Config(), 0, 0),
        "distilbert-houlsby": (distilbert, DoubleSeqBnConfig(reduction_factor=8, scaling="channel"), 0, 0),
        "distilbert-pfeiffer": (distilbert, SeqBnConfig(reduction_factor=8, scaling="learned"), 0, 0),
        "gpt2-pfeiffer": (gpt2, SeqBnConfig(reduction_factor=8), 0, 0),
    }
    torch.manual_seed(0)
    print("adapters", adapters.__version__, "torch", torch.__version__, file=sys.stderr)
    for name, ((kind, config), adapter, labels, layers) in cases.items():
        model = kind(copy.deepcopy(config)).eval()  # adapters writes into it
        fill(model.base_model)
        model.add_adapter("task", config=adapter)
        if labels:
            model.add_classification_head("task", num_labels=labels, layers=layers, use_pooler=layers == 1)
        model.set_active_adapters("task")
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".task." in key:  # half precision, so that the small files hold these very values
                    around = 1.0 if isinstance(adapter, IA3Config) and "lora_B" in key else 0.0
                    parameter.copy_((torch.randn(parameter.shape) * 0.3 + around).half())
            found = model(input_ids=torch.tensor(IDS))
            model.set_active_adapters(None)
            plain = model(input_ids=torch.tensor(IDS), **({"head": "task"} if labels else {}))
            assert (found[0] - plain[0]).abs().max() > 1e-2, name
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        model.save_adapter(str(folder), "task", use_safetensors=True)
        for file in folder.glob("*.safetensors"):
            save_file({key: value.half() for key, value in load_file(file).items()}, file)
        value = found.logits if labels else found[0]
        save_file({"ids": torch.tensor(IDS), "expected": value.contiguous()}, folder / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
