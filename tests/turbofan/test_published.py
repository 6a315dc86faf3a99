"""What docs/published_experiment.md says is in the JSON that it is made from, and true."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.turbofan_study import full
from gaba_jax.turbofan import metrics

PAGE = (Path(__file__).parents[2] / "docs" / "published_experiment.md").read_text()
DOCUMENT = json.loads(full.RESULT.read_text())
FD001 = DOCUMENT["runs"]["FD001"]


def test_tables_are_those_of_the_json():
    for start, text in full.tables(DOCUMENT).items():
        assert start + text + full.END in PAGE


@pytest.mark.parametrize("rmse", [3.0, 10.0, 25.0])
def test_score_of_normal_errors(rmse):
    """The formula against the integral of the score over the normal density."""
    z = np.linspace(-12.0, 12.0, 4001)
    scores = np.array([metrics.nasa_score([100.0 + rmse * each], [100.0]) for each in z])
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    mean = np.sum(scores * density) * (z[1] - z[0])
    assert full.gaussian_nasa_score(rmse, 7) == pytest.approx(7 * mean, rel=1e-5)


def test_published_scores_are_sums_over_the_test_engines():
    for subset, methods in full.PUBLISHED.items():
        for method, (rmse, nasa) in methods.items():
            if rmse is None:
                continue
            normal = full.gaussian_nasa_score(rmse, full.TEST_ENGINES[subset])
            assert (abs(normal / nasa - 1) < 0.1) == (method != "AMNL"), (subset, method)


def test_runs_are_of_the_same_protocol():
    """All methods had the same epochs, windows and options, but for the weighting."""
    differing = {"weighting", "gaba", "measure", "every"}
    kept = [
        {k: v for k, v in run["configuration"].items() if k not in differing}
        for runs in FD001.values()
        for run in runs
    ]
    assert len(kept) >= 3
    assert all(each == kept[0] for each in kept)
    assert {run["parameters"] for runs in FD001.values() for run in runs} == {3_493_380}
    assert {run["windows"]["test"] for runs in FD001.values() for run in runs} == {100}


def test_what_the_page_says_of_the_runs():
    (uniform,), (gaba,), (recommended,) = FD001.values()
    of_all = [uniform, gaba, recommended]
    assert f"in {sum(run['timing']['seconds'] for run in of_all) / 60:.0f} minutes" in PAGE
    assert [run["epochs"] for run in of_all] == [10, 6, 6]
    assert [run["evaluated_epoch"] for run in of_all] == [3, 3, 3]
    for split in ("validation", "test"):
        assert uniform[split]["rmse"] == min(run[split]["rmse"] for run in of_all)
    for run in of_all:
        assert 14 < run["test"]["rmse"] < 16
        assert run["test_uncapped"]["rmse"] > run["test"]["rmse"]
        assert 12.9 < run["test_all_windows"]["rmse"] < 15
        assert 56 < run["test_all_windows_uncapped"]["rmse"] < 58
        assert run["test_all_windows"]["nasa_score"] > 100 * 434.4


def test_how_far_the_published_figures_are():
    for subset, (least, most) in {"FD001": (2, 7), "FD002": (5.5, 6.5)}.items():
        for published, full_name, compact in full.NAMES:
            rmse, _ = full.PUBLISHED[subset].get(published, (None, None))
            if rmse is None:
                continue
            study = [
                float(run["rmse"])
                for run in full._page.rows()
                if (run["subset"], run["label"]) == (subset, compact)
            ]
            ours = [sum(study) / len(study)]
            if subset == "FD001":
                ours += [run["test"]["rmse"] for run in FD001.get(full_name, [])]
            assert all(least < each - rmse < most for each in ours), (subset, published)


def test_what_the_page_says_of_the_gradient_ratio():
    ratios = DOCUMENT["ratios"]
    fd001 = ratios["full"]["FD001"]
    assert fd001["epoch"][int(np.argmax(fd001["median"]))] == 0.375  # of one epoch of warm-up
    peaks = {subset: max(found["median"]) for subset, found in ratios["full"].items()}
    assert all(1850 < peak < 3250 for peak in peaks.values())
    assert all(370 < found["median"][0] < 510 for found in ratios["full"].values())
    ends = {subset: found["median"][-1] for subset, found in ratios["full"].items()}
    assert all(480 < ends[subset] < 1000 for subset in ("FD002", "FD004"))
    assert all(180 < ends[subset] < 210 for subset in ("FD001", "FD003"))
    assert 550 < max(max(found["median"]) for found in ratios["compact"].values()) < 570


def test_a_run_with_other_options_is_not_taken_for_the_one_asked_for(tmp_path):
    kept = full.PROTOCOL | full.SHORT | {"epochs": 10, "seed": 0}
    config = {name.replace("-", "_"): value for name, value in kept.items()}
    (tmp_path / "summary.json").write_text(json.dumps({"config": config}))
    np.savez(tmp_path / "history.npz", task_norms=np.ones((5, 2)))
    summary, _ = full.train(tmp_path, tmp_path, "FD001", kept, ())
    assert summary["config"] == config
    asked = full.PROTOCOL | full.LONG | {"epochs": 500, "seed": 0}
    with pytest.raises(SystemExit, match="another schedule, warmup-epochs, epochs: name another"):
        full.train(tmp_path, tmp_path, "FD001", asked, ())
