"""Inputs are found as a user means them; outputs get numbers that never collide."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from sgm.inference import files
from sgm.inference.files import expand_inputs, next_output_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_output_numbers_go_on_from_the_highest_and_spare_every_suffix(tmp_path):
    """Caught: counting the files of one suffix, which overwrites after one was deleted."""
    folder = tmp_path / "outputs"
    with next_output_path(folder) as path:
        assert path == folder / "000000.mp4"
    for taken in ("000001.mp4", "000007.json", "notes.txt", "99.mp4"):
        (folder / taken).touch()
    with next_output_path(folder, ".gif") as first, next_output_path(folder, "") as second:
        assert (first.name, second.name) == ("000008.gif", "000009")
    assert names(folder) == ["000001.mp4", "000007.json", "99.mp4", "notes.txt"]


def test_a_number_is_given_back_after_a_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt), next_output_path(tmp_path):
        raise KeyboardInterrupt
    with next_output_path(tmp_path) as path:
        assert path.name == "000000.mp4"


def test_writers_at_the_same_time_never_share_a_number(tmp_path):
    def write(index):
        with next_output_path(tmp_path, ".txt") as path, path.open("x") as file:
            file.write(str(index))  # opening fails where the name is taken

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(64)))
    assert names(tmp_path) == [f"{index:06d}.txt" for index in range(64)]
    assert {path.read_text() for path in tmp_path.iterdir()} == {str(i) for i in range(64)}


@pytest.mark.parametrize("taken", [".000000.claim", "000000.mp4"], ids=["claimed", "finished"])
def test_a_number_taken_after_the_listing_is_passed_over(tmp_path, monkeypatch, taken):
    """Another process takes 0 between this one's look at the folder and its claim."""
    listing, stale = files._highest_number, [-1]
    monkeypatch.setattr(files, "_highest_number", lambda f: stale.pop() if stale else listing(f))
    (tmp_path / taken).touch()
    with next_output_path(tmp_path) as path:
        assert path.name == "000001.mp4"
    assert names(tmp_path) == [taken], "the other's claim stays its own"


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
