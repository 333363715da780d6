"""The registry of quantization methods, and a method of somebody else's that goes the whole way."""

import math
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

import made_up_method
from conftest import MODELS, ROOT
from running import Running
from vllm_bridge import versions
from vllm_bridge.checkpoints import fit
from vllm_bridge.checkpoints.models import check_model
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization import naming, registry
from vllm_bridge.quantization.method import Method

LOCKS = ROOT / "priv" / "requirements"
STORED = [
    folder
    for folder in (
        MODELS / "demo-awq",
        MODELS / "demo-gptq",
        *(ROOT / "test/checkpoints").iterdir(),
    )
    # Those that say how they are quantized in other files have tensors of their own.
    if "quantization_config" in (folder / "config.json").read_text(encoding="utf-8")
]

# One of the matrices of a Llama.
MATRIX = "model.layers.0.mlp.down_proj."


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The method as a package has it that was installed beside vLLM: with an entry point."""
    from vllm.model_executor.layers import quantization

    folder = tmp_path / "made_up-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
    entry_point = "[vllm.general_plugins]\nmade_up = made_up_method:install\n"
    (folder / "entry_points.txt").write_text(entry_point)
    monkeypatch.syspath_prepend(str(tmp_path))
    made_up_method.install()  # vLLM loads its plugins once in a process
    yield
    del registry._added["made-up"]
    quantization.QUANTIZATION_METHODS.remove("made-up")
    quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.pop("made-up")


@pytest.mark.usefixtures("made_up")
def test_a_method_of_somebody_elses_is_named_where_it_was_meant() -> None:
    plain = check_model(str(MODELS / "demo"), {})
    for asked in ("made-upp", "inventedd"):
        with pytest.raises(BridgeError) as caught:
            naming.check(plain, {"quantization": asked})
        assert "Did you mean `made-up`?" in caught.value.message
        assert caught.value.details["nearest"] == "made-up"
    arguments = {"quantization": "Invented"}
    naming.check(plain, arguments)
    assert arguments == {"quantization": "made-up"}


@pytest.mark.usefixtures("made_up")
def test_a_method_of_somebody_elses_is_estimated() -> None:
    plain = check_model(str(MODELS / "demo"), {})
    matrices = [t for name, t in plain.tensors.items() if name.endswith("_proj.weight")]
    spared = sum(math.prod(tensor.shape) for tensor in matrices)
    assert (
        fit.loaded_bytes(plain, {"quantization": "made-up"}) == fit.loaded_bytes(plain, {}) - spared
    )


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.usefixtures("made_up")
def test_a_method_of_somebody_elses_loads(facts: dict[str, str]) -> None:
    running = Running()
    info = running.load(quantization="Invented", max_model_len=256)
    assert info["quantization"] == "made-up"
    assert info["quantization_kernel"] == "whole numbers"
    assert info["quantization_note"].endswith("Rounded, computed in torch.bfloat16.")
    assert running.complete_all(facts) == facts
    running.stop()


# -- those of this library


def test_a_method_is_the_one_class_of_its_file() -> None:
    from vllm_bridge.quantization import methods

    found = registry._found()
    files = {path.stem for path in Path(methods.__path__[0]).glob("*.py")} - {"__init__"}
    assert {type(method).__module__.rpartition(".")[2] for method in found} == files
    assert len({method.name for method in found}) == len(found) == len(files)


def test_a_method_that_nothing_is_known_of_asks_for_nothing() -> None:
    for name in ("experts_int8", "humming", "", None):
        method = registry.of(name)
        assert type(method) is Method
        assert (method.extra, method.formats, method.online) == (None, (), None)
        assert method.bytes_per_weight({}) is None


def test_extras_are_the_locks_of_the_set_up_and_their_packages() -> None:
    locks = {path.stem: path.read_text() for path in LOCKS.glob("*.txt")}
    # Those of no method: the devices', the tests', and what makes, trains and draws.
    for name in ("cpu", "cuda", "test", "quantize", "finetune", "matplotlib"):
        del locks[name]
    extras = {extra.name: extra for extra in registry.extras().values()}
    assert set(extras) == set(locks)
    for name, lock in locks.items():
        packages = {*extras[name].modules, *extras[name].faster}
        assert packages == set(re.findall(r"^([\w.-]+)==", lock, re.MULTILINE))
        assert (LOCKS / f"{name}.in").exists()
    assert set(registry.distributions()) <= set(versions._DISTRIBUTIONS)


def test_the_guide_has_the_methods() -> None:
    guide = (ROOT / "guides" / "quantization.md").read_text(encoding="utf-8")
    script = runpy.run_path(str(ROOT / "scripts" / "quantization_methods.py"))
    assert guide == script["written"](guide)


@pytest.mark.parametrize("folder", STORED, ids=lambda folder: str(folder.name))
def test_bytes_per_weight_are_those_of_checkpoints(folder: Path) -> None:
    checkpoint = check_model(str(folder), {})
    method = registry.of(naming.resolve(checkpoint.quant_method or ""))
    said = method.bytes_per_weight(checkpoint.quantization or {})
    assert said is not None
    weights = checkpoint.config["hidden_size"] * checkpoint.config["intermediate_size"]
    # The order of inputs is as long as there are inputs, which counts in small matrices only.
    size = sum(
        tensor.size
        for name, tensor in checkpoint.tensors.items()
        if MATRIX in name and not name.endswith(".g_idx")
    )
    assert said.disk == pytest.approx(size / weights, rel=0.03)
