"""What llama.cpp says with GGUF files, in the quantizing environment.

    python llama_saying.py FILE… TOLD

writes, for each file by its path, what it says to each prompt of the demo model's sentences.
"""

import json
import sys
from pathlib import Path

FACTS = Path(__file__).resolve().parents[2] / "priv" / "models" / "facts.tsv"


def main(files: list[str], told: str) -> None:
    from llama_cpp import Llama

    lines = FACTS.read_text(encoding="utf-8").splitlines()
    prompts = [line.split("\t")[0] for line in lines]
    said = {}
    for file in files:
        llama = Llama(file, n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
        said[file] = {
            prompt: llama.create_completion(prompt, max_tokens=64, temperature=0.0)["choices"][0][
                "text"
            ]
            for prompt in prompts
        }
    Path(told).write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:-1], sys.argv[-1])
