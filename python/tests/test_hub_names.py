"""How models of the hub are named, and which of a repository's files they take."""

from typing import Any

import pytest

from vllm_bridge.errors import BridgeError
from vllm_bridge.hub.names import Name, parse
from vllm_bridge.hub.needed import needed


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/name", Name("org/name")),
        ("gpt2", Name("gpt2")),
        ("org/name:Q8_0", Name("org/name", variant="Q8_0")),
        ("org/name:file.Q8_0.gguf", Name("org/name", file="file.Q8_0.gguf")),
        (
            "org/name:Q8_0/file-00001-of-00002.gguf",
            Name("org/name", "Q8_0/file-00001-of-00002.gguf"),
        ),
        ("org/name/file.gguf", Name("org/name", file="file.gguf")),
        ("/models/name", None),
        ("./name", None),
        ("~/name", None),
        ("a/b/c", None),
        ("file.gguf", None),
        ("org/name:../../file.gguf", None),
        ("org/name:", None),
        ("", None),
    ],
)
def test_names(model: str, name: Name | None) -> None:
    assert parse(model) == name


def chosen(paths: list[str], name: str = "org/name", **options: Any) -> list[str]:
    parsed = parse(name)
    assert parsed is not None
    return needed(paths, parsed, options)


def refused(paths: list[str], name: str = "org/name") -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        chosen(paths, name)
    assert caught.value.reason == "model_not_found"
    return caught.value


SMALL = ["config.json", "tokenizer.json"]


@pytest.mark.parametrize(
    ("beside", "weights"),
    [
        (["pytorch_model.bin", "tf_model.h5", "onnx/model.onnx"], ["model.safetensors"]),
        (["original/consolidated.00.pth", "README.md", "images/a.png"], ["model.safetensors"]),
        (["model.fp16.safetensors", "adapter_model.safetensors"], ["model.safetensors"]),
        # The whole beside its shards
        (
            ["model.safetensors"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        # An extra file that an index names
        (["model-00001-of-00001.bin"], ["model-00001-of-00001.safetensors", "mtp.safetensors"]),
        (["training_args.bin", "optimizer.pt"], ["pytorch_model-00001-of-00001.bin"]),
        (["rng_state_0.pth", "scheduler.pt"], ["qmodel.pt"]),
        (["name.Q4_K_M.gguf"], ["model.safetensors"]),
        (["onnx/model.onnx", "flax_model.msgpack"], []),
    ],
)
def test_of_several_formats_one_is_fetched(beside: list[str], weights: list[str]) -> None:
    assert chosen([*SMALL, *beside, *weights]) == [*SMALL, *weights]


def test_what_else_a_model_reads() -> None:
    module = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"]
    small = ["chat_template.jinja", "modeling_x.py", "tekken.json", "tokenizer.model.v3", *SMALL]
    found = chosen([*small, *module, "model.safetensors", "onnx/config.json", "eval/x.json"])
    assert sorted(found) == sorted([*small, *module, "model.safetensors"])


MISTRAL = ["params.json", "config.json", "consolidated.safetensors", "model.safetensors"]


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, "consolidated.safetensors"),  # the format of the config, which is Mistral's
        ({"config_format": "hf"}, "model.safetensors"),
        ({"load_format": "safetensors"}, "model.safetensors"),
        ({"load_format": "mistral"}, "consolidated.safetensors"),
    ],
)
def test_mistrals_own_format(options: dict[str, str], weights: str) -> None:
    found = chosen(MISTRAL, **options)
    assert [path for path in found if path.endswith(".safetensors")] == [weights]


def test_an_adapter() -> None:
    files = ["adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"]
    assert chosen(files) == ["adapter_config.json", "adapter_model.safetensors"]


GGUF = [
    "name.IQ4_XS.gguf", "name.Q4_K_S.gguf", "name.Q4_K_M.gguf", "name-UD-Q4_K_M.gguf",
    "name.Q8_0.gguf", "mmproj-F16.gguf", "F16/name-F16-00001-of-00002.gguf",
    "F16/name-F16-00002-of-00002.gguf",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("org/name", ["name.Q4_K_M.gguf"]),
        ("org/name:q8_0", ["name.Q8_0.gguf"]),
        ("org/name:IQ4_XS", ["name.IQ4_XS.gguf"]),
        ("org/name:UD-Q4_K_M", ["name-UD-Q4_K_M.gguf"]),
        ("org/name:name.Q4_K_S.gguf", ["name.Q4_K_S.gguf"]),
        ("org/name:F16", [path for path in GGUF if path.startswith("F16/")]),
        ("org/name:F16/name-F16-00002-of-00002.gguf", GGUF[-2:]),
    ],
)
def test_one_gguf_file_of_many(name: str, files: list[str]) -> None:
    assert chosen(["config.json", *GGUF], name) == ["config.json", *files]


def test_a_gguf_file_beside_safetensors_is_named() -> None:
    paths = ["config.json", "model.safetensors", "name.Q8_0.gguf"]
    assert chosen(paths, "org/name:Q8_0") == ["config.json", "name.Q8_0.gguf"]
    assert chosen(paths, load_format="gguf") == ["config.json", "name.Q8_0.gguf"]


def test_a_single_gguf_file_is_meant_whatever_it_is() -> None:
    assert chosen(["name.Q2_K.gguf", "mmproj-F16.gguf"]) == ["name.Q2_K.gguf"]


@pytest.mark.parametrize(
    ("paths", "name", "told"),
    [
        (["a.Q8_0.gguf", "a.F16.gguf"], "org/name", "none in Q4_K_M; it has a.F16.gguf, a.Q8_0"),
        (GGUF, "org/name:Q5_K_M", "no GGUF file `Q5_K_M`; it has"),
        (GGUF, "org/name:name.Q4_K_L.gguf", "Did you mean `org/name:name.Q4_K_"),
        (["a.Q4_K_M.gguf", "b.Q4_K_M.gguf"], "org/name", "Name one, such as `org/name:a.Q4_K_M.gg"),
        (SMALL, "org/name:Q8_0", "has no GGUF file, and `Q8_0` names one"),
        (["mmproj-F16.gguf"], "org/name:F16", "has no GGUF file"),
    ],
)
def test_a_gguf_file_that_is_not_there(paths: list[str], name: str, told: str) -> None:
    assert told in refused(paths, name).message
