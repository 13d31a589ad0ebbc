"""Run as a script: `MODEL.gguf LORA.gguf|- ID ID ...` prints llama.cpp's log-probabilities after these tokens.

A list by token id, as JSON in the last line. The server runs in this process; no port is asked.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    import xllamacpp

    model, lora, *ids = sys.argv[1:]
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx = 128
    parameters.warmup = False
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = 1
    if lora != "-":
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = lora, 1.0
        parameters.lora_adapters = [adapter]
    server = xllamacpp.Server(parameters)
    asked = {"prompt": [int(i) for i in ids], "n_predict": 1, "n_probs": 10**6, "temperature": 0}
    answer = server.handle_completions(asked)
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    by_id = {entry["id"]: entry["logprob"] for entry in found}
    print(json.dumps([by_id[i] for i in range(len(by_id))]))


if __name__ == "__main__":
    main()
