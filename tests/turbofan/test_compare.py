"""Comparisons: methods by name, runs that resume, and what the report says of known numbers."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

from gaba_jax.turbofan import compare, config, report
from gaba_jax.turbofan.train import TrainConfig, load_data, train, train_seeds

pytestmark = pytest.mark.usefixtures("compiled_once")
SMALL = TrainConfig(epochs=1, stride=20)
METHODS = ("uniform", "gaba:warmup_steps=0,beta=0.5", "inverse_norm")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(cells, folder, results) of a small comparison with two seeds."""
    out = tmp_path_factory.mktemp("compare")
    cells = compare.cells(METHODS, ("FD001", "FD002"), ("mse",), SMALL)
    return cells, out, compare.run(cells, (0, 1), out)


class TestMethods:
    def test_options(self):
        text = "gaba:beta=0.5,floor=project,debias=true,task_priorities=(1.0,2.0),warmup_steps=0"
        rule = config.parse_method(text)
        assert rule.num_tasks == 2
        assert "norms" in config.parse_method("uniform").needs
        default = config.parse_method("gaba")
        state, changed = default.init(), rule.init()
        assert state.ema_mass == 1
        assert changed.ema_mass == 0  # debiased

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("gabba", r"no weighting 'gabba'. Did you mean 'gaba'. There are: .*gaba, .*uniform"),
            (
                "gaba:betta=0.5",
                r"'betta=0.5' is no option of gaba\. Did you mean 'beta'\? It",
            ),
            ("gaba:beta", r"'beta' is no option"),
            ("gaba:beta=2", r"'gaba:beta=2': .*beta"),
            ("gaba:floor=none", r"floor"),
            ("stabilize", r"no weighting 'stabilize'"),
        ],
    )
    def test_mistakes(self, text, message):
        with pytest.raises(ValueError, match=message):
            config.parse_method(text)


class TestRuns:
    @pytest.mark.slow
    def test_every_method_starts_from_the_same(self, finished):
        _, _, results = finished
        assert len(results) == 12
        for subset in ("FD001", "FD002"):
            first = {
                r["method"]: r["history"]["gradient_ratio"][0]
                for r in results
                if r["subset"] == subset and r["seed"] == 0
            }
            assert len(set(np.round(list(first.values()), 3))) == 1
        scores = {(r["subset"], r["label"], r["seed"]): r["test"]["rmse"] for r in results}
        assert len(set(scores.values())) == 12

    @pytest.mark.slow
    def test_a_seed_does_not_depend_on_the_others(self, finished):
        _, _, results = finished
        config = dataclasses.replace(SMALL, weighting="inverse_norm")
        alone = train(load_data(config), config).summary
        kept = next(r for r in results if r["method"] == "inverse_norm" and r["seed"] == 0)
        assert kept["test"]["rmse"] == pytest.approx(alone["test"]["rmse"], rel=1e-4)

    @pytest.mark.slow
    def test_what_is_there_is_not_run_again(self, finished, monkeypatch, tmp_path):
        cells, out, results = finished
        trained = []

        def record(data, config, rule, seeds, on_epoch):
            trained.append((config.subset, tuple(seeds)))
            return train_seeds(data, config, rule, seeds, on_epoch)

        monkeypatch.setattr(compare, "train_seeds", record)
        assert compare.run(cells, (0, 1), out) == results
        assert not trained
        gone = compare.run_file(out, cells[4], 1)
        gone.unlink()
        assert list(compare.missing_epochs(cells, (0, 1), out)) == [0, 0, 0, 0, 1, 0]
        again = compare.run(cells, (0, 1), out)
        assert trained == [("FD002", (1,))]
        for a, b in zip(again, results, strict=True):
            assert a["test"] == pytest.approx(b["test"], rel=1e-4)

    @pytest.mark.slow
    def test_a_stopped_cell_leaves_no_half_file(self, finished, tmp_path):
        cells, _, _ = finished

        def stop(cell, epoch, count):
            if cell.method == "inverse_norm":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compare.run(cells[:3], (0,), tmp_path, stop)
        assert len(list(tmp_path.rglob("seed*"))) == 2
        assert all(json.loads(file.read_text()) for file in tmp_path.rglob("seed*"))

    @pytest.mark.slow
    def test_other_settings_need_another_folder(self, finished):
        _, out, _ = finished
        other = compare.cells(METHODS, ("FD001",), ("mse",), dataclasses.replace(SMALL, stride=30))
        with pytest.raises(ValueError, match=r"seed0.json holds a run with another stride"):
            compare.run(other, (0,), out)

    @pytest.mark.slow
    def test_a_diverged_run_is_counted(self, tmp_path):
        config = dataclasses.replace(SMALL, optimizer="sgd", learning_rate=1e3)
        cells = compare.cells(("uniform", "inverse_norm"), ("FD001",), ("amnl",), config)
        results = compare.run(cells, (0,), tmp_path)
        assert results[0]["diverged"]
        assert results[0]["test"] == {}
        text = report.report(results)
        assert "1 of 1" in text
        assert "runs that diverged: uniform + amnl" in text
        report.write(results, tmp_path)

    @pytest.mark.slow
    def test_an_infinite_score_is_left_out_of_means_and_picture(self, finished):
        """A NASA score beyond float64 is null in a run's file, and the run did not diverge."""
        runs = [dict(r) for r in finished[2] if r["subset"] == "FD001"]
        label = runs[0]["label"]
        for run in runs:
            if run["label"] == label:
                run["test"] = run["test"] | {"nasa_score": None, "rmse": 1e4}
        means = {name: row for _, name, row in report.means(runs)}
        assert np.isnan(means[label]["nasa_score"])
        assert means[label]["rmse"] == 1e4
        assert f"| {label} | 10000.0" in report.report(runs)
        _, names = report.pareto(runs).axes[0].get_legend_handles_labels()
        assert f"{label} (far outside)" in names


def results_of(points):
    """Results of one seed with so much RMSE and accuracy."""
    return [
        {
            "label": label,
            "subset": "FD001",
            "diverged": False,
            "test": {"rmse": rmse, "health_accuracy": accuracy, "nasa_score": 1.0},
        }
        for label, (rmse, accuracy) in points.items()
    ]


class TestReport:
    def test_the_trade_off_is_that_of_the_tasks(self):
        points = {"a": (10, 0.8), "b": (12, 0.9), "c": (13, 0.85), "d": (14, 0.7), "e": (90, 0.9)}
        axes = report.pareto(results_of(points)).axes[0]
        assert axes.get_xlabel() == "RUL: test RMSE (cycles)"
        assert axes.get_ylabel() == "health: test accuracy"
        front = axes.lines[-1].get_xydata()
        np.testing.assert_allclose(front, [[10, 0.8], [12, 0.9]])
        assert "e (far outside)" in axes.get_legend_handles_labels()[1]

    @pytest.mark.slow
    def test_files(self, finished, tmp_path):
        _, _, results = finished
        report.write(results, tmp_path)
        assert {file.name for file in tmp_path.iterdir()} == {
            "results.csv",
            "report.md",
            *(f"{what}_{s}.png" for what in ("pareto", "history") for s in ("FD001", "FD002")),
        }
        lines = (tmp_path / "results.csv").read_text().splitlines()
        assert len(lines) == 13
        assert lines[0].startswith("subset,loss,method,seed,diverged,rmse,nasa_score")
        text = (tmp_path / "report.md").read_text()
        assert "time" not in text  # which was not measured side by side
        for part in ("## FD002", "Friedman (seed means", "subset x seed", "Nemenyi", "Holm"):
            assert part in text

    @pytest.mark.slow
    def test_one_subset_and_one_seed_say_what_they_need(self, finished):
        _, _, results = finished
        text = report.report([r for r in results if r["subset"] == "FD001" and r["seed"] == 0])
        assert "needs at least 2 blocks and 3 methods; there are 1 and 3" in text
        assert "Nemenyi: needs at least 2 subsets" in text
        assert "needs at least 2 seeds" in text

    def test_holm(self):
        np.testing.assert_allclose(report.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
        np.testing.assert_allclose(report.holm([0.5, 0.9]), [1, 1])

    def test_nemenyi_of_the_literature(self):
        """Demsar 2006: four classifiers on 14 data sets have the critical difference 1.25."""
        scores = np.random.default_rng(0).normal(size=(14, 4))
        assert "more than 1.25." in report.nemenyi(scores, "abcd")

    def test_detectable_difference_is_detected(self):
        random = np.random.default_rng(0)
        differences = random.normal(size=5)
        effect = report.detectable(differences)
        spread = differences.std(ddof=1)
        drawn = random.normal(effect, spread, size=(20000, 5))
        found = stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05
        assert found.mean() == pytest.approx(0.8, abs=0.08)

    def test_friedman_is_scipys(self):
        scores = np.random.default_rng(0).normal(size=(6, 3))
        expected = stats.friedmanchisquare(*scores.T)
        assert f"p = {expected.pvalue:.3g}, 6 blocks" in report.friedman(scores, "blocks")
