"""What docs/published_experiment.md says is in the JSON that it is made from, and true."""

import json
import re
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


def test_the_published_table():
    """It holds every figure and spread; the printed averages are those of its figures."""
    table = full.whole_table()
    assert table in PAGE
    for method, printed in full.PUBLISHED_AVERAGE.items():
        (line,) = (each for each in table.splitlines() if each.startswith(f"| {method} |"))
        cells = [float(part) for part in re.findall(r"\d+\.\d+", line)]
        published = [methods[method] for methods in full.PUBLISHED.values()]
        assert cells == [*published[0], *published[1], *printed]
        mean = np.mean([(each.rmse, each.nasa) for each in published], axis=0)
        assert np.all(np.abs(mean - printed) < (0.0051, 0.051)), method  # half the last digit


def test_the_published_errors_differ_by_less_than_their_spreads():
    for methods in full.PUBLISHED.values():
        errors = [found.rmse for found in methods.values()]
        assert max(errors) - min(errors) < max(found.rmse_spread for found in methods.values())


def test_published_scores_are_sums_over_the_test_engines():
    for subset, methods in full.PUBLISHED.items():
        for method, found in methods.items():
            normal = full.gaussian_nasa_score(found.rmse, full.TEST_ENGINES[subset])
            assert abs(normal / found.nasa - 1) < 0.06, (subset, method)
    for method, (rmse, nasa) in full.EARLIER.items():
        normal = full.gaussian_nasa_score(rmse, full.TEST_ENGINES["FD001"])
        assert (abs(normal / nasa - 1) < 0.1) == (method != "AMNL"), method


def test_no_way_of_counting_gives_the_published_errors():
    for subset, methods in full.PUBLISHED.items():
        run = DOCUMENT["compact"][subset]
        assert all(7.5 < found.rmse < 8.3 for found in methods.values())
        assert 14 < run["test"]["rmse"] < 15.1
        assert 13 < run["test_all_windows"]["rmse"] < 16
        assert run["test_uncapped"]["rmse"] > 27
        assert run["test_all_windows_uncapped"]["rmse"] > 27


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
    (uniform,), (gaba,), (debiased,) = FD001.values()
    of_all = [uniform, gaba, debiased]
    assert f"in {sum(run['timing']['seconds'] for run in of_all) / 60:.0f} minutes" in PAGE
    steps = sum(run["updates"] * run["timing"]["step_seconds"] for run in of_all)
    assert f"({steps / 60:.0f} by the median" in PAGE
    assert [run["epochs"] for run in of_all] == [12, 12, 12]
    assert [run["evaluated_epoch"] for run in of_all] == [6, 7, 5]
    assert min(run["validation"]["rmse"] for run in of_all) == gaba["validation"]["rmse"]
    assert abs(gaba["test"]["rmse"] - uniform["test"]["rmse"]) < 0.05
    assert gaba["test"]["nasa_score"] > uniform["test"]["nasa_score"]
    accuracy = {run["test"]["health_accuracy"] for run in of_all}
    assert max(accuracy) == debiased["test"]["health_accuracy"]
    for run in of_all:
        assert 14 < run["test"]["rmse"] < 15
        assert run["test_uncapped"]["rmse"] > run["test"]["rmse"]
        assert 12 < run["test_all_windows"]["rmse"] < 13
        assert 56 < run["test_all_windows_uncapped"]["rmse"] < 58
        assert run["test_all_windows"]["nasa_score"] > 90 * 434.4
    assert 13 < DOCUMENT["compact"]["FD001"]["test_all_windows"]["rmse"] < 13.1


def test_how_far_the_published_figures_are():
    given = {s: {m: of.rmse for m, of in methods.items()} for s, methods in full.PUBLISHED.items()}
    given["FD001"] = {method: rmse for method, (rmse, _) in full.EARLIER.items()}
    for subset, (least, most) in {
        "FD001": (2, 5.2),
        "FD002": (5.5, 6.5),
        "FD004": (6.5, 9.5),
    }.items():
        for published, full_name, compact in full.NAMES:
            rmse = given[subset].get(published)
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
    for found in ratios["full"].values():
        assert found["epoch"][int(np.argmax(found["median"]))] < 2
        assert 1650 < max(found["median"]) < 3450
        assert 315 < found["median"][0] < 590
    ends = {subset: np.median(found["median"][-4:]) for subset, found in ratios["full"].items()}
    assert 175 < ends.pop("FD001") < 185
    assert all(525 < end < 655 for end in ends.values())
    assert 550 < max(max(found["median"]) for found in ratios["compact"].values()) < 570


def test_a_run_with_other_options_is_not_taken_for_the_one_asked_for(tmp_path):
    kept = full.PROTOCOL | full.SHORT | {"epochs": 12, "seed": 0}
    config = {name.replace("-", "_"): value for name, value in kept.items()}
    (tmp_path / "summary.json").write_text(json.dumps({"config": config}))
    np.savez(tmp_path / "history.npz", task_norms=np.ones((5, 2)))
    summary, _ = full.train(tmp_path, tmp_path, "FD001", kept, ())
    assert summary["config"] == config
    asked = full.PROTOCOL | full.LONG | {"epochs": 500, "seed": 0}
    with pytest.raises(SystemExit, match="another schedule, warmup-epochs, epochs: name another"):
        full.train(tmp_path, tmp_path, "FD001", asked, ())
