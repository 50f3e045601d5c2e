"""The command as a user meets it: verbs, exit codes, and mistakes told in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dynprune.cli import VERBS, main

MISTAKES = {
    "unknown source": (["explain", "resnet18"], "model 'resnet18' is not understood; give torchvision:NAME"),
    "missing file": (["explain", "no_such_file.py:make"], "file 'no_such_file.py' does not exist"),
    "unknown rival": (["bench", "x.py:make", "--against", "eager,tensorrt"], "rival 'tensorrt' is unknown; choose of eager"),
    "missing folder": (["bench", "x.py:make", "--json", "no_such_folder/out.json"], "folder 'no_such_folder' does not exist"),
}
REFUSED_WORDS = {
    "keep above 1": (["bench", "x.py:make", "--keep", "1,1.5"], "a keep ratio must lie in (0, 1], got 1.5"),
    "keep 0": (["bench", "x.py:make", "--keep", "0"], "expected a number above 0, got '0'"),
    "keep not a number": (["bench", "x.py:make", "--keep", "half"], "expected a number above 0, got 'half'"),
    "no threads": (["bench", "x.py:make", "--threads", "0"], "expected an integer of at least 1, got '0'"),
    "bad shape": (["explain", "x.py:make", "--shape", "3,-1,8"], "expected an integer of at least 1, got '-1'"),
    "unknown verb": (["shrink"], "invalid choice: 'shrink'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(case, capsys):
    words, expected = MISTAKES[case]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"dynprune {words[0]}: ")
    assert expected in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("case", REFUSED_WORDS)
def test_the_parser_refuses_with_exit_code_2(case, capsys):
    words, expected = REFUSED_WORDS[case]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    assert f"usage: dynprune {verb}" in capsys.readouterr().out


def test_a_reader_that_stops_early_is_no_error():
    code = "import sys; from dynprune.cli import main; sys.exit(main(['doctor']))"
    process = subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()
