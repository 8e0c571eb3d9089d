"""How commands fail."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sdp_llm import cli
from sdp_llm.cli import Parser, exported_model, run_command, until_checked
from sdp_llm.errors import ConfigError, RankLost, TrainingStopped


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def raising(error: BaseException) -> Callable[[argparse.Namespace], None]:
    def command(_: argparse.Namespace) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ConfigError("x = 1: wrong"), 2, "job: error: x = 1: wrong\n"),
        (TrainingStopped("step 3: no"), 3, "job: error: step 3: no\n"),
        (RankLost("rank 2 is gone"), 4, "job: error: rank 2 is gone\n"),
        (KeyboardInterrupt(), 130, "job: interrupted\n"),
    ],
)
def test_an_error_is_one_line_and_a_status(
    error: BaseException, status: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("job", raising(error), argparse.Namespace(debug=False)) == status
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", text)


def test_success_is_0() -> None:
    assert run_command("job", lambda _: None, argparse.Namespace(debug=False)) == 0


def test_debug_shows_the_traceback_and_other_errors_always_do() -> None:
    with pytest.raises(ConfigError):
        run_command("job", raising(ConfigError("x")), argparse.Namespace(debug=True))
    with pytest.raises(ZeroDivisionError):
        run_command("job", raising(ZeroDivisionError()), argparse.Namespace(debug=False))


def test_a_rank_names_itself_and_leaves_the_others_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "3")
    for world_size, pauses in (("1", []), ("4", [cli.GRACE_S])):
        monkeypatch.setenv("WORLD_SIZE", world_size)
        assert run_command("job", raising(ConfigError("x")), argparse.Namespace(debug=False)) == 2
        assert capsys.readouterr().err == "job: error: [rank 3] x\n"
        assert slept == pauses


def test_sigterm_waits_for_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    def command(_: argparse.Namespace) -> None:
        with until_checked():
            os.kill(os.getpid(), signal.SIGTERM)
            raise ConfigError("x")

    assert run_command("job", command, argparse.Namespace(debug=False)) == 2
    assert capsys.readouterr().err == "job: error: x\n"
    os.kill(os.getpid(), signal.SIGTERM)  # also while the process is on its way out


def test_sigterm_takes_effect_when_nothing_is_wrong() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, until_checked():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    with until_checked():
        pass
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_folder_of_a_run_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--model {tmp_path}: has no config.json; name an exp"):
        exported_model(str(tmp_path))
    (tmp_path / "config.json").touch()
    assert exported_model(str(tmp_path)) == str(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=f"folder of a run; name the model in it, {tmp_path}/mod"):
        exported_model(str(tmp_path))


def test_a_pattern_without_quotes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser("")
    parser.add_argument("--source")
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        file.touch()
    with pytest.raises(SystemExit):
        parser.parse_args(["--source", *map(str, files)])
    said = capsys.readouterr().err
    assert f"arguments: {files[1]}; if that is of a pattern, give the pattern in quotes;" in said
    with pytest.raises(SystemExit):
        parser.parse_args(["x" * 5000])
    assert "unrecognized arguments: xxx" in capsys.readouterr().err
