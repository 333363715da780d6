"""How near GGUF files are to the models that they were made of: llama.cpp beside transformers, in
the quantizing environment.

    python llama_likeness.py PAIRS TOLD

reads a JSON list of pairs of a model's folder and a file, and writes one of what was found of each:
``kl`` is the mean KL divergence of the file's model, ``context`` that of one which expects the same
at each place, and ``ours`` and ``theirs`` are the tokens of a text.
"""

import json
import sys
from pathlib import Path
from typing import Any

PYTHON = Path(__file__).resolve().parents[1]
TEXT = (PYTHON / "vllm_bridge" / "jobs" / "held_out.txt").read_text("utf-8")[:700]

# Of so many tokens of the text: more than the models look back.
TOKENS = 160


def likeness(folder: str, file: str) -> dict[str, Any]:
    import numpy as np
    import torch
    from llama_cpp import Llama
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    llama = Llama(file, n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    theirs = llama.tokenize(TEXT.encode(), add_bos=True, special=False)
    llama.eval(ours[:TOKENS])
    told = torch.tensor(np.array(llama.scores[:TOKENS]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ours[:TOKENS]])).logits[0]
    p = logits.double().log_softmax(-1)
    q = told[:, : p.shape[-1]].double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    context = (p.exp() * (p - p.exp().mean(0).log())).sum(-1).mean()
    return {"kl": float(kl), "context": float(context), "ours": ours, "theirs": theirs}


def main(pairs: str, told: str) -> None:
    import torch

    torch.set_num_threads(1)
    found = [likeness(*pair) for pair in json.loads(Path(pairs).read_text("utf-8"))]
    Path(told).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
