from __future__ import annotations

from pathlib import Path

from mgpu_llm.config.files import read
from mgpu_llm.config.parse import load
from mgpu_llm.config.problem import render
from tests.config.loading import unprivileged


def test_drop_ins_are_read_after_the_main_file_in_the_order_of_their_names(tmp_path: Path) -> None:
    main = tmp_path / "mgpu-llm.toml"
    main.write_text("")
    (tmp_path / "conf.d").mkdir()
    for name in ("20-b.toml", "10-a.toml", ".#10-a.toml", "notes.txt", "30-c.toml~"):
        (tmp_path / "conf.d" / name).write_text("")
    sources, problems = read(main)
    assert [source.file.name for source in sources] == ["mgpu-llm.toml", "10-a.toml", "20-b.toml"]
    assert problems == ()


def test_a_missing_file_says_where_to_take_one_from(tmp_path: Path) -> None:
    main = tmp_path / "mgpu-llm.toml"
    loaded = load(main)
    assert render(loaded.problems) == f"{main}: cannot read it: no such file; copy etc/mgpu-llm.toml there"
    assert not loaded.complete


def test_a_folder_in_the_files_place_is_named_so(tmp_path: Path) -> None:
    assert render(load(tmp_path).problems) == f"{tmp_path}: cannot read it: it is a folder"


def test_a_file_that_may_not_be_read_is_named_so(tmp_path: Path) -> None:
    main = tmp_path / "mgpu-llm.toml"
    main.write_text("")
    main.chmod(0)
    with unprivileged():
        loaded = load(main)
    assert render(loaded.problems).splitlines()[-1] == f"{main}: cannot read it: permission denied"


def test_a_drop_in_folder_that_is_a_file_is_a_problem(tmp_path: Path) -> None:
    main, folder = tmp_path / "mgpu-llm.toml", tmp_path / "conf.d"
    main.write_text("")
    folder.write_text("")
    assert render(load(main).problems) == f"{folder}: cannot read it: Not a directory"


def test_any_other_failure_is_told_in_the_systems_words(tmp_path: Path) -> None:
    main = tmp_path / "loop.toml"
    main.symlink_to(main)
    assert render(load(main).problems) == f"{main}: cannot read it: Too many levels of symbolic links"


def test_a_file_that_is_not_utf8_says_which_line(tmp_path: Path) -> None:
    main = tmp_path / "mgpu-llm.toml"
    main.write_bytes("[model]\n# Modèle\n".encode("latin-1"))
    assert render(load(main).problems) == (
        f"{main}: cannot read it: byte 0xe8 in line 2 is not UTF-8; save it as UTF-8"
    )


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    main = tmp_path / "mgpu-llm.toml"
    main.write_text("engine.port = 81\r\n", encoding="utf-8-sig")
    loaded = load(main)
    assert loaded.problems == ()
    assert loaded.config.engine.port == 81


def test_a_dangling_link_among_the_drop_ins_does_not_hide_what_is_wrong_elsewhere(tmp_path: Path) -> None:
    main = tmp_path / "mgpu-llm.toml"
    main.write_text("engine.port = 0")
    (tmp_path / "conf.d").mkdir()
    gone = tmp_path / "conf.d" / "gone.toml"
    gone.symlink_to("nowhere")
    assert render(load(main).problems).splitlines() == [
        f"{gone}: cannot read it: no such file; remove the dangling link",
        f"{main}: engine.port: found 0 (integer), expected an integer from 1 to 65535",
    ]


def test_a_drop_in_folder_that_cannot_be_listed_is_a_problem(tmp_path: Path) -> None:
    main = tmp_path / "mgpu-llm.toml"
    main.write_text("")
    folder = tmp_path / "conf.d"
    folder.symlink_to(folder)
    loaded = load(main)
    assert render(loaded.problems) == f"{folder}: cannot read it: Too many levels of symbolic links"
    assert not loaded.complete
