"""The configuration is strict, says what is wrong, and round-trips."""

from dataclasses import replace

import pytest

from protformer.config import (
    ExactConfig,
    FavorConfig,
    GeneralizedConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    dump_yaml,
    load_run_config,
)
from protformer.errors import ConfigError

BUILT_IN = ("tiny", "small", "base", "paper-single", "paper-concat")


def test_a_resolved_configuration_reads_back_to_an_equal_one(tmp_path):
    config = load_run_config("paper-concat", ("seed=7", "training.max_time=01:02:03"))
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config))
    assert load_run_config(str(file)) == config


def test_an_empty_file_gives_the_defaults(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("# nothing\n")
    assert load_run_config(str(file)) == RunConfig() == load_run_config(None)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", ".0001"])
def test_numbers_that_yaml_takes_for_text_are_read_as_numbers(text):
    assert load_run_config(None, (f"training.learning_rate={text}",)).training.learning_rate == 1e-4


def test_an_override_of_the_kind_drops_the_fields_of_the_kind_before():
    attention = load_run_config("tiny", ("model.attention.kind=exact",)).model.attention
    assert attention == ExactConfig()
    attention = load_run_config(
        "tiny", ("model.attention.kind=generalized", "model.attention.num_features=8")
    ).model.attention
    assert attention == GeneralizedConfig(num_features=8)


def test_an_attention_kind_can_be_given_as_a_whole():
    config = load_run_config(None, ("model.attention={kind: favor, num_features: 32, row_norms: chi}",))
    assert config.model.attention == FavorConfig(num_features=32, row_norms="chi")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layer=3", "model.num_layer: no such field (value 3); did you mean num_layers?"),
        ("modell.num_layers=3", "modell: no such field (modell.num_layers=3); did you mean model?"),
        (
            "model.attention.kind=favr",
            "model.attention.kind: 'favr' is not one of favor, generalized, exact, clustered; did you mean favor?",
        ),
        ("model.attention={kind: exact, num_features: 3}", "model.attention.num_features: no such field (value 3)"),
        ("model.attention=favor", "model.attention: 'favor' is not a group of fields"),
        ("training.schedule=no", "training.schedule: False is not one of constant, cosine"),
        (
            "training.schedule=cosin",
            "training.schedule: 'cosin' is not one of constant, cosine, wsd; did you mean cosine?",
        ),
        ("training.accumulate_batches=most", "training.accumulate_batches: 'most' is not auto or a whole number"),
        (
            "training.accumulate_batches=0",
            "training.accumulate_batches: 0 is not allowed; it must be auto, or at least 1",
        ),
        ("model.num_layers=2.5", "model.num_layers: 2.5 is not a whole number"),
        ("model.num_layers=true", "model.num_layers: True is not a whole number"),
        ("model.num_layers=0", "model.num_layers: 0 is not allowed; it must be at least 1"),
        (
            "model.num_heads=7",
            "model.hidden_size: 512 is not allowed; it must be an even multiple of model.num_heads (7)",
        ),
        ("training.learning_rate=fast", "training.learning_rate: 'fast' is not a number"),
        ("training.learning_rate=.nan", "training.learning_rate: nan is not a number"),
        ("training.max_time=90", "training.max_time: 90 is not text"),
        ("training.max_time='1:99:00'", "training.max_time: '1:99:00' is not a duration"),
        ("model.attention.orthogonal=1", "model.attention.orthogonal: 1 is not true or false"),
        ("data=3", "data: 3 is not a group of fields"),
        ("seed=-1", "seed: -1 is not allowed; it must be from 0 to 4294967295"),
        ("seed", "--set seed: expected dotted.path=value"),
        ("seed.x=1", "seed: {'x': 1} is not a whole number"),
        ("seed=[", "--set seed=[: the value is not YAML"),
    ],
)
def test_a_wrong_override_is_named_with_path_value_and_remedy(override, message):
    with pytest.raises(ConfigError) as caught:
        load_run_config(None, (override,))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_configuration_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--config tinny: no such file.*did you mean tiny\?"):
        load_run_config("tinny")
    for text, message in (("- 1", "expected fields and values"), ("a: [", "not YAML"), ("\x00", "not YAML")):
        file = tmp_path / "bad.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError, match=message) as caught:
            load_run_config(str(file))
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_configurations_are_found_by_name(name):
    assert load_run_config(name) != RunConfig()


def test_a_schedule_is_as_long_as_the_run_unless_it_says_so():
    assert TrainingConfig(max_steps=10).num_schedule_steps == 10
    assert TrainingConfig(max_steps=10, schedule_steps=90).num_schedule_steps == 90


def test_configurations_are_immutable_and_checked_however_they_are_made():
    with pytest.raises(ConfigError, match=r"model\.dropout"):
        replace(ModelConfig(), dropout=1.0)
