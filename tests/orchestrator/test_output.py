import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator import output
from orchestrator.output import Output, Report, Table, duration_text, one_line, progress_text


@dataclass(frozen=True)
class Found:
    path: Path
    sizes: tuple[int, ...]


def test_a_result_is_one_json_document_for_a_program(capsys):
    Output(is_json=True).result({"name": "größer", "found": Found(Path("a"), (1, 2))}, "text for people")
    assert json.loads(capsys.readouterr().out) == {"name": "größer", "found": {"path": "a", "sizes": [1, 2]}}


def test_a_result_is_text_for_a_person(capsys):
    Output().result({"count": 2}, "two of them")
    assert capsys.readouterr() == ("two of them\n", "")


def test_a_result_without_text_lists_its_keys(capsys):
    Output().result(Found(Path("a"), (3, 3)))
    assert capsys.readouterr().out == "path   a\nsizes  3x3\n"


def test_notes_and_hints_keep_stdout_clean(capsys):
    out = Output()
    out.note("waiting")
    out.hint("dab", "status", "$(touch x)")
    assert capsys.readouterr() == ("", "waiting\nnext: dab status '$(touch x)'\n")


def test_a_program_gets_no_hint(capsys):
    Output(is_json=True).hint("dab", "runs")
    assert capsys.readouterr() == ("", "")


def test_an_error_is_a_line_for_a_person_and_a_document_for_a_program(capsys):
    Output().error("data.train: missing", 2)
    assert capsys.readouterr() == ("", "error: data.train: missing\n")
    Output(is_json=True).error("data.train: missing", 2)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"error": {"message": "data.train: missing", "exit_code": 2}}
    assert captured.err == "error: data.train: missing\n"


def test_a_number_that_json_does_not_have_is_null(capsys):
    Output(is_json=True).result({"loss": float("nan"), "deep": [{"rate": float("inf")}, 1.5]})
    assert capsys.readouterr().out == '{"loss": null, "deep": [{"rate": null}, 1.5]}\n'


def test_an_error_brings_its_details_to_a_program(capsys):
    Output(is_json=True).error("it failed", 1, {"run_id": "3f"})
    assert json.loads(capsys.readouterr().out) == {"run_id": "3f", "error": {"message": "it failed", "exit_code": 1}}


def test_a_table_aligns_numbers_right_and_text_left():
    table = Table.of([{"name": "a", "macs": 1200}, {"name": "longer", "macs": None}], ["name", "macs"])
    assert str(table).splitlines() == ["name     macs", "a       1,200", "longer      -"]


def test_a_table_without_rows_is_its_heading():
    assert str(Table(["run", "status"], [])) == "run  status"


@pytest.mark.parametrize(
    ("done", "total", "rate", "expected"),
    [
        (0, 100, 0, "0/100 images (0 %)"),
        (512, 2048, 1024, "512/2,048 images (25 %), 1,024 images/s, 2 s left"),
        (2048, 2048, 1024, "2,048/2,048 images (100 %), 1,024 images/s"),
        (5, None, 0.5, "5 images, 0.5 images/s"),
    ],
)
def test_progress_says_how_far_how_fast_and_how_long(done, total, rate, expected):
    assert progress_text(done, total, rate, "images") == expected


def test_progress_ends_with_what_else_there_is_to_say():
    assert progress_text(1, 2, 0, "epochs", "loss 0.31") == "1/2 epochs (50 %), loss 0.31"


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_a_duration_is_said_as_people_say_it(seconds, expected):
    assert duration_text(seconds) == expected


def test_without_a_terminal_progress_is_the_last_state_of_a_short_task(capsys):
    with Output().progress("build", "images") as bar:
        for done in range(1, 1001):
            bar.update(done, 1000)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("build: 1,000/1,000 images (100 %)")
    assert captured.err.count("\n") == 1


def test_without_a_terminal_progress_writes_a_line_when_the_last_one_is_old_enough(capsys, monkeypatch):
    monkeypatch.setattr(output, "_SECONDS_BETWEEN_LINES", 0.0)
    with Output().progress("train") as bar:
        bar.update(1, 3, "loss 2")
        bar.update(2, 3, "loss 1")
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(", ")[2] for line in lines] == ["loss 2", "loss 1"]


def test_the_rate_of_a_resumed_task_does_not_count_what_was_done_before():
    rate = output._Rate()
    assert rate.after(5000) == 0
    assert rate.after(5000) == 0


def test_a_task_that_fails_writes_no_last_state(capsys):
    def broken() -> None:
        with Output().progress("build") as bar:
            bar.update(1, 2)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        broken()
    assert capsys.readouterr().err == ""


HOSTILE = "\x1b[31mred\x1b]0;title\x07\x9b1m\u202egnp\ud800\r"
HARMLESS = r"\x1b[31mred\x1b]0;title\x07\x9b1m\u202egnp\ud800\x0d"


def test_what_a_file_says_cannot_steer_a_terminal(capsys):
    out = Output()
    out.result({"name": HOSTILE}, f"{HOSTILE}\tseen\nas text")
    out.result({HOSTILE: HOSTILE})
    out.result({}, Report([HOSTILE, Table([HOSTILE], [[HOSTILE]])]))
    out.note(HOSTILE)
    out.error(HOSTILE, 1)
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{HARMLESS}\tseen\nas text\n{HARMLESS}  {HARMLESS}\n{HARMLESS}\n")
    assert captured.err == f"{HARMLESS}\nerror: {HARMLESS}\n"
    assert not set(captured.out + captured.err) & set(HOSTILE) & set("\x1b\x07\x9b\u202e\ud800\r")


def test_a_terminal_with_colours_is_not_steered_either(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    Output().result({}, Report([HOSTILE, Table(["name"], [[HOSTILE]])]))
    found = capsys.readouterr().out
    assert found.count(r"red\x1b]0;title") == 2
    assert "\x07" not in found
    assert "\x9b" not in found


def test_json_escapes_what_a_terminal_would_take_for_a_command_and_says_the_same(capsys):
    Output(is_json=True).result({HOSTILE: [HOSTILE]})
    text = capsys.readouterr().out
    assert json.loads(text) == {HOSTILE: [HOSTILE]}
    assert not set(text) & set("\x1b\x07\x9b\u202e\ud800\r")


def test_names_in_other_scripts_are_shown_as_they_are(capsys):
    names = "größer 日本語 👩\u200d🚀"
    Output().result({}, names)
    assert capsys.readouterr().out == f"{names}\n"


def test_a_name_in_a_line_stays_in_its_line():
    assert one_line("a\nb: 100 %\t\x1b") == r"a\x0ab: 100 %\x09\x1b"
