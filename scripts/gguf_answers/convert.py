"""Run llama.cpp's converter on a model with the demo model's tokenizer.

    convert.py LLAMA_CPP MODEL TYPE FILE

The converter knows tokenizers by what they make of a certain text, and this one is not among those
it knows: that it splits text like GPT-2's is said here. So is its class, which transformers takes
from the kind of the model otherwise.
"""

import runpy
import sys


def main(llama_cpp: str, model: str, outtype: str, file: str) -> None:
    # The gguf-py beside it, of the same version.
    sys.path[:0] = [llama_cpp, f"{llama_cpp}/gguf-py"]
    import transformers
    from conversion import base

    transformers.AutoTokenizer = transformers.PreTrainedTokenizerFast
    base.TextModel.get_vocab_base_pre = lambda _self, _tokenizer: "gpt-2"
    converter = f"{llama_cpp}/convert_hf_to_gguf.py"
    sys.argv = [converter, model, "--outtype", outtype, "--outfile", file]
    runpy.run_path(converter, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
