"""tools/benchmark.py: its subcommands, and what it refuses."""

import pytest

from tools.benchmark import get_parser, main, subcommands


def test_every_subcommand_has_help_and_the_common_options() -> None:
    for name, module in subcommands().items():
        args = get_parser().parse_args([name, "--rounds", "2"])
        assert (args.subcommand, args.rounds) == (name, 2)
        assert module.__doc__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "toaster"], "--device"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--threads", "-1"], "--threads must be at least 1, got -1"),
    ],
)
def test_wrong_options_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = next(iter(subcommands()))
    with pytest.raises(SystemExit) as exit_info:
        main([name, *arguments])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
