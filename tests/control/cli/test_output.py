"""What `meshctl` prints: aligned, and nothing that steers a terminal."""

from control.api.problems import ResourceError
from control.cli.output import counted, printable, show_problems, show_table

ESCAPE = "\x1b]0;owned\x07"


def test_columns_are_as_wide_as_their_widest_cell(capsys):
    show_table(("NAME", "B"), [("x", ""), ("longer", "y")])
    assert capsys.readouterr().out == "NAME    B\nx       -\nlonger  y\n"


def test_nothing_that_is_shown_steers_the_terminal(capsys):
    show_table(("A",), [(f"web{ESCAPE}",)])
    show_problems("warning", [ResourceError(f"f{ESCAPE}", 1, "x", f"{ESCAPE}\nerror: forged line")])
    out, err = capsys.readouterr()
    assert out == "A\nweb?]0;owned?\n"
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert printable("naïve, ok") == "naïve, ok"


def test_one_is_not_many():
    assert [counted(n, "error") for n in (0, 1, 2)] == ["0 errors", "1 error", "2 errors"]
