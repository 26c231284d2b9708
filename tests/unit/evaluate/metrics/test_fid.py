"""fid: the distance against closed forms and SciPy, the features against torch-fidelity, and what a reference may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.evaluate.__main__ import main
from pretrain.evaluate.features import as_records, of_records
from pretrain.evaluate.metrics import fid

WIDTH = 64  # the network's first features: their distance takes no seconds


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights in the library's layout."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda path, **words: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda network, state: None)
        network = FeatureExtractorInceptionV3("any", ["64"], feature_extractor_weights_path="none")
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fid, "FEATURES", WIDTH)


def gaussian(n: int, mu: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Samples whose own mean is `mu` and whose own covariance is root·rootᵀ, but for fp32's rounding."""
    x = np.random.default_rng(n).standard_normal((n, len(mu)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return (x @ root.T + mu).astype(np.float32)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    first, second = (fid.moments(of_records(as_records(x))) for x in (a, b))
    return fid.frechet_distance(first["mu"], first["sigma"], second["mu"], second["sigma"])


# ---- the distance ----


def test_gaussians_with_the_same_axes_have_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fid, "BLOCK", 300)
    mu_a, mu_b = np.zeros(6), np.linspace(-1, 2, 6)
    std_a, std_b = np.linspace(0.5, 3, 6), np.linspace(2, 0.1, 6)
    found = distance(gaussian(1000, mu_a, np.diag(std_a)), gaussian(700, mu_b, np.diag(std_b)))
    assert found == pytest.approx(((mu_a - mu_b) ** 2).sum() + ((std_a - std_b) ** 2).sum(), rel=1e-5)


def test_any_gaussians_agree_with_scipy() -> None:
    import scipy.linalg

    rng = np.random.default_rng(0)
    roots = [rng.standard_normal((12, 12)) for _ in range(2)]
    mus = [rng.standard_normal(12) for _ in range(2)]
    found = distance(*(gaussian(500, mu, root) for mu, root in zip(mus, roots, strict=True)))
    a, b = (root @ root.T for root in roots)
    expected = ((mus[0] - mus[1]) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert found == pytest.approx(expected, rel=1e-5)


def test_singular_covariances_need_no_offset() -> None:
    """tr (A·Aᵀ·B·Bᵀ)^½ is the sum of the singular values of Aᵀ·B: few pictures, many features."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((5, 40)).astype(np.float32), rng.standard_normal((7, 40)).astype(np.float32)
    a, b = ((z - z.mean(0)).T.astype(np.float64) / np.sqrt(len(z) - 1) for z in (x, y))
    shared = np.linalg.svd(a.T @ b, compute_uv=False).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * shared
    assert distance(x, y) == pytest.approx(expected, rel=1e-5)
    assert distance(x, x) == pytest.approx(0, abs=1e-4)  # roots of rounded zeros


# ---- the command ----


def command(folders: tuple[Path, Path], weights: Path | None, out: Path, reference: Path | None) -> list[str]:
    words = ["--pictures", str(folders[0]), "--metrics", "fid", "--device", "cpu", "--out", str(out)]
    words += ["--fid-weights", str(weights)] if weights else []
    return words + (["--fid-reference", str(reference)] if reference else [])


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "fid.json").read_text())


@pytest.mark.usefixtures("narrow")
def test_a_folder_is_judged_once_and_its_file_serves_elsewhere(
    folders: tuple[Path, Path],
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    judged: list[str] = []
    score = fid.FidScorer.score
    monkeypatch.setattr(
        fid.FidScorer, "score", lambda s, p: (judged.extend(x.path.parent.name for x in p), score(s, p))[1]
    )
    out = tmp_path / "out"
    assert main(command(folders, weights, out, folders[1])) == 0
    found = result(out)
    assert sorted(judged) == ["ours"] * 5 + ["theirs"] * 4

    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("any", [str(WIDTH)], feature_extractor_weights_path=str(weights))
    features = [
        torch.cat([network(torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1)[None])[0] for p in paths])
        for paths in (sorted(folder.iterdir()) for folder in folders)
    ]
    (mu_a, a), (mu_b, b) = ((f.double().mean(0), torch.cov(f.double().T)) for f in features)
    root = torch.linalg.eigvals(a @ b).sqrt().real.sum()  # torchmetrics' way
    expected = float((mu_a - mu_b).square().sum() + a.trace() + b.trace() - 2 * root)
    assert found["values"]["fid"] == {"value": pytest.approx(expected, rel=1e-3), "count": 5, "sem": None}
    assert found["notes"]["reference"]["count"] == 4
    assert found["notes"]["few pictures"].startswith("5 pictures and 4 in the reference for 64 features: a covariance")
    assert set(found["scorer"]) == {"library", "version", "weights", "features", "resize"}

    (file,) = (out / "reference").iterdir()
    for reference in (folders[1], file):
        assert main(command(folders, weights, out, reference)) == 0
        assert result(out)["values"] == found["values"] and len(judged) == 9
    assert result(out)["notes"]["reference"]["count"] == 4

    with np.load(file) as made:
        np.savez(tmp_path / "others.npz", mu=made["mu"], sigma=made["sigma"])
        about = json.loads(str(made["about"]))
        about["scorer"]["version"] = "0.1"
        np.savez(tmp_path / "older.npz", mu=made["mu"], sigma=made["sigma"], about=np.array(json.dumps(about)))
    assert main(command(folders, weights, out, tmp_path / "others.npz")) == 0
    assert result(out)["values"] == found["values"]
    assert result(out)["notes"]["reference"]["made"].startswith("elsewhere")
    assert len(judged) == 9
    assert main(command(folders, weights, out, tmp_path / "older.npz")) == 1
    assert "older.npz: made with another version 0.1 (here 0." in capsys.readouterr().err


@pytest.mark.usefixtures("narrow")
def test_a_reference_goes_on_after_a_kill(
    folders: tuple[Path, Path], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[str] = []
    score = fid.FidScorer.score

    def stopped(scorer: Any, pictures: Any) -> Any:
        if len(judged) == 2:
            raise KeyboardInterrupt
        judged.extend(p.path.name for p in pictures)
        return score(scorer, pictures)

    monkeypatch.setattr(fid.FidScorer, "batch", 1)
    monkeypatch.setattr(fid.FidScorer, "score", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(command(folders, weights, tmp_path / "out", folders[1]))
    monkeypatch.setattr(fid.FidScorer, "score", lambda s, p: (judged.extend(x.path.name for x in p), score(s, p))[1])
    assert main(command(folders, weights, tmp_path / "out", folders[1])) == 0
    assert judged == ["0.png", "1.png", "2.png", "3.png"] + [f"{i}.png" for i in range(5)]


@pytest.mark.usefixtures("narrow")
def test_processes_share_a_reference(
    folders: tuple[Path, Path], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two, the first of which sums up nothing."""
    judged: dict[str, list[str]] = {"0": [], "1": []}
    score = fid.FidScorer.score
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, mine in judged.items():
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(
            fid.FidScorer, "score", lambda s, p, m=mine: (m.extend(x.path.name for x in p), score(s, p))[1]
        )
        assert main(command(folders, weights, tmp_path / "out", folders[1])) == 0
        assert (tmp_path / "out/fid.json").exists() == (rank == "1")
    assert judged == {"0": ["0.png", "2.png", "0.png", "2.png", "4.png"], "1": ["1.png", "3.png", "1.png", "3.png"]}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            {"weights": None},
            "no weights; fetch torch-fidelity's weights (docs/evaluation.md) and give --fid-weights FILE",
        ),
        ({"weights": Path("gone.pth")}, "no file gone.pth; fetch torch-fidelity's weights"),
        ({"reference": None}, "nothing to compare with; give --fid-reference FOLDER or FILE.npz"),
        ({"package": None}, "the package torch-fidelity is missing; pip install 'focusdit-pretrain[evaluate]'"),
    ],
)
def test_what_is_missing_is_not_run(
    given: dict[str, Any], reason: str, folders: tuple[Path, Path], weights: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    if "package" in given:
        monkeypatch.setattr(fid, "find_spec", lambda name: None)
    reference = given.get("reference", folders[1])
    assert main(command(folders, given.get("weights", weights), tmp_path / "out", reference)) == 0
    assert result(tmp_path / "out")["status"] == "not run"
    assert result(tmp_path / "out")["reason"].startswith(reason)


@pytest.mark.parametrize(
    ("reference", "line"),
    [
        ("gone", "No such file or directory: 'gone'"),
        ("empty", "--fid-reference empty: holds no pictures"),
        ("text.npz", "--fid-reference text.npz: no file of numpy"),
        ("wide.npz", "--fid-reference wide.npz: mu is (2048,) and sigma (2048, 2048), expected (64,) and (64, 64)"),
        ("mu.npz", "--fid-reference mu.npz: holds mu, but not sigma; expected a .npz with mu and sigma"),
        ("nan.npz", "--fid-reference nan.npz: mu or sigma is not finite"),
    ],
)
@pytest.mark.usefixtures("narrow")
def test_references_of_no_use_are_one_line(
    reference: str,
    line: str,
    folders: tuple[Path, Path],
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.npz").write_text("mu, sigma")
    np.savez("wide.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048), np.float32))
    np.savez("mu.npz", mu=np.zeros(WIDTH))
    np.savez("nan.npz", mu=np.zeros(WIDTH), sigma=np.full((WIDTH, WIDTH), np.nan))
    monkeypatch.setattr(fid, "read_inception", lambda weights: torch.nn.Identity())  # the reference is looked at first
    assert main(command(folders, weights, tmp_path / "out", Path(reference))) == 1
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert said.startswith("evaluate: fid: ") and line in said


@pytest.mark.parametrize("content", [{"a": torch.zeros(1)}, {"code": Path("x")}, b"half a file"])
def test_other_weights_are_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"--fid-weights .*other.pth: not torch-fidelity's InceptionV3 \("):
        fid.read_inception(path)


@pytest.mark.usefixtures("narrow")
def test_one_picture_has_no_covariance(
    folders: tuple[Path, Path], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sorted(folders[0].iterdir())[1:]:
        path.unlink()
    assert main(command(folders, weights, tmp_path / "out", folders[1])) == 1
    assert "fid: a covariance needs at least 2 pictures" in capsys.readouterr().err
