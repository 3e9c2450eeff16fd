"""Old names of commands and options are replaced, with a line on stderr for each."""

import pytest

from sacflow_robot.cli.renamed import with_new_names


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("study regularisation --seeds 3", "study regularization --seeds 3"),
        ("run --arm-wait=5 --handheld keyboard", "run --enable-wait=5 --teleop keyboard"),
        ("run --no-arm", "run --no-enable"),
        ("serve --reload_limit 0.1", "serve --max-action-change 0.1"),
    ],
)
def test_old_names_are_replaced_and_told(capsys: pytest.CaptureFixture[str], old: str, new: str) -> None:
    assert with_new_names(old.split()) == new.split()
    lines = capsys.readouterr().err.splitlines()
    assert lines and all("is now" in line and "still works in this release" in line for line in lines)


def test_other_names_pass_silently(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "--teleop", "handheld", "--", "--x"]
    assert with_new_names(arguments) == arguments
    assert not capsys.readouterr().err
