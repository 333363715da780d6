"""Prompts with images, on the real engine: one for all tests of this file, of a tiny LLaVA."""

import base64
import io
import math
import shutil
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava_model import make_llava
from running import Running
from vllm_bridge.chat import ChatParams
from vllm_bridge.engine.start import load
from vllm_bridge.errors import BridgeError
from vllm_bridge.rpc.protocol import pack_u32, unpack_u32

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPT = "USER: <image>\nWhat is it?\nASSISTANT:"
TOP = {"logprobs": 5, "max_tokens": 8}

# The largest difference of two log probabilities that is nothing but rounding.
EXACT = 0.002

OPTIONS = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 2**26,
    "max_model_len": 256,
    "dtype": "float32",
    "limit_mm_per_prompt": {"image": 2},
    # vLLM's own LLaVA needs torchvision.
    "model_impl": "transformers",
}


def png(*colors: tuple[int, int, int]) -> bytes:
    """A picture of stripes."""
    image = Image.new("RGB", (16, 16))
    for x in range(16):
        for y in range(16):
            image.putpixel((x, y), colors[x * len(colors) // 16])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


RED = png((200, 30, 40))
STRIPES = png((0, 0, 0), (250, 250, 250), (20, 90, 200))


def data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def asked(*images: bytes | str, prompt: str = PROMPT) -> dict[str, Any]:
    return {"prompt": prompt, "multi_modal_data": {"image": list(images)}}


def start(model: Path, **options: Any) -> Running:
    running = Running()
    running.loaded = running.run(load(str(model), OPTIONS | options))
    return running


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def running(llava: Path) -> Iterator[Running]:
    running = start(llava)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Where `/red.png` is the red image, and nothing else is."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/red.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            if found:
                self.wfile.write(RED)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def red(running: Running) -> dict[str, Any]:
    return running.complete(asked(RED), **TOP)


def first_logprobs(completion: dict[str, Any]) -> dict[int, float]:
    """The log probabilities of the first step."""
    columns = completion["logprobs"]
    count = unpack_u32(columns["counts"])[0]
    values = struct.unpack(f"<{count}f", columns["logprobs"][: 4 * count])
    return dict(zip(unpack_u32(columns["token_ids"])[:count], values, strict=True))


def refused(running: Running, red: dict[str, Any], prompt: Any) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        running.run(running.generate(prompt))
    # An error of one request is nobody else's.
    assert running.complete(asked(RED), **TOP)["token_ids"] == red["token_ids"]
    return caught.value


@pytest.mark.parametrize("image", [RED, STRIPES])
def test_the_model_sees_what_it_sees_in_transformers(
    running: Running, llava: Path, image: bytes
) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32).eval()
    processor = LlavaProcessor.from_pretrained(llava)
    inputs = processor(images=Image.open(io.BytesIO(image)), text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits[0, -1].log_softmax(-1)
    output = running.run(running.generate(asked(image), **TOP))
    assert unpack_u32(output["prompt_token_ids"]) == inputs["input_ids"][0].tolist()
    seen = first_logprobs(output["outputs"][0])
    assert next(iter(seen)) == int(expected.argmax())
    for token, logprob in seen.items():
        assert math.isclose(logprob, float(expected[token]), abs_tol=1e-3)


def test_the_same_image_says_the_same_and_another_something_else(
    running: Running, red: dict[str, Any]
) -> None:
    again = running.complete(asked(RED), **TOP)
    assert again["token_ids"] == red["token_ids"]
    striped = first_logprobs(running.complete(asked(STRIPES), **TOP))
    before = first_logprobs(red)
    assert striped.keys() != before.keys() or any(
        abs(striped[token] - before[token]) > 0.01 for token in before
    )


def test_an_image_comes_as_bytes_or_from_a_url(
    running: Running, red: dict[str, Any], server: str
) -> None:
    for image in (data_url(RED), f"{server}/red.png"):
        assert running.complete(asked(image), **TOP)["token_ids"] == red["token_ids"]


def test_an_image_goes_with_tokens_too(running: Running, red: dict[str, Any]) -> None:
    tokenizer = running.engine._llm.renderer.get_tokenizer()
    prompt = asked(RED) | {"prompt_token_ids": pack_u32(tokenizer.encode(PROMPT))}
    assert running.complete(prompt, **TOP)["token_ids"] == red["token_ids"]


def test_the_order_of_several_images_counts(running: Running) -> None:
    two = "USER: <image> and <image>\nASSISTANT:"
    there = first_logprobs(running.complete(asked(RED, STRIPES, prompt=two), **TOP))
    back = first_logprobs(running.complete(asked(STRIPES, RED, prompt=two), **TOP))
    assert there != back


def test_a_conversation_has_images(running: Running, red: dict[str, Any]) -> None:
    def conversation(url: str) -> ChatParams:
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "\nWhat is it?"},
        ]
        return ChatParams(
            messages=[{"role": "user", "content": content}],
            sampling_params={"temperature": 0.0} | TOP,
        )

    output = running.run(running.engine.chat("chat", conversation(data_url(RED))))
    prompt = running.run(running.generate(asked(RED)))["prompt_token_ids"]
    assert output["prompt_token_ids"] == prompt
    seen, expected = first_logprobs(output["outputs"][0]), first_logprobs(red)
    assert seen == pytest.approx(expected, abs=1e-3)
    with pytest.raises(BridgeError):
        running.run(running.engine.chat("broken", conversation(data_url(b"no image"))))
    assert running.complete(asked(RED), **TOP)["token_ids"] == red["token_ids"]


def test_what_is_no_image_is_refused(running: Running, red: dict[str, Any], server: str) -> None:
    wrong: list[tuple[bytes | str, str]] = [
        (b"", "0 bytes"),
        (b"no image", "8 bytes"),
        (RED[:-30], "cannot be read"),
        (data_url(b"no image"), "cannot be read"),
        ("data:image/png;base64,????", "cannot be read"),
        (f"{server}/none.png", "404"),
        ("file:///etc/hostname", "local"),
        ("ftp://127.0.0.1/red.png", "HTTP, data or file URL"),
    ]
    for image, words in wrong:
        error = refused(running, red, asked(RED, image))
        assert error.reason == "invalid_prompt"
        assert error.details["image_index"] == 1
        assert words in error.message


def test_an_image_of_too_many_pixels_is_refused(
    running: Running, red: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", "300")
    large = io.BytesIO()
    Image.new("RGB", (20, 20)).save(large, "PNG")
    error = refused(running, red, asked(large.getvalue()))
    assert error.reason == "invalid_prompt"
    assert "20x20" in error.message


def test_more_images_than_the_limit_are_refused(running: Running, red: dict[str, Any]) -> None:
    error = refused(running, red, asked(RED, RED, RED, prompt="<image><image><image>"))
    assert error.reason == "invalid_prompt"
    assert (error.details["images"], error.details["limit"]) == (3, 2)
    assert "`limit_mm_per_prompt`" in error.message


@pytest.mark.parametrize(("text", "images"), [("USER: Nothing.", 1), ("USER: <image>", 2)])
def test_an_image_without_its_place_is_refused(
    running: Running, red: dict[str, Any], text: str, images: int
) -> None:
    error = refused(running, red, asked(*[RED] * images, prompt=text))
    assert (error.reason, error.details["images"]) == ("invalid_prompt", images)


@pytest.mark.parametrize(
    "prompt",
    [
        {"prompt": PROMPT, "multi_modal_data": {"image": []}},
        {"prompt": PROMPT, "multi_modal_data": {"image": RED}},
        {"prompt": PROMPT, "multi_modal_data": {"image": [1]}},
        {"prompt": PROMPT, "multi_modal_data": {"image": [RED], "audio": [b""]}},
        {"prompt": PROMPT, "multi_modal_data": [RED]},
        {"multi_modal_data": {"image": [RED]}},
        {"prompt_embeds": b"", "shape": [0, 0], "multi_modal_data": {"image": [RED]}},
    ],
)
def test_images_have_one_form(running: Running, red: dict[str, Any], prompt: Any) -> None:
    assert refused(running, red, prompt).reason == "invalid_prompt"


def int8_weights(llava: Path, folder: Path) -> Path:
    """The plain model that torchao's weights of 8 bits stand for: all linear layers have them,
    those that see the image too, but the last one, which names the tokens."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not model.lm_head:
            quantize_(layer, Int8WeightOnlyConfig())
            layer.weight = torch.nn.Parameter(layer.weight.dequantize())
    shutil.copytree(llava, folder)
    model.save_pretrained(folder)
    return folder


def answers(running: Running) -> tuple[list[list[int]], list[float]]:
    """The tokens said to each of two images, and the log probability of every token of the
    prompts but the first."""
    tokens: list[list[int]] = []
    logprobs: list[float] = []
    for image in (RED, STRIPES):
        output = running.run(running.generate(asked(image), max_tokens=8, prompt_logprobs=0))
        tokens.append(unpack_u32(output["outputs"][0]["token_ids"]))
        values = output["prompt_logprobs"]["logprobs"]
        logprobs += struct.unpack(f"<{len(values) // 4}f", values)
    return tokens, logprobs


def test_a_quantized_model_sees_what_its_weights_see(
    running: Running, llava: Path, tmp_path: Path
) -> None:
    seen = []
    for model, options in (
        (llava, {"quantization": "torchao", "quantization_config": "Int8WeightOnlyConfig"}),
        (int8_weights(llava, tmp_path / "plain"), {}),
    ):
        one = start(model, **options)
        try:
            seen.append(answers(one))
        finally:
            one.stop()
    (tokens, logprobs), (expected_tokens, expected_logprobs) = seen
    assert tokens == expected_tokens
    assert logprobs == pytest.approx(expected_logprobs, abs=EXACT)
    # It is quantized: the model itself says otherwise.
    _, plain = answers(running)
    assert logprobs != pytest.approx(plain, abs=20 * EXACT)
