"""What each of two processes looks at and reads when loaders are made; a module of its own, so that forked processes find it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from pretrain.config import load
from pretrain.data.loader import Loader
from pretrain.data.location import DataLocation
from pretrain.data.shard_check import check_shards
from pretrain.data.shard_index import ShardIndex
from pretrain.distributed.world import World
from pretrain.models import preset


def note_looks(whole: Path, bad: Path, out: Path) -> None:
    """Notes what this process read and looked at when loaders were made, and what it was told."""
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    world = World(rank, 2, torch.device("cpu"))
    looked: list[str] = []
    read: list[str] = []
    stat, scandir, read_index = os.stat, os.scandir, ShardIndex.read

    def count_stat(path: Any, *args: Any, **more: Any) -> Any:
        if str(path).endswith(".mds"):
            looked.append(Path(path).name)
        return stat(path, *args, **more)

    def count_read(path: Path) -> ShardIndex:
        read.append(str(path))
        return read_index(path)

    def scan_elsewhere(path: Any = ".") -> Any:
        assert not str(path).startswith(str(whole)), "streaming looks at the data set again"
        return scandir(path)

    os.stat, os.scandir = count_stat, scan_elsewhere  # type: ignore[assignment]
    ShardIndex.read = count_read  # type: ignore[method-assign,assignment]
    loader = Loader(load("demo_256", [f"data.path={whole}"])[0], preset("focusdit_tiny"), 4, 2, world)
    said: dict[str, Any] = {"looked": [*looked], "read": [*read]}
    said["hashes"] = [loader.fingerprint["indexes"] for _ in range(2)]
    said["read again"] = read[len(said["read"]) :]
    for name, place in (("shared", bad), ("own", (whole, bad)[rank])):
        location = DataLocation(str(place), place, cached=False)
        looked.clear()
        said[name] = check_shards(location, loader.indexes, 2, world)
        said[f"{name} looked"] = [*looked]
        try:
            check_shards(location, loader.indexes, 1, world)
        except ValueError as error:
            said[f"{name} refused"] = str(error)
    out.write_text(json.dumps(said))
    torch.distributed.destroy_process_group()
