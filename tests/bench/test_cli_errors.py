"""What a user can get wrong on the command line gives one line, exit code 2, and no traceback."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from offload.bench.cli import main
from offload.bench.cli.arguments import write_json
from offload.bench.memory import peak_rss_nbytes


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command prints."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert lines[-1].startswith("offload: error: ")
    assert len([line for line in lines if line.startswith("offload: error: ")]) == 1
    assert "Traceback" not in captured.err
    return lines[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["bench"], "required: COMMAND"),
        (["train", "--steps", "0"], "'0' is not a whole number of at least 1"),
        (["train", "--steps", "many"], "'many' is not a whole number"),
        (["train", "--lr", "-1"], "'-1' is not a positive number"),
        (["train", "--lr", "nan"], "'nan' is not a positive number"),
        (["train", "--dropout", "1"], "dropout is 1.0"),
        (["train", "--model", "huge"], "No model called 'huge'; expected one of tiny"),
        (["train", "--host-memory", "lots"], "'lots'"),
        (["train", "--host-memory", "0"], "0"),
        (["train", "--device", "abacus"], "abacus"),
        (["train", "--text", "/does/not/exist"], "Text '/does/not/exist' does not exist"),
        (["train", "--json", "/does/not/exist/run.json"], "the folder '/does/not/exist' does not exist"),
        (["bench", "step", "--cases", "plain,warp"], "'warp'"),
        (["bench", "step", "--model", "huge"], "No model called 'huge'"),
        (["bench", "step", "--nvme", "/does/not/exist"], "'/does/not/exist' is not a folder"),
    ],
)
def test_mistake_is_named_in_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert words in refusal(capsys, *arguments)


def test_nvme_path_that_is_a_file_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("not a folder")
    flags = ("--quiet", "--steps", "1", "--host-memory", "16MiB")
    assert f"{path} is a file" in refusal(capsys, "train", *flags, "--nvme", str(path))
    assert path.read_text() == "not a folder"


def test_too_little_text_is_found_before_the_model_is_built(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("short")
    before_nbytes = peak_rss_nbytes()
    assert "expected at least 257" in refusal(capsys, "train", "--model", "xl", "--text", str(path))
    assert peak_rss_nbytes() - before_nbytes < 2**30  # the model alone would be 10.7 GB


def test_result_file_that_is_a_folder_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "is a folder" in refusal(capsys, "train", "--json", str(tmp_path))


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from offload.bench.cli.commands import train

    def broken(_: object) -> int:
        raise RuntimeError("ours")

    monkeypatch.setattr(train, "run", broken)
    with pytest.raises(RuntimeError, match="ours"):
        main(["train"])


def test_tracebacks_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_TRACEBACK", "1")
    with pytest.raises(ValueError, match="huge"):
        main(["train", "--model", "huge"])


def test_message_of_many_lines_becomes_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from offload.bench.cli.commands import train

    def broken(_: object) -> int:
        raise ValueError("first\n  second")

    monkeypatch.setattr(train, "run", broken)
    assert refusal(capsys, "train") == "offload: error: first second"


def test_help_is_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    assert "--host-memory" in capsys.readouterr().out


def test_json_is_written_whole_and_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"loss": float("nan"), "losses": [1.5, float("inf")], "path": Path("x"), "shape": (1, 2)})
    assert json.loads(path.read_text()) == {"loss": None, "losses": [1.5, None], "path": "x", "shape": [1, 2]}
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_ends_training_with_130_and_frees_the_directory(tmp_path: Path) -> None:
    """Interrupt a run in mid-training, then train again on the directory: the first has let go of it."""
    command = [
        sys.executable,
        "-P",
        "-u",
        "-m",
        "offload",
        "train",
        "--batch",
        "1",
        "--seq",
        "32",
        "--sample-bytes",
        "0",
    ]
    command += ["--eval-batches", "1", "--nvme", str(tmp_path / "nvme")]
    running = subprocess.Popen(
        [*command, "--steps", "100000"],
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background ignores Ctrl-C, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert running.stderr is not None
    seen = []
    for line in running.stderr:
        seen.append(line)
        if line.startswith("step "):
            os.kill(running.pid, signal.SIGINT)
            break
    _, rest = running.communicate(timeout=60)
    assert running.returncode == 130, "".join(seen) + rest
    assert rest.splitlines()[-1] == "offload: interrupted"
    assert "Traceback" not in rest
    again = subprocess.run(
        [*command, "--steps", "1", "--overwrite"], capture_output=True, text=True, check=False, timeout=100
    )
    assert again.returncode == 0, again.stderr
