"""Inputs are found as a user means them; outputs get numbers that never collide."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sgm.inference import files
from sgm.inference.files import expand_inputs, place_numbered


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def place(tmp_path):
    """Puts a video into the folder of videos; gives its name there."""
    (tmp_path / "videos").mkdir()

    def place(name="new.mp4", text="", describe=str):
        video = tmp_path / name
        video.write_text(text)
        return place_numbered(video, tmp_path / "videos", describe).name

    return place


def test_output_numbers_go_on_from_the_highest_and_spare_every_suffix(tmp_path, place):
    """Caught: counting the files of one suffix, which overwrites after one was deleted."""
    folder = tmp_path / "videos"
    assert place(describe=lambda name: f"made {name}") == "000000.mp4"
    assert (folder / "000000.json").read_text() == "made 000000.mp4\n"
    for taken in ("000001.mp4", "000007.json", "notes.txt", "99.mp4"):
        (folder / taken).touch()
    assert [place("new.gif"), place("new")] == ["000008.gif", "000009"]
    made = {"000000.mp4", "000000.json", "000008.gif", "000008.json", "000009", "000009.json"}
    assert set(names(folder)) == made | {"000001.mp4", "000007.json", "99.mp4", "notes.txt"}


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_a_number_is_given_back_after_a_failure(tmp_path, place, monkeypatch, failure):
    """Caught: a record of a video that is not there."""

    def refused(*_):
        raise failure

    with pytest.raises(failure):
        place(describe=refused)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        with pytest.raises(failure):
            place()
    assert names(tmp_path / "videos") == []
    assert place() == "000000.mp4"


def test_writers_at_the_same_time_never_share_a_number(tmp_path, place):
    """Caught: a video that replaces another's, and a record beside a video of another."""

    def write(index):
        return place(f"{index}.txt", str(index), lambda _: str(index))

    with ThreadPoolExecutor(8) as pool:
        made = sorted(pool.map(write, range(64)))
    assert made == [f"{index:06d}.txt" for index in range(64)]
    texts = [
        [(tmp_path / "videos" / name).with_suffix(suffix).read_text().strip() for name in made]
        for suffix in (".txt", ".json")
    ]
    assert texts[0] == texts[1]
    assert set(texts[0]) == {str(index) for index in range(64)}


def test_a_number_taken_after_the_listing_is_passed_over(tmp_path, place, monkeypatch):
    """Another process takes 0 between this one's look at the folder and its record."""
    listing, stale = files._highest_number, [-1]
    monkeypatch.setattr(files, "_highest_number", lambda f: stale.pop() if stale else listing(f))
    (tmp_path / "videos" / "000000.json").write_text("another's")
    assert place() == "000001.mp4"
    assert (tmp_path / "videos" / "000000.json").read_text() == "another's"


def test_what_a_killed_process_left_takes_no_number(tmp_path, place):
    """Caught: numbers that are skipped for ever, for the mark that was to reserve them stays."""
    (tmp_path / "videos" / ".000000.claim").touch()  # of an older version
    (tmp_path / "videos" / ".unfinished-x1").mkdir()
    assert place() == "000000.mp4"


@pytest.fixture
def photos(tmp_path):
    for name in ("b.jpg", "a.PNG", "c[1].webp", "notes.txt", ".hidden.png", "sub/d.gif"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("b.jpg", ["b.jpg"]),
        ("", ["a.PNG", "b.jpg", "c[1].webp"]),
        ("c[1].webp", ["c[1].webp"]),
        ("*.jpg", ["b.jpg"]),
        ("[ab].*", ["a.PNG", "b.jpg"]),
        ("**/*.gif", ["sub/d.gif"]),
        ("*", ["a.PNG", "b.jpg", "c[1].webp", "notes.txt"]),
    ],
)
def test_inputs_are_files_folders_and_patterns(photos, wanted, found):
    assert expand_inputs(str(photos / wanted)) == [photos / name for name in found]


def test_several_inputs_keep_their_order_and_come_once(photos):
    address = "https://example.org/a.png"
    several = [photos / "b.jpg", address, photos]
    expected = [photos / "b.jpg", address, photos / "a.PNG", photos / "c[1].webp"]
    assert expand_inputs(several) == expected


@pytest.mark.parametrize("wanted", ["missing.png", "*.tiff", "sub/e"])
def test_inputs_that_are_not_there_are_named(photos, wanted):
    with pytest.raises(ValueError, match="no such file or folder") as error:
        expand_inputs([photos / "b.jpg", photos / wanted])
    assert wanted in str(error.value)


def test_an_empty_list_and_a_folder_without_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no input picture"):
        expand_inputs([])
    with pytest.raises(ValueError, match="holds no picture"):
        expand_inputs(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "expected a file, folder, pattern"),
        ("~nosuchuser/a.png", "no home folder ~nosuchuser;"),
        ("x" * 300 + ".png", "name too long"),
    ],
    ids=["empty", "unknown user", "long"],
)
def test_what_can_be_no_file_is_refused_by_name(given, message):
    """Caught: an empty shell variable that takes the pictures of the current folder."""
    with pytest.raises(ValueError, match=rf"(?i)'{given[:9]}.*{message}"):
        expand_inputs(given)
