"""What a resumed run may change: a rule for every field, and what becomes of a change of each."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from deepseek_v3.config.data_config import SourceConfig
from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import BatchRampConfig, RunConfig, SamplesConfig
from deepseek_v3.training.resume_rules import RULES, Rule, check_changes, fields_of, rule_of
from deepseek_v3.utils.errors import CheckpointError
from helpers.runs import write_run

FIELDS = [name for name, _ in fields_of(RunConfig, None)]
CHECKPOINT = Path("checkpoint_step_4.pt")
ANOTHER = 12345  # no field of the run has this value


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = load_config(write_run(tmp_path_factory.mktemp("run")))
    ramp, samples = BatchRampConfig(initial=2), SamplesConfig(prompts=("The",))
    training = config.training.model_copy(update={"batch_ramp": ramp})
    logging = config.logging.model_copy(update={"samples": samples})
    source = SourceConfig(name="web", path=Path("web"), weight=1.0)
    data = config.data.model_copy(update={"sources": (source,)})
    return config.model_copy(update={"training": training, "logging": logging, "data": data})


def changed(section: BaseModel, field: str, value: Any) -> Any:
    """A copy with one dotted field changed, whatever its type."""
    name, _, rest = field.partition(".")
    inner = getattr(section, name)
    if isinstance(inner, tuple) and rest:
        return section.model_copy(update={name: tuple(changed(each, rest, value) for each in inner)})
    new = changed(inner, rest, value) if rest and inner is not None else value
    return section.model_copy(update={name: new})


def test_every_field_of_a_run_has_a_rule() -> None:
    assert [field for field in FIELDS if field not in RULES and not field.startswith("model.")] == []
    assert sorted(RULES.keys() - set(FIELDS)) == ["model"]


@pytest.mark.parametrize("field", [field for field in FIELDS if not field.startswith("model.rope_scaling.")])
def test_a_change_of_any_field_is_treated_by_its_rule(
    config: RunConfig, caplog: pytest.LogCaptureFixture, field: str
) -> None:
    new, rule = changed(config, field, ANOTHER), rule_of(field)
    for allowed in (False, True):
        caplog.clear()
        if rule is Rule.REFUSED or (rule is Rule.DATA and not allowed):
            with pytest.raises(CheckpointError, match=rf"checkpoint_step_4\.pt: .*{field}: .* -> \[?{ANOTHER}"):
                check_changes(config, new, CHECKPOINT, allowed)
        else:
            check_changes(config, new, CHECKPOINT, allowed)
            lines = [line for line in caplog.messages if re.search(rf"{field}: .* -> \[?{ANOTHER}", line)]
            assert len(lines) == (0 if rule is Rule.FREE else 1)


def test_all_changes_stand_in_one_line(config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    new = changed(changed(config, "training.seed", 7), "training.optimizer.moments", "float32")
    check_changes(config, new, CHECKPOINT, allow_changed_data=True)
    assert caplog.messages == [
        "the config differs from the checkpoint's: training.seed: 0 -> 7; "
        "training.optimizer.moments: bfloat16 -> float32"
    ]


def test_sources_are_compared_one_by_one(config: RunConfig) -> None:
    (web,) = config.data.sources
    code = web.model_copy(update={"name": "code", "path": Path("code"), "weight": 0.5})
    both = changed(config, "data.sources", (web, code))
    moved = changed(config, "data.sources", (web.model_copy(update={"path": Path("elsewhere")}), code))
    check_changes(both, moved, CHECKPOINT, allow_changed_data=False)
    with pytest.raises(CheckpointError, match=r"data\.sources\.weight: \[1\.0\] -> \[1\.0, 0\.5\]; resume with"):
        check_changes(config, both, CHECKPOINT, allow_changed_data=False)


def test_a_section_that_is_left_out_is_compared_by_its_fields(config: RunConfig) -> None:
    without = changed(config, "training.batch_ramp", None)
    with pytest.raises(CheckpointError, match=r"training\.batch_ramp\.initial: 2 -> null.*--allow-changed-data"):
        check_changes(config, without, CHECKPOINT, allow_changed_data=False)
    check_changes(without, without, CHECKPOINT, allow_changed_data=False)
