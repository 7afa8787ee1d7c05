"""Settings: where a value comes from, and that nothing wrong is ever taken for a setting."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from ksi.actors import config
from ksi.actors.config import Config, as_environment, defaults_text, load, shown
from ksi.transport.errors import Invalid


def written(var: Path, text: str) -> Path:
    path = var / "ksi.toml"
    path.write_text(text)
    return path


def test_without_any_file_all_values_are_defaults(tmp_path: Path) -> None:
    loaded = load(tmp_path, {}, {})

    assert loaded.config == Config()
    assert (loaded.config.supervisor.intensity, loaded.config.supervisor.period_s) == (5, 10.0)
    assert set(loaded.origin.values()) == {"default"}


def test_flags_come_before_the_environment_before_the_file_before_defaults(tmp_path: Path) -> None:
    path = written(
        tmp_path, '[supervisor]\nintensity = 1\nperiod_s = 1\nstart_s = 1\n[log]\nlevel = "error"\n'
    )
    environment = {"KSI_SUPERVISOR__PERIOD_S": "2", "KSI_SUPERVISOR__START_S": "2"}
    loaded = load(tmp_path, {"supervisor.start_s": 3}, environment)
    settings = loaded.config.supervisor

    assert (settings.intensity, settings.period_s, settings.start_s) == (1, 2.0, 3.0)
    assert loaded.config.log.level == "error"
    assert loaded.origin["supervisor.intensity"] == f"file {path}"
    assert loaded.origin["supervisor.period_s"] == "environment KSI_SUPERVISOR__PERIOD_S"
    assert loaded.origin["supervisor.start_s"] == "flag"
    assert loaded.origin["supervisor.shutdown_s"] == "default"


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("[supervisor]\nintensty = 1\n", "supervisor.intensity"),
        ("[supervisors]\nintensity = 1\n", "supervisor.intensity"),
        ("[supervisors]\n", "supervisor."),
        ("log_level = 'info'\n", "log.level"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_named(
    tmp_path: Path, text: str, near: str
) -> None:
    written(tmp_path, text)

    with pytest.raises(Invalid, match="there is no setting") as refused:
        load(tmp_path, {}, {})
    assert near in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("supervisor.intensity", -1),
        ("supervisor.intensity", 1.5),
        ("supervisor.intensity", True),
        ("supervisor.intensity", "many"),
        ("supervisor.period_s", 0),
        ("supervisor.period_s", "nan"),
        ("supervisor.period_s", float("inf")),
        ("checkpoint.every_s", -1),
        ("log.level", "loud"),
        ("log.level", 3),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_with_its_key(
    tmp_path: Path, key: str, value: Any
) -> None:
    with pytest.raises(Invalid, match=key):
        load(tmp_path, {key: value}, {})


def test_an_unknown_variable_with_our_prefix_is_refused_and_others_are_left_alone(
    tmp_path: Path,
) -> None:
    load(tmp_path, {}, {"KSI_VAR": "x", "KSI_AGENT": "y", "PATH__X": "z"})

    with pytest.raises(Invalid, match="KSI_LOG__LEVLE"):
        load(tmp_path, {}, {"KSI_LOG__LEVLE": "info"})


def test_a_file_that_is_no_toml_or_is_named_and_missing_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "[supervisor\n")
    with pytest.raises(Invalid, match="is no TOML"):
        load(tmp_path, {}, {})
    with pytest.raises(Invalid, match="no configuration file"):
        load(tmp_path, {}, {}, path=tmp_path / "other.toml")
    with pytest.raises(Invalid, match="no configuration file"):
        load(tmp_path, {}, {"KSI_CONFIG": str(tmp_path / "other.toml")})


def test_the_variable_names_a_file_in_place_of_the_usual_one(tmp_path: Path) -> None:
    written(tmp_path, "[supervisor]\nintensity = 1\n")
    other = tmp_path / "other.toml"
    other.write_text("[supervisor]\nintensity = 2\n")

    assert load(tmp_path, {}, {"KSI_CONFIG": str(other)}).config.supervisor.intensity == 2


def test_flags_reach_children_as_variables(tmp_path: Path) -> None:
    flags = {"supervisor.hung_turn_s": 0.5, "log.level": "debug"}

    assert load(tmp_path, {}, as_environment(flags)).config == load(tmp_path, flags, {}).config


def test_the_default_file_holds_every_key_with_its_default_and_changes_nothing(
    tmp_path: Path,
) -> None:
    written(tmp_path, defaults_text())
    assert load(tmp_path, {}, {}).config == Config()

    uncommented = "\n".join(
        line.removeprefix("# ") if " = " in line else line for line in defaults_text().splitlines()
    )
    flat = {
        f"{section}.{key}": value
        for section, keys in tomllib.loads(uncommented).items()
        for key, value in keys.items()
    }
    assert flat == shown(Config())


def test_every_key_says_its_unit_its_reason_and_its_danger() -> None:
    for key, declared in config._declared().items():
        extra = config._meta(declared).extra or {}
        assert all(extra.get(word) for word in ("unit", "reason", "danger")), key
