"""What a public host reads: versions that agree, links to one repository, workflows."""

import re
import tomllib
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
WORKFLOWS = {path.stem: path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")}
REPOSITORY = "https://github.com/gaba-jax/gaba_jax"


def steps(workflow):
    """Of all jobs, in order."""
    jobs = yaml.safe_load(WORKFLOWS[workflow])["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_the_version_is_one():
    heading = re.search(
        r"^## \[(\S+)\] - (Unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert heading
    assert PROJECT["version"] == str(CITATION["version"]) == heading[1]
    released = str(CITATION.get("date-released", "Unreleased"))
    assert released == heading[2]


def test_the_citation_says_what_the_project_says():
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["title"] == PROJECT["name"]
    assert CITATION["license"] == PROJECT["license"]
    assert [each["name"] for each in CITATION["authors"]] == [
        each["name"] for each in PROJECT["authors"]
    ]
    assert CITATION["repository-code"] == PROJECT["urls"]["Repository"] == REPOSITORY
    assert CITATION["url"] == PROJECT["urls"]["Documentation"]
    method = CITATION["references"][0]
    assert {"type", "title", "authors"} <= set(method)  # what the format requires
    for path in ("README.md", "docs/published_experiment.md", "gaba_jax/weighting/_gaba.py"):
        assert method["url"] in (ROOT / path).read_text(), path


def test_links_lead_to_files_of_the_repository():
    for path in (*ROOT.glob("notebooks/*.py"), ROOT / "docs/conf.py", ROOT / "pyproject.toml"):
        for link in re.findall(rf"{REPOSITORY}/blob/main/([\w./]*)", path.read_text()):
            assert (ROOT / link).exists(), link


def test_the_readme_of_the_index_has_absolute_links():
    hook = PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = (ROOT / hook["fragments"][0]["path"]).read_text()
    relative = r"\]\((?!https?:)[^)]*\)"
    assert len(re.findall(relative, text)) > 10
    for each in hook["substitutions"]:
        replacement = each["replacement"].replace("$HFPR_VERSION", PROJECT["version"])
        text = re.sub(each["pattern"], replacement, text)
    assert re.findall(relative, text) == []
    tag = f"v{PROJECT['version']}"
    raw = f"https://raw.githubusercontent.com/gaba-jax/gaba_jax/{tag}/docs/images/balance.png"
    assert f"]({raw})" in text
    files = re.findall(rf"\]\({REPOSITORY}/blob/{re.escape(tag)}/([^)#]*)", text)
    assert len(files) > 10
    assert all((ROOT / file).is_file() for file in files)


def test_what_every_workflow_has():
    assert sorted(WORKFLOWS) == ["ci", "docs", "publish"]
    for name, text in WORKFLOWS.items():
        workflow = yaml.safe_load(text)
        assert set(workflow) >= {"name", True, "permissions", "jobs"}, name  # True: YAML 1.1's on
        assert workflow["permissions"] == {"contents": "read"}
        for job in workflow["jobs"].values():
            assert job["timeout-minutes"] <= 350
            assert set(job.get("needs", "").split()) <= set(workflow["jobs"])
        for step in steps(name):
            assert ("run" in step) != ("uses" in step)
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v1)", step["uses"])


def test_ci_runs_what_must_pass_before_a_merge():
    assert ".ci/run" in [step.get("run") for step in steps("ci")]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    oldest = PROJECT["requires-python"].removeprefix(">=")
    jobs = yaml.safe_load(WORKFLOWS["ci"])["jobs"]
    versions = jobs["everything"]["strategy"]["matrix"]["python"]
    assert versions[0] == oldest
    assert jobs["everything"]["container"].startswith("python:${{ matrix.python }}-")
    setup = next(s for s in jobs["fast-tests"]["steps"] if "setup-python" in s.get("uses", ""))
    versions = [*versions, setup["with"]["python-version"]]
    claimed = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert claimed == sorted(versions)


def test_publishing_stores_no_token():
    text = WORKFLOWS["publish"]
    jobs = yaml.safe_load(text)["jobs"]
    assert jobs["pypi"]["permissions"] == {"id-token": "write"}
    assert jobs["pypi"]["needs"] == "build"
    assert "permissions" not in jobs["build"]
    assert "secrets." not in text
    assert "password" not in text


def test_the_site_is_built_as_contributing_says():
    command = next(step["run"] for step in steps("docs") if "sphinx" in step.get("run", ""))
    assert command.split()[:3] == ["sphinx-build", "-W", "--keep-going"]
    assert (
        "sphinx-build -W --keep-going docs docs/_build/html"
        in (ROOT / "CONTRIBUTING.md").read_text()
    )
    upload = next(step for step in steps("docs") if "upload" in step.get("uses", ""))
    assert upload["with"]["path"] == command.split()[-1]
