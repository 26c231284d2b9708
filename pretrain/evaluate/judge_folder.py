"""A judge that is a model of transformers in this process: Qwen2.5-VL, InternVL, or any other that chats about pictures.

One question at a time: a vLLM server with the same weights (judge_endpoint.py) is the faster way to thousands of pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data_prep.encoders import working_dtype
from data_prep.weights import local_folder
from pretrain.evaluate.judge import Answer
from pretrain.evaluate.metric import NotRun, Picture
from pretrain.evaluate.weights import identity_of, read_model


class FolderJudge:
    """A vision-language model on one device; its answers are the likeliest (no sampling)."""

    concurrency = 1

    def __init__(self, name: str, device: torch.device, tokens: int):
        """Args: name: folder or hub name; tokens: the longest answer. Raises NotRun where it cannot be loaded."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            folder = local_folder(name, {})
            self._processor: Any = AutoProcessor.from_pretrained(folder)
            model = read_model(AutoModelForImageTextToText, folder, dtype=working_dtype(device))
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise NotRun(f"--judge-folder {name}: no model that can be loaded ({reason})") from error
        if not getattr(self._processor, "chat_template", None):
            raise NotRun(f"--judge-folder {name}: its processor has no chat template; take an instruct model")
        self._model, self._device, self._tokens = model.to(device), device, tokens
        self.identity: Mapping[str, Any] = {
            "judge": folder.name if Path(name).is_dir() else name,
            **identity_of(folder),
            "dtype": str(model.dtype),
            "tokens": tokens,
        }

    @torch.inference_mode()
    def ask(self, picture: Picture, question: str) -> Answer:
        """Its answer."""
        content = [{"type": "image", "image": picture.open()}, {"type": "text", "text": question}]
        inputs = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._device, dtype=self._model.dtype)
        padding = self._processor.tokenizer.pad_token_id  # else it is guessed, with a line for each question
        tokens = self._model.generate(**inputs, max_new_tokens=self._tokens, do_sample=False, pad_token_id=padding)
        (text,) = self._processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return Answer(text)
