"""Completion in a real shell, of what `lossworks completion` prints."""

import shutil
import subprocess
from pathlib import Path

import pytest

from lossworks.cli import main

ROOT = Path(__file__).parents[2]
ASK = """
source {script}
asked=$(complete -p lossworks | sed -E 's/.*-F ([^ ]+).*/\\1/')
COMP_WORDS=({words} "{last}")
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
$asked lossworks "{last}" "${{COMP_WORDS[COMP_CWORD-1]}}" 2>/dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "lossworks.bash"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr("sys.stdout", file)
        assert main(["completion", "bash"]) == 0
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "last", "among"),
    [
        ("lossworks", "tr", "train"),
        ("lossworks train", "--print", "--print-spec"),
        ("lossworks train", "jobs/sp", "jobs/specs"),
        ("lossworks compare", "--", "--to"),
        ("lossworks completion", "z", "zsh"),
    ],
)
def test_commands_options_and_files_are_completed(words, last, among, script):
    asked = ASK.format(script=script, words=words, last=last)
    found = subprocess.run(["bash", "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True)

    assert among in found.stdout.split()


def test_zsh_and_unknown_shells(capsys):
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef lossworks")
    assert main(["completion", "fish"]) == 2
