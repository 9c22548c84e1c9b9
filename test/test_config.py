"""The schema of parameters: what it accepts, what it refuses, and what it ships."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import yaml

from vpr_lite_ros.config import (
    Config,
    ConfigError,
    KeyframeConfig,
    Parameter,
    describe,
    make_config,
    parameters,
    read_yaml,
    shipped_yaml,
)

NUMBERS = [p for p in parameters().values() if p.type in (int, float)]
CHOICES = [p for p in parameters().values() if p.choices]


def _name(parameter: Parameter) -> str:
    return parameter.name


def _same(one: object, other: object) -> bool:
    """Equal, where nan equals nan."""
    return repr(one) == repr(other)


def test_no_values_give_the_defaults() -> None:
    assert _same(make_config({}), Config())
    every_default = {name: parameter.default for name, parameter in parameters().items()}
    assert _same(make_config(every_default), Config())


def test_values_arrive_where_they_belong() -> None:
    config = make_config({"top_k": 3, "keyframe.min_rotation_rad": 1.5, "qos.image": "reliable"})
    assert (config.top_k, config.keyframe.min_rotation_rad) == (3, 1.5)
    assert config.qos.image == "reliable"
    assert config.keyframe.min_interval_s == KeyframeConfig().min_interval_s
    assert Config().top_k != 3


def test_every_field_is_a_parameter_with_a_sentence_and_bounds() -> None:
    names = [field.name for field in dataclasses.fields(Config)]
    assert {name.split(".")[0] for name in parameters()} == set(names)
    for name, parameter in parameters().items():
        assert parameter.name == name and len(parameter.help) > 10
        assert parameter.type is type(parameter.default)
        bounded = parameter.minimum is not None and parameter.maximum is not None
        assert bounded or parameter.type not in (int, float), name


def test_defaults_fit_their_own_bounds() -> None:
    for parameter in parameters().values():
        assert _same(parameter.check(parameter.default), parameter.default)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("topk", "top_k"), ("keyframe.min_interval", "keyframe.min_interval_s"), ("zzz", None)],
)
def test_an_unknown_parameter_is_named(name: str, meant: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"top_k": 2, name: 1})
    assert f"{name} is unknown" in str(caught.value)
    assert ("did you mean" in str(caught.value)) is (meant is not None)
    assert meant is None or f"did you mean {meant}?" in str(caught.value)


@pytest.mark.parametrize("parameter", NUMBERS, ids=_name)
def test_bounds_are_held(parameter: Parameter) -> None:
    assert parameter.minimum is not None and parameter.maximum is not None
    for bound, beyond in ((parameter.minimum, -1), (parameter.maximum, 1)):
        inside, outside = parameter.type(bound), parameter.type(bound + beyond)
        assert parameter.check(inside) == bound
        with pytest.raises(ConfigError) as caught:
            make_config({parameter.name: outside})
        message = str(caught.value)
        assert parameter.name in message and repr(outside) in message and "range" in message
        assert f"{parameter.minimum:g} to {parameter.maximum:g}" in message


@pytest.mark.parametrize("parameter", [p for p in NUMBERS if p.type is float], ids=_name)
def test_nan_means_something_only_where_it_is_the_default(parameter: Parameter) -> None:
    if math.isnan(float(parameter.default)):
        assert math.isnan(float(parameter.check(math.nan)))
    else:
        with pytest.raises(ConfigError, match=parameter.name):
            parameter.check(math.nan)
    for infinity in (math.inf, -math.inf):
        with pytest.raises(ConfigError, match=parameter.name):
            parameter.check(infinity)


@pytest.mark.parametrize("parameter", CHOICES, ids=_name)
def test_choices_are_held(parameter: Parameter) -> None:
    for choice in parameter.choices:
        assert parameter.check(choice) == choice
    with pytest.raises(ConfigError) as caught:
        make_config({parameter.name: "sideways"})
    assert all(word in str(caught.value) for word in (parameter.name, "sideways"))
    assert all(choice in str(caught.value) for choice in parameter.choices)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 3.0),
        ("top_k", "3"),
        ("top_k", True),
        ("top_k", None),
        ("min_time_gap_s", "30"),
        ("min_time_gap_s", False),
        ("backend", 7),
        ("database_path", Path("/tmp/x.db")),
        ("qos.image", ["reliable"]),
    ],
)
def test_a_wrong_type_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({name: value})
    assert name in str(caught.value) and type(value).__name__ in str(caught.value)
    assert f"expected {parameters()[name].type.__name__}" in str(caught.value)


def test_a_whole_number_will_do_for_a_float() -> None:
    gap = make_config({"min_time_gap_s": 5}).min_time_gap_s
    assert gap == 5.0 and isinstance(gap, float)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("top_k", "7", 7),
        ("min_time_gap_s", "1e2", 100.0),
        ("backend", "onnxruntime", "onnxruntime"),
        ("match_threshold", "nan", math.nan),
        ("session_id", "", ""),
    ],
)
def test_command_line_text_is_parsed(name: str, text: str, value: object) -> None:
    assert _same(parameters()[name].parse(text), value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("top_k", "many"),
        ("top_k", "1.5"),
        ("top_k", "0"),
        ("top_k", ""),
        ("match_threshold", "2"),
        ("match_threshold", "high"),
        ("backend", "abacus"),
    ],
)
def test_command_line_text_that_does_not_fit_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parameters()[name].parse(text)
    assert name in str(caught.value) and (repr(text) in str(caught.value) or text in "0 2")


def test_a_ros_parameter_file_and_its_bare_content_read_alike(tmp_path: Path) -> None:
    content = {"top_k": 4, "keyframe": {"min_interval_s": 2.0}, "qos": {"image": "reliable"}}
    flat = {"top_k": 4, "keyframe.min_interval_s": 2.0, "qos.image": "reliable"}
    file = tmp_path / "params.yaml"
    for layout in (
        content,
        flat,
        {"ros__parameters": content},
        {"/**": {"ros__parameters": content}},
        {"/robot1/vpr_lite": {"ros__parameters": content}},
        {"/**": {"ros__parameters": flat}},
    ):
        file.write_text(yaml.safe_dump(layout))
        assert read_yaml(file) == flat


def test_one_line_files_are_not_taken_for_a_heading(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("top_k: 4\n")
    assert read_yaml(file) == {"top_k": 4}
    file.write_text("keyframe:\n  min_interval_s: 1.0\n")
    assert read_yaml(file) == {"keyframe.min_interval_s": 1.0}


@pytest.mark.parametrize("text", ["", "# nothing\n", "/**:\n  ros__parameters:\n"])
def test_an_empty_file_changes_nothing(tmp_path: Path, text: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(text)
    assert read_yaml(file) == {}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"top_k: [1", "not YAML"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"- top_k\n- 3\n", "name: value"),
        (b"42", "name: value"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    file = tmp_path / "params.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_yaml(file)
    assert str(file) in str(caught.value) and complaint in str(caught.value)


def test_the_shipped_file_is_made_from_the_schema(repository: Path) -> None:
    shipped = repository / "config" / "vpr_lite.yaml"
    assert shipped.read_text(encoding="utf-8") == shipped_yaml(), (
        f"{shipped} differs from the schema: run `vpr-lite parameters > {shipped}`"
    )


def test_the_shipped_file_sets_every_parameter_to_its_default(tmp_path: Path) -> None:
    file = tmp_path / "shipped.yaml"
    file.write_text(shipped_yaml())
    values = read_yaml(file)
    assert list(values) == list(parameters())
    assert _same(make_config(values), Config())
    assert max(map(len, shipped_yaml().splitlines())) <= 100


def test_the_shipped_file_tells_each_sentence_and_its_bounds() -> None:
    words = " ".join(shipped_yaml().replace("#", " ").split())
    for parameter in parameters().values():
        assert " ".join(describe(parameter).split()) in words
    assert "[1 to 1000]" in describe(parameters()["top_k"])
    assert "One of: raw, compressed." in describe(parameters()["image_transport"])


def test_the_readme_lists_every_parameter_as_it_is(repository: Path) -> None:
    readme = (repository / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.startswith("| `")]
    for name, parameter in parameters().items():
        default = yaml.safe_dump(parameter.default).removesuffix("...\n").strip()
        row = f"| `{name}` | `{default}` | {describe(parameter)} |"
        assert row in rows, f"README.md lacks or garbles: {row}"
