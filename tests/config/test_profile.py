"""Profiles and the link that names the active one."""

import os

import pytest

from llmwd.config import ConfigError, active_profile, load, profile_names, set_active
from tests.config.homes import GOOD_PROFILE, environ, told, write

HOSTILE = ["", ".", "..", "../p", "a/b", "/etc/passwd", "-x", ".hidden", "p\n", "p q", "p;ls", "é", "p\0", "a" * 101, "$(ls)"]


@pytest.fixture
def home(tmp_path):
    return write(
        tmp_path,
        {
            "etc/config.env": "",
            "models/b-2.env": GOOD_PROFILE,
            "models/a.1.env": GOOD_PROFILE,
            "models/.x.env": "",
            "models/-y.env": "",
            "models/notes.txt": "",
            "p.env": "touch escaped\n",
        },
    )


def test_profiles_are_the_files_with_a_proper_name(home):
    assert profile_names(home) == ["a.1", "b-2"]
    assert profile_names(home / "nowhere") == []


def test_the_link_names_the_active_profile(home):
    assert active_profile(home) is None
    set_active(home, "a.1")
    assert active_profile(home) == "a.1" and os.readlink(home / "active-model.env") == "models/a.1.env"
    set_active(home, "b-2")
    assert active_profile(home) == "b-2" and load(home, None, "n", environ()).profile.name == "b-2"
    assert sorted(path.name for path in home.iterdir()) == ["active-model.env", "etc", "models", "p.env"]


def test_an_absolute_link_into_models_counts_as_well(home):
    (home / "active-model.env").symlink_to(home / "models/a.1.env")
    assert active_profile(home) == "a.1"


@pytest.mark.parametrize("name", HOSTILE)
def test_nobody_escapes_models(home, name):
    with pytest.raises(ConfigError, match="is no profile name"):
        set_active(home, name)
    loaded = load(home, name, "n", environ())
    assert loaded.profile is None and loaded.settings is not None
    assert told(loaded)[0].startswith(f"models: {name!r} is no profile name")
    assert not (home / "escaped").exists() and not os.path.lexists(home / "active-model.env")


@pytest.mark.parametrize("target", ["p.env", "../p.env", "models/../p.env", "/etc/passwd", "models/.x.env", "models"])
def test_a_link_that_leads_elsewhere_names_no_profile(home, target):
    (home / "active-model.env").symlink_to(target)
    assert active_profile(home) is None
    loaded = load(home, None, "n", environ())
    assert told(loaded) == [
        "active-model.env: is not a link to models/<profile>.env; "
        "choose a profile with ./switch-model.sh PROFILE (a.1, b-2)"
    ]
    assert loaded.settings is not None and not (home / "escaped").exists()


def test_a_missing_and_a_dangling_link_tell_the_remedy(home):
    assert told(load(home, None, "n", environ())) == [
        "active-model.env: is missing; choose a profile with ./switch-model.sh PROFILE (a.1, b-2)"
    ]
    (home / "active-model.env").symlink_to("models/gone.env")
    loaded = load(home, None, "n", environ())
    assert told(loaded) == [
        "active-model.env: there is no profile gone; choose one with ./switch-model.sh PROFILE (a.1, b-2)"
    ]
    assert loaded.settings is not None


def test_an_unknown_profile_is_refused_with_the_known_ones(home):
    with pytest.raises(ConfigError, match=r"there is no profile gone .*; there are: a.1, b-2"):
        set_active(home, "gone")


def test_a_file_in_place_of_the_link_is_never_overwritten(home):
    write(home, {"active-model.env": "MODEL_NAME=precious\n"})
    with pytest.raises(ConfigError, match="is not a link"):
        set_active(home, "a.1")
    assert (home / "active-model.env").read_text() == "MODEL_NAME=precious\n"
