"""The doctor: known-bad versions are found, named with their sources, and decide the exit code."""

from __future__ import annotations

import sys

import pytest

from thence.cli import doctor as module
from thence.cli.doctor import doctor_command
from thence.errors import UserError
from thence.known_faults import load_known_faults


def environment(monkeypatch, **packages):
    named = {name.replace("_", "-"): version for name, version in packages.items()}
    monkeypatch.setattr(module, "_installed", lambda: named)
    monkeypatch.setattr(module, "_this_environment", lambda: {"Python": "3.x"})
    monkeypatch.setenv("COLUMNS", "160")


@pytest.mark.parametrize(
    "package, version, fault",
    [
        ("deepspeed", "0.15.2", "deepspeed-offload-accumulation"),
        ("deepspeed", "0.18.9", "deepspeed-offload-accumulation"),
        ("deepspeed", "0.18.9+cpu", "deepspeed-offload-accumulation"),
        ("deepspeed", "0.12.0", "deepspeed-offload-several-backwards"),
        ("transformers", "4.45.2", "transformers-mean-of-means"),
        ("transformers", "4.46.1", "transformers-loss-times-accumulation"),
        ("openrlhf", "0.9.10", "openrlhf-sft-mean-of-means"),
        ("openrlhf", "0.10.2", "openrlhf-window-normaliser"),
        ("openrlhf", "0.11.0", "openrlhf-epoch-boundary"),
        ("verl", "0.6.0", "verl-sft-mean-of-means"),
    ],
)
def test_a_known_bad_version_is_named_with_its_source_and_fails(monkeypatch, capsys, package, version, fault):
    environment(monkeypatch, **{package: version})
    assert doctor_command() == 1
    told = capsys.readouterr().out
    assert f"known bad: {package} {version}" in told
    assert fault in told
    assert "https://github.com/" in told


@pytest.mark.parametrize(
    "package, version",
    [
        ("deepspeed", "0.19.8"),
        ("transformers", "5.23.0"),
        ("transformers", "4.46.3"),
        ("openrlhf", "0.11.2"),
        ("llamafactory", "0.9.5"),
        ("verl", "0.9.1"),
        ("trl", "1.16.0"),
    ],
)
def test_versions_that_were_run_and_are_right_pass(monkeypatch, capsys, package, version):
    environment(monkeypatch, **{package: version})
    assert doctor_command() == 0
    assert "no installed version is known to be bad" in capsys.readouterr().out


def test_an_uncertain_report_is_a_note_and_never_an_error(monkeypatch, capsys):
    environment(monkeypatch, llamafactory="0.9.3")
    assert doctor_command() == 0
    told = capsys.readouterr().out
    assert "note: llamafactory" in told and "reported" in told


def test_all_lists_what_is_not_installed(monkeypatch, capsys):
    environment(monkeypatch)
    assert doctor_command(all_=True) == 0
    told = capsys.readouterr().out
    assert all(fault.id in told for fault in load_known_faults())


def test_every_entry_can_be_checked_by_the_reader():
    faults = load_known_faults()
    assert len({fault.id for fault in faults}) == len(faults)
    for fault in faults:
        assert fault.sources and all(source.startswith("https://") for source in fault.sources)
        assert fault.level in ("fault", "note")
        assert fault.confirmed in ("by running", "by the project's own fix", "reported")
        if fault.level == "fault":
            assert fault.affected and fault.confirmed != "reported"
        fault.hits("1.0")  # the specifier can be read


def test_a_version_that_is_no_version_is_not_judged():
    assert not any(fault.hits("git-main") for fault in load_known_faults())


def test_another_environment_is_asked_through_its_python(monkeypatch, capsys, tmp_path):
    package = tmp_path / "deepspeed-0.18.9.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: DeepSpeed\nVersion: 0.18.9\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "160")
    assert doctor_command(python=sys.executable) == 1
    assert "known bad: deepspeed 0.18.9" in capsys.readouterr().out


@pytest.mark.parametrize("executable", ["/nowhere/python", "/bin/false", "/bin/echo"])
def test_a_python_that_does_not_answer_is_a_user_error(executable):
    with pytest.raises(UserError, match="--python"):
        doctor_command(python=executable)


def test_this_environment_is_described(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    assert doctor_command() == 0
    told = capsys.readouterr().out
    for what in ("Python", "torch", "transformers", "Threads", "BLAS", "Disk free", "Devices"):
        assert what in told


def test_no_source_is_cut_on_a_narrow_terminal(monkeypatch, capsys):
    environment(monkeypatch, transformers="4.45.2")
    monkeypatch.setenv("COLUMNS", "50")
    assert doctor_command() == 1
    told = capsys.readouterr().out
    fault = next(f for f in load_known_faults() if f.id == "transformers-mean-of-means")
    assert "…" not in told
    assert all(source in "".join(told.split()) for source in fault.sources)
