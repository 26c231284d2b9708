"""A judge's endpoint on loopback, whose behaviour each test writes down; a small CLIP with random weights."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pretrain.evaluate import judge_endpoint


@dataclass(frozen=True)
class Asked:
    """A request, as the server saw it. `sha256` is of the picture's bytes."""

    sha256: str
    question: str
    model: str
    key: str | None


@dataclass
class Endpoint:
    """What the server answers: `reply(asked)` gives the text, or (status, headers, body), "stall" or "drop"."""

    url: str = ""
    reply: Callable[[Asked], Any] = lambda asked: "yes"
    asked: list[Asked] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def options(self, **more: Any) -> list[str]:
        words = {"url": self.url, "model": "a-judge", **more}
        return [word for name, value in words.items() for word in (f"--judge-{name}", str(value))]


def completion(text: str | None, **more: Any) -> tuple[int, dict[str, str], bytes]:
    """A chat completion."""
    choice = {"message": {"role": "assistant", "content": text, **more}, "finish_reason": "stop"}
    if "finish_reason" in more:
        choice["finish_reason"] = more["finish_reason"]
    return 200, {}, json.dumps({"choices": [choice]}).encode()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A server that answers yes."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(judge_endpoint, "FIRST_WAIT", 0.01)
    served = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            image, text = body["messages"][0]["content"]
            picture = base64.b64decode(image["image_url"]["url"].partition("base64,")[2])
            key = self.headers.get("Authorization")
            asked = Asked(hashlib.sha256(picture).hexdigest(), text["text"], body["model"], key)
            served.asked.append(asked)
            found = served.reply(asked) if self.path == "/v1/chat/completions" else (404, {}, b"no such path")
            if found == "stall":
                served.over.wait(60)
            if found in ("stall", "drop"):
                self.close_connection = True
                return
            status, headers, content = completion(found) if isinstance(found, str) else found
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    yield served
    served.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of six pictures of one colour each."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / f"{i}.png")
    return folder


def number_of(asked: Asked, folder: Path) -> int:
    """Which of the folder's pictures was asked about."""
    (path,) = (p for p in folder.iterdir() if hashlib.sha256(p.read_bytes()).hexdigest() == asked.sha256)
    return int(path.stem)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP for pictures of 32 pixels and captions of 40 tokens, each a byte; embeddings are 12 wide."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

    folder = tmp_path_factory.mktemp("clip") / "tiny_clip"
    folder.mkdir()
    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(f"{byte}</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = small | ids | {"vocab_size": len(words), "max_position_embeddings": 40}
    vision = small | {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder
