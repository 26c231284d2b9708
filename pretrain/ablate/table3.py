"""table3: the paper's ablation (FocusDiT, Table 3): the query mask's layers, dropout, previous mask, and the shared vocabulary.

The paper trains 30k steps at batch 1024 and reports FID. Its rows leave open how wide the mask's layers are, and by which way
time enters: here as the presets have it, the 2 and 10 layers are ours. Two rows are added: the last one with FFNs skipped where
the query mask is under 0.15 (§6, Fig. 9), and with the least used FFNs removed (Fig. 10).
"""

from __future__ import annotations

from pretrain.ablate.study import ON_SHAPES, Row, Scale, Study

MASK = ("model.mask={mask}", "model.mask_dropout=0", "model.mask_previous=false")
FIVE = (*MASK, "model.mask_hidden={layers_5}")
BOTH = ("model.mask={mask}", "model.mask_hidden={layers_5}", "model.mask_dropout=0.1", "model.mask_previous=true")

ROWS = {
    "A": Row("DiT baseline", None, paper={"FID": 31.29}),
    "B1": Row("A + query mask, 2 layers", "A", (*MASK, "model.mask_hidden={layers_2}"), paper={"FID": 33.59}),
    "B2": Row("A + query mask, 5 layers", "A", FIVE, paper={"FID": 31.42}),
    "B3": Row("A + query mask, 10 layers", "A", (*MASK, "model.mask_hidden={layers_10}"), paper={"FID": 31.58}),
    "C": Row("B2 + dropout", "B2", (*FIVE, "model.mask_dropout=0.1"), paper={"FID": 31.00}),
    "D": Row("B2 + previous mask", "B2", (*FIVE, "model.mask_previous=true"), paper={"FID": 32.19}),
} | {
    f"VR{width}": Row(
        f"C + D + shared vocabulary of {'' if width == 1 else width}d",
        "A" if width == 1 else f"VR{width - 1}",
        (*BOTH, "model.ffn=shared", f"model.shared_width={width}"),
        paper={"FID": fid},
    )
    for width, fid in ((1, 32.33), (2, 30.59), (3, 30.58))
}
ROWS["skip"] = Row("VR3 + FFNs skipped under 0.15", "VR3", trained_as="VR3", drawing=("--skip-threshold", "0.15"))

ROWS["prune"] = Row("VR3 without the least used FFNs", "VR3", trained_as="VR3", prune=True)

PLAIN = ("model.mask=none", "model.ffn=uniform", *ON_SHAPES)
TINY = ("model.preset=dit_tiny_deep", *PLAIN, "optimizer.name=muon", "optimizer.lr=3e-3", "steps=250")
STUDY = Study(
    "Table 3 of the paper",
    ROWS,
    {
        "tiny": Scale(
            "demo_256",
            TINY,
            words={
                "mask": "adaln_single",
                "layers_2": "[64]",
                "layers_5": "[64,32,16,8]",
                "layers_10": "[64,64,32,32,16,16,8,8,8]",
            },
            seeds=(0, 1, 2),
            prune=2,
            prompts=128,
            about="1.7M to 2.5M parameters on captioned shapes: all rows and seeds took 95 minutes on two busy cores",
        ),
        "small": Scale(
            "demo_256",
            (
                *("model.preset=dit_s2", "model.text_width=128", "model.absolute=sincos", *PLAIN),
                *("optimizer.name=adamw", "optimizer.lr=1e-3", "steps=600"),
                *("model.compile=true", "deepspeed.bf16.enabled=true"),
                *("deepspeed.train_batch_size=256", "deepspeed.train_micro_batch_size_per_gpu=256"),
            ),
            words={
                "mask": "adaln_single",
                "layers_2": "[128]",
                "layers_5": "[128,64,32,16]",
                "layers_10": "[128,128,64,64,32,32,16,16,16]",
            },
            seeds=(0,),
            prune=2,
            prompts=192,
            about="DiT-S/2 on captioned shapes, for one GPU in 25 minutes (planned, not measured)",
        ),
        "paper": Scale(
            "stage1_256",
            (
                "model.preset=dit_1b",
                "model.mask=none",
                "model.ffn=uniform",
                "steps=30000",
                "deepspeed.train_batch_size=1024",
            ),
            words={
                "mask": "release",
                "layers_2": "[512]",
                "layers_5": "[512,128,32,16]",
                "layers_10": "[512,256,256,128,128,64,64,32,16]",
            },
            seeds=(0,),
            prune=8,
            prompts=0,
            caption_tokens=None,
            about="the paper's: the 1B model, 30k steps at batch 1024; give --prompts and --metrics of your own",
        ),
    },
)
