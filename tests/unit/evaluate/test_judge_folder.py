"""A judge that is a model of transformers: small Qwen2.5-VL and InternVL with random weights and a vocabulary of bytes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pretrain.evaluate.judge_folder import FolderJudge
from pretrain.evaluate.metric import NotRun, Picture

IMAGE = {"qwen": "<|vision_start|><|image_pad|><|vision_end|>", "internvl": "<IMG_CONTEXT>"}
START, END = "<|im_start|>", "<|im_end|>"
QUESTIONS = ("Is it red?", "Why?", "{}", "1 + 1", "ZZZ")
CPU = torch.device("cpu")


def template(image: str) -> str:
    """A chat template, in Jinja."""
    parts = f"{{% if part.type == 'image' %}}{image}{{% else %}}{{{{ part.text }}}}{{% endif %}}"
    turn = f"{START}{{{{ m.role }}}}\n{{% for part in m.content %}}{parts}{{% endfor %}}{END}\n"
    return (
        f"{{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}{START}assistant\n{{% endif %}}"
    )


def tokenizer_of(*words: str, **more: Any) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2TokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.Fuse()
    tokenizer = Qwen2TokenizerFast(tokenizer_object=made, pad_token="<|endoftext|>", eos_token=END, **more)
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END, *words]})
    return tokenizer


def text_model(tokenizer: Any, **more: Any) -> dict[str, Any]:
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": start,
        "eos_token_id": end,
        **more,
    }


def qwen() -> tuple[Any, Any]:
    """Its model and processor."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    words = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = tokenizer_of(*words)
    names = ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"]
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(words), strict=True))
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    text = text_model(tokenizer, rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]})
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    processor = Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=template(IMAGE["qwen"]))
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return Qwen2_5_VLForConditionalGeneration(config), processor


def internvl() -> tuple[Any, Any]:
    """Its model and processor."""
    from transformers import (
        GotOcr2ImageProcessorFast,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    words = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    words["video_token"] = "<video>"
    tokenizer = tokenizer_of(*words.values(), extra_special_tokens=words)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision |= {"image_size": [56, 56], "patch_size": [14, 14]}
    images = GotOcr2ImageProcessorFast(size={"height": 56, "width": 56}, crop_to_patches=False)
    processor = InternVLProcessor(
        images, tokenizer, InternVLVideoProcessor(), image_seq_length=4, chat_template=template(IMAGE["internvl"])
    )
    config = InternVLConfig(
        text_config=text_model(tokenizer, model_type="qwen2"),
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    return InternVLForConditionalGeneration(config), processor


@pytest.fixture(scope="module", params=["qwen", "internvl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = {"qwen": qwen, "internvl": internvl}[request.param]()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.5)
    saved = tmp_path_factory.mktemp("judge") / request.param
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    return saved


def test_the_likeliest_answer(folder: Path, tmp_path: Path, one_thread: None) -> None:
    """Token by token as computed here from the chat's text; it depends on picture and question."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    tested = FolderJudge(str(folder), CPU, tokens=12)
    Image.effect_noise((56, 56), 90).convert("RGB").save(tmp_path / "noise.png")
    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    noise, red = Picture(tmp_path / "noise.png", "n"), Picture(tmp_path / "red.png", "r")
    found = tested.ask(noise, "Is it red?").text

    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    chat = f"{START}user\n{IMAGE[folder.name]}Is it red?{END}\n{START}assistant\n"
    inputs = processor(text=[chat], images=[noise.open()], return_tensors="pt")
    tokens, start = inputs["input_ids"], inputs["input_ids"].shape[1]
    for _ in range(12):
        with torch.no_grad():
            inputs |= {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            logits = model(**inputs).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    assert found and found == processor.batch_decode(tokens[:, start:], skip_special_tokens=True)[0]
    by_picture = [[tested.ask(p, question).text for question in QUESTIONS] for p in (noise, red)]
    assert by_picture[0] != by_picture[1] and len(set(by_picture[0])) > 1
    assert tested.identity["judge"] == folder.name and list(tested.identity["weights"]) == ["model.safetensors"]


def test_what_cannot_be_loaded_whole_is_not_run(folder: Path, tmp_path: Path) -> None:
    silent = shutil.copytree(folder, tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(NotRun, match="no chat template"):
        FolderJudge(str(silent), CPU, 4)
    partial = shutil.copytree(folder, tmp_path / "partial")
    tensors = load_file(partial / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("norm.weight"))]
    save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotRun, match="partial lacks 1 of its tensors"):  # which would be random
        FolderJudge(str(partial), CPU, 4)
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(NotRun, match="no model that can be loaded"):
        FolderJudge(str(pickled), CPU, 4)
