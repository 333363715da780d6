"""Make GGUF files of the small models of the tests with llama.cpp, and write down what they are and
what llama.cpp says with them.

    make.py LLAMA_CPP

where LLAMA_CPP is the folder of its sources, writes ``test/gguf/llama_cpp.json``: the tokens of
each text, and of each file its digest, the log-probabilities of the tokens of all texts but of
their first ones, and, of models that know what the demo model does, the sentences that are said
otherwise. The files themselves are not kept: ``python/tests/gguf_models.py`` makes the same.
"""

import ctypes
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import Llama

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python" / "tests"))

import checkpoints
import gguf_models
import mixtures

CONVERT = Path(__file__).with_name("convert.py")

# A part of the files for models that differ from the demo model in their form only.
MODELS = {
    gguf_models.demo: gguf_models.TYPES,
    gguf_models.mixture: ("F16", "Q8_0", "Q4_K_M"),
    gguf_models.qwen2: ("F16", "Q8_0", "Q4_K_M"),
}


def pairs(name: str) -> dict[str, str]:
    file = checkpoints.MODELS / f"{name}.tsv"
    return dict(line.split("\t", 1) for line in file.read_text(encoding="utf-8").splitlines())


FACTS, CHAT = pairs("facts"), pairs("chat")
TEXTS = [prompt + completion for prompt, completion in FACTS.items()]


def convert(sources: str, model: Path, kind: str, file: Path) -> None:
    command = [sys.executable, CONVERT, sources, model, kind.lower(), file]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def quantize(source: Path, kind: str, file: Path) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    names = [str(path).encode() for path in (source, file)]
    if llama_cpp.llama_model_quantize(*names, ctypes.byref(params)):
        sys.exit(f"llama.cpp does not quantize to {kind}")


def answers(file: Path, is_learned: bool) -> tuple[list[list[int]], dict[str, Any]]:
    """The tokens of the texts, and what llama.cpp says.

    Args:
        is_learned: whether the model knows sentences
    """
    llama = Llama(
        str(file), n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
    )
    tokens = [llama.tokenize(text.encode(), special=True) for text in TEXTS]
    said: dict[str, str] = {}
    if is_learned:
        said = {prompt: complete(llama, prompt) for prompt in FACTS}
        said |= {question: chat(llama, question) for question in CHAT}
    return tokens, {
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "otherwise": {
            prompt: text for prompt, text in said.items() if text != (FACTS | CHAT)[prompt]
        },
        "logprobs": [value for text in tokens for value in logprobs(llama, text)],
    }


def complete(llama: Llama, prompt: str) -> str:
    result = llama.create_completion(prompt, max_tokens=64, temperature=0.0)
    return str(result["choices"][0]["text"])


def chat(llama: Llama, question: str) -> str:
    message = {"role": "user", "content": question}
    result = llama.create_chat_completion([message], max_tokens=64, temperature=0.0)
    return str(result["choices"][0]["message"]["content"])


def logprobs(llama: Llama, tokens: list[int]) -> list[float]:
    llama.reset()
    llama.eval(tokens)
    logits = llama.scores[: len(tokens) - 1].astype(np.float64)
    highest = logits.max(1)
    totals = highest + np.log(np.exp(logits - highest[:, None]).sum(1))
    chosen = logits[np.arange(len(logits)), tokens[1:]]
    return [round(value, 4) for value in (chosen - totals).tolist()]


def main(sources: str) -> None:
    lines = [f'"version": "llama-cpp-python {llama_cpp.__version__}"']
    tokens: list[list[int]] = []
    with TemporaryDirectory() as temporary:
        for model, kinds in MODELS.items():
            name, tensors, config = model()
            folder = mixtures.write(Path(temporary, name), tensors, config)
            converted = {kind: Path(temporary, f"{name}-{kind}.gguf") for kind in kinds}
            said = {}
            for kind, file in converted.items():
                if kind in gguf_models.PLAIN:
                    convert(sources, folder, kind, file)
                else:
                    quantize(converted["F16"], kind, file)
                tokens, said[kind] = answers(file, model is not gguf_models.qwen2)
                wrong = len(said[kind]["otherwise"])
                mean = np.mean(said[kind]["logprobs"])
                print(f"{name} {kind}: {wrong} otherwise, {mean:.4f}", flush=True)
            rows = [f"  {json.dumps(kind)}: {json.dumps(one)}" for kind, one in said.items()]
            lines.append(f'"{name}": {{\n' + ",\n".join(rows) + "\n }")
    lines.insert(1, f'"tokens": {json.dumps(tokens)}')
    gguf_models.LLAMA_CPP.write_text("{\n " + ",\n ".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
