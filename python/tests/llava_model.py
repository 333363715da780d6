"""A tiny LLaVA of random numbers from a seed, with the tokenizer of the demo model."""

from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from conftest import MODELS

IMAGE_TOKEN = "<image>"  # noqa: S105 - a token of a tokenizer
PIXELS = 16
PATCH = 4

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}USER: "
    "{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}"
    "{% endfor %}{{ '\\n' }}{% endfor %}ASSISTANT:"
)


def make_llava(folder: Path) -> Path:
    """An image takes 16 tokens (a patch of 4 times 4 pixels each), of 16 times 16 pixels in all."""
    torch.manual_seed(7)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODELS / "demo")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    size = {"height": PIXELS, "width": PIXELS}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=PIXELS,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=1088,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        # So far apart that float32 computed in another order names the same tokens.
        initializer_range=0.2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(PIXELS // PATCH) ** 2,
        dtype=torch.float32,
    )
    LlavaForConditionalGeneration(config).float().save_pretrained(folder)
    return folder
