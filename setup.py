"""Distribution `focusdit-pretrain`: the packages `pretrain` and `data_prep`, with their configs and small frozen encoders."""

from pathlib import Path

from setuptools import find_packages, setup

# Commands `focusdit-NAME`; each is `python -m MODULE`, too.
COMMANDS = {
    "encode": "data_prep.encode",
    "verify": "data_prep.verify",
    "convert": "data_prep.convert",
    "shapes": "data_prep.shapes",
    "plan": "pretrain.plan.__main__",
    "train": "pretrain.train",
    "launch": "pretrain.launch",
    "sample": "pretrain.sample",
    "export": "pretrain.export",
    "prune": "pretrain.prune",
    "import-release": "pretrain.import_release",
    "models": "pretrain.models.__main__",
    "analyze": "pretrain.analyze.__main__",
    "evaluate": "pretrain.evaluate.__main__",
    "ablate": "pretrain.ablate.__main__",
    "compare": "pretrain.compare.__main__",
    "reference": "pretrain.compare.reference",
    "demo": "pretrain.demo",
}

setup(
    name="focusdit-pretrain",
    version="0.1.0",
    description="Pretrain a FocusDiT text-to-image diffusion transformer from scratch: tar files to pictures",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["pretrain", "pretrain.*", "data_prep", "data_prep.*"]), "ds_configs"],
    package_data={
        "pretrain": ["configs/*.yaml", "configs/*.txt"],
        "data_prep": ["assets/**/*"],
        "ds_configs": ["*.json"],
    },
    entry_points={"console_scripts": [f"focusdit-{command} = {module}:main" for command, module in COMMANDS.items()]},
    # Exact versions that are known to work together stand in constraints.txt.
    install_requires=[
        "torch>=2.10,<2.13",  # Tensor.grad_dtype, varlen_attn; docs/dependencies.md: the private interfaces that are relied on
        "torchvision>=0.21",  # `import streaming` needs it
        "deepspeed>=0.19.7,<0.20",  # likewise
        "mosaicml-streaming>=0.13,<0.14",  # likewise
        "webdataset>=1.0",
        "transformers>=4.56,<5",  # the upper bound is mosaicml-streaming's
        "diffusers>=0.33,<0.41",  # docs/dependencies.md
        "sentencepiece>=0.2",  # the tokenizer of T5
        "tensorboard>=2.16",
        "accelerate>=1.0",  # diffusers' CPU offload
        "safetensors>=0.4.3",
        "numpy>=1.26,<2.2",  # the upper bound is mosaicml-streaming's
        "pillow>=10.3",
        "matplotlib>=3.8",
        "einops>=0.8",
        "fsspec>=2024.2",
        "pyarrow>=16",  # Parquet files are a source of pictures beside tars
        "pyyaml>=6",
        "omegaconf>=2.3",
        "pydantic>=2.6",
        "tqdm>=4.66",
        "tenacity>=8.2",  # retries of remote reads and writes
    ],
    # What fsspec needs for tars from, and shards to, object storage and web servers.
    extras_require={
        "s3": ["s3fs>=2024.2"],
        "gs": ["gcsfs>=2024.2"],
        "http": ["aiohttp>=3.9"],
        "fp8": ["torchao>=0.17"],  # model.fp8
        "geneval": ["scipy>=1.11"],  # Mask2Former of transformers
        "release": ["beautifulsoup4>=4.12", "ftfy>=6.1"],  # the caption cleaning of the recipe `release`
        "evaluate": ["torch-fidelity>=0.4"],  # the metric fid
        "dev": [
            *("beautifulsoup4>=4.12", "ftfy>=6.1", "scipy>=1.11"),
            *("torch-fidelity>=0.4", "torchmetrics>=1.8"),  # the latter is what clipscore is compared with
            *("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "ruff>=0.8", "mypy>=1.13"),
            *("s3fs>=2024.2", "aiohttp>=3.9", "moto[s3]>=5", "flask>=3", "flask-cors>=4"),  # an S3 server on loopback
        ],
    },
)
