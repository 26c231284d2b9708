"""Start of a training's loader on a data set of many shards: seconds and memory of each process.

The shards are sparse files with names, sizes and entries as `data_prep/encode.py` gives them; nothing is read from them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from data_prep import schema
from data_prep.common.words import counted
from data_prep.worker.report import size_text
from pretrain.config import load
from pretrain.console import silence_libraries
from pretrain.data.loader import Loader
from pretrain.models import preset

SAMPLES, BYTES = 137, 128 << 20  # of a shard
PART = 73  # shards of a tar of 10,000 samples
BATCH = 64  # samples of a process and step
COLUMNS = {
    "caption": "str",
    "crc32": "uint32",
    "height": "int",
    "key": "str",
    "latent_256_mean": "ndarray:float16",
    "latent_256_std": "ndarray:float16",
    "text": "ndarray:uint16",
    "width": "int",
}
FIXED = {"uint32": 4, "int": 8}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", type=int, default=730_000, help=f"in all; each has {SAMPLES} samples")
    parser.add_argument("--sets", type=int, default=4, help="that have equally many of the shards")
    parser.add_argument("--processes", type=int, default=1, help="of one node, each with a loader")
    parser.add_argument("--folder", type=Path, help="where the files are made, and removed again")


def run(args: argparse.Namespace) -> str:
    """The table."""
    root = Path(tempfile.mkdtemp(prefix="bench-start-", dir=args.folder))
    try:
        _write(root, args.shards // args.sets, args.sets)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            jobs = [(root, rank, args.processes, port) for rank in range(args.processes)]
            rows = pool.starmap(_start, jobs, chunksize=1)
            pool.close()
            pool.join()  # they remove their names from shared memory
        return _table(rows, root, args)
    finally:
        shutil.rmtree(root)


def _table(rows: list[dict[str, float]], root: Path, args: argparse.Namespace) -> str:
    indexes = sum(path.stat().st_size for path in root.glob(f"*/*/{schema.INDEX}"))
    lines = [
        f"{args.shards:,} shards, {counted(args.sets, 'set')}, indexes of {size_text(indexes)}; all files in the page cache",
        f"  {'process':<10}{'loader':>10}{'fingerprint':>14}{'peak memory':>14}{'kept':>12}",
    ]
    for rank, row in enumerate(rows):
        peak, kept = size_text(int(row["peak"])), size_text(int(row["kept"]))
        lines.append(f"  {rank:<10}{row['loader']:>8.1f} s{row['fingerprint']:>12.2f} s{peak:>14}{kept:>12}")
    return "\n".join(lines)


def _start(root: Path, rank: int, size: int, port: int) -> dict[str, float]:
    """Seconds that one process takes, and the bytes by which its memory grew: at the most, and afterwards."""
    silence_libraries()
    from pretrain.distributed.rendezvous import init_distributed, shutdown  # late: deepspeed has been told to be silent

    launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in launch.items()} | {"MASTER_ADDR": "127.0.0.1"}
    world = init_distributed()
    config, _ = load("stage1_256", [f"data.path={root}", "data.canonical_nodes=1", "preview.every=0"])
    backbone = preset(config.model.preset)
    before = _memory("VmRSS")
    started = time.perf_counter()
    loader = Loader(config, backbone, BATCH * size, BATCH, world)
    made = time.perf_counter()
    _ = loader.fingerprint
    done = time.perf_counter()
    peak, kept = _memory("VmHWM") - before, _memory("VmRSS") - before
    shutdown()
    return {"loader": made - started, "fingerprint": done - made, "peak": peak, "kept": kept}


def _memory(field: str) -> int:
    """Bytes of this process's memory, as Linux counts them: VmRSS now, VmHWM at the most."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


# ---- the data set ----


def _write(root: Path, shards: int, sets: int) -> None:
    about = {}
    for name in (f"source{i}/256" for i in range(sets)):
        folder = root / name
        entries = [_entry(i) for i in range(shards)]
        for number, entry in enumerate(entries):
            path = folder / entry["raw_data"]["basename"]
            if number % PART == 0:
                path.parent.mkdir(parents=True)
            with path.open("wb") as file:
                file.truncate(entry["raw_data"]["bytes"])
        (folder / schema.INDEX).write_text(json.dumps({"version": 2, "shards": entries}))
        about[name] = {
            "source": name.split("/")[0],
            "resolutions": [256],
            "bucket": None,
            "samples": SAMPLES * shards,
            "shards": shards,
            "bytes": BYTES * shards,
        }
    text = {"name": "random", "width": 4096}
    vae = {"name": "random", "channels": 12, "downsample": 8}
    card = schema.Card(text, vae, 300, "mean_std", [256], sets=about, complete=True)
    card.save(root)
    schema.save_null_text(root, torch.zeros(1, 4096, dtype=torch.bfloat16))


def _entry(number: int) -> dict[str, Any]:
    part, shard = divmod(number, PART)
    raw = {"basename": f"{part:05d}/shard.{shard:05d}.mds", "bytes": BYTES, "hashes": {"sha256": f"{number:064x}"}}
    return {
        "column_encodings": list(COLUMNS.values()),
        "column_names": list(COLUMNS),
        "column_sizes": [FIXED.get(kind) for kind in COLUMNS.values()],
        "compression": None,
        "format": "mds",
        "hashes": ["sha256"],
        "raw_data": raw,
        "samples": SAMPLES,
        "size_limit": BYTES,
        "version": 2,
        "zip_data": None,
    }
