import pytest
from pikv.report.folder import choose_folder, new_folder


def test_a_folder_appears_whole(tmp_path):
    folder = choose_folder(tmp_path / "a" / "results", "compare")
    with new_folder(folder) as part:
        (part / "file").write_text("content")
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert [path.name for path in folder.parent.iterdir()] == ["results"]


def test_nothing_half_written_stays(tmp_path):
    def fail():
        with new_folder(tmp_path / "results") as part:
            (part / "file").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_results_are_never_overwritten(tmp_path):
    (tmp_path / "results").mkdir()
    assert choose_folder(tmp_path / "results", "compare") == tmp_path / "results"  # empty is fine
    (tmp_path / "results" / "old").write_text("")
    with pytest.raises(ValueError, match="never overwritten"):
        choose_folder(tmp_path / "results", "compare")
    with pytest.raises(ValueError, match="is not a folder"):
        choose_folder(tmp_path / "results" / "old" / "deeper", "compare")


def test_the_default_folder_is_named_after_the_command():
    assert choose_folder(None, "compare").as_posix().startswith("out/compare-")
