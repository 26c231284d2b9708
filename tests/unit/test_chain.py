"""Whether each stage can follow the one before it is known before any is submitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.chain import main
from pretrain.handover import Encoding, problems

MADE = Encoding("/made", (256, 512))


def of(first: str = "", second: str = "", encoding: Encoding | None = MADE, data: str = "/made") -> list[str]:
    words = [
        ("stage1_256", [f"data.path={data}", *first.split()]),
        ("stage2_512", [f"data.path={data}", *second.split()]),
    ]
    return problems(words, encoding)


def test_the_shipped_stages_fit() -> None:
    assert of() == []
    assert of("run_dir=runs/mine", "init_from=mine run_dir=runs/my_second") == []
    assert of("run_dir=/far/run", "init_from=/far/run model.position_scale=3") == []
    assert of("model.mask=none", "model.density=flexdit model.attention=mediators") == []
    assert of("optimizer.name=muon", "optimizer.name=muon carry_moments=true") == []


def test_features_must_be_asked_for_where_they_are_aligned_with() -> None:
    """Else the first stage would say so, after all is encoded."""
    (found,) = of("alignment.weight=0.5")
    assert found.startswith(
        "stage1_256: alignment.weight: 0.5 needs a vision encoder's features, with which /made is not"
    )
    assert of("alignment.weight=0.5", encoding=replace(MADE, options=("--features=dinov2-base",))) == []


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        ("run_dir=runs/mine", "", "init_from: stage1_256 is not the stage before it, whose run_dir is runs/mine"),
        ("", "init_from=null", "init_from: None is not the stage before it, whose run_dir is runs/stage1_256"),
        ("", "run_dir=runs/stage1_256", "run_dir: runs/stage1_256 is the stage before it, too; give each its own"),
        (
            "model.ffn=uniform",
            "",
            "model: cannot start from the stage's before it: shared_expert.key.weight: there not there",
        ),
        ("", "model.preset=focusdit_tiny", "model: cannot start from the stage's before it: "),
        ("", "data.path=/else", "data: /else is no data set: dataset.json is missing"),
        (
            "",
            "data.resolution=768",
            "data.resolution: 768 is not among RESOLUTIONS (256 512), in which /made is encoded",
        ),
        ("", "optimizer.lr=-1", "optimizer.lr: Input should be greater than 0, not -1"),
        (
            "",
            "carry_moments=true model.fusion=[2,26]",
            "carry_moments: the stage before it is of a model with other settings, whose moments fit",
        ),
        (
            "",
            "carry_moments=true optimizer.name=muon",
            "carry_moments: the stage before it holds another optimizer's moments; leave carry_moments out: optimizer.name",
        ),
        (
            "",
            "carry_moments=true alignment.weight=0.5",
            "carry_moments: the stage before it was trained with another alignment; leave carry_moments out: alignment: there",
        ),
        (
            "alignment.weight=0.5 alignment.block=3",
            "carry_moments=true alignment.weight=0.5 alignment.hidden=64",
            "carry_moments: the stage before it was trained with another alignment; leave carry_moments out: alignment.block: t",
        ),
    ],
)
def test_stages_that_do_not_fit(first: str, second: str, problem: str) -> None:
    (found,) = of(first, second, encoding=replace(MADE, options=("--features", "dinov2-base")))
    assert found.startswith(f"stage2_512: {problem}")


def test_without_encoding_the_data_set_must_be_there_and_fit(data_set: Path) -> None:
    assert [p.split(";")[0] for p in of(encoding=None, data="/nowhere")] == [
        f"{stage}: data: /nowhere is no data set: dataset.json is missing" for stage in ("stage1_256", "stage2_512")
    ]
    one, two = of(encoding=None, data=str(data_set))  # of the tiny encoders
    assert (
        "text width: the data set has 128, the model (focusdit_1b_shared2d) takes 4096; model.text_width=128" in one
        and one.startswith("stage1_256: data: ")
    )
    assert two.startswith("stage2_512: data: ")
    words = [(name, [f"data.path={data_set}"]) for name in ("demo_256", "demo_512")]
    assert problems(words, None) == []


def test_a_third_stage_follows_the_second(data_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [word for name in ("stage1_256", "stage2_512", "stage3_finetune") for word in (name, "data.path=/made")]
    assert main([*stages, "--encodes", "/made", "256 512", ""]) == 0
    assert main([*stages[:-1], "data.path=/made init_from=stage1_256", "--encodes", "/made", "256 512", ""]) == 2
    said = "init_from: stage1_256 is not the stage before it, whose run_dir is runs/stage2_512"
    assert capsys.readouterr().err == f"error: stage3_finetune: {said}\n"
    third = (
        "demo_512",
        [f"data.path={data_set}", "init_from=demo_512", "run_dir=runs/third", "data.sources={fine: 1}"],
    )
    (found,) = problems([*((name, [f"data.path={data_set}"]) for name in ("demo_256", "demo_512")), third], None)
    assert found.startswith(f"demo_512: data: data.sources: {data_set} has no fine with samples for 512 px")


@pytest.mark.parametrize("words", [["stage1_256", ""], ["stage1_256", "", "stage2_512"]])
def test_stages_without_overrides_are_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "two stages or more, each with its overrides after it: '' for none" in capsys.readouterr().err


def test_the_command_tells_every_problem_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["stage1_256", "data.path=/made", "stage2_512", "data.path=/made", "--encodes", "/made", "256 512", ""])
        == 0
    )
    assert main(["stage1_256", "x=1", "stage2_512", " data.path=/made  y=2 ", "--encodes", "/made", "256", ""]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(";")[0] for line in lines] == [
        "error: stage1_256: x: unknown field",
        "error: stage2_512: y: unknown field",
    ]


def test_resolutions_that_are_no_numbers_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["stage1_256", "", "stage2_512", "", "--encodes", "/made", "256,512", ""])
    assert ended.value.code == 2
    assert "RESOLUTIONS must be sides in pixels, such as '256 512', not '256,512'" in capsys.readouterr().err
