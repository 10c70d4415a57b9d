"""Devices files: what they may say, and whom a group names."""

import pytest
from edgepress.graph.errors import RecipeError
from edgepress.runtimes.device_file import choose_devices, read_devices

LAB = """
[devices.pi4]
url = "ssh://pi@10.0.0.4"
groups = ["pi", "old"]
wheels = "wheels"
threads = 4

[devices.pi5]
url = "ssh://pi@10.0.0.5:2222"
groups = ["pi"]
python = "/opt/python/bin/python3"

[devices.here]
url = "local"
"""


def write(folder, text=LAB):
    path = folder / "lab.toml"
    path.write_text(text)
    return path


def test_devices_are_read_in_order_with_absolute_paths(tmp_path):
    (tmp_path / "wheels").mkdir()
    entries = read_devices(write(tmp_path))
    assert [entry.name for entry in entries] == ["pi4", "pi5", "here"]
    assert entries[0].wheels == str(tmp_path / "wheels")
    assert (entries[0].threads, entries[1].python) == (4, "/opt/python/bin/python3")


def test_a_group_or_a_name_chooses(tmp_path):
    (tmp_path / "wheels").mkdir()
    entries = read_devices(write(tmp_path))
    assert [entry.name for entry in choose_devices(entries, group="pi")] == ["pi4", "pi5"]
    assert [entry.name for entry in choose_devices(entries, group="here")] == ["here"]
    assert choose_devices(entries) == entries
    with pytest.raises(RecipeError, match="'pie'") as caught:
        choose_devices(entries, group="pie")
    assert "did you mean pi" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no device"),
        ("[device.pi]\nurl = 'local'", "unknown key 'device'"),
        ("devices = 3", "names no device"),
        ("[devices.pi]", "missing required field `url`"),
        ("[devices.pi]\nurl = 'local'\nuser = 'pi'", "unknown field `user`"),
        ("[devices.pi]\nurl = 'local'\nthreads = '4'", "threads"),
        ("[devices.pi]\nurl = 'local'\nthreads = 0", "threads is 0"),
        ("[devices.pi]\nurl = 'local'\nwheels = 'absent'", "wheels names no folder"),
        ("[devices.pi]\nurl = 'local'\nssh_config = 'absent'", "ssh_config names no file"),
        ("[devices.pi]\nurl = 'local'\nname = 'other'", "a device's name is its table's"),
        ("[devices.'a b']\nurl = 'local'", "is not a name for a device"),
        ("[devices.pi]\nurl = 'telnet://pi'", "is not a device"),
        ("[devices", "is not TOML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, said):
    with pytest.raises(RecipeError) as caught:
        read_devices(write(tmp_path, text))
    assert said in str(caught.value)
    assert "lab.toml" in caught.value.where
    assert caught.value.remedy


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        read_devices(tmp_path / "absent.toml")


def test_emulated_boards_are_devices_too(tmp_path):
    [entry] = read_devices(write(tmp_path, "[devices.pi]\nurl = 'emulated:raspberry-pi-5'"))
    assert entry.url == "emulated:raspberry-pi-5"
    with pytest.raises(RecipeError) as caught:
        read_devices(write(tmp_path, "[devices.pi]\nurl = 'emulated:raspberry-pi-1'"))
    assert "[devices.pi]" in caught.value.where
